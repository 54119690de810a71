/** The log: the turns of the conversation on the page, the questions that wait, and what went wrong. */
import { adopted, copied, current, fresh, labelOf, open, opened, save, unsaved } from "./conversation.js";
import { $, icon, iconButton, make } from "./dom.js";
import { exchangeOf } from "./exchange.js";
import { tell } from "./notice.js";
import { options } from "./settings/options.js";
import { endElsewhere } from "./storage/tab_lock.js";
import { AnswerView, QuestionView } from "./turns.js";

const WARM = 0.8; // at temperature 0 another answer would be the same
const NEAR = 40; // pixels from the end at which the view follows it

/** @type {Map<object, QuestionView | AnswerView>} the views on the page by message */
const views = new Map();
let pinned = true; // the view is at the end of the log, and follows it
let lastTop = 0; // pixels, at the last scroll
let problems = 0; // draws of what is missing
let offered = false; // the notice offers to go on
let forget = []; // ends of the listeners to the exchange on the page

/** @type {{edit: (question: object) => void, takeBack: (text: string) => void}} */
let composer;

/**
 * Shows conversations from now on.
 * @param {typeof composer} hands what the composer does with a question
 */
export function bindLog(hands) {
  composer = hands;
  opened.listen(showConversation);
  adopted.listen((conversation) => draw(exchangeOf(conversation)));
  copied.listen(() => tell("Another tab has gone on with this conversation; here it goes on as a copy."));
  unsaved.listen((error) => tell(error.message, { bad: true, action: "Retry", run: () => save() }));
  $("latest").addEventListener("click", toLatest);
  $("scroller").addEventListener("scroll", watchScroll, { passive: true });
  const sizes = new ResizeObserver(follow); // the log grows, a formula is set, a keyboard opens
  for (const id of ["scroller", "log", "queue", "notice"]) sizes.observe($(id));
}

/** Shows the end of the log, and follows it. */
export function toLatest() {
  pinned = true;
  follow();
}

/** Begins a new conversation. */
export function newConversation() {
  const { messages, queued, draft, attached = [] } = current;
  if (messages.length || queued.length || draft || attached.length) open(fresh());
  $("input").focus();
}

function showConversation(conversation) {
  const exchange = exchangeOf(conversation);
  forget.forEach((end) => end());
  forget = [
    exchange.changed.listen(() => draw(exchange)),
    exchange.grown.listen((message) => views.get(message)?.drawSoon()),
  ];
  views.clear();
  $("log").replaceChildren();
  tell("");
  pinned = true;
  $("scroller").scrollTop = 0;
  draw(exchange);
}

/** Makes the log equal to the conversation; a turn that stays keeps its element. */
function draw(exchange) {
  const { messages, queued } = exchange.conversation;
  const turns = messages.filter((it) => it.role !== "tool"); // a call shows its result
  const kept = new Set(turns);
  for (const [message, view] of views) {
    if (kept.has(message)) continue;
    view.element.remove();
    views.delete(message);
  }
  for (const message of turns) {
    if (!views.has(message)) {
      views.set(message, viewOf(message, exchange));
      $("log").append(views.get(message).element);
    }
    views.get(message).draw();
  }
  document.title = [exchange.conversation.title, "phi4_mlx"].filter(Boolean).join(" · ");
  $("empty").hidden = Boolean(turns.length || queued.length);
  document.body.classList.toggle("busy", exchange.busy);
  $("log").ariaBusy = String(exchange.busy); // a screen reader waits for the complete answer
  drawQueue(exchange);
  drawProblem(exchange);
}

function viewOf(message, exchange) {
  if (message.role === "user") return new QuestionView(message, composer.edit);
  const again = () => exchange.again(Math.max(Number(options.temperature) || 0, WARM));
  return new AnswerView(message, exchange, again);
}

function drawQueue(exchange) {
  const { busy, conversation: { queued } } = exchange;
  const items = queued.map((question, i) => {
    const takeBack = () => {
      const { text, media } = exchange.takeBack(i);
      composer.takeBack(text, media);
    };
    const back = iconButton("close", "Take back", takeBack);
    return make("li", {}, icon("queue"), make("span", {}, labelOf(question)), back);
  });
  const next = make("button.plain", { type: "button", onclick: () => exchange.askNext() }, "Send now");
  if (!busy && items.length) items[0].lastChild.before(next);
  $("queue").replaceChildren(...items);
  $("queue").hidden = !items.length;
}

/** Offers to go on where an answer is missing, unless another tab is at it; takes back an offer that is out of date. */
async function drawProblem(exchange) {
  const { problem, busy, conversation } = exchange;
  const drawn = ++problems;
  const offer = busy ? null : problem ? [problem, "Retry"] : openEnd(conversation.messages.at(-1));
  const elsewhere = offer && !problem ? await endElsewhere(conversation.id) : null;
  if (drawn !== problems) return;
  if (busy || (offered && !offer)) tell("");
  offered = Boolean(offer);
  elsewhere?.end.then(() => { if (drawn === problems) draw(exchange); });
  if (elsewhere) tell("Another tab is answering.");
  else if (offer) tell(offer[0], { bad: Boolean(problem), action: offer[1], run: () => exchange.resume() });
}

/** What is missing after a last message, and the offer to get it. */
function openEnd(last) {
  if (last?.role === "user") return ["The last question has no answer.", "Ask again"];
  return ["", "error"].includes(last?.finish) ? ["The last answer is not complete.", "Answer again"] : null;
}

function follow() {
  if (pinned && $("empty").hidden) $("scroller").scrollTop = $("scroller").scrollHeight;
}

/** Follows the end until the user scrolls up; a log that has grown since the last scroll is no reason to stop. */
function watchScroll() {
  const { scrollTop, scrollHeight, clientHeight } = $("scroller");
  const near = scrollHeight - scrollTop - clientHeight < NEAR;
  pinned = near || (pinned && scrollTop >= lastTop);
  lastTop = scrollTop;
  $("latest").hidden = pinned || !$("empty").hidden;
}
