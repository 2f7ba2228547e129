// The messages of one conversation on the page.

import { button, element } from "./dom.js";
import { Markdown } from "./markdown.js";
import { TokenView } from "./tokens.js";

const ENDS = {
  length: "cut at the longest answer", stopped: "stopped", failed: "broken off", content_filter: "filtered",
};

export class Messages {
  #views = new Map(); // message id -> what shows it

  /** `actions`: {retry(message), edit(message, text), choose(message)}. */
  constructor(root, likeliest, actions) {
    this.root = root;
    this.likeliest = likeliest;
    this.actions = actions;
  }

  /** Show the chosen messages of a conversation. `showTokens`: answers as tokens, where they have any. */
  show(conversation, showTokens) {
    this.#views.clear();
    this.root.replaceChildren(
      ...conversation.path().map((message) => {
        const view = new MessageView(message, conversation.versions(message), this, showTokens);
        this.#views.set(message.id, view);
        return view.root;
      }),
    );
  }

  /** Show what has been added to a message. */
  update(message) {
    this.#views.get(message.id)?.update();
  }
}

class MessageView {
  constructor(message, versions, { actions, likeliest }, showTokens) {
    this.message = message;
    this.actions = actions;
    this.showTokens = showTokens;
    this.bodies = []; // functions that show the newest text
    this.root = element("article", { class: message.role, "data-id": message.id });
    this.root.append(element("h3", { class: "hidden" }, message.role === "user" ? "You" : "Heron"));
    if (message.role === "user") {
      this.root.append(element("div", { class: "text" }, message.content));
    } else {
      this.#answer(likeliest);
    }
    this.figures = element("span", { class: "figures" });
    this.root.append(element("footer", {}, ...this.#versions(versions), ...this.#buttons(), this.figures));
    this.update();
  }

  update() {
    const { message } = this;
    const isWriting = message.finish === "writing";
    this.root.setAttribute("aria-busy", isWriting);
    this.root.classList.toggle("writing", isWriting);
    this.root.classList.toggle("silent", isWriting && !message.content && !message.thought);
    if (this.thought) {
      this.thought.hidden = !message.thought;
      if (isWriting) this.thought.open = !message.content;
    }
    for (const update of this.bodies) update();
    this.figures.textContent = figures(message, this.showTokens);
    const { prompt, cached } = message.figures;
    if (prompt) this.figures.title = `Prompt: ${prompt} tokens, ${cached ?? 0} of them read before`;
  }

  #answer(likeliest) {
    const { message } = this;
    const thought = element("div", { class: "text" });
    const text = element("div", { class: "text" });
    this.thought = element("details", { class: "thought" }, element("summary", {}, "Thoughts"), thought);
    this.root.append(this.thought, text);
    this.bodies.push(
      this.#body(thought, likeliest, () => [message.thought, message.thoughtTokens]),
      this.#body(text, likeliest, () => [message.content, message.tokens]),
    );
  }

  /** A function that shows the newest text in `root`: as tokens where they are wanted and there, else as Markdown. */
  #body(root, likeliest, read) {
    let tokens = null;
    let markdown = null;
    return () => {
      const [text, list] = read();
      if (this.showTokens && list.length) {
        if (!tokens) {
          root.replaceChildren();
          root.classList.add("tokens");
          tokens = new TokenView(root, likeliest);
        }
        tokens.update(list);
      } else {
        markdown ??= new Markdown(root);
        markdown.update(text);
      }
    };
  }

  #versions(versions) {
    if (versions.length < 2) return [];
    const at = versions.indexOf(this.message);
    const arrow = (sign, label, to) =>
      button(sign, () => this.actions.choose(versions[to]), {
        class: "icon", "aria-label": label, disabled: !versions[to], "data-action": label,
      });
    return [
      element(
        "span", { class: "versions", role: "group", "aria-label": "Versions" },
        arrow("‹", "Version before", at - 1),
        element("span", { "aria-label": `Version ${at + 1} of ${versions.length}` }, `${at + 1} / ${versions.length}`),
        arrow("›", "Version behind", at + 1),
      ),
    ];
  }

  #buttons() {
    const { message, actions } = this;
    const quiet = (text, onclick) => button(text, onclick, { class: "quiet", "data-action": text });
    const copy = quiet("Copy", () => navigator.clipboard.writeText(message.content));
    const retry = quiet("Retry", () => actions.retry(message));
    return [
      ...(navigator.clipboard ? [copy] : []), // there is none where the page comes over plain HTTP from elsewhere
      quiet("Edit", () => this.#edit()),
      ...(message.role === "assistant" ? [retry] : []),
    ];
  }

  /** Put a field with the text in the message's place; what is sent from there is a new version. */
  #edit() {
    const { message, actions } = this;
    const field = element("textarea", { "aria-label": "Text of the new version" }, message.content);
    const form = element(
      "form", { class: "edit" }, field,
      element("div", { class: "buttons" },
        element("button", { type: "submit" }, message.role === "user" ? "Send" : "Keep"),
        button("Cancel", () => close(), { class: "quiet" })),
    );
    const close = () => {
      form.replaceWith(this.root);
      this.root.querySelector("[data-action=Edit]").focus();
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) actions.edit(message, field.value);
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.root.replaceWith(form);
    field.style.height = `${Math.min(field.scrollHeight + 4, innerHeight / 2)}px`;
    field.focus();
  }
}

/** What is known of how an answer was written, as one line. */
function figures(message, showTokens) {
  const { finish, figures: { firstMs, tokens, perSecond } } = message;
  if (finish === "writing" || message.role === "user") return "";
  const parts = [];
  const isEmpty = !message.content && !message.thought;
  if (finish === "failed" && isEmpty) parts.push("no answer");
  else if (Object.hasOwn(ENDS, finish)) parts.push(ENDS[finish]);
  if (tokens) parts.push(`${tokens} tokens`);
  if (perSecond) parts.push(`${perSecond < 10 ? perSecond.toFixed(1) : Math.round(perSecond)} tokens/s`);
  if (firstMs < 1000) parts.push(`first after ${firstMs} ms`);
  else if (firstMs) parts.push(`first after ${(firstMs / 1000).toFixed(1)} s`);
  if (showTokens) parts.push(surprise([...message.thoughtTokens, ...message.tokens]));
  return parts.join(" · ");
}

function surprise(tokens) {
  if (!tokens.length) return "no probabilities: Retry gets them";
  const mean = tokens.reduce((sum, [, logprob]) => sum + logprob, 0) / tokens.length;
  return `perplexity ${Math.exp(-mean).toPrecision(2)}`;
}
