/** The tray: the pictures and sounds of the next message, with their prices, and the ways to put them there. */
import { current } from "../conversation.js";
import { $, icon, iconButton, make } from "../dom.js";
import { chosen } from "../models.js";
import { tell } from "../notice.js";
import { Signal } from "../signal.js";
import { mediumOf, mediumView, priceText } from "./medium.js";
import { audioTokens } from "./price.js";
import { obstacle, Recording } from "./recorder.js";

/** @typedef {import("./medium.js").Medium} Medium */

// Of all media of a conversation: each turn sends those before again, and the server takes 48 MB.
const CHARS = 44_000_000;
const PICTURES = 64; // the model's limit

/** Tells that the tray has changed. @type {Signal} */
export const changed = new Signal();

/** @type {Medium[]} */
let media = [];
/** @type {import("./price.js").Settings | null} of the model; null if it reads only text */
let settings = null;
/** @type {Recording | null} */
let recording = null;
let reading = Promise.resolve(); // the files before

/** The media in the tray. @returns {Medium[]} */
export const attached = () => media;

/** Puts other media into the tray. @param {Medium[]} other */
export function setAttached(other) {
  media = other;
  draw();
}

/**
 * Reads files and adds them; tells the user of those that cannot be added.
 * @param {Iterable<File>} files
 */
export function attach(files) {
  const given = [...files];
  reading = reading.then(() => add(given));
  return reading;
}

async function add(files) {
  const problems = [];
  if (!settings) problems.push(`This model reads only text: ${files.map(({ name }) => name).join(", ")} not added.`);
  for (const file of settings ? files : []) {
    $("media-note").textContent = `Reading ${file.name}…`;
    try {
      const medium = await mediumOf(file, settings);
      checkRoom(medium);
      media = [...media, medium];
    } catch (error) {
      problems.push(error.message);
    }
  }
  draw();
  changed.tell();
  if (problems.length) tell(problems.join(" "), { bad: true });
}

/** Refuses a medium that the conversation has no room for. */
function checkRoom(medium) {
  const all = [...current.messages.flatMap((it) => it.media ?? []), ...media, medium];
  if (all.reduce((sum, { url }) => sum + url.length, 0) > CHARS) {
    throw new Error(`${medium.name} is too large: a conversation has room for about 33 MB of pictures and sound.`);
  }
  if (all.filter(({ kind }) => kind === "image").length > PICTURES) {
    throw new Error(`${medium.name} not added: a conversation has at most ${PICTURES} pictures.`);
  }
}

function remove(medium) {
  setAttached(media.filter((it) => it !== medium));
  changed.tell();
  $("input").focus();
}

function draw() {
  $("attachments").replaceChildren(...media.map((medium) => {
    const close = iconButton("close", `Remove ${medium.name}`, () => remove(medium));
    const price = make("span.price", {}, priceText(medium.tokens));
    return make("li", {}, mediumView(medium), make("span.name", {}, medium.name), price, close);
  }));
  $("attachments").hidden = !media.length;
  const total = media.reduce((sum, { tokens }) => sum + tokens, 0);
  const prices = media.length > 1 ? `${priceText(total)} for ${media.length} attachments` : "";
  $("media-note").textContent = media.length && !settings ? "This model reads only text." : prices;
}

function drawButtons() {
  $("attach").hidden = !settings;
  $("record").hidden = !settings;
  const why = obstacle();
  $("record").disabled = Boolean(why);
  $("record").title = why || (recording ? "Stop recording" : "Record");
  $("record").ariaLabel = recording ? "Stop recording" : "Record";
  $("record").ariaPressed = String(Boolean(recording));
  $("record").replaceChildren(icon(recording ? "stop" : "record"));
}

async function toggleRecording() {
  if (recording) return endRecording();
  const mine = recording = new Recording();
  drawButtons();
  try {
    await mine.start(() => drawSeconds(mine), endRecording);
  } catch (error) {
    await mine.stop();
    recording = null;
    tell(error.message, { bad: true });
  }
  drawButtons();
}

function drawSeconds({ seconds }) {
  $("media-note").textContent = `Recording: ${seconds.toFixed(0)} s, ${priceText(audioTokens(seconds))}`;
}

async function endRecording() {
  const ended = recording;
  recording = null;
  drawButtons();
  const file = await ended?.stop();
  if (file) await attach([file]);
  else draw();
}

const filesOf = (data) => [...(data?.files ?? [])];
const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

function onPaste(event) {
  const files = filesOf(event.clipboardData);
  if (!files.length || event.clipboardData.getData("text/plain")) return; // a text with a picture of it is a text
  event.preventDefault();
  attach(files);
}

function bindDrop() {
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!hasFiles(event)) return;
    event.preventDefault(); // or the browser leaves the page for the file
    attach(filesOf(event.dataTransfer));
  });
}

/** Makes the tray work. */
export function bindTray() {
  $("attach").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => {
    attach(filesOf($("files")));
    $("files").value = "";
  });
  $("record").addEventListener("click", toggleRecording);
  $("input").addEventListener("paste", onPaste);
  bindDrop();
  chosen.listen((model) => {
    settings = model?.media ?? null;
    drawButtons();
    draw();
  });
}
