/** The log: the turns of the conversation on the page, the questions that wait, and what went wrong. */
import { adopted, current, fresh, open, opened, save, unsaved } from "./conversation.js";
import { $, iconButton, make } from "./dom.js";
import { exchangeOf } from "./exchange.js";
import { notice, tell } from "./notice.js";
import { options } from "./options.js";
import { AnswerView, QuestionView } from "./turns.js";

const WARM = 0.8; // at temperature 0 another answer would be the same

/** @type {Map<object, QuestionView | AnswerView>} the views on the page by message */
let views = new Map();
let pinned = true; // the view is at the end of the log, and follows it
let forget = []; // ends of the listeners to the exchange on the page
let editQuestion = () => {};

/** Shows conversations from now on; `edit` begins to edit a question. */
export function bindLog(edit) {
  editQuestion = edit;
  opened.listen(showConversation);
  adopted.listen((conversation) => draw(exchangeOf(conversation)));
  unsaved.listen((error) => tell(error.message, { bad: true, action: "Retry", run: () => save() }));
  notice.listen(follow);
  $("latest").addEventListener("click", toLatest);
  $("scroller").addEventListener("scroll", watchScroll, { passive: true });
  new ResizeObserver(follow).observe($("scroller")); // a keyboard opens, or the composer grows
}

/** Shows the end of the log, and follows it. */
export function toLatest() {
  pinned = true;
  follow();
}

function showConversation(conversation) {
  const exchange = exchangeOf(conversation);
  forget.forEach((end) => end());
  forget = [
    exchange.changed.listen(() => draw(exchange)),
    exchange.grown.listen((message) => views.get(message)?.drawSoon()),
  ];
  views = new Map();
  $("log").replaceChildren();
  tell("");
  pinned = true;
  draw(exchange);
}

/** Makes the log equal to the conversation; a turn that stays keeps its element. */
function draw(exchange) {
  const { messages, queued } = exchange.conversation;
  const shown = messages.filter((it) => it.role !== "tool"); // a call shows its result
  for (const [message, view] of views) {
    if (shown.includes(message)) continue;
    view.element.remove();
    views.delete(message);
  }
  for (const message of shown) {
    if (!views.has(message)) {
      views.set(message, viewOf(message, exchange));
      $("log").append(views.get(message).element);
    }
    views.get(message).draw();
  }
  $("empty").hidden = Boolean(shown.length || queued.length);
  drawQueue(exchange);
  drawBusy(exchange);
  drawProblem(exchange);
  follow();
}

function viewOf(message, exchange) {
  const temperature = Math.max(Number(options.temperature) || 0, WARM);
  const actions = { edit: editQuestion, again: () => exchange.retry(temperature), drawn: follow };
  return message.role === "user" ? new QuestionView(message, actions) : new AnswerView(message, actions, exchange);
}

function drawQueue(exchange) {
  const { queued } = exchange.conversation;
  $("queue").replaceChildren(...queued.map((text, i) => {
    const back = iconButton("close", "Take back", () => {
      $("input").value ||= exchange.takeBack(i);
      $("input").dispatchEvent(new Event("input"));
      $("input").focus();
    });
    return make("li", {}, make("span.text", {}, text), make("span.note", {}, "waits"), back);
  }));
  $("queue").hidden = !queued.length;
}

function drawBusy({ busy }) {
  document.body.classList.toggle("busy", busy);
  $("log").ariaBusy = String(busy); // a screen reader waits for the complete answer
}

function drawProblem(exchange) {
  const { problem, busy, conversation: { messages, queued } } = exchange;
  const last = messages.at(-1);
  if (problem) return tell(problem, { bad: true, action: "Retry", run: () => exchange.retry() });
  if (busy) return tell("");
  if (last?.role === "user") return tell("The last question has no answer.", { action: "Ask again", run: () => exchange.retry() });
}

/** Begins a new conversation. */
export function newConversation() {
  if (current.messages.length || current.queued.length || current.draft) open(fresh());
  $("input").focus();
}

function follow() {
  if (pinned) $("scroller").scrollTop = $("scroller").scrollHeight;
}

function watchScroll() {
  const { scrollTop, scrollHeight, clientHeight } = $("scroller");
  pinned = scrollHeight - scrollTop - clientHeight < 40;
  $("latest").hidden = pinned;
}
