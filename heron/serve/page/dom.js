// Elements made by hand. Text becomes a text node, so nothing in it is ever read as HTML.

/**
 * An element with its attributes and children.
 * An attribute `onclick` and its like is a function; `true` sets an attribute without a value, `false` and null none.
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A button with a word or a sign on it; a sign needs a `label` for those who can't see it. */
export function button(text, onclick, attributes = {}) {
  return element("button", { type: "button", onclick, ...attributes }, text);
}

/** The element of the page with this id. */
export const byId = (id) => document.getElementById(id);

/** A short random name. `crypto.randomUUID` is missing where the page comes over plain HTTP from another machine. */
export function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");
}
