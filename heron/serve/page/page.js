// The page of `heron serve`: what the parts do together.

import { Server } from "./api.js";
import { Composer } from "./composer.js";
import { Conversation } from "./conversation.js";
import { button, byId, element } from "./dom.js";
import { Drawers } from "./drawers.js";
import { askForKey } from "./key.js";
import { Messages } from "./messages.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { States } from "./states.js";
import { Store } from "./store.js";
import { Likeliest } from "./tokens.js";
import { write } from "./writer.js";

const SUGGESTIONS = [
  "Explain in three sentences why the sky is blue.",
  "Write a Python function that tells whether a word is a palindrome.",
  "Give me five names for a boat, each with a reason.",
];
const SAVE_EVERY_MS = 1000; // while an answer is written
const NEAR_PX = 80; // from the end of the messages: the newest stay in view

class Page {
  #writing = new Map(); // conversation id -> AbortController: several conversations may be answered at once
  #failed = new Map(); // conversation id -> what broke its answer off while another one was open
  #follows = true; // the newest text stays in view
  #frame = 0;
  #changed = new Set(); // messages to show in the next frame

  constructor() {
    this.store = new Store();
    this.server = new Server(askForKey);
    this.settings = new Settings(byId("sampling"), byId("sliders"));
    this.drawers = new Drawers({ sidebar: true, settings: false });
    this.composer = new Composer({ send: (text) => this.send(text), stop: () => this.stop() });
    this.messages = new Messages(byId("messages"), new Likeliest(byId("likeliest")), {
      retry: (message) => this.answer(message.parent),
      edit: (message, text) => this.edit(message, text),
      choose: (message) => this.choose(message),
    });
    this.sidebar = new Sidebar({
      create: () => this.open(Conversation.blank()),
      open: (conversation) => this.open(conversation),
      remove: (conversation) => this.remove(conversation),
      exported: () => this.store.exported(),
      import: (text) => this.import(text),
    });
    this.states = new States(this.server, {
      current: () => this.conversation, changed: () => this.save(), failed: (error) => this.report(error),
    });
    this.conversation = this.store.all()[0] ?? Conversation.blank();
    this.#listen();
    this.open(this.conversation);
    this.connect();
  }

  /** Ask the server what it has. */
  async connect() {
    try {
      const models = await this.server.models();
      const chosen = localStorage.getItem("heron.model");
      byId("model").replaceChildren(...models.map((name) => element("option", { selected: name === chosen }, name)));
      byId("model").disabled = models.length < 2;
      this.#greet();
      await this.states.refresh();
    } catch (error) {
      this.report(error);
    }
  }

