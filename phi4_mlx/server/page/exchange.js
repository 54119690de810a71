/** An exchange: questions, answers and tool calls of one conversation, as they happen. Knows nothing of the page. */
import { answering, labelOf, partsOf, save, titleOf } from "./conversation.js";
import { bodyOf, receive } from "./reply.js";
import { runTool } from "./server_tools.js";
import { Signal } from "./signal.js";
import { holdUntil } from "./storage/tab_lock.js";

/** @typedef {import("./conversation.js").Conversation} Conversation */
/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {import("./conversation.js").ToolCall} ToolCall */

const SAVE_MS = 500; // between two saves of an answer that grows
const ROUNDS = 10; // of calls that run without a question; then the user is asked again
const DECLINED = "The user declined to run this tool.";

/** @type {WeakMap<Conversation, Exchange>} */
const exchanges = new WeakMap();

/**
 * The exchange of a conversation; it goes on while another conversation is on the page.
 * @param {Conversation} conversation
 * @returns {Exchange}
 */
export function exchangeOf(conversation) {
  if (!exchanges.has(conversation)) exchanges.set(conversation, new Exchange(conversation));
  return exchanges.get(conversation);
}

export class Exchange {
  /** Something has changed that is not the text of the last answer. */
  changed = new Signal();
  /** The last answer has grown; the value is its message. */
  grown = new Signal();
  /** Why there is no answer, in one line; "" if nothing is wrong. */
  problem = "";
  /** The ids of the calls that run now. @type {Set<string>} */
  running = new Set();

  #controller = null;
  #done = Promise.resolve();
  #rounds = 0;
  #saved = 0; // when the answer that grows was kept

  /** @param {Conversation} conversation */
  constructor(conversation) {
    this.conversation = conversation;
  }

  /** True while an answer is being generated or a tool runs. */
  get busy() {
    return this.#controller !== null;
  }

  /** Asks a question; while an answer is being generated, the question waits for its end. */
  async ask(text, media = []) {
    this.conversation.queued.push(media.length ? { text, media } : text);
    this.#note();
    if (!this.busy) await this.askNext();
  }

  /** Asks the first waiting question. Calls that the user has not decided on are declined. */
  async askNext() {
    const { conversation } = this;
    if (this.busy || !conversation.queued.length) return;
    for (const call of this.pending) this.#giveResult(call, DECLINED, true);
    const question = conversation.queued.shift();
    const { text, media } = partsOf(question);
    conversation.messages.push({ role: "user", content: text, ...(media.length && { media }) });
    conversation.title ||= titleOf(labelOf(question));
    await this.#go();
  }

  /** Takes a waiting question back; returns it. */
  takeBack(index) {
    const [question] = this.conversation.queued.splice(index, 1);
    this.#note();
    return partsOf(question);
  }

  /** Replaces a question and everything after it. */
  async replace(question, text, media = []) {
    await this.stop();
    const { messages, queued } = this.conversation;
    const at = messages.indexOf(question);
    if (at >= 0) messages.length = at;
    queued.unshift(media.length ? { text, media } : text);
    await this.askNext();
  }

  /** Replaces the last answer by another one. */
  async again(temperature) {
    if (this.busy) return;
    const { messages } = this.conversation;
    const at = messages.findLastIndex((it) => it.role === "assistant");
    if (at >= 0 && (at === messages.length - 1 || this.pending.length)) messages.length = at;
    await this.#go(temperature);
  }

  /** Does again what has failed or was broken off. */
  async resume() {
    if (this.pending.length) await this.#go();
    else await this.again();
  }

  /** Stops the answer and the tools that run; what has come so far is kept. */
  async stop() {
    this.#controller?.abort();
    await this.#done;
  }

