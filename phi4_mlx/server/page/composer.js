/** The composer: the field for a question, its draft, and the buttons that send and stop. */
import { opened, save } from "./conversation.js";
import { $ } from "./dom.js";
import { exchangeOf } from "./exchange.js";
import { toLatest } from "./log.js";
import { attached, changed as trayChanged, setAttached } from "./media/tray.js";

const DRAFT_MS = 300; // from the last key to the save of the draft

/**
 * The conversation whose draft is in the field; null before the first.
 * @type {import("./conversation.js").Conversation}
 */
let shown = null;
let edited = null; // the question that the user edits instead
let timer = 0;
let forget = () => {};

/** True if a key sends; an Enter that ends an input method's composition does not (its keyCode in Safari is 229). */
const isSend = ({ key, shiftKey, isComposing, keyCode }) =>
  key === "Enter" && !shiftKey && !isComposing && keyCode !== 229;

/** @typedef {import("./media/medium.js").Medium} Medium */

/**
 * Asks a question in the conversation on the page.
 * @param {string} text
 * @param {Medium[]} [media]
 */
export function ask(text, media = []) {
  if (!text.trim() && !media.length) return;
  toLatest();
  exchangeOf(shown).ask(text, media);
}

/** Sends what is in the field: a new question, or an edited one in the place of the old. */
function send(event) {
  event.preventDefault();
  const [text, media] = [$("input").value, attached()];
  if (isEmpty() || !shown) return;
  if (edited) {
    exchangeOf(shown).replace(edited, text, media);
    toLatest();
    return endEdit();
  }
  setInput("");
  if (media.length) setAttached([]);
  keepDraft();
  ask(text, media);
}

/**
 * Begins to edit a question; the draft comes back afterwards.
 * @param {import("./conversation.js").Message} question
 */
export function edit(question) {
  keepDraft();
  edited = question;
  $("editing").hidden = false;
  setAttached(question.media ?? []);
  setInput(question.content);
  $("input").focus();
}

function endEdit() {
  edited = null;
  $("editing").hidden = true;
  showKept();
  $("input").focus();
}

/** Shows the draft of the conversation and its attachments. */
function showKept(early = "") {
  setAttached(shown.attached ?? []);
  setInput([shown.draft, early].filter(Boolean).join("\n\n"));
}

/**
 * Adds a text and media to what is in the composer.
 * @param {string} text
 * @param {Medium[]} [media]
 */
export function addToDraft(text, media = []) {
  setAttached([...attached(), ...media]);
  setInput([$("input").value, text].filter((it) => it.trim()).join("\n\n"));
  keepDraft();
  $("input").focus();
}

function setInput(text) {
  $("input").value = text;
  fit();
}

function fit() {
  if (!CSS.supports("field-sizing", "content")) {
    $("input").style.height = "auto";
    $("input").style.height = `${$("input").scrollHeight}px`;
  }
  drawButtons();
}

const isEmpty = () => !$("input").value.trim() && !attached().length;

/** While an answer grows there is a button to stop it, and one to send if there is something to send. */
function drawButtons() {
  if (!shown) return;
  const { busy } = exchangeOf(shown);
  const empty = isEmpty();
  const stopHadFocus = document.activeElement === $("stop");
  $("stop").hidden = !busy;
  $("send").hidden = busy && empty;
  $("send").disabled = empty;
  $("send").ariaLabel = $("send").title = busy ? "Send after this answer" : "Send";
  if (stopHadFocus && !busy) $("input").focus();
}

/** Keeps what is in the composer with its conversation, unless it is an edited question. */
function keepDraft() {
  clearTimeout(timer);
  const draft = $("input").value;
  if (edited || !shown || (draft === shown.draft && attached() === shown.attached)) return;
  Object.assign(shown, { draft, attached: attached() });
  save(shown);
}

function showDraft(conversation) {
  const early = shown ? "" : $("input").value; // typed before the page was ready
  keepDraft(); // of the one before
  forget();
  shown = conversation;
  forget = exchangeOf(shown).changed.listen(drawButtons);
  edited = null;
  $("editing").hidden = true;
  shown.attached ??= [];
  showKept(early);
  keepDraft();
}

function onEscape(event) {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if (!shown) return;
  if (exchangeOf(shown).busy) exchangeOf(shown).stop();
  else if (edited) endEdit();
}

/** Makes the composer work. */
export function bindComposer() {
  $("composer").addEventListener("submit", send);
  $("input").addEventListener("keydown", (event) => { if (isSend(event)) send(event); });
  $("input").addEventListener("input", () => {
    fit();
    clearTimeout(timer);
    timer = setTimeout(keepDraft, DRAFT_MS);
  });
  trayChanged.listen(() => {
    drawButtons();
    keepDraft();
  });
  $("stop").addEventListener("click", () => exchangeOf(shown).stop());
  $("cancel-edit").addEventListener("click", endEdit);
  opened.listen(showDraft);
  document.addEventListener("keydown", onEscape);
  addEventListener("pagehide", () => {
    keepDraft();
    if (shown && exchangeOf(shown).busy) save(shown);
  });
}
