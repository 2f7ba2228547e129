// One answer, from the request to its last token.

import { ServerError } from "./api.js";

const SHORTEST_MS = 50; // that tells a speed: what comes faster has come in one piece
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
  const waiting = []; // tokens whose text is still to come
  answer.finish = "writing";
  try {
    // A session of its own for each answer, so that its state can be saved, whichever branch it is on.
    const request = { ...settings, messages: conversation.before(answer), session_id: answer.id };
    if (conversation.data.state) request.state = conversation.data.state;
    for await (const chunk of server.chat(request, signal)) {
      if (chunk.usage) clock.usage = chunk.usage;
      for (const choice of chunk.choices) {
        take(answer, choice, waiting);
        if (choice.delta.content || choice.delta.reasoning_content) clock.tick();
      }
      changed(answer);
    }
    if (answer.finish === "writing") answer.finish = "stop";
  } catch (error) {
    answer.finish = error.name === "AbortError" ? "stopped" : "failed";
    if (error instanceof ServerError) throw error;
    if (answer.finish === "failed") throw new ServerError(`The server's answer can't be read: ${error.message}`);
  } finally {
    answer.tokens.push(...waiting);
    answer.figures = clock.figures(answer);
    conversation.data.changed = Date.now();
    changed(answer);
  }
}

function take(answer, { delta, logprobs, finish_reason }, waiting) {
  answer.thought += delta.reasoning_content ?? "";
  answer.content += delta.content ?? "";
  for (const token of logprobs?.content ?? []) {
    const likeliest = token.top_logprobs.map((other) => [tokenText(other), rounded(other.logprob)]);
    waiting.push([tokenText(token), rounded(token.logprob), likeliest]);
  }
  if (delta.reasoning_content) answer.thoughtTokens.push(...waiting.splice(0));
  else if (delta.content) answer.tokens.push(...waiting.splice(0));
  if (finish_reason) answer.finish = finish_reason;
}

// Control characters but for line ends and tabs, parts of a character, and tokens of nothing that can be seen.
const UNSEEN = /[^\P{Cc}\n\t]|\ufffd|^[\p{Cf}\p{Zl}\p{Zp}]+$/u;

/** What a token says; where that can't be seen, its bytes, as in ⟨e2 82⟩. */
export function tokenText({ token, bytes }) {
  if (!bytes) return token;
  const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(bytes));
  return UNSEEN.test(text) ? `⟨${bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ")}⟩` : text;
}

const rounded = (number) => Math.round(number * 1000) / 1000; // so that what is kept stays short

class Clock {
  #began = performance.now();
  #first = null;
  #last = null;
  usage = {}; // tokens, as the server counts them at the end

  tick() {
    this.#last = performance.now();
    this.#first ??= this.#last;
  }

  /**
   * Milliseconds to the first token; tokens, and how many a second came behind the first; tokens of the prompt, and how
   * many of those the server had read before. What is not known is left out.
   */
  figures(answer) {
    if (this.#first === null) return {};
    const { completion_tokens, prompt_tokens: prompt, prompt_tokens_details } = this.usage;
    const tokens = completion_tokens ?? (answer.tokens.length + answer.thoughtTokens.length || undefined);
    const cached = prompt_tokens_details?.cached_tokens;
    const figures = { firstMs: Math.round(this.#first - this.#began), tokens, prompt, cached };
    const took = this.#last - this.#first;
    if (tokens > 1 && took > SHORTEST_MS) figures.perSecond = ((tokens - 1) * 1000) / took;
    return figures;
  }
}
