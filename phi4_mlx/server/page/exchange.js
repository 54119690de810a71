/** An exchange: questions, answers and tool calls of one conversation, as they happen. Knows nothing of the page. */
import { eventsOf, request } from "./api.js";
import { save, titleOf } from "./conversation.js";
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
    const { conversation } = this;
    if (this.busy) {
      conversation.queued.push(text);
      return this.#note();
    }
    this.#declineRest();
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
    const { messages } = this.conversation;
    const at = messages.indexOf(question);
    if (at >= 0) messages.length = at;
    await this.ask(text);
  }

  /** Answers the last question, or goes on from the last results, again. */
  async retry(temperature) {
    if (this.busy) return;
    const { messages } = this.conversation;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    if (messages.length) await this.#go(temperature);
    else await this.#next();
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

  /** Runs a call; goes on when it was the last without a result. */
  async run(call, always = false) {
    const { allowed } = this.conversation;
    if (always && !allowed.includes(call.function.name)) allowed.push(call.function.name);
    this.#rounds = 0;
    if (this.busy || !this.pending.includes(call)) return;
    await this.#work((signal) => this.#runOne(call, signal));
    await this.#continue();
  }

  /** Answers a call with a result that says that the user declined. */
  async decline(call) {
    if (this.busy || !this.pending.includes(call)) return;
    this.#giveResult(call, DECLINED, true);
    this.#note();
    await this.#continue();
  }

  #done = Promise.resolve();

  /** Does work that the user can stop. Afterwards, a waiting question is asked. */
  async #work(work) {
    this.#controller = new AbortController();
    this.problem = "";
    this.changed.tell();
    const { signal } = this.#controller;
    this.#done = (async () => {
      try {
        await work(signal);
      } catch (error) {
        if (!signal.aborted) this.problem = error.message;
      }
      this.#controller = null;
      this.running.clear();
      this.#note();
    })();
    await this.#done;
    return !signal.aborted && !this.problem;
  }

  async #go(temperature) {
    this.#rounds = 0;
    const well = await this.#work(async (signal) => {
      do await this.#receive(signal, temperature);
      while (await this.#runAllowed(signal));
    });
    if (well) await this.#next();
  }

  /** Goes on once each call has a result. */
  async #continue() {
    if (this.problem || this.conversation.messages.at(-1)?.role !== "tool" || this.pending.length) return;
    await this.#go();
  }

  /** Asks the first waiting question. */
  async #next() {
    if (!this.conversation.queued.length || this.pending.length) return;
    await this.ask(this.conversation.queued.shift());
  }

  /** Runs the calls that the user has allowed; true if then each call has a result. */
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

  #declineRest() {
    for (const call of this.pending) this.#giveResult(call, DECLINED, true);
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

  #body(temperature) {
    const system = options.system.trim() ? [{ role: "system", content: options.system }] : [];
    const messages = this.conversation.messages.map(({ role, content, tool_calls, tool_call_id }) => ({
      role, content, tool_calls, tool_call_id, // JSON omits the undefined ones
    }));
    return {
      model: options.model,
      messages: [...system, ...messages],
      ...sampling(),
      ...(temperature !== undefined && { temperature }),
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
