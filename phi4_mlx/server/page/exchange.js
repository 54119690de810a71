/** An exchange: questions, answers and tool calls of one conversation, as they happen. Knows nothing of the page. */
import { eventsOf, request } from "./api.js";
import { answering, save, titleOf } from "./conversation.js";
import { options, sampling } from "./options.js";
import { runTool, tools } from "./server_tools.js";
import { Signal } from "./signal.js";
import { splitThought } from "./thought.js";

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

  /** @param {Conversation} conversation */
  constructor(conversation) {
    this.conversation = conversation;
  }

  /** True while an answer is being generated or a tool runs. */
  get busy() {
    return this.#controller !== null;
  }

  /** Asks a question; while an answer is being generated, the question waits for its end. */
  async ask(text) {
    this.conversation.queued.push(text);
    this.#note();
    if (!this.busy) await this.askNext();
  }

  /** Asks the first waiting question. Calls that the user has not decided on are declined. */
  async askNext() {
    const { conversation } = this;
    if (this.busy || !conversation.queued.length) return;
    for (const call of this.pending) this.#giveResult(call, DECLINED, true);
    const text = conversation.queued.shift();
    conversation.messages.push({ role: "user", content: text });
    conversation.title ||= titleOf(text);
    await this.#go();
  }

  /** Takes a waiting question back; returns its text. */
  takeBack(index) {
    const [text] = this.conversation.queued.splice(index, 1);
    this.#note();
    return text;
  }

  /** Replaces a question and everything after it. */
  async replace(question, text) {
    await this.stop();
    const { messages, queued } = this.conversation;
    const at = messages.indexOf(question);
    if (at >= 0) messages.length = at;
    queued.unshift(text);
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
    const body = this.#body(temperature);
    const reply = { role: "assistant", content: "", finish: "" };
    messages.push(reply);
    this.#note();
    try {
      const response = await request("v1/chat/completions", { body, signal });
      const ignored = response.headers.get("x-phi4-ignored");
      if (ignored) reply.ignored = ignored;
      await this.#read(response, reply);
      reply.finish ||= "stop";
    } catch (error) {
      reply.finish = signal.aborted ? "stopped" : "error";
      if (!reply.content && !reply.thought && !reply.tool_calls) messages.splice(messages.indexOf(reply), 1);
      throw error;
    }
  }

  async #read(response, reply) {
    const text = { content: "", thought: "" };
    let first = 0;
    let saved = performance.now();
    try {
      for await (const event of eventsOf(response)) {
        if (!take(event, reply, text)) continue;
        const now = performance.now();
        first ||= now;
        reply.seconds = (now - first) / 1000;
        this.grown.tell(reply);
        if (now - saved < SAVE_MS) continue;
        saved = now;
        save(this.conversation);
      }
    } finally {
      show(text, reply, false);
    }
  }

  /** A request for the next answer; one at another temperature leaves the seed out, or it might be the same again. */
  #body(temperature) {
    const system = options.system.trim() ? [{ role: "system", content: options.system }] : [];
    const messages = this.conversation.messages.map(({ role, content, tool_calls, tool_call_id }) => ({
      role, content, tool_calls, tool_call_id, // JSON omits the undefined ones
    }));
    return {
      model: options.model,
      messages: [...system, ...messages],
      ...sampling(),
      ...(temperature !== undefined && { temperature, seed: undefined }),
      ...(options.tools && tools.length && { tools }),
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  /** Tells of a change and keeps the conversation. */
  #note() {
    this.conversation.updated = Date.now();
    this.changed.tell();
    save(this.conversation);
  }
}

/** Adds an event of the stream to a reply; true if it had text or calls. */
function take(event, reply, text) {
  if (event.error) throw new Error(event.error.message);
  if (event.usage) reply.usage = event.usage;
  const choice = event.choices?.[0];
  if (choice?.finish_reason) reply.finish = choice.finish_reason;
  const { content, reasoning_content: thought, tool_calls: calls = [] } = choice?.delta ?? {};
  text.content += content ?? "";
  text.thought += thought ?? "";
  for (const { id, function: called } of calls) {
    (reply.tool_calls ??= []).push({ id, type: "function", function: called });
  }
  if (content || thought) show(text, reply, true);
  return Boolean(content || thought || calls.length);
}

/** Sets a reply's answer and reasoning, which come apart or in one text. */
function show(text, reply, growing) {
  const { thought, content } = splitThought(text.content, growing);
  reply.content = content;
  if (text.thought || thought) reply.thought = text.thought + thought;
}
