// The token view: each token of an answer coloured by how likely it was, and the likeliest ones in its place.

import { button, element } from "./dom.js";

const NATS = 5; // of surprise, at which a token has its full colour: a probability of 0.7 %

/** The tokens of one answer, shown in `root`; they grow at the end. The arrow keys go from one to the next. */
export class TokenView {
  #shown = 0;

  constructor(root, likeliest) {
    this.root = root;
    this.likeliest = likeliest;
    root.addEventListener("keydown", (event) => this.#walk(event));
    root.addEventListener("click", ({ target }) => target.matches(".token") && this.#open(target));
  }

  update(tokens) {
    this.tokens = tokens;
    const added = tokens.slice(this.#shown).map(([text, logprob], place) => {
      const tabindex = this.#shown + place ? "-1" : "0"; // the arrow keys lead from the first to the others
      const token = element("span", { class: "token", role: "button", tabindex }, text);
      token.title = percent(logprob);
      token.style.setProperty("--surprise", Math.min(-logprob / NATS, 1));
      if (!text.trim()) token.setAttribute("aria-label", JSON.stringify(text));
      return token;
    });
    this.root.append(...added);
    this.#shown = tokens.length;
  }

  #walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") this.#open(event.target);
    else if (step) {
      const next = step > 0 ? event.target.nextElementSibling : event.target.previousElementSibling;
      if (!next) return;
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      if (this.likeliest.isOpen) this.#open(next);
    } else return;
    event.preventDefault();
  }

  #open(token) {
    this.likeliest.show(this.tokens[[...this.root.children].indexOf(token)], token);
  }
}

/** The small window with the likeliest tokens. */
export class Likeliest {
  constructor(root) {
    this.root = root;
  }

  get isOpen() {
    return this.root.matches(":popover-open");
  }

  /** Show the tokens that could have stood in a place, beside the one that does. */
  show([text, logprob, others], anchor) {
    const rows = others.map(([other, its]) => row(other, its, other === text));
    if (!others.some(([other]) => other === text)) rows.push(row(text, logprob, true));
    this.root.replaceChildren(
      element("header", {}, element("strong", {}, visible(text)), ` ${percent(logprob)}`,
        button("✕", () => this.root.hidePopover(), { class: "icon", "aria-label": "Close" })),
      element("table", {}, element("tbody", {}, ...rows)),
    );
    if (!this.isOpen) this.root.showPopover();
    const { left, bottom, top } = anchor.getBoundingClientRect();
    const below = bottom + 8 + this.root.offsetHeight < innerHeight;
    this.root.style.left = `${Math.max(8, Math.min(left, innerWidth - this.root.offsetWidth - 8))}px`;
    this.root.style.top = `${below ? bottom + 8 : Math.max(8, top - 8 - this.root.offsetHeight)}px`;
  }
}

function row(text, logprob, isDrawn) {
  const bar = element("div", { class: "share" });
  bar.style.setProperty("--share", Math.exp(logprob));
  return element(
    "tr", { class: isDrawn ? "drawn" : null },
    element("th", { scope: "row" }, visible(text)), element("td", {}, bar), element("td", {}, percent(logprob)),
  );
}

/** Spaces and line ends as signs, so that a token of nothing else can be seen. */
const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value >= 99.95 ? "100 %" : `${value.toPrecision(value < 0.01 ? 1 : 2)} %`;
}
