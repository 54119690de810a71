/** The dialog with the settings. */
import { currentKey, useKey } from "../api.js";
import { $ } from "../dom.js";
import { mistakeIn, NUMBERS, options, setOptions } from "./options.js";

const FIELDS = { system: "system", temperature: "temperature", "top-p": "topP", seed: "seed", "max-tokens": "maxTokens" };

function bindField(id, name) {
  const note = $(`${id}-note`);
  const usual = note?.textContent;
  const check = () => {
    const mistake = name in NUMBERS ? mistakeIn(name, $(id).value) : "";
    $(id).setAttribute("aria-invalid", String(Boolean(mistake)));
    note?.classList.toggle("bad", Boolean(mistake));
    if (note) note.textContent = mistake || usual;
    return !mistake;
  };
  $(id).value = options[name];
  check();
  $(id).addEventListener("input", () => { if (check()) setOptions({ [name]: $(id).value }); });
}

/** Opens the settings. */
export function openSettings() {
  $("key").value = currentKey();
  $("settings").showModal();
}

/**
 * Makes the settings work.
 * @param {() => void} onKey a new key has been entered
 */
export function bindSettings(onKey) {
  for (const [id, name] of Object.entries(FIELDS)) bindField(id, name);
  $("key").addEventListener("change", () => {
    useKey($("key").value.trim());
    onKey();
  });
  $("open-settings").addEventListener("click", openSettings);
  $("settings").addEventListener("click", ({ target }) => { if (target === $("settings")) target.close(); });
  $("settings").addEventListener("submit", (event) => {
    event.preventDefault();
    $("settings").close();
  });
}
