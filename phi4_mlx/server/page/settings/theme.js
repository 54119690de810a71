/** The theme, light or dark: the system's, or the user's own choice; early.js has set it before the first paint. */
import { $ } from "../dom.js";
import { options, setOptions } from "./options.js";

const system = matchMedia("(prefers-color-scheme: dark)");

function show() {
  if (options.theme) document.documentElement.dataset.theme = options.theme;
  else delete document.documentElement.dataset.theme;
}

/** Changes to the other theme; the system's own is followed again. */
function switchTheme() {
  const own = system.matches ? "dark" : "light";
  const other = (options.theme || own) === "dark" ? "light" : "dark";
  setOptions({ theme: other === own ? "" : other });
  show();
}

/** Makes the button of the theme work. */
export function bindTheme() {
  $("theme").addEventListener("click", switchTheme);
}
