// Conversations in the browser's localStorage, one key each, and as a file.

import { Conversation } from "./conversation.js";

const PREFIX = "heron.conversation.";
const FORMAT = "heron-conversations";
const VERSION = 1;

export class Store {
  /** Read all that is kept. What can't be read is left where it is. */
  constructor() {
    this.kept = new Map();
    for (const key of Object.keys(localStorage)) this.read(key);
  }

  /** Read what is under a key of localStorage, as when another tab has written; gives the conversation's id, if any. */
  read(key) {
    if (!key?.startsWith(PREFIX)) return null;
    const id = key.slice(PREFIX.length);
    const text = localStorage.getItem(key);
    try {
      if (text === null) this.kept.delete(id);
      else this.kept.set(id, Conversation.checked(JSON.parse(text)));
    } catch (error) {
      console.warn(`${key} is no conversation: ${error.message}`);
    }
    return id;
  }

  /** All conversations, the one that changed last in front. */
  all() {
    return [...this.kept.values()].sort((one, other) => other.data.changed - one.data.changed);
  }

  get(id) {
    return this.kept.get(id);
  }

  /**
   * Keep a conversation. Where the browser's space is used up, the token probabilities of the oldest ones make room.
   * Throws an Error where even that is not enough.
   */
  save(conversation) {
    this.kept.set(conversation.id, conversation);
    if (write(conversation)) return;
    for (const old of this.all().reverse()) {
      for (const message of old.data.messages) message.tokens = message.thoughtTokens = [];
      if (write(old) && write(conversation)) return;
    }
    throw new Error("The browser's space is used up: export and delete some conversations.");
  }

  delete(conversation) {
    this.kept.delete(conversation.id);
    localStorage.removeItem(PREFIX + conversation.id);
  }

  /** All conversations as the text of a file. */
  exported() {
    const conversations = this.all().map((conversation) => conversation.data);
    return JSON.stringify({ format: FORMAT, version: VERSION, conversations });
  }

  /**
   * Keep the conversations of such a file; one that is here already is replaced. Gives how many there were.
   * Throws an Error for any other file, having kept nothing of it.
   */
  import(text) {
    let data;
    try {
      data = JSON.parse(text);
    } catch {
      throw new Error("This file is not JSON.");
    }
    if (data?.format !== FORMAT || data.version !== VERSION || !Array.isArray(data.conversations)) {
      throw new Error(`This file was not exported here: wanted "format": "${FORMAT}", "version": ${VERSION}.`);
    }
    const conversations = data.conversations.map((one, number) => {
      try {
        return Conversation.checked(one);
      } catch (error) {
        throw new Error(`conversations[${number}]: ${error.message}`);
      }
    });
    for (const conversation of conversations) this.save(conversation);
    return conversations.length;
  }
}

function write(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation.data));
    return true;
  } catch (error) {
    if (error.name === "QuotaExceededError") return false;
    throw error;
  }
}
