/** The models of the server, and the one that answers. */
import { request } from "./api.js";
import { $, make } from "./dom.js";
import { tell } from "./notice.js";
import { options, setOptions } from "./settings/options.js";
import { Signal } from "./signal.js";

/** The models have been read, or another one has been chosen; the value is the one that answers. @type {Signal} */
export const chosen = new Signal();

/** @type {{id: string, kind?: string, context_length?: number, media?: import("./media/price.js").Settings}[]} */
let models = [];

const shortName = (id) => id.replace(/\/+$/, "").split("/").at(-1);

function choose(id) {
  setOptions({ model: id });
  chosen.tell(models.find((it) => it.id === id));
}

/** True if the chosen model is a reasoning model; the server then defaults to its authors' sampling settings. */
export const isReasoning = () => models.find(({ id }) => id === options.model)?.kind?.endsWith("reasoning");

/** Reads the models and shows them. */
export async function loadModels() {
  try {
    models = (await (await request("v1/models")).json()).data;
  } catch (error) {
    return tell(error.message, { bad: true, action: "Retry", run: loadModels });
  }
  const ids = models.map(({ id }) => id);
  $("model").replaceChildren(...ids.map((id) => make("option", { value: id }, shortName(id))));
  choose(ids.includes(options.model) ? options.model : ids[0]);
  $("model").value = options.model;
  $("model").hidden = ids.length < 2;
  $("model-name").hidden = ids.length > 1;
  $("model-name").textContent = shortName(options.model);
  const { context_length: context } = models.find(({ id }) => id === options.model) ?? {};
  $("model-name").title = options.model + (context ? `, context of ${context.toLocaleString("en")} tokens` : "");
}

/** Makes the choice of a model work. */
export function bindModels() {
  $("model").addEventListener("change", () => choose($("model").value));
}
