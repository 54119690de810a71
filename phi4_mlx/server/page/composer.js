/** The composer: the field for a question, its draft, and the button that sends or stops. */
import { current, opened, save } from "./conversation.js";
import { $ } from "./dom.js";
import { exchangeOf } from "./exchange.js";
import { toLatest } from "./log.js";

const DRAFT_MS = 300; // from the last key to the save of the draft

let edited = null; // the question that the user edits
let timer = 0;
let forget = () => {};

/** True if a key sends; an Enter that ends an input method's composition does not (its keyCode in Safari is 229). */
const isSend = ({ key, shiftKey, isComposing, keyCode }) =>
  key === "Enter" && !shiftKey && !isComposing && keyCode !== 229;

/** Asks a question in the conversation on the page. */
export function ask(text) {
  if (!text.trim()) return;
  const exchange = exchangeOf(current);
  const question = edited;
  endEdit();
  toLatest();
  if (question) exchange.replace(question, text);
  else exchange.ask(text);
}

/** Begins to edit a question. */
export function edit(question) {
  edited = question;
  $("editing").hidden = false;
  setInput(question.content);
  $("input").focus();
}

function endEdit() {
  edited = null;
  $("editing").hidden = true;
  setInput("");
  keepDraft();
}

function setInput(text) {
  $("input").value = text;
  fit();
}

function fit() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
  $("send").disabled = !$("input").value.trim();
  drawButtons(exchangeOf(current));
}

/** While an answer grows, the button stops it, unless there is a text to send. */
function drawButtons({ busy }) {
  const stopHadFocus = document.activeElement === $("stop");
  const empty = !$("input").value.trim();
  $("stop").hidden = !busy;
  $("send").hidden = busy && empty;
  $("send").ariaLabel = $("send").title = busy ? "Send after this answer" : "Send";
  if (stopHadFocus && $("stop").hidden) $("input").focus();
}

/** Keeps what is in the field, except for a question that is edited. */
function keepDraft() {
  clearTimeout(timer);
  const draft = edited ? "" : $("input").value;
  if (draft === current.draft) return;
  current.draft = draft;
  save();
}

function onOpened(conversation) {
  const exchange = exchangeOf(conversation);
  forget();
  forget = exchange.changed.listen(() => drawButtons(exchange));
  edited = null;
  $("editing").hidden = true;
  setInput(conversation.draft);
}

function onInput() {
  fit();
  clearTimeout(timer);
  timer = setTimeout(keepDraft, DRAFT_MS);
}

function onEscape(event) {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if (exchangeOf(current).busy) exchangeOf(current).stop();
  else if (edited) endEdit();
}

/** Makes the composer work. */
export function bindComposer() {
  const send = (event) => {
    event.preventDefault();
    ask($("input").value);
  };
  $("composer").addEventListener("submit", send);
  $("input").addEventListener("keydown", (event) => { if (isSend(event)) send(event); });
  $("input").addEventListener("input", onInput);
  $("stop").addEventListener("click", () => exchangeOf(current).stop());
  $("cancel-edit").addEventListener("click", endEdit);
  opened.listen(onOpened);
  document.addEventListener("keydown", onEscape);
  addEventListener("pagehide", () => {
    keepDraft();
    if (exchangeOf(current).busy) save();
  });
}
