/** The only way for HTML into the page: lists of the elements and attributes that the page's own renderers make. */
import "../vendor/dompurify.js"; // sets a global

const purifier = /** @type {any} */ (globalThis).DOMPurify;

const words = (text) => text.trim().split(/\s+/);
const SHARED = { RETURN_DOM_FRAGMENT: true, ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false };

const CONFIG = {
  markdown: {
    ...SHARED,
    ALLOWED_TAGS: words(`a blockquote br code div em h2 h3 h4 h5 h6 hr li ol p pre s span strong table tbody td th thead
      tr ul #text`),
    ALLOWED_ATTR: words("class data-source href start title"),
    ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
    ADD_URI_SAFE_ATTR: ["data-source", "start"], // no addresses
  },
  code: { ...SHARED, ALLOWED_TAGS: ["span", "#text"], ALLOWED_ATTR: ["class"] },
  formula: {
    ...SHARED,
    ALLOWED_TAGS: words(`span math menclose merror mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot
      mrow ms mspace msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover none semantics #text`),
    ALLOWED_ATTR: words(`accent accentunder class columnalign columnlines columnspacing depth display displaystyle
      fence form height largeop linethickness lspace mathbackground mathcolor mathsize mathvariant maxsize minsize
      movablelimits notation rowlines rowspacing rspace scriptlevel separator stretchy symmetric voffset width`),
    FORBID_CONTENTS: ["annotation"], // KaTeX's copy of the source
  },
};

/**
 * Nodes of HTML, without anything that a renderer would not write.
 * @param {string} html
 * @param {"markdown" | "code" | "formula"} kind the renderer
 * @returns {DocumentFragment}
 */
export function nodesOf(html, kind) {
  return purifier.sanitize(html, CONFIG[kind]);
}
