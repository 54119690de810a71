/**
 * Formulas in Markdown, a plugin of markdown-it: `$…$`, `$$…$$`, `\(…\)`, `\[…\]`. A formula becomes an element with
 * its source as text, which typesetter.js replaces; until then, and if it is not valid LaTeX, the source is shown.
 */

const LIMIT = 3000; // in one text; a browser needs seconds for the layout of more, which stay source
const CLOSER = { $: "$", $$: "$$", "\\(": "\\)", "\\[": "\\]" };

/** The opener of a formula at a position, or "". */
function openerAt(text, at) {
  const [first, second] = [text[at], text[at + 1]];
  if (first === "\\") return second === "(" || second === "[" ? first + second : "";
  if (first !== "$" || text[at - 1] === "$") return "";
  if (second !== "$") return "$";
  return text[at + 2] === "$" ? "" : "$$";
}

/** The index of a closer at or after a position, or -1; a backslash protects the character after it. */
function indexOfCloser(text, closer, from) {
  for (let i = from; i < text.length; i++) {
    if (text.startsWith(closer, i)) return i;
    if (text[i] === "\\") i++;
  }
  return -1;
}

/** False for dollars that are prices or shell variables: "$5 and $6", "$5 million in US$", "$A:$B". */
function isFormula(text, opener, start, end) {
  const body = text.slice(start, end);
  if (!body.trim()) return false;
  if (opener !== "$") return true;
  const after = text[end + 1] ?? "";
  return /^\S/.test(body) && /\S$/.test(body) && !/[0-9A-Z$]/.test(after) && !body.includes("`") &&
    !/^\d[\d.,]*\s+[a-z]{2,}/i.test(body);
}

/** True if an open formula at the end of a growing text is better shown as source than read as Markdown. */
function mayBecomeFormula(rest, opener) {
  return opener !== "$" || (/^[^\s\d]/.test(rest) && !/\*\*|`|\$/.test(rest));
}

function push(state, type, source, finished) {
  const token = state.push(type, "", 0);
  token.content = source;
  token.meta = { finished };
  state.env.formulas = (state.env.formulas ?? 0) + 1;
  return token;
}

function inlineRule(state, silent) {
  const { src, pos, posMax } = state;
  const opener = openerAt(src, pos);
  if (!opener || state.env.formulas > LIMIT) return false;
  state.withoutCloser ??= new Set(); // keeps the searches of a paragraph linear
  const start = pos + opener.length;
  const found = state.withoutCloser.has(opener) ? -1 : indexOfCloser(src, CLOSER[opener], start);
  if (found < 0) state.withoutCloser.add(opener);
  const finished = found >= 0 && found + opener.length <= posMax && isFormula(src, opener, start, found);
  const open = src === state.env.openEnd && found < 0 && mayBecomeFormula(src.slice(start, posMax), opener);
  if (!finished && !open) return false;
  const end = finished ? found + opener.length : posMax;
  if (!silent) push(state, "formula", src.slice(pos, end), finished);
  state.pos = end;
  return true;
}

/** Formulas that begin and end a line: their lines are not read as lists, headings or quotes. */
function blockRule(growing) {
  return (state, startLine, endLine, silent) => {
    if (state.sCount[startLine] - state.blkIndent >= 4) return false; // indented code
    const lineAt = (line) => state.src.slice(state.bMarks[line] + state.tShift[line], state.eMarks[line]);
    const opener = openerAt(lineAt(startLine), 0);
    if (opener.length < 2 || opener === "\\(" || startLine < state.withoutCloser?.[opener]) return false;
    for (let line = startLine; line < endLine; line++) {
      if (state.isEmpty(line) || state.sCount[line] < state.blkIndent) return none(state, opener, line);
      const text = lineAt(line).trimEnd();
      const at = indexOfCloser(text, CLOSER[opener], line === startLine ? opener.length : 0);
      const open = growing && line === state.bMarks.length - 2 && at < 0; // the last line of all
      if (at < 0 && !open) continue;
      if (at >= 0 && at + opener.length < text.length) return false; // text follows: part of a paragraph
      const source = state.getLines(startLine, line + 1, state.blkIndent, false).trim();
      if (!open && !source.slice(opener.length, -opener.length).trim()) return false;
      if (silent) return true;
      push(state, "formula_block", source, !open).map = [startLine, line + 1];
      state.line = line + 1;
      return true;
    }
    return none(state, opener, endLine);
  };
}

/** Notes that no closer comes before a line, which keeps the searches of a whole text linear. */
function none(state, opener, line) {
  (state.withoutCloser ??= {})[opener] = line;
  return false;
}

/**
 * Adds formulas to a parser.
 * @param {any} md of markdown-it
 * @param {boolean} growing true if a formula without end will get it
 */
export function formulas(md, growing) {
  const element = (tag) => (tokens, i) => {
    const { content, meta } = tokens[i];
    const text = md.utils.escapeHtml(content);
    if (!meta.finished) return `<${tag} class="source">${text}</${tag}>`;
    const display = /^(?:\$\$|\\\[)/.test(content) ? " display" : "";
    return `<${tag} class="formula${display}" data-source="${text}">${text}</${tag}>`;
  };
  md.inline.ruler.before("escape", "formula", inlineRule);
  const interrupts = { alt: ["paragraph", "reference", "blockquote", "list"] };
  md.block.ruler.before("blockquote", "formula", blockRule(growing), interrupts);
  md.renderer.rules.formula = element("span");
  md.renderer.rules.formula_block = element("div");
}
