/** Requests to the server, and the events of its streams. */
import { Signal } from "./signal.js";
import { keep, recall } from "./storage/local.js";

/** The server answers again. @type {Signal} */
export const returned = new Signal();

let lost = false; // the last request got no answer

/** A request that failed; the message is one line for the user. */
export class RequestError extends Error {
  /**
   * @param {string} message
   * @param {number} [status] of the answer; 0 if there is none
   */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

let key = recall("localStorage", "key", "");

/** Asks the user for a key; resolves to false if there is none. @type {(wrong: boolean) => Promise<boolean>} */
let askForKey = async () => false;

/** Sets the function that asks the user for a key. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** The key that is sent; "" for none. */
export const currentKey = () => key;

/** Sends a key from now on, and keeps it in this browser. */
export function useKey(text) {
  key = text;
  keep("localStorage", "key", key || undefined);
}

/**
 * Sends a request. If the server requires a key, the user is asked for it, and the request is sent again.
 * @param {string} path relative to the page
 * @param {{body?: object, signal?: AbortSignal}} [options] a body makes it a POST
 * @returns {Promise<Response>}
 * @throws {RequestError}
 */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const sent = key;
    const response = await attempt(path, body, signal, sent);
    if (response.ok) return response;
    if (response.status !== 401) throw await refusal(response);
    if (key !== sent) continue; // another request has got a new key meanwhile
    if (!(await askForKey(Boolean(sent)))) throw new RequestError("The server requires a key.", 401);
    signal?.throwIfAborted();
  }
}

/**
 * True if the server accepts a key.
 * @param {string} other
 * @returns {Promise<boolean>}
 * @throws {RequestError} no answer
 */
export async function accepts(other) {
  const response = await attempt("v1/models", undefined, undefined, other);
  return response.status !== 401;
}

async function attempt(path, body, signal, key) {
  const headers = new Headers();
  if (key) headers.set("Authorization", `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`); // as UTF-8
  if (body) headers.set("Content-Type", "application/json");
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    signal?.throwIfAborted();
    lost = true;
    throw new RequestError("The server does not answer. Is it running?");
  }
  if (lost) {
    lost = false;
    returned.tell();
  }
  return response;
}

async function refusal(response) {
  const told = await response.json().catch(() => null);
  const message = told?.error?.message ?? `The server answered with status ${response.status}.`;
  return new RequestError(message, response.status);
}

/**
 * The JSON of a stream's events, as they arrive.
 * @param {Response} response
 * @returns {AsyncGenerator<any>}
 * @throws {RequestError} the stream broke off
 */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ""; ;) {
      const { done, value } = await read(reader);
      if (done) throw new RequestError("The connection ended before the answer did.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // a comment that keeps the connection alive
        const data = line.slice("data:".length).trim();
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("The connection ended before the answer did.");
  }
}
