/** A reply of the model: the request for it, and reading it as it comes. */
import { eventsOf, request } from "./api.js";
import { contentOf } from "./media/medium.js";
import { isReasoning } from "./models.js";
import { tools } from "./server_tools.js";
import { options, sampling } from "./settings/options.js";
import { splitThought } from "./thought.js";

/** @typedef {import("./conversation.js").Message} Message */

/**
 * The body of a request for the next reply.
 * @param {Message[]} messages
 * @param {number} [temperature] in place of the user's; the seed is left out then, or the reply might be the same again
 * @returns {object}
 */
export function bodyOf(messages, temperature) {
  const system = options.system.trim() ? [{ role: "system", content: options.system }] : [];
  const sent = messages.map(({ role, content, media, tool_calls, tool_call_id }) => ({
    role, content: contentOf({ content, media }), tool_calls, tool_call_id, // JSON omits the undefined ones
  }));
  return {
    model: options.model,
    messages: [...system, ...sent],
    ...(!isReasoning() && { temperature: 0 }), // unless the user sets one; a reasoning model has the server's
    ...sampling(),
    ...(temperature !== undefined && { temperature, seed: undefined }),
    ...(options.tools && tools.length && { tools }),
    stream: true,
    stream_options: { include_usage: true },
  };
}

/**
 * Requests a reply and fills a message with what comes.
 * @param {object} body
 * @param {Message} reply
 * @param {AbortSignal} signal
 * @param {() => void} grown the reply has grown
 * @throws {Error} it broke off; the reply has what had come
 */
export async function receive(body, reply, signal, grown) {
  const response = await request("v1/chat/completions", { body, signal });
  const ignored = response.headers.get("x-phi4-ignored");
  if (ignored) reply.ignored = ignored;
  const text = { content: "", thought: "" };
  let first = 0;
  try {
    for await (const event of eventsOf(response)) {
      if (!take(event, reply, text)) continue;
      const now = performance.now();
      first ||= now;
      reply.seconds = (now - first) / 1000;
      grown();
    }
  } finally {
    show(text, reply, false);
  }
  reply.finish ||= "stop";
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
