// A conversation is a tree: a message that was edited or asked for again has several versions, and what follows hangs
// below one of them. What is shown is the path of chosen versions from the first message to the last.

import { randomId } from "./dom.js";

const ROLES = ["user", "assistant"];

export class Conversation {
  /** `data`: as `Conversation.blank` makes it; `Conversation.checked` is for data of unknown origin. */
  constructor(data) {
    this.data = data;
  }

  static blank() {
    const now = Date.now();
    return new Conversation({
      id: randomId(), title: "", created: now, changed: now, system: "", state: "", messages: [], chosen: {},
    });
  }

  /** A conversation from parsed JSON, every field that is used checked. Throws an Error that says what is wrong. */
  static checked(data) {
    const text = (holder, name) => {
      if (typeof holder?.[name] !== "string") throw new Error(`${name}: wanted a text`);
      return holder[name];
    };
    if (!Array.isArray(data?.messages)) throw new Error("messages: wanted a list");
    const { data: made } = Conversation.blank();
    for (const name of ["id", "title", "system", "state"]) made[name] = text(data, name);
    for (const name of ["created", "changed"]) if (Number.isFinite(data[name])) made[name] = data[name];
    const known = new Set([""]);
    for (const message of data.messages) {
      const { id, parent, role } = message;
      const names = ["id", "parent", "role", "content", "thought", "finish"];
      const fields = Object.fromEntries(names.map((name) => [name, text(message, name)]));
      if (!ROLES.includes(role)) throw new Error(`role: wanted one of ${ROLES.join(", ")}, got ${role}`);
      if (!known.has(parent)) throw new Error(`parent: wanted a message that stands before, got ${parent}`);
      if (known.has(id)) throw new Error(`id: ${id} is there twice`);
      known.add(id);
      const { figures, tokens, thoughtTokens } = message;
      made.messages.push({
        ...fields,
        finish: message.finish === "writing" ? "stopped" : message.finish, // the page was closed meanwhile
        figures: Object.fromEntries(Object.entries(figures ?? {}).filter(([, value]) => Number.isFinite(value))),
        tokens: Array.isArray(tokens) ? tokens.filter(isToken) : [],
        thoughtTokens: Array.isArray(thoughtTokens) ? thoughtTokens.filter(isToken) : [],
      });
    }
    const chosen = Object.entries(data.chosen ?? {}).filter(([parent, id]) => known.has(parent) && known.has(id));
    made.chosen = Object.fromEntries(chosen);
    return new Conversation(made);
  }

  get id() {
    return this.data.id;
  }

  /** What it is called: its name, else the beginning of its first message. */
  get title() {
    const first = this.data.messages[0]?.content.trim().split("\n")[0] ?? "";
    return this.data.title || (first.length > 60 ? `${first.slice(0, 59)}…` : first) || "New conversation";
  }

  /** The messages that are shown, first to last. */
  path() {
    const found = [];
    for (let message = this.#chosenBelow(""); message; message = this.#chosenBelow(message.id)) found.push(message);
    return found;
  }

  /** The versions of a message, oldest first, itself among them. */
  versions(message) {
    return this.data.messages.filter((other) => other.parent === message.parent);
  }

  /** Add a message below another ("": as the first) and show it; for a new version, the parent of the old one. */
  add(parent, role, content = "") {
    const message = {
      id: randomId(), parent, role, content, thought: "", finish: "", figures: {}, tokens: [], thoughtTokens: [],
    };
    this.data.messages.push(message);
    this.choose(message);
    this.data.changed = Date.now();
    return message;
  }

  /** Take away the answers to a message that came to nothing: another one takes their place. */
  dropEmptyAnswers(parent) {
    const { messages } = this.data;
    const isKept = ({ id, parent: below, role, content, thought }) =>
      below !== parent || role !== "assistant" || content || thought || messages.some((other) => other.parent === id);
    this.data.messages = messages.filter(isKept);
  }

  /** Show this version of its message, with what follows it. */
  choose(message) {
    this.data.chosen[message.parent] = message.id;
  }

  /** What the model is to read before it writes `answer`: the chat messages of the OpenAI interface. */
  before(answer) {
    const messages = this.data.system.trim() ? [{ role: "system", content: this.data.system }] : [];
    for (const { id, role, content } of this.path()) {
      if (id === answer.id) break;
      if (role === "assistant" && !content) continue; // it failed, or was stopped before its first word
      messages.push({ role, content });
    }
    return messages;
  }

  #chosenBelow(parent) {
    const below = this.data.messages.filter((message) => message.parent === parent);
    return below.find((message) => message.id === this.data.chosen[parent]) ?? below.at(-1);
  }
}

// A token as it is kept: its text, its log-probability, and the likeliest ones in its place as [text, log-probability].
function isToken(token) {
  const isPair = (pair) => Array.isArray(pair) && typeof pair[0] === "string" && typeof pair[1] === "number";
  return isPair(token) && Array.isArray(token[2]) && token[2].every(isPair);
}
