// The server's OpenAI interface, as far as this page needs it.

export class ServerError extends Error {
  /** `status`: of the HTTP answer; 0 where none came. */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const KEY = "heron.key"; // in sessionStorage: forgotten with the tab

export class Server {
  /** `askForKey`: an async function that gives the API key that someone typed, or "" where they would not. */
  constructor(askForKey) {
    this.askForKey = askForKey;
  }

  /** The names of the models. */
  async models() {
    return (await this.#json("GET", "/v1/models")).data.map((model) => model.id);
  }

  /** The names of the kept states. */
  async states() {
    return (await this.#json("GET", "/v1/states")).data.map((state) => state.id);
  }

  /** Keep under a name what the model has read in a session. */
  async saveState(name, session) {
    await this.#json("POST", "/v1/states", { name, session_id: session });
  }

  async deleteState(name) {
    await this.#json("DELETE", `/v1/states/${encodeURIComponent(name)}`);
  }

  /** The chunks of an answer as they come. Ends early, with an AbortError, when `signal` says so. */
  async *chat(request, signal) {
    const body = { ...request, stream: true, stream_options: { include_usage: true } };
    const response = await this.#fetch("POST", "/v1/chat/completions", body, signal);
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message ?? "The server failed.", 500);
      yield chunk;
    }
    throw new ServerError("The server broke off before the answer's end.");
  }

  async #json(method, path, body) {
    const response = await this.#fetch(method, path, body);
    return response.status === 204 ? null : response.json();
  }

  async #fetch(method, path, body, signal) {
    for (;;) {
      const key = sessionStorage.getItem(KEY);
      const headers = {
        ...(body && { "Content-Type": "application/json" }),
        ...(key && { Authorization: `Bearer ${key}` }),
      };
      let response;
      try {
        response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ServerError("The server can't be reached. Is heron serve still running?");
      }
      if (response.ok) return response;
      if (response.status !== 401) throw await refusal(response);
      const typed = await this.askForKey();
      if (!typed) throw await refusal(response);
      sessionStorage.setItem(KEY, typed);
    }
  }
}

async function refusal(response) {
  const wait = response.headers.get("Retry-After");
  if (response.status === 429) {
    return new ServerError(`The server has no free place. Try again${wait ? ` in ${wait} s` : " soon"}.`, 429);
  }
  const said = await response.json().catch(() => null); // a proxy's own pages are not JSON
  return new ServerError(said?.error?.message ?? `The server answered ${response.status}.`, response.status);
}

/** The data of server-sent events, one text an event. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // one that broke off has nothing to cancel
  }
}
