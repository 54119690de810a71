/** The switch in the composer that lets the model call the server's tools. */
import { $, icon } from "../dom.js";
import { loaded, tools } from "../server_tools.js";
import { changed, options, setOptions } from "./options.js";

const NAMES = 3; // shown beside the switch

function draw() {
  const names = tools.map((it) => it.function.name);
  const few = names.slice(0, NAMES).join(", ") + (names.length > NAMES ? ` and ${names.length - NAMES} more` : "");
  const on = options.tools && names.length > 0;
  $("tools-on").hidden = !names.length;
  $("tools-on").ariaPressed = String(on);
  $("tools-on").replaceChildren(icon("tool"), "Tools");
  $("tools-on").title = `${on ? "Do not offer" : "Offer"} the server's tools to the model: ${names.join(", ")}`;
  $("tools-hint").hidden = !on;
  $("tools-hint").textContent = `The model may ask to run ${few}. Nothing runs unless you agree.`;
}

/** Makes the switch work. */
export function bindToolsSwitch() {
  $("tools-on").addEventListener("click", () => setOptions({ tools: !options.tools }));
  loaded.listen(draw);
  changed.listen(draw);
}
