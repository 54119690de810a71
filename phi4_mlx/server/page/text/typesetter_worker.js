/**
 * Colours code and typesets formulas, apart from the page's thread: a hostile input cannot make the page wait.
 * Takes { id, kind, source, language } and posts { id, started } before its work, then { id, html } (null: it cannot).
 */

const LIMIT = { code: 50_000, formula: 4000 }; // characters of a source
const HTML_LIMIT = 1_000_000; // characters of a result

async function codeHtml(source, language) {
  const { default: highlight } = await import("../vendor/highlight.js");
  const options = { language, ignoreIllegals: true };
  return () => (highlight.getLanguage(language) ? highlight.highlight(source, options).value : null);
}

/** "$$", "\[" and the like around the formula say how it is displayed. */
async function formulaHtml(source) {
  await import("../vendor/katex.js"); // sets a global
  const marks = source.startsWith("$$") || source.startsWith("\\") ? 2 : 1;
  const options = {
    output: "mathml", displayMode: /^(?:\$\$|\\\[)/.test(source), trust: false, strict: "ignore", throwOnError: true,
    maxSize: 20, maxExpand: 500,
  };
  return () => /** @type {any} */ (globalThis).katex.renderToString(source.slice(marks, -marks), options);
}

globalThis.onmessage = async ({ data: { id, kind, source, language } }) => {
  let html = null;
  try {
    if (source.length <= LIMIT[kind]) {
      const work = await (kind === "code" ? codeHtml(source, language) : formulaHtml(source));
      postMessage({ id, started: true });
      html = work();
    }
  } catch { /* invalid LaTeX: the page shows its source */ }
  postMessage({ id, html: html?.length <= HTML_LIMIT ? html : null });
};
