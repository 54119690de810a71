/** The list of all conversations, which follows the changes of all tabs, and the search in it. */
import { titleOf } from "../conversation.js";
import { Signal } from "../signal.js";

/**
 * @typedef {object} Entry
 * @property {string} id
 * @property {string} title
 * @property {number} updated
 * @property {string} text the title and all messages
 * @property {string} folded the text as it is searched: lower case, without accents
 */

const AROUND = 40; // characters of a found place on each side

/** Lower case without accents, letter by letter, so that places in it are places in the text. */
function fold(text) {
  const lower = text.replaceAll("İ", "I").toLowerCase(); // the only letter that would become two
  return lower.replace(/[\u00c0-\u04ff\u1e00-\u1fff]/g, (letter) => letter.normalize("NFD")[0]).replaceAll("ς", "σ");
}

function entryOf({ id, title, updated, messages, draft }) {
  const name = title || titleOf(draft) || "New conversation";
  const text = [name, ...messages.filter((it) => it.role !== "tool").map((it) => it.content)].join("\n");
  return { id, title: name, updated, text, folded: fold(text) };
}

/** All conversations, the latest first. */
export class Catalogue {
  /** The list has changed. @type {Signal} */
  changed = new Signal();
  #store;
  /** @type {Map<string, Entry>} */
  #entries = new Map();

  /** @param {import("./store.js").Store} store */
  constructor(store) {
    this.#store = store;
    store.changed.listen(({ id }) => this.#follow(id));
  }

  /** Reads all conversations. */
  async read() {
    for (const conversation of await this.#store.all()) this.#entries.set(conversation.id, entryOf(conversation));
    this.changed.tell();
  }

  async #follow(id) {
    const conversation = await this.#store.load(id).catch(() => null);
    if (conversation) this.#entries.set(id, entryOf(conversation));
    else this.#entries.delete(id);
    this.changed.tell();
  }

  /** @param {string} id @returns {Entry | undefined} */
  get(id) {
    return this.#entries.get(id);
  }

  /**
   * The conversations that have each word of a query in their title or text.
   * @param {string} query
   * @returns {Entry[]} the latest first
   */
  find(query) {
    const words = fold(query).split(/\s+/).filter(Boolean);
    const found = [...this.#entries.values()].filter(({ folded }) => words.every((word) => folded.includes(word)));
    return found.sort((a, b) => b.updated - a.updated);
  }
}

/**
 * The text around the first place of a query outside the title.
 * @param {Entry} entry
 * @param {string} query
 * @returns {string} "" if the query is in the title alone
 */
export function placeOf({ title, text, folded }, query) {
  const [word] = fold(query).split(/\s+/).filter(Boolean);
  const at = word ? folded.indexOf(word, title.length) : -1;
  if (at < 0) return "";
  const [start, end] = [Math.max(title.length + 1, at - AROUND), Math.min(text.length, at + word.length + AROUND)];
  const place = text.slice(start, end).replace(/\s+/g, " ").trim();
  return [start > title.length + 1 ? "…" : "", place, end < text.length ? "…" : ""].join("");
}
