/** The tools that the server runs, if it has any. */
import { request, RequestError } from "./api.js";
import { Signal } from "./signal.js";

/** The server's tools in OpenAI's form. @type {object[]} */
export let tools = [];

/** The tools have been read. @type {Signal} */
export const loaded = new Signal();

/** Reads which tools the server has; a server without the route has none. */
export async function loadTools() {
  try {
    tools = (await (await request("tools")).json()).data;
  } catch (error) {
    if (!(error instanceof RequestError)) throw error;
    tools = [];
  }
  loaded.tell(tools);
}

/**
 * Runs a call on the server.
 * @param {import("./conversation.js").ToolCall} call
 * @param {AbortSignal} signal
 * @returns {Promise<{content: string, is_error: boolean}>}
 * @throws {RequestError}
 */
export async function runTool(call, signal) {
  const { name, arguments: json } = call.function;
  const response = await request("tools/call", { body: { name, arguments: JSON.parse(json) }, signal });
  return response.json();
}
