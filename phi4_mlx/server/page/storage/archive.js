/** Conversations as files: Markdown to read, JSON to read in again. */

import { isMedium } from "../media/medium.js";

/** @typedef {import("./store.js").Stored} Stored */

const FORMAT = "phi4_mlx conversations";
const NAMES = { user: "You", assistant: "Answer" };

const isText = (value) => typeof value === "string";
const areMedia = (value = []) => Array.isArray(value) && value.every(isMedium);
const isQuestion = (it) => isText(it) || (isText(it?.text) && areMedia(it.media));

function isMessage(it) {
  const calls = it?.tool_calls ?? [];
  return ["user", "assistant", "tool"].includes(it?.role) && isText(it.content) && isText(it.thought ?? "") && areMedia(it.media) &&
    Array.isArray(calls) &&
    calls.every((call) => isText(call?.id) && isText(call.function?.name) && isText(call.function.arguments));
}

/**
 * True if a value from outside is a conversation.
 * @param {any} value
 * @returns {boolean}
 */
export function isSound(value) {
  const { id, title, messages, draft = "", queued = [], attached, allowed = [], updated } = value ?? {};
  return [id, title, draft].every(isText) && id !== "" && Number.isFinite(updated) &&
    [messages, queued, allowed].every(Array.isArray) && messages.every(isMessage) &&
    queued.every(isQuestion) && allowed.every(isText) && areMedia(attached);
}

/**
 * Conversations as JSON.
 * @param {Stored[]} conversations
 * @returns {string}
 */
export function toJson(conversations) {
  return `${JSON.stringify({ format: FORMAT, conversations }, null, 1)}\n`;
}

/**
 * The conversations in JSON from `toJson`.
 * @param {string} json
 * @returns {Stored[]} throws an Error for the user if there are none
 */
export function fromJson(json) {
  let value;
  try {
    value = JSON.parse(json);
  } catch (error) {
    throw new Error(`The file is not JSON: ${error.message}`);
  }
  const listed = value?.conversations;
  if (value?.format !== FORMAT || !Array.isArray(listed)) {
    throw new Error("The file is no export of conversations from this page.");
  }
  const wrong = listed.findIndex((it) => !isSound(it));
  if (wrong >= 0) {
    throw new Error(`Conversation ${wrong + 1} of ${listed.length} in the file is damaged; nothing was imported.`);
  }
  return listed.map((it) => ({ draft: "", queued: [], allowed: [], ...it }));
}

/** A fence that is longer than any in the text. */
function fenced(text) {
  const longest = Math.max(2, ...Array.from(text.matchAll(/`+/g), ({ 0: run }) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}\n${text}\n${fence}`;
}

function messageText({ role, content, media = [], tool_calls: calls = [] }) {
  if (role === "tool") return `**Result**\n\n${fenced(content)}`;
  const parts = calls.map((call) => `**Call of ${call.function.name}**\n\n${fenced(call.function.arguments)}`);
  const names = media.map(({ kind, name }) => `*${kind === "image" ? "Picture" : "Sound"}: ${name}*`);
  return [`## ${NAMES[role]}`, ...names, content.trim(), ...parts].filter(Boolean).join("\n\n");
}

/**
 * A conversation as Markdown.
 * @param {Stored} conversation
 * @returns {string}
 */
export function toMarkdown({ title, messages }) {
  return `${[`# ${title || "Conversation"}`, ...messages.map(messageText)].join("\n\n")}\n`;
}

/**
 * A name for a file.
 * @param {string} title
 * @param {string} extension
 * @returns {string}
 */
export function fileName(title, extension) {
  const words = title.normalize("NFC").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60);
  return `${words || "conversation"}.${extension}`;
}

/**
 * Gives a text to the user as a file.
 * @param {string} name
 * @param {string} text
 * @param {string} type
 */
export function download(name, text, type) {
  const href = URL.createObjectURL(new Blob([text], { type }));
  Object.assign(document.createElement("a"), { href, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}