  /** The calls of the last answer that have no result yet. @returns {ToolCall[]} */
  get pending() {
    const { messages } = this.conversation;
    const at = messages.findLastIndex((it) => it.role === "assistant");
    const results = messages.slice(at + 1);
    if (at < 0 || results.some((it) => it.role !== "tool")) return [];
    return (messages[at].tool_calls ?? []).filter((call) => !results.some((it) => it.tool_call_id === call.id));
  }

  /** Runs a call; goes on when it was the last without a result. `always` allows this tool in this conversation. */
  async run(call, always = false) {
    const { allowed } = this.conversation;
    if (this.busy || !this.pending.includes(call)) return;
    if (always && !allowed.includes(call.function.name)) allowed.push(call.function.name);
    if (await this.#work((signal) => this.#runOne(call, signal))) await this.#continue();
  }

  /** Answers a call with a result that says that the user declined. */
  async decline(call) {
    if (this.busy || !this.pending.includes(call)) return;
    this.#giveResult(call, DECLINED, true);
    this.#note();
    await this.#continue();
  }

  /** Does work that the user can stop; true if it came to its end. */
  async #work(work) {
    this.#controller = new AbortController();
    answering.add(this.conversation);
    this.problem = "";
    this.changed.tell();
    const { signal } = this.#controller;
    this.#done = work(signal).catch((error) => {
      if (!signal.aborted) this.problem = error.message;
    });
    holdUntil(this.conversation.id, this.#done);
    await this.#done;
    this.#controller = null;
    answering.delete(this.conversation);
    this.running.clear();
    this.#note();
    return !signal.aborted && !this.problem;
  }

  /** Requests answers and runs the calls in them that the user has allowed, then asks the next waiting question. */
  async #go(temperature) {
    this.#rounds = 0;
    const well = await this.#work(async (signal) => {
      let more = !this.pending.length || (await this.#runAllowed(signal));
      for (; more; more = await this.#runAllowed(signal)) await this.#receive(signal, temperature);
    });
    if (well && !this.pending.length) await this.askNext();
  }

  /** Goes on if each call has a result or is allowed. */
  async #continue() {
    const { allowed } = this.conversation;
    if (this.pending.every((call) => allowed.includes(call.function.name))) await this.#go();
  }

  /** Runs the calls that the user has allowed; true if then each call of the last answer has a result. */
  async #runAllowed(signal) {
    const calls = this.pending.filter((call) => this.conversation.allowed.includes(call.function.name));
    if (!calls.length || ++this.#rounds > ROUNDS) return false;
    for (const call of calls) await this.#runOne(call, signal);
    return !this.pending.length;
  }

  async #runOne(call, signal) {
    this.running.add(call.id);
    this.changed.tell();
    const { content, is_error: failed } = await runTool(call, signal);
    this.running.delete(call.id);
    this.#giveResult(call, content, failed);
    this.#note();
  }

  #giveResult(call, content, failed) {
    this.conversation.messages.push({ role: "tool", tool_call_id: call.id, content, failed });
  }

  /** Requests an answer and keeps what comes of it, even if it breaks off. */
  async #receive(signal, temperature) {
    const { messages } = this.conversation;
    const body = bodyOf(messages, temperature);
    /** @type {Message} */
    const reply = { role: "assistant", content: "", finish: "" };
    messages.push(reply);
    this.#note();
    try {
      await receive(body, reply, signal, () => this.#grow(reply));
    } catch (error) {
      reply.finish = signal.aborted ? "stopped" : "error";
      if (!reply.content && !reply.thought && !reply.tool_calls) messages.splice(messages.indexOf(reply), 1);
      throw error;
    }
  }

  /** Tells that the answer has grown, and keeps it now and then. */
  #grow(reply) {
    this.grown.tell(reply);
    const now = performance.now();
    if (now - this.#saved < SAVE_MS) return;
    this.#saved = now;
    save(this.conversation);
  }

  /** Tells of a change and keeps the conversation. */
  #note() {
    this.conversation.updated = Date.now();
    this.changed.tell();
    save(this.conversation);
  }
}
