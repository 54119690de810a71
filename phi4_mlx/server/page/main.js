/** The page's start: makes each part work, then shows the conversation of this tab. */
import { addToDraft, ask, bindComposer, edit } from "./composer.js";
import { connect, reopen } from "./conversation.js";
import { $ } from "./dom.js";
import { recall, keep } from "./local.js";
import { bindLog, newConversation } from "./log.js";
import { bindModels, chosen, loadModels } from "./models.js";
import { bindNotice } from "./notice.js";
import { bindToolsSwitch } from "./tools_switch.js";
import { loaded, loadTools, tools } from "./server_tools.js";
import { bindKey } from "./key.js";
import { setOptions } from "./options.js";
import { bindSettings, openSettings } from "./settings.js";
import { showPlace, showStarters } from "./starters.js";
import { bindTheme } from "./theme.js";

function connectServer() {
  loadModels();
  loadTools();
}

/** One conversation in the browser's small storage. */
const store = {
  load: async (id) => recall("localStorage", `conversation.${id}`, null),
  async save(conversation) {
    if (keep("localStorage", `conversation.${conversation.id}`, conversation)) return;
    throw new Error("The browser's storage is full or forbidden: this conversation will be lost on a reload.");
  },
  remove: async (id) => void keep("localStorage", `conversation.${id}`, undefined),
};

/** Shows the starters each time the model or the tools have been read. */
function bindStarters() {
  let kind = "";
  const begin = (prompt, withTools) => {
    if (withTools) setOptions({ tools: true });
    ask(prompt);
  };
  const show = () => { if (kind) showStarters(kind, tools, begin); };
  chosen.listen((model) => {
    kind = model?.kind ?? "instruct";
    show();
  });
  loaded.listen(show);
  showPlace();
}

async function start() {
  bindNotice();
  bindLog({ edit, takeBack: addToDraft });
  bindComposer();
  bindSettings(connectServer);
  bindModels();
  bindTheme();
  bindKey(openSettings, connectServer);
  bindToolsSwitch();
  bindStarters();
  $("new").addEventListener("click", newConversation);
  connectServer();
  connect(store);
  await reopen();
  if (matchMedia("(pointer: fine)").matches) $("input").focus(); // on a phone, a keyboard would cover the page
}

start();
