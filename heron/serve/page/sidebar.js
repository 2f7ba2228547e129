// The list of conversations, and their way into a file and back.

import { button, byId, element } from "./dom.js";

export class Sidebar {
  /** `actions`: {create(), open(conversation), remove(conversation), exported() -> text, import(text)}. */
  constructor(actions) {
    this.actions = actions;
    byId("new").addEventListener("click", actions.create);
    byId("export").addEventListener("click", () => download("heron-conversations.json", actions.exported()));
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", async ({ target }) => {
      const [file] = target.files;
      if (file) actions.import(await file.text());
      target.value = ""; // so that the same file can be chosen again
    });
  }

  show(conversations, open) {
    const items = conversations.map((conversation) => {
      const title = button(conversation.title, () => this.actions.open(conversation), {
        class: "open", "aria-current": conversation === open && "true",
      });
      const remove = button("✕", () => this.#remove(conversation), {
        class: "icon", "aria-label": `Delete ${conversation.title}`,
      });
      return element("li", {}, title, remove);
    });
    byId("conversations").replaceChildren(...items);
  }

  #remove(conversation) {
    if (confirm(`Delete “${conversation.title}”? It can't be brought back.`)) this.actions.remove(conversation);
  }
}

function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000); // some browsers read it after the click
}
