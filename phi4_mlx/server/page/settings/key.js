/** The key of a server that requires one: asked for once, checked, and kept in this browser. */
import { accepts, onKeyNeeded, useKey } from "../api.js";
import { $ } from "../dom.js";

const WRONG = "The server does not accept this key.";

/** The question that is on the page; all requests that need a key wait for it. @type {Promise<boolean> | null} */
let asking = null;

function ask(wrong) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    showMistake(wrong ? "The server does not accept the key that this browser keeps." : "");
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "accepted"), { once: true });
  }).finally(() => { asking = null; });
  return asking;
}

function showMistake(text) {
  $("key-mistake").textContent = text;
  $("new-key").setAttribute("aria-invalid", String(Boolean(text)));
  $("key-settings").hidden = !text;
}

async function submit(event) {
  event.preventDefault();
  const key = $("new-key").value.trim();
  $("key-send").disabled = true;
  let mistake = WRONG;
  try {
    if (key && (await accepts(key))) mistake = "";
  } catch (error) {
    mistake = error.message;
  }
  $("key-send").disabled = false;
  if (mistake) {
    showMistake(mistake);
    return $("new-key").select();
  }
  useKey(key);
  $("new-key").value = "";
  $("key-dialog").close("accepted");
}

/**
 * Makes the page ask for a key when the server requires one.
 * @param {() => void} openSettings
 * @param {() => void} onKey the server has accepted a key
 */
export function bindKey(openSettings, onKey) {
  onKeyNeeded(ask);
  $("key-dialog").addEventListener("close", () => { if ($("key-dialog").returnValue === "accepted") onKey(); });
  $("key-form").addEventListener("submit", submit);
  $("key-later").addEventListener("click", () => $("key-dialog").close());
  $("key-settings").addEventListener("click", () => {
    $("key-dialog").close();
    openSettings();
  });
}
