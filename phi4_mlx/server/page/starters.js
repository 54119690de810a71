/** The starters: first questions that suit the model. */
import { $, make } from "./dom.js";

const GENERAL = [
  { title: "Explain", prompt: "Explain how a hash table works, with a small example." },
  { title: "Make JSON", prompt: "Extract name, age and city as JSON: Anna, 34, is a nurse from Oslo." },
  { title: "Write code", prompt: "Write a Python function that merges two sorted lists, with an example." },
  { title: "Compare", prompt: "Compare bicycles, trams and cars for a city of 200,000 people, in a table." },
];

/**
 * Shows starters.
 * @param {(prompt: string) => void} ask
 */
export function showStarters(ask) {
  const local = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  const place = local ? "this machine" : location.hostname;
  $("where").textContent = `The model runs on ${place}. Your messages go nowhere else.`;
  $("starters").replaceChildren(...GENERAL.map(({ title, prompt }) => {
    const onclick = () => ask(prompt);
    return make("button", { type: "button", onclick }, make("b", {}, title), make("span", {}, prompt));
  }));
}
