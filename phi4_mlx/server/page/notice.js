/** The notice: one line under the conversation, with an optional action. */
import { $ } from "./dom.js";

/**
 * Shows one line; "" hides it.
 * @param {string} text
 * @param {{bad?: boolean, action?: string, run?: () => void}} [options] an action has a button that runs it
 */
export function tell(text, { bad = false, action = "", run = () => {} } = {}) {
  $("notice").hidden = !text;
  $("notice").classList.toggle("bad", bad);
  $("notice-text").textContent = text;
  $("notice-action").textContent = action;
  $("notice-action").hidden = !action;
  $("notice-action").onclick = () => {
    tell("");
    run();
  };
}

/** Makes the notice's own button work. */
export function bindNotice() {
  $("notice-close").addEventListener("click", () => tell(""));
}
