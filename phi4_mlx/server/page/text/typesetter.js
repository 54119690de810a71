/**
 * Colours for code and typeset formulas. A worker does it, one job after the other; a job that takes too long is ended
 * with its worker, and its source stays on the page. The libraries are loaded with the first job that needs them.
 */
import { useAlphabets } from "./letters.js";
import { nodesOf } from "./sanitizer.js";

const JOB_MS = 2000; // without the time to load a library
const KEPT = 2000; // results

/** @typedef {{key: string, kind: "code" | "formula", source: string, language: string}} Job */

/** @type {Map<string, DocumentFragment | null>} the nodes of each finished job; null if it could not be done */
const results = new Map();
/** @type {Map<string, Set<HTMLElement>>} the elements that wait for a job */
const waiting = new Map();
/** @type {Job[]} */
const jobs = [];
/** @type {WeakMap<HTMLElement, number>} the characters of a code element that have colours */
const coloured = new WeakMap();

/** @type {Worker | null} */
let worker = null;
/** @type {Job | null} */
let running = null;
let timer = 0;

/** The worker's address, which the page's policy accepts from here alone. */
function workerUrl() {
  const url = new URL("./typesetter_worker.js", import.meta.url).href;
  const policy = window.trustedTypes?.createPolicy("typesetter", { createScriptURL: () => url });
  return policy ? policy.createScriptURL("") : url;
}

const WORKER = workerUrl();

function startWorker() {
  worker = new Worker(WORKER, { type: "module" });
  worker.onmessage = ({ data }) => {
    if (data.started) timer = setTimeout(giveUp, JOB_MS);
    else finish(data.html);
  };
  worker.onerror = giveUp;
}

function giveUp() {
  worker?.terminate();
  worker = null;
  finish(null);
}

function finish(html) {
  clearTimeout(timer);
  if (!running) return;
  const job = running;
  running = null;
  const nodes = html === null ? null : nodesOf(html, job.kind);
  if (nodes && job.kind === "formula") useAlphabets(nodes);
  results.set(job.key, nodes);
  if (results.size > KEPT) results.delete(results.keys().next().value);
  for (const element of waiting.get(job.key) ?? []) show(element, job, nodes);
  waiting.delete(job.key);
  startNext();
}

function startNext() {
  if (running || !jobs.length) return;
  running = jobs.shift();
  if (!worker) startWorker();
  worker.postMessage({ ...running, id: running.key });
}

/** Shows a result, unless the element has changed since; code that has grown keeps its new end without colours. */
function show(element, { kind, source }, nodes) {
  if (kind === "formula") {
    if (nodes && element.dataset.source === source) element.replaceChildren(nodes.cloneNode(true));
    return;
  }
  const text = element.textContent;
  if (!text.startsWith(source)) return;
  coloured.set(element, source.length);
  if (nodes) element.replaceChildren(nodes.cloneNode(true), text.slice(source.length));
}

/** @param {HTMLElement} element @param {Omit<Job, "key">} job */
function request(element, job) {
  const key = [job.kind, job.language, job.source].join("\n");
  const known = results.get(key);
  if (known !== undefined) return show(element, job, known);
  if (waiting.has(key)) return void waiting.get(key).add(element);
  waiting.set(key, new Set([element]));
  jobs.push({ ...job, key });
  startNext();
}

/**
 * Typesets the formulas and colours the code in an element. Code that grows gets new colours each time it is a quarter
 * longer, which keeps the work linear.
 * @param {HTMLElement} root
 * @param {boolean} growing
 */
export function typeset(root, growing) {
  const formulas = [...root.querySelectorAll(".formula:not(:has(math))")];
  if (root.matches(".formula:not(:has(math))")) formulas.push(root);
  for (const element of formulas) request(element, { kind: "formula", source: element.dataset.source, language: "" });
  for (const element of root.querySelectorAll("code[class^=language-]")) {
    const source = element.textContent;
    const done = coloured.get(element) ?? 0;
    const language = element.className.slice("language-".length);
    const due = growing ? source.length > 1.25 * done + 100 : source.length !== done;
    if (due) request(element, { kind: "code", source, language });
  }
}

/**
 * Changes the text of a code element; if it has only grown, its colours stay.
 * @param {HTMLElement} element
 * @param {string} text
 */
export function setCode(element, text) {
  const old = element.textContent;
  if (old === text) return;
  if (!text.startsWith(old)) {
    element.textContent = text;
    coloured.delete(element);
  } else if (element.lastChild instanceof Text) element.lastChild.appendData(text.slice(old.length));
  else element.append(text.slice(old.length));
}
