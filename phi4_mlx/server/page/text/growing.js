/**
 * Markdown that is still being written: its last marks are read as what they will most likely become, so that what is
 * on the page does not change its look when the rest arrives.
 */

// A last line that may become a list item, a heading, a rule, a quote or the end of a fence.
const MARK_LINE = /(^|\n)[ \t]*(?:[-=*+>_~`#|]+|\d{1,9}[.)])[ \t]*$/;
const FENCE = /^[ \t]*(?:`{3,}|~{3,})/;
const OPEN_LIMIT = 12; // more open marks than this are not prose

/** The number of columns of a table's row. */
function columnsOf(row) {
  return row.trim().replaceAll("\\|", "").replace(/^\|/, "").replace(/\|$/, "").split("|").length;
}

/**
 * Completes a table whose second line, which makes it a table, has not arrived.
 * @param {string} text
 * @param {any[]} tokens of the text
 * @returns {string}
 */
export function withTableRule(text, tokens) {
  const end = tokens.findLast((token) => token.nesting >= 0);
  if (end?.type !== "inline" || !/(?:^|\n)\|[^\n]*$/.test(end.content)) return text; // not in code

  const lines = text.split("\n").slice(-3);
  const isRow = (line) => line?.trimStart().startsWith("|");
  const last = lines.pop();
  const cut = /^[\s|:-]+$/.test(last) && isRow(lines.at(-1));
  const head = cut ? lines.pop() : last;
  if (!isRow(head) || lines.at(-1)?.includes("|")) return text;
  const indent = /^\s*/.exec(head)[0];
  const before = cut ? text.slice(0, text.length - last.length) : `${text}\n`;
  return `${before}${indent}|${"-|".repeat(columnsOf(head))}`;
}

/**
 * The text without a last line whose meaning is not known yet.
 * @param {string} text
 * @returns {string}
 */
export function withoutUnclearEnd(text) {
  const last = text.slice(text.lastIndexOf("\n") + 1);
  return FENCE.test(last) ? text : text.replace(MARK_LINE, "$1");
}

/** The run of backticks that opens code at the end of a text, or "". */
function openTicks(text) {
  const runs = [...text.matchAll(/\\`|`+/g)].filter(({ 0: run }) => run[0] === "`");
  const last = new Map(runs.map(({ 0: run, index }) => [run.length, index])); // length -> where the last such run is
  for (let i = 0; i < runs.length; i++) {
    const { 0: run, index } = runs[i];
    if (last.get(run.length) === index) return run;
    while (runs[i + 1][0].length !== run.length) i++;
    i++;
  }
  return "";
}

/** Shows a link whose address is being written as its label, and a label that is being written without its bracket. */
function withoutOpenLink(text) {
  const label = text.replace(/!?\[([^\][\n]{0,300})\]\([^\s)]{0,2000}$/, "$1");
  return label.replace(/(^|[\s(*_])!?\[([^\][\n]{1,300})$/, "$1$2");
}

/** The marks that would close the emphasis that is open at the end of a text. */
function closersOf(text, md, env) {
  env.openEnd = text;
  const state = new md.inline.State(text, md, env, []);
  md.inline.tokenize(state);
  const [balance] = md.inline.ruler2.getRules("");
  balance(state);
  const open = state.delimiters.filter((it) => it.open && !it.close && it.end < 0);
  if (open.length > OPEN_LIMIT) return "";
  return open.map(({ marker }) => (marker === 0x7e ? "~~" : String.fromCharCode(marker))).reverse().join("");
}

function withMarksClosed(text, md, env) {
  const ticks = openTicks(text.replace(/[`\s]+$/, ""));
  if (ticks) {
    const code = text.replace(/[`\s]+$/, "");
    return code.endsWith(ticks) ? code : code + ticks + closersOf(code + ticks, md, env);
  }
  const cut = withoutOpenLink(text.replace(/[*_~!`]+$/, "")).trimEnd();
  return cut + closersOf(cut, md, env);
}

/**
 * Makes a parser close what is open at the end of a text, if the text ends in a paragraph, a heading or a table. The
 * parser's `env.openEnd` is then the content that is still growing.
 * @param {any} md of markdown-it
 */
export function closeOpenMarks(md) {
  md.core.ruler.before("inline", "close_open_marks", ({ tokens, env }) => {
    const last = tokens.findLast((token) => token.nesting >= 0);
    if (last?.type === "inline") env.openEnd = last.content = withMarksClosed(last.content, md, env);
  });
}
