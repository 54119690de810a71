/**
 * Markdown on the page. markdown-it parses it (HTML of the model stays text), the sanitizer makes its nodes, and they
 * are patched into the page, so that what has not changed keeps its selection, scroll position and focus.
 */
import { copy, iconButton, make } from "../dom.js";
import { blocksOf, htmlOf, plainBlock } from "./parser.js";
import { nodesOf } from "./sanitizer.js";
import { setCode, typeset } from "./typesetter.js";

const SLOW_MS = 300; // a draw of a growing text; then the last block is shown as source until it is complete
const BRIEF_MS = 8; // a draw that needs no pause after it

const scrollBox = { tabIndex: 0, role: "group" }; // reachable by keyboard, with a name

/**
 * The elements of blocks, one for each. They are sanitized together, which is faster for many.
 * @param {import("./parser.js").Block[]} blocks
 * @returns {Element[]}
 */
function elementsOf(blocks) {
  const html = blocks.map((block) => `<div>${htmlOf(block)}</div>`);
  const fragment = nodesOf(html.join(""), "markdown");
  const outside = { target: "_blank", rel: "noopener noreferrer" };
  for (const link of fragment.querySelectorAll("a")) Object.assign(link, outside);
  for (const box of fragment.querySelectorAll(".table")) Object.assign(box, scrollBox, { ariaLabel: "Table" });
  for (const pre of fragment.querySelectorAll("pre")) pre.replaceWith(figureOf(pre.firstElementChild));
  for (const formula of fragment.querySelectorAll(".formula")) {
    const long = formula.dataset.source.length > 40;
    if (long) formula.classList.add("long");
    if (long || formula.matches(".display")) Object.assign(formula, scrollBox, { ariaLabel: "Formula" });
  }
  return Array.from(fragment.children, (box) => box.firstElementChild ?? make("p"));
}

function figureOf(code) {
  const language = /^language-(\S+)/.exec(code.className)?.[1] ?? "text";
  const button = iconButton("copy", "Copy code", () => copy(code.textContent, button));
  code.textContent = code.textContent.replace(/\n$/, "");
  const pre = make("pre", { ...scrollBox, ariaLabel: `Code: ${language}` }, code);
  return make("figure", {}, make("figcaption", {}, make("span", {}, language), button), pre);
}

const sameTag = (old, now) => old.nodeType === 1 && old.cloneNode(false).isEqualNode(now.cloneNode(false));

/** Makes a node like a new one, with as few changes as possible; returns the one of them that is on the page. */
function patch(old, now) {
  if (now instanceof Text && old instanceof Text) setText(old, now.data);
  else if (!sameTag(old, now)) old.replaceWith(now);
  else if (now.matches("pre > code")) setCode(old, now.textContent);
  else if (!now.matches(".formula") && !old.isEqualNode(now)) patchChildren(old, now);
  return old.parentNode ? old : now;
}

function patchChildren(old, now) {
  const [before, after] = [[...old.childNodes], [...now.childNodes]];
  after.forEach((node, i) => (i < before.length ? patch(before[i], node) : old.append(node)));
  for (const extra of before.slice(after.length)) extra.remove();
}

/** Appends where it can: a selection in the text stays. */
function setText(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.length));
  else node.data = text;
}

/** An element with Markdown text, redrawn while the text grows. */
export class MarkdownView {
  #element;
  /** @type {{key: string, element: Element}[]} the blocks on the page */
  #drawn = [];
  #settled = ""; // the text before the last blocks, which more text does not change
  #settledBlocks = 0;
  #outline = []; // the levels of the headings that are open after the settled text
  #slow = false; // the last block is too large to be parsed while it grows
  #pause = 0; // the time of the next draw; draws take a third of the time at most
  #timer = 0;

  /** @param {HTMLElement} element which has no other content */
  constructor(element) {
    this.#element = element;
  }

  /**
   * Draws the text. While it grows, only its last blocks are parsed again.
   * @param {string} text Markdown
   * @param {boolean} growing true if more text will follow
   */
  draw(text, growing) {
    const start = performance.now();
    clearTimeout(this.#timer);
    if (growing && start < this.#pause) {
      this.#timer = setTimeout(() => this.draw(text, growing), this.#pause - start);
      return;
    }
    this.#draw(text.replaceAll(/\r\n?/g, "\n"), growing);
    const took = performance.now() - start;
    this.#slow = growing && (this.#slow || took > SLOW_MS);
    this.#pause = took > BRIEF_MS ? start + 3 * took : 0;
  }

  #draw(text, growing) {
    if (!growing || !text.startsWith(this.#settled)) [this.#settled, this.#settledBlocks, this.#outline] = ["", 0, []];
    const first = this.#settledBlocks;
    const tail = text.slice(this.#settled.length);
    const parsed = this.#slow && growing ? { blocks: [plainBlock(tail)] } : blocksOf(tail, growing, this.#outline);
    const { blocks, references = {} } = parsed;
    const linked = Object.keys(references).length > 0; // then any block may refer to one
    const keys = blocks.map((block, i) => [growing && i === blocks.length - 1, block.outline, block.source].join("\n"));
    const changed = [...blocks.keys()].filter((i) => linked || this.#drawn[first + i]?.key !== keys[i]);
    const elements = elementsOf(changed.map((i) => blocks[i]));
    changed.forEach((i, n) => this.#drawBlock(first + i, keys[i], elements[n], growing && i === blocks.length - 1));
    for (const { element } of this.#drawn.splice(first + blocks.length)) element.remove();
    if (growing && blocks.length) this.#settle(text, blocks);
  }

  /** A last block of two lines or less, or a formula, may still become a part of the block before it. */
  #settle(text, blocks) {
    const last = blocks.at(-1);
    const sure = last.source.split("\n", 3).length > 2 && last.tokens[0].type !== "formula_block";
    const count = blocks.length - (sure || blocks.length === 1 ? 1 : 2);
    const open = blocks.slice(count).reduce((sum, { source }) => sum + source.length + 1, -1);
    this.#settled = text.slice(0, text.length - open);
    this.#settledBlocks += count;
    this.#outline = blocks[count].outline;
  }

  #drawBlock(i, key, element, growing) {
    const old = this.#drawn[i];
    if (old) element = patch(old.element, element);
    else this.#element.append(element);
    typeset(element, growing);
    this.#drawn[i] = { key, element };
  }
}
