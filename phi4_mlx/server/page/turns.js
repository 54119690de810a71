/** The views of one turn: a question, an answer with its reasoning, and its tool calls. */
import { beforeNextFrame, copy, icon, iconButton, make } from "./dom.js";
import { mediumView } from "./media/medium.js";
import { MarkdownView } from "./text/markdown.js";

/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {import("./conversation.js").ToolCall} ToolCall */
/** @typedef {import("./exchange.js").Exchange} Exchange */

const BRIEF_CHARS = 200;
const ENDS = {
  length: "cut off at the token limit",
  stopped: "stopped",
  error: "broken off",
  interrupted: "not complete",
};

/** A question. */
export class QuestionView {
  /**
   * @param {Message} message
   * @param {(question: Message) => void} edit
   */
  constructor(message, edit) {
    const button = iconButton("edit", "Edit and send again", () => edit(message), ".edit");
    const { content, media = [] } = message;
    const parts = [make("div.text", { hidden: !content.trim() }, content)];
    if (media.length) parts.unshift(make("div.media", {}, ...media.map(mediumView)));
    const column = media.length ? [make("div.column", {}, ...parts)] : parts;
    this.element = make("article.turn.question", { ariaLabel: "You" }, ...column, button);
  }

  draw() {}

  drawSoon() {}
}

/** An answer, drawn again while it grows. */
export class AnswerView {
  /**
   * @param {Message} message
   * @param {Exchange} exchange
   * @param {() => void} again asks for another answer
   */
  constructor(message, exchange, again) {
    this.message = message;
    this.exchange = exchange;
    this.thought = new ThoughtView();
    this.text = make("div.text");
    this.markdown = new MarkdownView(this.text);
    this.calls = make("div.calls");
    this.callViews = new Map();
    this.waiting = make("div.waiting", { role: "img", ariaLabel: "The answer is being generated" });
    this.stats = make("span.stats");
    this.copy = iconButton("copy", "Copy answer", () => copy(message.content, this.copy), ".copy");
    const under = make("div.under", {}, this.copy, iconButton("again", "Answer again", again, ".again"), this.stats);
    const parts = [this.thought.element, this.text, this.calls, this.waiting, under];
    this.element = make("article.turn.answer", { ariaLabel: "Answer" }, ...parts);
    this.drawSoon = beforeNextFrame(() => this.draw());
  }

  /** Draws the message as it is now. */
  draw() {
    const { content, thought = "", finish, tool_calls: calls = [] } = this.message;
    const growing = !finish && this.exchange.busy;
    this.thought.draw(thought, growing && !content);
    this.drawText(content, growing);
    this.drawCalls(calls);
    this.waiting.hidden = !growing || Boolean(content || thought || calls.length);
    this.copy.hidden = !content;
    this.stats.replaceChildren(...statsOf(this.message, growing));
  }

  /** Draws the text if it has changed: the whole log is drawn at each step of an exchange. */
  drawText(content, growing) {
    if (content === this.drawn?.content && growing === this.drawn.growing) return;
    this.drawn = { content, growing };
    this.markdown.draw(content, growing);
  }

  drawCalls(calls) {
    for (const call of calls) {
      if (!this.callViews.has(call)) {
        const view = new CallView(call, this.exchange);
        this.callViews.set(call, view);
        this.calls.append(view.element);
      }
      this.callViews.get(call).draw();
    }
  }
}

/** The reasoning of an answer, folded up. */
class ThoughtView {
  constructor() {
    this.label = make("span");
    this.text = make("div.text");
    this.markdown = new MarkdownView(this.text);
    this.element = make("details.thought", {}, make("summary", {}, this.label, icon("down")), this.text);
    this.element.addEventListener("toggle", () => this.fill());
    this.draw("", false);
  }

  draw(thought, growing) {
    this.element.hidden = !thought;
    this.label.textContent = growing ? "Thinking…" : "Reasoning";
    this.element.classList.toggle("growing", growing);
    this.thought = thought;
    this.growing = growing;
    this.fill();
  }

  /** Draws the text if it can be seen; a long one takes time. */
  fill() {
    if (this.element.open) this.markdown.draw(this.thought, this.growing);
  }
}

/** A call of a tool: its arguments, the user's consent, and its result. */
class CallView {
  constructor(call, exchange) {
    this.call = call;
    this.exchange = exchange;
    const { name, arguments: json } = call.function;
    this.value = parsed(json);
    this.brief = make("span.brief");
    this.state = make("span.state");
    this.results = make("div");
    this.consent = consentOf(call, exchange);
    const summary = make("summary", {}, icon("tool"), make("b", {}, name), this.brief, this.state, icon("down"));
    const pretty = this.value === undefined ? json : JSON.stringify(this.value, null, 2);
    this.details = make("details", {}, summary, ...panel("Arguments", pretty), this.results);
    this.element = make("section.call", { ariaLabel: `Tool call ${name}` }, this.details, this.consent);
  }

  draw() {
    const { conversation, running, busy, pending } = this.exchange;
    const result = conversation.messages.find((it) => it.role === "tool" && it.tool_call_id === this.call.id);
    const isRunning = running.has(this.call.id);
    const asks = !busy && pending.includes(this.call);
    if (asks === this.consent.hidden) this.details.open = asks; // what is to be decided on lies open
    this.consent.hidden = !asks;
    this.state.textContent = isRunning ? "running…" : asks ? "may it run?" : result?.failed ? "failed" : "";
    this.state.classList.toggle("bad", Boolean(result?.failed));
    this.brief.textContent = briefOf(this.value, result);
    if (result && this.result !== result) this.results.replaceChildren(...panel("Result", result.content));
    this.result = result;
  }
}

/** The values of a call's arguments and its result, for one line. */
function briefOf(value, result) {
  const values = Object.values(value ?? {}).map((it) => JSON.stringify(it)).join(", ");
  return (result ? `${values} → ${result.content}` : values).slice(0, BRIEF_CHARS);
}

function panel(title, text) {
  return [make("p.label", {}, title), make("pre", { tabIndex: 0, ariaLabel: title, role: "group" }, text)];
}

/** The buttons with which the user decides on a call. */
function consentOf(call, exchange) {
  const { name } = call.function;
  const button = (label, onclick, kind = "") => make(`button.plain${kind}`, { type: "button", onclick }, label);
  return make(
    "div.consent", { hidden: true },
    button("Run", () => exchange.run(call), ".main"),
    button("Decline", () => exchange.decline(call)),
    button(`Always run ${name} here`, () => exchange.run(call, true)),
  );
}

function parsed(json) {
  try {
    return JSON.parse(json);
  } catch {
    return undefined;
  }
}

/**
 * The line under an answer: tokens, their rate, the reason of an unusual end, and what had no effect.
 * @param {Message} message
 * @param {boolean} growing
 */
function statsOf({ usage, seconds, finish, ignored, content, thought, tool_calls: calls }, growing) {
  if (growing) return [];
  const end = ENDS[finish || "interrupted"];
  const tokens = usage?.completion_tokens;
  const parts = [];
  if (tokens) parts.push(`${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`);
  if (tokens > 1 && seconds > 0.005) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (!content && !thought && !calls) parts.push("the answer is empty");
  if (end) parts.push(make(finish === "stopped" ? "span" : "span.cut", {}, end));
  if (ignored) parts.push(make("span.cut", {}, `ignored: ${ignored}`));
  return parts.flatMap((part, i) => (i ? [" · ", part] : [part]));
}
