/**
 * The conversation on the page, and where conversations are kept.
 *
 * @typedef {object} ToolCall
 * @property {string} id
 * @property {"function"} type
 * @property {{name: string, arguments: string}} function arguments is JSON
 *
 * @typedef {object} Message a message in the server's form, with more fields for the page
 * @property {"user" | "assistant" | "tool"} role
 * @property {string} content
 * @property {import("./media/medium.js").Medium[]} [media] of a question: what comes before its text
 * @property {ToolCall[]} [tool_calls] of an answer
 * @property {string} [tool_call_id] of a result
 * @property {boolean} [failed] of a result: the tool reported an error, or the user declined
 * @property {string} [thought] of an answer: its reasoning
 * @property {string} [finish] of an answer: "" while it grows, then "stop", "length", "tool_calls", "stopped" (by the
 *   user), "error", or "interrupted" (the page was closed)
 * @property {{completion_tokens: number, prompt_tokens: number}} [usage]
 * @property {number} [seconds] from the first to the last piece
 * @property {string} [ignored] what had no effect on the answer
 *
 * @typedef {string | {text: string, media: import("./media/medium.js").Medium[]}} Question
 *
 * @typedef {object} Conversation
 * @property {string} id
 * @property {string} title "" until the first question, which names it
 * @property {Message[]} messages
 * @property {number} updated milliseconds since 1970
 * @property {string} draft the text in the composer
 * @property {import("./media/medium.js").Medium[]} [attached] the pictures and sounds in the composer
 * @property {Question[]} queued questions that wait for the answer to end
 * @property {number} [revision] the number of its saves; set by the store, like `created`
 * @property {number} [created] milliseconds since 1970
 * @property {string[]} allowed tools that run without a question in this conversation
 *
 * @typedef {object} Store
 * @property {(id: string) => Promise<Conversation | null>} load
 * @property {(conversation: Conversation) => Promise<string>} save keeps a copy. If another tab has changed the
 *   stored one since, nothing is lost: it takes over a newer one, or keeps both and gives this one a new id. Gives "same",
 *   "newer" or "copy"; rejects with an Error whose message is for the user.
 * @property {(conversation: Conversation) => Promise<void>} discard removes one that has become empty
 * @property {Signal} changed a conversation has changed; the value is { id, here }, `here` true for this tab's changes
 */
import { Signal } from "./signal.js";
import { keep, recall } from "./storage/local.js";

const TITLE_CHARS = 60;

/** The conversations that are being answered in this tab. @type {Set<Conversation>} */
export const answering = new Set();

/** Another conversation is on the page. @type {Signal} */
export const opened = new Signal();

/** Another tab has changed the conversation on the page. @type {Signal} */
export const adopted = new Signal();

/** Another tab has gone on with the conversation on the page; what is here has become a copy. @type {Signal} */
export const copied = new Signal();

/** A conversation could not be kept; the value is an Error. @type {Signal} */
export const unsaved = new Signal();

/** @type {Store} */
let store = { load: async () => null, save: async () => "same", discard: async () => {}, changed: new Signal() };

/** The conversation on the page. @type {Conversation} */
export let current = fresh();

/**
 * Keeps conversations in a store from now on.
 * @param {Store} other
 */
export function connect(other) {
  store = other;
  store.changed.listen(({ id, here }) => { if (!here) follow(id); });
}

/** Follows what another tab has done to the conversation on the page, unless it is being changed here. */
async function follow(id) {
  const idle = () => id === current.id && !answering.has(current) && !keeping.has(current);
  if (!idle()) return;
  const stored = await store.load(id).catch(() => undefined);
  if (!idle() || stored === undefined) return;
  if (!stored) adopt({ ...fresh(), revision: 0, created: Date.now() }); // deleted; what is being written goes on
  else if (stored.revision !== current.revision) adopt(stored);
}

/** An id that no other conversation has. @returns {string} */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (it) => it.toString(16).padStart(2, "0")).join("");
}

/**
 * A new conversation, which is kept once there is something in it.
 * @returns {Conversation}
 */
export function fresh() {
  return { id: newId(), title: "", messages: [], updated: Date.now(), draft: "", queued: [], allowed: [] };
}

/**
 * Shows a conversation on the page.
 * @param {Conversation} conversation
 */
export function open(conversation) {
  current = conversation;
  keep("sessionStorage", "open", current.id);
  opened.tell(current);
}

/**
 * Takes over what another tab has made of the conversation on the page; the draft stays. Not for one that is being
 * answered in this tab.
 * @param {Conversation} stored
 */
export function adopt(stored) {
  const { draft, attached } = current;
  Object.assign(current, stored, { draft, attached });
  keep("sessionStorage", "open", current.id);
  adopted.tell(current);
}

/**
 * Shows a stored conversation, or a new one if there is none with that id. One that is being answered goes on.
 * @param {string} id
 */
export async function openById(id) {
  const live = [...answering].find((it) => it.id === id);
  open(live ?? (await store.load(id).catch(() => null)) ?? fresh());
}

/** Shows the conversation that this tab showed before a reload, or a new one. */
export const reopen = () => openById(recall("sessionStorage", "open", ""));

/** The text and the media of a question that waits. @param {Question} question */
export const partsOf = (question) => (typeof question === "string" ? { text: question, media: [] } : question);

/** A question in one line: its text, or the names of its media. @param {Question} question */
export function labelOf(question) {
  const { text, media } = partsOf(question);
  return text.trim() || media.map(({ name }) => name).join(", ");
}

/** The first line of a question as a title. */
export function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length <= TITLE_CHARS ? line : `${line.slice(0, TITLE_CHARS - 1).trimEnd()}…`;
}

function noteOutcome(conversation, outcome) {
  if (conversation !== current) return;
  if (outcome === "newer") adopted.tell(current);
  if (outcome === "copy") copied.tell(current);
}

/** @type {Map<Conversation, boolean>} the ones that are being kept -> true if they have changed since */
const keeping = new Map();

/**
 * Keeps a conversation; an empty one is removed. Calls during a save lead to one more save.
 * @param {Conversation} [conversation]
 */
export async function save(conversation = current) {
  if (keeping.has(conversation)) return void keeping.set(conversation, true);
  const { messages, draft, queued, attached = [] } = conversation;
  keeping.set(conversation, false);
  try {
    const isEmpty = !messages.length && !draft.trim() && !queued.length && !attached.length;
    if (isEmpty) await store.discard(conversation);
    else noteOutcome(conversation, await store.save(conversation));
    if (conversation === current) keep("sessionStorage", "open", conversation.id); // it may be a new one
  } catch (error) {
    unsaved.tell(error);
  }
  const changed = keeping.get(conversation);
  keeping.delete(conversation);
  if (changed) await save(conversation);
}
