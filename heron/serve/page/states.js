// The states that the server keeps under names: save, start from, delete.

import { button, byId, element } from "./dom.js";

export class States {
  #names = [];

  /** `current()`: the open conversation. `changed()`: it starts from another state now. `failed(error)`. */
  constructor(server, { current, changed, failed }) {
    this.server = server;
    this.current = current;
    this.changed = changed;
    this.failed = failed;
    byId("save-state").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#then(() => server.saveState(byId("state-name").value, this.#session()), () => event.target.reset());
    });
  }

  /** Ask the server for its list; where it keeps no states, the section stays away. */
  async refresh() {
    try {
      this.#names = await this.server.states();
    } catch (error) {
      if (error.status !== 404) throw error;
      return;
    }
    byId("states").hidden = false;
    this.show();
  }

  show() {
    const { state } = this.current().data;
    const items = this.#names.map((name) => {
      const isUsed = name === state;
      const use = button(isUsed ? "Starts here" : "Start from", () => this.#use(isUsed ? "" : name), {
        class: "quiet", "aria-pressed": String(isUsed), "aria-label": `Start from ${name}`,
      });
      const remove = button("✕", () => this.#delete(name), { class: "icon", "aria-label": `Delete ${name}` });
      return element("li", {}, element("span", {}, name), use, remove);
    });
    byId("state-list").replaceChildren(...items);
  }

  /** The session of the answer that is shown last. */
  #session() {
    const answer = this.current().path().findLast((message) => message.role === "assistant");
    if (!answer) throw new Error("There is no answer yet whose state could be kept.");
    return answer.id;
  }

  #use(name) {
    this.current().data.state = name;
    this.changed();
    this.show();
  }

  #delete(name) {
    if (confirm(`Delete the state “${name}” from the server?`)) this.#then(() => this.server.deleteState(name));
  }

  async #then(action, afterwards = () => {}) {
    try {
      await action();
      afterwards();
      await this.refresh();
    } catch (error) {
      this.failed(error);
    }
  }
}
