/** Markdown -> blocks -> HTML, by markdown-it. HTML in the text stays text. Knows nothing of the page. */
import MarkdownIt from "../vendor/markdown-it.js";
import { formulas } from "./formula.js";
import { closeOpenMarks, withoutUnclearEnd, withTableRule } from "./growing.js";

const SAFE_URL = /^(?:https?:\/\/|mailto:)/i;
const SIZE_LIMIT = 30_000; // tokens of a text; a browser needs seconds to draw more
const DEPTH_LIMIT = 24; // levels of lists and quotes, a list being two; deeper ones are shown as source text

const growingParser = parser(true);
const finalParser = parser(false);

function parser(growing) {
  const md = new MarkdownIt({ linkify: true, breaks: true });
  md.linkify.set({ fuzzyLink: false, fuzzyEmail: false, fuzzyIP: false }); // "main.py" is a file
  md.validateLink = (url) => SAFE_URL.test(url);
  md.block.ruler.before("table", "deep", deepAsText);
  formulas(md, growing);
  if (growing) {
    md.block.ruler.disable("reference"); // a later definition would change blocks that have been drawn
    closeOpenMarks(md);
  }
  const cell = (tokens, i) => {
    const side = /right|center/.exec(tokens[i].attrGet("style") ?? "")?.[0];
    return side ? `<${tokens[i].tag} class="${side}">` : `<${tokens[i].tag}>`;
  };
  Object.assign(md.renderer.rules, {
    source: (tokens, i) => `<p class="source">${md.utils.escapeHtml(tokens[i].content)}</p>`,
    heading_open: (tokens, i) => `<h${tokens[i].meta} class="level-${tokens[i].tag[1]}">`,
    heading_close: (tokens, i) => `</h${tokens[i].meta}>`,
    table_open: () => '<div class="table"><table>',
    table_close: () => "</table></div>",
    th_open: cell,
    td_open: cell,
    image: (tokens, i) => imageLink(tokens[i], md),
  });
  return md;
}

/** A rule that ends the nesting of lists and quotes; markdown-it alone would drop what is deeper. */
function deepAsText(state, startLine, endLine, silent) {
  if (silent || state.level < DEPTH_LIMIT) return false;
  let end = startLine;
  while (end < endLine && (state.isEmpty(end) || state.sCount[end] >= state.blkIndent)) end++;
  const token = state.push("source", "", 0);
  token.content = state.getLines(startLine, end, state.blkIndent, false);
  token.map = [startLine, end];
  state.line = end;
  return true;
}

/**
 * Gives a heading its level on the page: below the page's own headings and without a gap, as screen readers expect. It
 * looks as the model wrote it.
 * @param {any} token
 * @param {number[]} outline the levels in the text of the headings that are open
 */
function setLevel(token, outline) {
  const level = Number(token.tag[1]);
  if (token.nesting > 0) {
    while (outline.at(-1) >= level) outline.pop();
    outline.push(level);
  }
  token.meta = Math.min(6, outline.length + 1);
}

/** A link instead of an image: the page loads nothing from elsewhere. */
function imageLink(token, md) {
  const [url, label] = [token.attrGet("src"), token.content || "image"];
  return `<a href="${md.utils.escapeHtml(url)}">${md.utils.escapeHtml(label)}</a>`;
}

/**
 * @typedef {object} Block a paragraph, a list, a table, …
 * @property {string} source
 * @property {any[]} tokens
 * @property {number[]} outline the levels of the headings that are open before it
 */

/**
 * The blocks of a text, and the link references in it.
 * @param {string} text
 * @param {boolean} growing
 * @param {number[]} outline the levels of the headings that are open before the text
 * @returns {{blocks: Block[], references: object}}
 */
export function blocksOf(text, growing, outline) {
  const env = { references: {} };
  const open = [...outline];
  const tokens = growing ? growingTokens(text, env) : finalParser.parse(text, env);
  /** @type {Block[]} */
  const blocks = [];
  for (const token of tokens) {
    if (token.level === 0 && token.nesting >= 0) blocks.push({ source: "", tokens: [], outline: [...open] });
    if (token.tag[0] === "h" && token.type.startsWith("heading")) setLevel(token, open);
    blocks.at(-1).tokens.push(token);
  }
  return { blocks: withSources(blocks, text), references: env.references };
}

function growingTokens(text, env) {
  const clear = withoutUnclearEnd(text);
  const tokens = growingParser.parse(clear, env);
  const table = withTableRule(text, tokens);
  return table === text ? tokens : growingParser.parse(table, env);
}

/** Gives blocks their sources; what comes after the limit of the page becomes one block of source text. */
function withSources(blocks, text) {
  const lines = text.split("\n");
  const starts = blocks.map((block) => block.tokens[0].map[0]);
  let size = 0;
  for (const [i, block] of blocks.entries()) {
    size += block.tokens.reduce((sum, { children }) => sum + 1 + (children?.length ?? 0), 0);
    if (size > SIZE_LIMIT) return [...blocks.slice(0, i), plainBlock(lines.slice(starts[i]).join("\n"))];
    block.source = lines.slice(starts[i], starts[i + 1]).join("\n");
  }
  return blocks;
}

/**
 * A block of source text, for text that is not parsed.
 * @param {string} source
 * @returns {Block}
 */
export function plainBlock(source) {
  return { source, tokens: [{ type: "source", content: source }], outline: [] };
}

/**
 * The HTML of a block: one element, or none.
 * @param {Block} block
 * @returns {string}
 */
export function htmlOf({ tokens }) {
  return finalParser.renderer.render(tokens, finalParser.options, {});
}
