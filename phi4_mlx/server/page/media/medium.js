/**
 * Pictures and sounds of a message: read from files, shown, and put into a request.
 *
 * @typedef {object} Medium
 * @property {"image" | "audio"} kind
 * @property {string} name of its file
 * @property {string} url a data: URL; "" if the browser had no room to keep it
 * @property {number} tokens
 */
import { make } from "../dom.js";
import { audioTokens, imageTokens } from "./price.js";
import { monoOf, wavOf } from "./wav.js";

const RATE = 16_000; // Hz, the model's
const SENT_PICTURES = ["image/png", "image/jpeg", "image/webp", "image/gif"]; // others become PNG
const SENT_SOUNDS = { // others, which the server may not read, become WAV
  "audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/mpeg": "mp3", "audio/flac": "flac",
  "audio/x-flac": "flac", "audio/ogg": "ogg",
};

/**
 * A file as a picture or a sound.
 * @param {File} file
 * @param {import("./price.js").Settings} settings of the model
 * @returns {Promise<Medium>}
 * @throws {Error} it is neither, or the browser cannot read it; the message is for the user
 */
export async function mediumOf(file, settings) {
  if (file.type.startsWith("image/")) return imageOf(file, settings);
  if (/^(audio\/|video\/(webm|mp4|ogg|quicktime))/.test(file.type)) return audioOf(file);
  throw new Error(`${file.name} is neither a picture nor sound.`);
}

async function imageOf(file, settings) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) throw new Error(`${file.name} cannot be read by this browser; save it as PNG or JPEG.`);
  const { width, height } = bitmap;
  const tokens = imageTokens(width, height, settings);
  if (!tokens) throw new Error(`${file.name} is too narrow for the model: ${width} × ${height} pixels.`);
  const sent = SENT_PICTURES.includes(file.type) ? file : await pngOf(bitmap);
  bitmap.close();
  return { kind: "image", name: file.name, url: await urlOf(sent), tokens };
}

function pngOf(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

async function audioOf(file) {
  const context = new OfflineAudioContext(1, 1, RATE);
  const sound = await context.decodeAudioData(await file.arrayBuffer()).catch(() => null);
  if (!sound) throw new Error(`${file.name} cannot be read by this browser; save it as WAV or MP3.`);
  const tokens = audioTokens(sound.duration);
  if (!tokens) throw new Error(`${file.name} is too short: ${sound.length} samples.`);
  const sent = file.type in SENT_SOUNDS ? file : wavOf(monoOf(sound), RATE);
  return { kind: "audio", name: file.name, url: await urlOf(sent), tokens };
}

function urlOf(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`The file cannot be read: ${reader.error?.message}`));
    reader.readAsDataURL(blob);
  });
}

/** A price in words. @param {number} tokens */
export const priceText = (tokens) => `${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`;

/**
 * The element that shows a medium.
 * @param {Medium} medium
 * @returns {HTMLElement}
 */
export function mediumView({ kind, name, url }) {
  if (!url) return make("span.lost", {}, `${name} (not kept: the browser had no room)`);
  if (kind === "image") return make("img", { src: url, alt: name, title: name });
  const view = make("audio", { src: url, controls: true, preload: "metadata", title: name });
  view.setAttribute("aria-label", name);
  return view;
}

/**
 * The content of a message in OpenAI's form: a text, or the media and the text behind them.
 * @param {{content: string, media?: Medium[]}} message
 * @returns {string | object[]}
 */
export function contentOf({ content, media = [] }) {
  const parts = media.filter(({ url }) => url).map(partOf);
  if (!parts.length) return content;
  return content.trim() ? [...parts, { type: "text", text: content }] : parts;
}

function partOf({ kind, url }) {
  if (kind === "image") return { type: "image_url", image_url: { url } };
  const [head, data] = url.split(",");
  return { type: "input_audio", input_audio: { data, format: SENT_SOUNDS[head.slice(5).split(";")[0]] ?? "wav" } };
}

/** True if a value from outside is a medium. @param {any} it */
export const isMedium = (it) =>
  ["image", "audio"].includes(it?.kind) && typeof it.name === "string" && Number.isFinite(it.tokens) &&
  typeof it.url === "string" && (it.url === "" || it.url.startsWith(`data:${it.kind}/`));
