// The sampling settings: what the controls show, what is kept, what a request carries.

import { element } from "./dom.js";
import { LIKELIEST } from "./writer.js";

const KEPT = "heron.settings";

// [name, label, smallest, largest, step, what it does]
const SLIDERS = [
  ["temperature", "Temperature", 0, 2, 0.05, "0 always takes the likeliest token; more is more daring"],
  ["top_p", "Top p", 0, 1, 0.01, "keeps the fewest tokens whose probabilities reach this sum"],
  ["presence_penalty", "Presence penalty", 0, 2, 0.05, "taken off every token that was there before"],
  ["frequency_penalty", "Frequency penalty", 0, 2, 0.05, "taken off once for each time it was there"],
  ["penalty_decay", "Penalty decay", 0.9, 1, 0.001, "how well the two penalties remember"],
];
// Those of `heron chat`; what is empty here is left to the server.
const DEFAULTS = {
  think: "", max_completion_tokens: "", seed: "", temperature: 1, top_p: 0.3,
  presence_penalty: 0.3, frequency_penalty: 0.3, penalty_decay: 0.996,
};

export class Settings {
  /** `form` holds a control for each name of DEFAULTS; the sliders are put into `sliders`. */
  constructor(form, sliders) {
    this.form = form;
    sliders.append(...SLIDERS.map(slider));
    this.#show({ ...DEFAULTS, ...kept() });
    form.addEventListener("input", () => this.#keep());
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", (event) => {
      event.preventDefault(); // the browser would take the values of the document, which has none
      this.#show(DEFAULTS);
      this.#keep();
    });
  }

  /** The fields of a request. `version`: which answer in the same place this is, from 0. */
  request(version, withTokens) {
    const fields = Object.fromEntries(Object.entries(this.#values()).filter(([, value]) => value !== ""));
    if ("seed" in fields) fields.seed += version;
    if (withTokens) Object.assign(fields, { logprobs: true, top_logprobs: LIKELIEST });
    return fields;
  }

  #values() {
    const values = {};
    for (const name of Object.keys(DEFAULTS)) {
      const control = this.form.elements[name];
      if (name === "think") values[name] = control.value;
      else values[name] = control.value !== "" && control.checkValidity() ? Number(control.value) : DEFAULTS[name];
    }
    return values;
  }

  #show(values) {
    for (const name of Object.keys(DEFAULTS)) this.form.elements[name].value = values[name];
    this.#echo();
  }

  #keep() {
    localStorage.setItem(KEPT, JSON.stringify(this.#values()));
    this.#echo();
  }

  #echo() {
    for (const [name] of SLIDERS) this.form.elements[`${name}-value`].value = this.form.elements[name].value;
  }
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {}; // written by something else
  }
}

function slider([name, label, min, max, step, help]) {
  return element(
    "div", { class: "slider" },
    element("label", { for: name }, label),
    element("output", { name: `${name}-value`, for: name }),
    element("input", { type: "range", id: name, name, min, max, step, "aria-describedby": `${name}-help` }),
    element("p", { class: "help", id: `${name}-help` }, help),
  );
}
