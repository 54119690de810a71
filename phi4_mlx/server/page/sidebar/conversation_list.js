/** The list of conversations: grouped by day, or what a search has found; one row a conversation. */
import { icon, make } from "../dom.js";
import { placeOf } from "../storage/catalogue.js";

/** @typedef {import("../storage/catalogue.js").Entry} Entry */
/**
 * @typedef {object} Hands what the buttons of a row do
 * @property {(id: string) => void} open
 * @property {(button: HTMLElement, id: string) => void} menu
 * @property {(id: string, title: string) => void} rename
 * @property {(id: string) => void} remove
 */

const DAY_MS = 86_400_000;

/** The heading under which a conversation stands. */
function groupOf(updated) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (updated >= today) return "Today";
  if (updated >= today - DAY_MS) return "Yesterday";
  if (updated >= today - 7 * DAY_MS) return "Last 7 days";
  return updated >= today - 30 * DAY_MS ? "Last 30 days" : "Older";
}

/** The headings of a list with their entries. @returns {Map<string, Entry[]>} */
function groupsOf(entries, query) {
  const groups = new Map();
  for (const entry of entries) {
    const name = query ? "Found" : groupOf(entry.updated);
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(entry);
  }
  return groups;
}

/** One conversation: a button that opens it, a button with its menu, and a field while it is renamed. */
class Row {
  /** @param {Entry} entry @param {Hands} hands */
  constructor({ id }, hands) {
    this.id = id;
    this.hands = hands;
    this.title = make("span.title");
    this.place = make("span.place");
    this.button = make("button.open", { type: "button", onclick: () => hands.open(id) }, this.title, this.place);
    const onclick = () => hands.menu(this.more, id);
    const states = { ariaHasPopup: "menu", ariaExpanded: "false" };
    this.more = make("button.icon.more", { type: "button", onclick, ...states }, icon("more"));
    this.element = make("li", {}, this.button, this.more);
    this.element.dataset.id = id;
  }

  /** @param {Entry} entry @param {{query: string, isCurrent: boolean}} view */
  draw(entry, { query, isCurrent }) {
    this.title.textContent = this.button.title = entry.title;
    this.place.textContent = query ? placeOf(entry, query) : "";
    this.place.hidden = !this.place.textContent;
    this.more.ariaLabel = this.more.title = `More for ${entry.title}`;
    if (isCurrent) this.button.ariaCurrent = "true";
    else this.button.removeAttribute("aria-current");
  }

  /** True if the row can be reached by Tab; only one of the list is, and arrow keys move on. */
  set reachable(reachable) {
    this.button.tabIndex = this.more.tabIndex = reachable ? 0 : -1;
  }

  /** Shows a field with the title; Enter and leaving it keep what is in it, Escape does not. */
  rename() {
    const field = make("input.field", { value: this.title.textContent, ariaLabel: "Title", maxLength: 200 });
    let open = true;
    const close = (kept) => {
      if (!open) return;
      open = false;
      const hadFocus = document.activeElement === field;
      field.replaceWith(this.button);
      if (hadFocus) this.button.focus();
      const title = field.value.trim();
      if (kept && title && title !== this.title.textContent) this.hands.rename(this.id, title);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      close(event.key === "Enter" && !event.isComposing);
    });
    field.addEventListener("blur", () => close(true));
    this.button.replaceWith(field);
    field.select();
    field.focus();
  }
}

export class ConversationList {
  /** @type {Map<string, Row>} */
  #rows = new Map();
  #order = ""; // the headings and rows on the page

  /** @param {Hands} hands what the rows' buttons do */
  constructor(hands) {
    this.hands = hands;
    this.element = make("nav.list", { ariaLabel: "Conversations" });
    this.element.addEventListener("keydown", (event) => this.#onKey(event));
    this.element.addEventListener("focusin", ({ target }) => this.#reach(target.closest("li")?.dataset.id));
  }

  /**
   * Makes the list equal to entries; a row that stays keeps its elements.
   * @param {Entry[]} entries
   * @param {{query: string, currentId: string}} view
   */
  draw(entries, { query, currentId }) {
    for (const entry of entries) {
      if (!this.#rows.has(entry.id)) this.#rows.set(entry.id, new Row(entry, this.hands));
      this.#rows.get(entry.id).draw(entry, { query, isCurrent: entry.id === currentId });
    }
    const groups = groupsOf(entries, query);
    const order = JSON.stringify([...groups].map(([name, group]) => [name, group.map(({ id }) => id)]));
    if (order !== this.#order) this.#arrange(groups);
    this.#order = order;
    const [focused, marked, first] = ["li:focus-within", "li:has([aria-current])", "li"].map((it) =>
      this.element.querySelector(it));
    this.#reach((focused ?? marked ?? first)?.dataset.id);
  }

  /** Begins to rename a conversation. @param {string} id */
  rename(id) {
    this.#rows.get(id)?.rename();
  }

  /** Moves the focus to the first row. */
  focus() {
    this.#buttons()[0]?.focus();
  }

  #arrange(groups) {
    const focused = this.element.contains(document.activeElement) ? document.activeElement : null;
    const { scrollTop } = this.element;
    const sections = [...groups].map(([name, group]) => {
      const items = group.map(({ id }) => this.#rows.get(id).element);
      return make("section", {}, make("h3", {}, name), make("ul", {}, ...items));
    });
    this.element.replaceChildren(...sections);
    this.element.scrollTop = scrollTop;
    if (focused?.isConnected) focused.focus();
    else if (focused) this.focus();
    const shown = new Set([...groups.values()].flat().map(({ id }) => id));
    for (const id of this.#rows.keys()) if (!shown.has(id)) this.#rows.delete(id);
  }

  #buttons() {
    return [...this.element.querySelectorAll(".open")];
  }

  #reach(id) {
    if (id !== undefined) for (const row of this.#rows.values()) row.reachable = row.id === id;
  }

  #onKey(event) {
    const id = event.target.closest("li")?.dataset.id;
    if (!id || event.target.matches("input")) return;
    const buttons = this.#buttons();
    const at = buttons.indexOf(this.#rows.get(id).button);
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (next !== undefined) buttons[next]?.focus();
    else if (event.key === "F2") this.rename(id);
    else if (event.key === "Delete") this.hands.remove(id);
    else return;
    event.preventDefault();
  }
}
