// One answer, from the request to its last token.

import { ServerError } from "./api.js";

export const LIKELIEST = 10; // tokens that the token view can show in the place of each

/**
 * Have the model write `answer`, a message of `conversation`, whose fields fill up as the tokens come.
 *
 * @param settings the fields of the request that are about sampling.
 * @param changed called with the answer after each change.
 * Throws a ServerError where it fails; what was written by then stays. A stop through `signal` is no error.
 */
export async function write(server, conversation, answer, settings, signal, changed) {
  const clock = new Clock();
  answer.finish = "writing";
  try {
    // A session of its own for each answer: it begins with all of the text, or behind the state that was chosen, and
    // what the server keeps of it is the state behind this answer, whichever branch that is on.
    if (conversation.data.state) await server.loadState(conversation.data.state, answer.id);
    const request = { ...settings, messages: conversation.before(answer), session_id: answer.id };
    for await (const chunk of server.chat(request, signal)) {
      if (chunk.usage) clock.counted = chunk.usage.completion_tokens;
      for (const choice of chunk.choices) {
        take(answer, choice);
        if (choice.delta.content || choice.delta.reasoning_content) clock.tick();
      }
      changed(answer);
    }
    if (answer.finish === "writing") answer.finish = "stop";
  } catch (error) {
    answer.finish = error.name === "AbortError" ? "stopped" : "failed";
    if (answer.finish === "failed") {
      throw error instanceof ServerError ? error : new ServerError(`The server's answer can't be read: ${error.message}`);
    }
  } finally {
    answer.figures = clock.figures(answer);
    conversation.data.changed = Date.now();
    changed(answer);
  }
}

function take(answer, { delta, logprobs, finish_reason }) {
  answer.thought += delta.reasoning_content ?? "";
  answer.content += delta.content ?? "";
  const isThought = delta.reasoning_content && !delta.content;
  const tokens = (logprobs?.content ?? []).map((token) => [
    tokenText(token), rounded(token.logprob),
    token.top_logprobs.map((other) => [tokenText(other), rounded(other.logprob)]),
  ]);
  (isThought ? answer.thoughtTokens : answer.tokens).push(...tokens);
  if (finish_reason) answer.finish = finish_reason;
}

/** What a token says; of one that is part of a character only, its bytes, as in ⟨e2 82⟩. */
export function tokenText({ token, bytes }) {
  if (!bytes) return token;
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
  } catch {
    return `⟨${bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}⟩`;
  }
}

const rounded = (number) => Math.round(number * 1000) / 1000; // so that what is kept stays short

class Clock {
  #began = performance.now();
  #first = null;
  #last = null;
  counted = null; // tokens, as the server counts them at the end

  tick() {
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  /** Milliseconds to the first token, tokens, and tokens a second behind the first; what is not known is left out. */
  figures(answer) {
    if (this.#first === null) return {};
    const tokens = this.counted ?? (answer.tokens.length + answer.thoughtTokens.length || null);
    const figures = { firstMs: Math.round(this.#first - this.#began) };
    if (tokens) figures.tokens = tokens;
    if (tokens > 1 && this.#last > this.#first) figures.perSecond = ((tokens - 1) * 1000) / (this.#last - this.#first);
    return figures;
  }
}
