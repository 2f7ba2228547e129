// A small part of Markdown as elements: paragraphs, headings, lists, quotes, code, bold, italics. All else stays text.
// Whatever a model writes, the depth is bounded and the work grows with the text's length alone.

import { button, element } from "./dom.js";

const DEEPEST = 6; // lists and quotes inside one another
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const QUOTE = /^ {0,3}> ?/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const ITEM = /^( {0,3}(?:[-*+]|(\d{1,9})[.)]))(?:\s+(?=\S)|\s*$)/;

/** Shows a text that grows: blocks that have not changed keep their elements. */
export class Markdown {
  #shown = []; // sources of the blocks

  constructor(root) {
    this.root = root;
  }

  update(text) {
    const found = blocks(text);
    const sources = found.map((block) => JSON.stringify(block));
    let same = 0;
    while (same < sources.length && sources[same] === this.#shown[same]) same += 1;
    while (this.root.childElementCount > same) this.root.lastElementChild.remove();
    this.root.append(...found.slice(same).map((block) => render(block, 0)));
    this.#shown = sources;
  }
}

/** The blocks of a text, as plain objects: {kind, lines} and what else the kind has. */
export function blocks(text) {
  const lines = text.split("\n");
  const found = [];
  for (let at = 0; at < lines.length; ) {
    const [block, next] = blockAt(lines, at);
    if (block) found.push(block);
    at = next;
  }
  return found;
}

function blockAt(lines, at) {
  const line = lines[at];
  if (!line.trim()) return [null, at + 1];
  const fence = FENCE.exec(line);
  if (fence) return codeAt(lines, at, fence);
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, lines: [heading[2]] }, at + 1];
  if (QUOTE.test(line)) {
    const end = firstFrom(lines, at, (other) => !QUOTE.test(other));
    return [{ kind: "quote", lines: lines.slice(at, end).map((other) => other.replace(QUOTE, "")) }, end];
  }
  if (ITEM.test(line)) return listAt(lines, at);
  const end = firstFrom(lines, at + 1, (other) => !other.trim() || startsBlock(other));
  return [{ kind: "paragraph", lines: lines.slice(at, end) }, end];
}

const startsBlock = (line) => [FENCE, RULE, HEADING, QUOTE, ITEM].some((pattern) => pattern.test(line));

function firstFrom(lines, at, is) {
  while (at < lines.length && !is(lines[at])) at += 1;
  return at;
}

function codeAt(lines, at, [, fence, language]) {
  const closes = (line) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], "");
  const end = firstFrom(lines, at + 1, closes); // a block that is still being written has no end yet
  return [{ kind: "code", language: language.trim(), lines: lines.slice(at + 1, end) }, end + 1];
}

function listAt(lines, at) {
  const base = leading(lines[at]);
  const isOrdered = (line) => ITEM.exec(line)[2] !== undefined;
  const list = { kind: "list", start: isOrdered(lines[at]) ? Number(ITEM.exec(lines[at])[2]) : null, items: [] };
  while (at < lines.length && ITEM.test(lines[at]) && isOrdered(lines[at]) === (list.start !== null)) {
    const end = firstFrom(lines, at + 1, (line) => line.trim() && leading(line) < base + 2);
    const inner = lines.slice(at + 1, end);
    const indent = Math.min(...inner.filter((line) => line.trim()).map(leading));
    list.items.push([lines[at].replace(ITEM, ""), ...inner.map((line) => line.slice(indent))]);
    at = end;
  }
  return [list, at];
}

const leading = (line) => line.length - line.trimStart().length;

function render(block, depth) {
  const inside = (lines) =>
    depth < DEEPEST ? blocks(lines.join("\n")).map((inner) => render(inner, depth + 1)) : [lines.join("\n")];
  switch (block.kind) {
    case "code":
      return codeBlock(block);
    case "rule":
      return element("hr");
    case "heading": // below the page's own headings
      return element(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.lines[0]));
    case "quote":
      return element("blockquote", {}, ...inside(block.lines));
    case "list": {
      const items = block.items.map((lines) => element("li", {}, ...inside(lines)));
      return block.start === null ? element("ul", {}, ...items) : element("ol", { start: block.start }, ...items);
    }
    default:
      return element("p", {}, ...inline(block.lines.join("\n")));
  }
}

function codeBlock({ language, lines }) {
  const code = lines.join("\n");
  const copy = button("Copy", () => navigator.clipboard.writeText(code), { class: "quiet" });
  return element(
    "figure", { class: "code" },
    element("figcaption", {}, element("span", {}, language || "code"), ...(navigator.clipboard ? [copy] : [])),
    element("pre", { tabindex: "0" }, element("code", {}, code)),
  );
}

/** The nodes of a text with `code`, **bold** and *italics*. */
export function inline(text) {
  const nodes = [];
  const unclosed = new Set(); // marks that close nowhere further on
  let plain = 0; // where the text that is not yet in a node begins
  for (let at = 0; at < text.length; ) {
    const marks = /^(?:`+|\*{1,2})/.exec(text.slice(at, at + 64))?.[0];
    if (!marks) {
      at += 1;
      continue;
    }
    const start = at + marks.length;
    const opens = marks[0] === "`" || /\S/.test(text[start] ?? " ");
    const end = opens && !unclosed.has(marks) ? closing(text, marks, start) : -1;
    if (end === -1) {
      if (opens) unclosed.add(marks);
      at = start;
      continue;
    }
    if (plain < at) nodes.push(text.slice(plain, at));
    const inner = text.slice(start, end);
    nodes.push(marks[0] === "`" ? element("code", {}, inner.trim()) : element(TAGS[marks], {}, ...inline(inner)));
    at = plain = end + marks.length;
  }
  if (plain < text.length) nodes.push(text.slice(plain));
  return nodes;
}

const TAGS = { "*": "em", "**": "strong" };

/** Where the marks that opened before `start` close; -1: nowhere. */
function closing(text, marks, start) {
  for (let at = text.indexOf(marks, start); at !== -1; ) {
    let end = at;
    while (text[end] === marks[0]) end += 1;
    const fits = marks[0] === "`" ? end - at === marks.length
      : at > start && /\S/.test(text[at - 1]) && (end - at === marks.length || end - at > 2);
    if (fits) return marks[0] === "`" ? at : end - marks.length;
    at = text.indexOf(marks, end);
  }
  return -1;
}
