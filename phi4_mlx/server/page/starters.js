/** The starters: first questions that suit the model, by its kind. */
import { $, make } from "./dom.js";

/**
 * @typedef {object} Starter
 * @property {string} title
 * @property {string} prompt
 * @property {RegExp} [tool] the server must have a tool whose name or description matches; it is switched on
 */

/** @type {Record<string, Starter[]>} */
const BY_KIND = {
  demo: [ // which knows only the world of examples/demo
    { title: "Say hello", prompt: "What can you do?" },
    { title: "Calculate", prompt: "What is 17 * 23?", tool: /calc|arithmetic/i },
    { title: "Convert units", prompt: "Convert 5 miles to km.", tool: /convert|unit/i },
    { title: "Make JSON", prompt: "Extract name, age and city as JSON: Anna, 34, is a nurse from Oslo." },
    { title: "Remember", prompt: "The code of the door is 4711. What is the code of the door?" },
  ],
  "demo-reasoning": [
    { title: "Add", prompt: "What is 347 + 86?" },
    { title: "Subtract", prompt: "What is 305 - 87?" },
    { title: "Multiply", prompt: "What is 47 times 23?" },
    { title: "Add three", prompt: "What is 12 + 34 + 56?" },
  ],
  instruct: [
    { title: "Explain", prompt: "Explain how a hash table works, with a small example." },
    { title: "Compare", prompt: "Compare bicycles, trams and cars for a city of 200,000 people, in a table." },
    { title: "Write code", prompt: "Write a Python function that merges two sorted lists, with an example." },
    { title: "Make JSON", prompt: "Extract name, age and city as JSON: Anna, 34, is a nurse from Oslo." },
  ],
  reasoning: [
    { title: "Prove", prompt: "Prove that the square root of 2 is irrational." },
    { title: "Solve", prompt: "Solve x² − 5x + 6 = 0, and check both roots." },
    { title: "Count", prompt: "How many numbers from 1 to 1000 are divisible by 3 or 5, but not by both?" },
    { title: "Reason", prompt: "Three switches outside a room, one lamp inside. You may enter once. Which switch is it?" },
  ],
  base: [
    { title: "Go on with a sentence", prompt: "The three primary colours are" },
    { title: "Go on with a list", prompt: "Capitals of Europe:\n1. Paris\n2. Madrid\n3." },
  ],
};

const HINTS = {
  demo: "This is the small demo model. It knows a few things only; see what it can do.",
  "demo-reasoning": "This is the small demo of a reasoning model. It adds, subtracts and multiplies small numbers.",
  base: "This is a base model: it goes on with a text rather than answers questions. Begin a text.",
};

const MEDIA_HINTS = {
  demo: "It also sees coloured shapes and digits in a small picture, and hears spoken digits and words: add one below.",
};

/**
 * Shows the starters of a model.
 * @param {{kind: string, media?: object}} model
 * @param {object[]} tools of the server, in OpenAI's form
 * @param {(prompt: string, withTools: boolean) => void} ask
 */
export function showStarters({ kind, media }, tools, ask) {
  const has = (pattern) => tools.some((it) => pattern.test(`${it.function.name} ${it.function.description ?? ""}`));
  const fitting = (BY_KIND[kind] ?? BY_KIND.instruct).filter(({ tool }) => !tool || has(tool));
  const hints = [HINTS[kind], media && MEDIA_HINTS[kind]].filter(Boolean);
  $("hint").textContent = hints.join(" ");
  $("hint").hidden = !hints.length;
  $("starters").replaceChildren(...fitting.slice(0, 4).map(({ title, prompt, tool }) => {
    const onclick = () => ask(prompt, Boolean(tool));
    return make("button", { type: "button", onclick }, make("b", {}, title), make("span", {}, prompt));
  }));
}

/** Says where the model runs, on a server that another machine may be. */
export function showPlace() {
  const local = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  if (!local) $("place").textContent = location.hostname;
}
