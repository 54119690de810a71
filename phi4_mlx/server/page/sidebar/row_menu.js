/** The menu of a conversation in the list: a popover that all rows share. */
import { make } from "../dom.js";

/** @typedef {{label: string, run: (id: string) => void}} Action */

/** A menu. Arrow keys move in it; Escape, Tab or a click elsewhere closes it. */
export class RowMenu {
  #id = "";
  #button = null;

  /** @param {Action[]} actions */
  constructor(actions) {
    this.items = actions.map(({ label, run }) => {
      const onclick = () => {
        this.element.hidePopover();
        run(this.#id);
      };
      return make("button", { type: "button", role: "menuitem", tabIndex: -1, onclick }, label);
    });
    this.element = make("div.menu", { popover: "auto", role: "menu", ariaLabel: "Conversation" }, ...this.items);
    this.element.addEventListener("keydown", (event) => this.#move(event));
    this.element.addEventListener("toggle", ({ newState }) => {
      this.#button.ariaExpanded = String(newState === "open");
      if (newState === "closed" && document.activeElement === document.body) this.#button.focus();
    });
  }

  /**
   * Opens the menu beside a button.
   * @param {HTMLElement} button
   * @param {string} id of the conversation
   */
  open(button, id) {
    [this.#button, this.#id] = [button, id];
    const { right, bottom, top } = button.getBoundingClientRect();
    this.element.showPopover();
    const { width, height } = this.element.getBoundingClientRect();
    this.element.style.left = `${Math.max(8, Math.min(right - width, innerWidth - width - 8))}px`;
    this.element.style.top = `${bottom + height < innerHeight ? bottom : Math.max(8, top - height)}px`;
    this.items[0].focus();
  }

  #move(event) {
    const at = this.items.indexOf(document.activeElement);
    const last = this.items.length - 1;
    const next = { ArrowDown: at < last ? at + 1 : 0, ArrowUp: at > 0 ? at - 1 : last, Home: 0, End: last }[event.key];
    if (event.key === "Tab") this.element.hidePopover();
    if (next === undefined) return;
    event.preventDefault();
    this.items[next].focus();
  }
}
