// The two panels at the sides. On a wide window they stand beside the messages, on a narrow one they lie over them.

import { byId } from "./dom.js";

const NARROW = matchMedia("(max-width: 60rem)");

export class Drawers {
  /** `names`: ids of the panels; each is open or closed at first, on a wide window, as its value says. */
  constructor(names) {
    this.names = Object.keys(names);
    for (const [name, isOpen] of Object.entries(names)) this.#set(name, isOpen && !NARROW.matches);
    for (const opener of document.querySelectorAll("[data-opens]")) {
      opener.addEventListener("click", () => this.toggle(opener.dataset.opens));
    }
    for (const closer of document.querySelectorAll("[data-closes]")) {
      closer.addEventListener("click", () => this.close(closer.dataset.closes));
    }
    byId("scrim").addEventListener("click", () => this.closeOver());
    NARROW.addEventListener("change", () => {
      for (const [name, isOpen] of Object.entries(names)) this.#set(name, isOpen && !NARROW.matches);
    });
  }

  toggle(name) {
    if (this.#isOpen(name)) this.close(name);
    else {
      this.closeOver();
      this.#set(name, true);
      byId(name).querySelector("button, textarea").focus();
    }
  }

  /** Close a panel, and give the focus back to the button that opens it. */
  close(name) {
    this.#set(name, false);
    document.querySelector(`[data-opens=${name}]`).focus();
  }

  /** Close the panel that lies over the messages; gives whether there was one. */
  closeOver() {
    const open = NARROW.matches && this.names.find((name) => this.#isOpen(name));
    if (open) this.close(open);
    return Boolean(open);
  }

  #isOpen(name) {
    return byId(name).classList.contains("open");
  }

  #set(name, isOpen) {
    byId(name).classList.toggle("open", isOpen);
    document.querySelector(`[data-opens=${name}]`).setAttribute("aria-expanded", isOpen);
    const isOver = NARROW.matches && this.names.some((other) => this.#isOpen(other));
    byId("scrim").hidden = !isOver;
    document.querySelector("main").inert = isOver; // the keyboard stays in the panel
  }
}
