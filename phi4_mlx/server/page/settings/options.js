/** The user's options, kept in this browser, and what they put into a request. */
import { Signal } from "../signal.js";
import { keep, recall } from "../storage/local.js";

const DEFAULTS = {
  system: "", temperature: "", topP: "", seed: "", maxTokens: "", theme: "", model: "", tools: false,
};

/** Texts of fields as the user has entered them; "" leaves the choice to the server. */
export const options = { ...DEFAULTS, ...sound(recall("localStorage", "settings", {})) };

/** The stored values that an option can have; an older page may have kept others. */
function sound(stored) {
  return Object.fromEntries(Object.entries(stored).filter(([name, value]) => typeof value === typeof DEFAULTS[name]));
}

/** An option has changed. @type {Signal} */
export const changed = new Signal();

/** Numbers that the server accepts, by option: name in the request, least, most, and if only whole ones are. */
export const NUMBERS = {
  temperature: { field: "temperature", least: 0, most: 2 },
  topP: { field: "top_p", least: 0.01, most: 1 },
  seed: { field: "seed", least: 0, most: Number.MAX_SAFE_INTEGER, whole: true },
  maxTokens: { field: "max_tokens", least: 1, most: 1_000_000, whole: true },
};

/**
 * Sets options and keeps them.
 * @param {Partial<typeof DEFAULTS>} values
 */
export function setOptions(values) {
  Object.assign(options, values);
  keep("localStorage", "settings", options);
  changed.tell(options);
}

/**
 * The mistake in a number's text, as one line; "" if there is none.
 * @param {keyof typeof NUMBERS} name
 * @param {string} text
 * @returns {string}
 */
export function mistakeIn(name, text) {
  const { least, most, whole } = NUMBERS[name];
  const number = Number(text);
  if (!text.trim()) return "";
  const right = number >= least && number <= most && (!whole || Number.isInteger(number));
  if (right) return "";
  const kind = whole ? "a whole number" : "a number";
  const range = most === Number.MAX_SAFE_INTEGER ? `from ${least} up` : `from ${least} to ${most.toLocaleString("en")}`;
  return `${text} is not ${kind} ${range}, and is not used.`;
}

/** The fields of a request for the numbers that are set and right. */
export function sampling() {
  const fields = {};
  for (const name of /** @type {(keyof typeof NUMBERS)[]} */ (Object.keys(NUMBERS))) {
    const text = String(options[name]);
    if (text.trim() && !mistakeIn(name, text)) fields[NUMBERS[name].field] = Number(text);
  }
  return fields;
}
