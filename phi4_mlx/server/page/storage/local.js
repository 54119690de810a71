/** Small values in the browser's storage. It may be forbidden or full, or hold values of an older page. */

const PREFIX = "phi4_mlx.";

/**
 * A stored value.
 * @template T
 * @param {"localStorage" | "sessionStorage"} area
 * @param {string} name
 * @param {T} fallback if there is none
 * @returns {T}
 */
export function recall(area, name, fallback) {
  try {
    return JSON.parse(window[area].getItem(PREFIX + name)) ?? fallback;
  } catch {
    return fallback;
  }
}

/**
 * Stores a value.
 * @param {"localStorage" | "sessionStorage"} area
 * @param {string} name
 * @param {unknown} value undefined deletes it
 * @returns {boolean} false if the storage is full or forbidden
 */
export function keep(area, name, value) {
  try {
    if (value === undefined) window[area].removeItem(PREFIX + name);
    else window[area].setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** The names of the stored values. @returns {string[]} */
export function names() {
  try {
    return Object.keys(localStorage).filter((it) => it.startsWith(PREFIX)).map((it) => it.slice(PREFIX.length));
  } catch {
    return [];
  }
}