  #greet() {
    byId("welcome-model").textContent = `You are talking to ${byId("model").value}.`;
  }

  open(conversation) {
    this.conversation = conversation;
    this.composer.notice = this.#failed.get(conversation.id) ?? "";
    this.#failed.delete(conversation.id);
    byId("system").value = conversation.data.system;
    this.states.show();
    this.show();
    this.#follow(true);
    this.drawers.closeOver();
    this.composer.focus();
  }

  /** Show the open conversation as it is now. */
  show() {
    const { conversation } = this;
    const isEmpty = !conversation.data.messages.length;
    byId("welcome").hidden = !isEmpty;
    byId("title").value = isEmpty ? "" : conversation.title;
    byId("title").placeholder = conversation.title;
    document.title = isEmpty ? "Heron" : `${conversation.title} · Heron`;
    this.messages.show(conversation, this.showsTokens);
    this.composer.isWriting = this.#writing.has(conversation.id);
    this.sidebar.show(this.store.all(), conversation);
    if (this.#follows) this.#follow(true);
  }

  get showsTokens() {
    return byId("token-view").getAttribute("aria-pressed") === "true";
  }

  send(text) {
    if (this.#writing.has(this.conversation.id)) return;
    const last = this.conversation.path().at(-1);
    const message = this.conversation.add(last?.id ?? "", "user", text.trim());
    this.composer.text = "";
    this.answer(message.id);
  }

  /** A new version of a message: of the user's, it is answered; of an answer, it stands as it is. */
  edit(message, text) {
    const version = this.conversation.add(message.parent, message.role, text.trim());
    if (message.role === "user") this.answer(version.id);
    else this.save();
    this.show();
  }

  choose(message) {
    this.#follows = false;
    this.conversation.choose(message);
    this.save();
    this.show();
    const shown = document.querySelector(`[data-id="${message.id}"]`);
    shown.querySelector(".versions button:enabled")?.focus();
    shown.scrollIntoView({ block: "nearest" });
  }

  /** Have the model write an answer to a message of the open conversation: the first, or a further version. */
  async answer(parent) {
    const { conversation } = this;
    this.stop(); // one answer at a time in a conversation
    conversation.dropEmptyAnswers(parent);
    const answer = conversation.add(parent, "assistant");
    const version = conversation.versions(answer).indexOf(answer);
    const request = { model: byId("model").value, ...this.settings.request(version, this.showsTokens) };
    const stopping = new AbortController();
    this.#writing.set(conversation.id, stopping);
    this.#follows = true;
    this.composer.notice = "";
    this.save(conversation);
    this.show();
    this.composer.focus();
    this.#say("Heron is writing.");
    let saved = Date.now();
    const save = () => {
      if (this.store.get(conversation.id)) saved = this.save(conversation); // else it was deleted meanwhile
    };
    try {
      await write(this.server, conversation, answer, request, stopping.signal, (changed) => {
        this.#showSoon(changed);
        if (Date.now() - saved > SAVE_EVERY_MS) save();
      });
      this.#say("The answer has ended.");
    } catch (error) {
      if (conversation === this.conversation) this.report(error);
      else this.#failed.set(conversation.id, error.message);
    } finally {
      if (this.#writing.get(conversation.id) === stopping) this.#writing.delete(conversation.id);
      save();
      if (conversation === this.conversation) {
        this.#showNow();
        this.composer.isWriting = this.#writing.has(conversation.id);
        this.sidebar.show(this.store.all(), conversation);
      }
    }
  }

  /** Stop the answer that is being written in the open conversation; gives whether there was one. */
  stop() {
    const stopping = this.#writing.get(this.conversation.id);
    stopping?.abort();
    return Boolean(stopping);
  }

  save(conversation = this.conversation) {
    try {
      if (conversation.data.messages.length) this.store.save(conversation);
    } catch (error) {
      this.report(error);
    }
    return Date.now();
  }

  remove(conversation) {
    this.#writing.get(conversation.id)?.abort();
    this.store.delete(conversation);
    if (conversation === this.conversation) this.open(this.store.all()[0] ?? Conversation.blank());
    else this.show();
  }

  import(text) {
    try {
      const count = this.store.import(text);
      this.open(this.store.all()[0] ?? this.conversation);
      this.#say(`${count} conversations are here now.`);
    } catch (error) {
      this.report(error);
    }
  }

  report(error) {
    this.composer.notice = error.message;
    if (this.#follows) this.#follow(true);
  }

  #listen() {
    const scroll = byId("scroll");
    scroll.addEventListener("scroll", () => {
      this.#follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_PX;
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open], :popover-open")) return;
      if (this.drawers.closeOver() || this.stop()) event.preventDefault();
    });
    byId("token-view").addEventListener("click", ({ currentTarget }) => {
      currentTarget.setAttribute("aria-pressed", !this.showsTokens);
      localStorage.setItem("heron.tokens", this.showsTokens);
      this.show();
    });
    byId("token-view").setAttribute("aria-pressed", localStorage.getItem("heron.tokens") === "true");
    byId("title").addEventListener("change", ({ target }) => {
      this.conversation.data.title = target.value.trim();
      this.save();
      this.show();
    });
    byId("system").addEventListener("input", ({ target }) => {
      this.conversation.data.system = target.value;
      this.save();
    });
    byId("model").addEventListener("change", ({ target }) => {
      localStorage.setItem("heron.model", target.value);
      this.#greet();
    });
    byId("theme").value = document.documentElement.dataset.theme ?? "";
    byId("theme").addEventListener("change", ({ target }) => {
      localStorage.setItem("heron.theme", target.value);
      if (target.value) document.documentElement.dataset.theme = target.value;
      else delete document.documentElement.dataset.theme;
    });
    byId("suggestions").append(...SUGGESTIONS.map((text) => element("li", {}, button(text, () => this.send(text)))));
    addEventListener("storage", ({ key }) => this.#readOther(key));
    // A page that goes away breaks its requests off before `pagehide`; telephones say no `beforeunload`.
    for (const name of ["beforeunload", "pagehide"]) addEventListener(name, () => this.#leave());
  }

  /** Keep what has been written, and stop: the page is going away. */
  #leave() {
    for (const [id, stopping] of this.#writing) {
      this.save(this.store.get(id));
      stopping.abort();
    }
  }

  /** Another tab has written a conversation: take it, unless this one is writing it. */
  #readOther(key) {
    if (this.#writing.has(key?.split(".").at(-1))) return;
    const id = this.store.read(key);
    if (id === this.conversation.id && this.store.get(id)) this.open(this.store.get(id));
    else if (id) this.sidebar.show(this.store.all(), this.conversation);
  }

  /** Show what a message has become, at most once a frame, however fast the tokens come. */
  #showSoon(message) {
    this.#changed.add(message);
    this.#frame ||= requestAnimationFrame(() => this.#showNow());
  }

  #showNow() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    for (const changed of this.#changed) this.messages.update(changed);
    this.#changed.clear();
    if (this.#follows) this.#follow();
  }

  #follow(always = false) {
    if (always) this.#follows = true;
    byId("scroll").scrollTop = byId("scroll").scrollHeight;
  }

  #say(text) {
    byId("status").textContent = text;
  }
}

new Page();
