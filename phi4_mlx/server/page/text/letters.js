/** Letters of formulas in other alphabets. Browsers ignore all values of `mathvariant` but "normal" (MathML Core). */

// Where A, a and 0 of each alphabet are in Unicode, https://www.unicode.org/charts/PDF/U1D400.pdf
const ALPHABETS = {
  bold: [0x1d400, 0x1d41a, 0x1d7ce],
  italic: [0x1d434, 0x1d44e],
  "bold-italic": [0x1d468, 0x1d482],
  script: [0x1d49c, 0x1d4b6],
  "bold-script": [0x1d4d0, 0x1d4ea],
  fraktur: [0x1d504, 0x1d51e],
  "double-struck": [0x1d538, 0x1d552, 0x1d7d8],
  "bold-fraktur": [0x1d56c, 0x1d586],
  "sans-serif": [0x1d5a0, 0x1d5ba, 0x1d7e2],
  "bold-sans-serif": [0x1d5d4, 0x1d5ee, 0x1d7ec],
  "sans-serif-italic": [0x1d608, 0x1d622],
  "sans-serif-bold-italic": [0x1d63c, 0x1d656],
  monospace: [0x1d670, 0x1d68a, 0x1d7f6],
};
// Those that were in Unicode before, https://www.unicode.org/charts/PDF/U2100.pdf
const OLDER = {
  italic: "hℎ",
  script: "BℬEℰFℱHℋIℐLℒMℳRℛeℯgℊoℴ",
  fraktur: "CℭHℌIℑRℜZℨ",
  "double-struck": "CℂHℍNℕPℙQℚRℝZℤ",
};

/** A letter or digit of an alphabet; other characters stay. */
function letterOf(character, variant) {
  const older = OLDER[variant]?.indexOf(character) ?? -1;
  if (older >= 0 && older % 2 === 0) return OLDER[variant][older + 1];
  const group = ["A", "a", "0"].findIndex((first) => {
    const distance = character.charCodeAt(0) - first.charCodeAt(0);
    return distance >= 0 && distance < (first === "0" ? 10 : 26);
  });
  const start = ALPHABETS[variant]?.[group];
  return start ? String.fromCodePoint(start + character.charCodeAt(0) - "Aa0".charCodeAt(group)) : character;
}

/**
 * Writes the letters of a formula in the alphabets that its `mathvariant` attributes name.
 * @param {DocumentFragment} formula
 */
export function useAlphabets(formula) {
  for (const element of formula.querySelectorAll("[mathvariant]")) {
    const variant = element.getAttribute("mathvariant");
    if (!(variant in ALPHABETS)) continue;
    element.textContent = Array.from(element.textContent, (it) => letterOf(it, variant)).join("");
    element.removeAttribute("mathvariant");
  }
}
