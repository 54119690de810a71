/** The reasoning of an answer, which some models write between <think> and </think> before the answer itself. */

const OPEN = "<think>";
const CLOSE = "</think>";

/**
 * Splits a text that may still grow.
 * @param {string} text
 * @param {boolean} growing
 * @returns {{thought: string, content: string}}
 */
export function splitThought(text, growing) {
  const start = text.trimStart();
  if (!start.startsWith(OPEN)) {
    const mayBegin = growing && OPEN.startsWith(start);
    return { thought: "", content: mayBegin ? "" : text };
  }
  const end = start.indexOf(CLOSE);
  if (end < 0) return { thought: start.slice(OPEN.length).trimStart(), content: "" };
  return { thought: start.slice(OPEN.length, end).trim(), content: start.slice(end + CLOSE.length).trimStart() };
}
