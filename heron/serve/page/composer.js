// The field for the next message, with the button that sends it, or stops the answer.

import { byId } from "./dom.js";

export class Composer {
  /** `actions`: {send(text), stop()}. */
  constructor(actions) {
    this.field = byId("message");
    this.field.addEventListener("input", () => this.#fit());
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: a word of an input method
      event.preventDefault();
      byId("composer").requestSubmit();
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.isWriting && this.field.value.trim()) actions.send(this.field.value);
    });
    byId("stop").addEventListener("click", actions.stop);
  }

  get text() {
    return this.field.value;
  }

  set text(text) {
    this.field.value = text;
    this.#fit();
  }

  /** Whether an answer is being written; then the button stops it. */
  set isWriting(isWriting) {
    const hadFocus = document.activeElement === byId(isWriting ? "send" : "stop");
    byId("send").hidden = isWriting;
    byId("stop").hidden = !isWriting;
    if (hadFocus) this.field.focus();
  }

  get isWriting() {
    return byId("send").hidden;
  }

  /** Say what went wrong, above the field; "" takes it away. */
  set notice(text) {
    byId("notice").textContent = text;
    byId("notice").hidden = !text;
  }

  focus() {
    this.field.focus();
  }

  #fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
  }
}
