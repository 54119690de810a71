/** The page's start: makes each part work, then shows the conversation of this tab. */
import { addToDraft, ask, bindComposer, edit } from "./composer.js";
import { connect, reopen } from "./conversation.js";
import { $ } from "./dom.js";
import { recall, keep } from "./local.js";
import { bindLog, newConversation } from "./log.js";
import { bindModels, chosen, loadModels } from "./models.js";
import { bindNotice } from "./notice.js";
import { loadTools } from "./server_tools.js";
import { bindSettings } from "./settings.js";
import { showStarters } from "./starters.js";
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

async function start() {
  bindNotice();
  bindLog({ edit, takeBack: addToDraft });
  bindComposer();
  bindSettings(connectServer);
  bindModels();
  bindTheme();
  chosen.listen(() => showStarters(ask));
  $("new").addEventListener("click", newConversation);
  connectServer();
  connect(store);
  await reopen();
  if (matchMedia("(pointer: fine)").matches) $("input").focus(); // on a phone, a keyboard would cover the page
}

start();
