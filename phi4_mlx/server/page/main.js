/** The page's start: makes each part work, then shows the conversation of this tab. */
import { returned } from "./api.js";
import { addToDraft, ask, bindComposer, edit } from "./composer.js";
import { connect, reopen } from "./conversation.js";
import { $ } from "./dom.js";
import { bindKey } from "./key.js";
import { bindLog, newConversation } from "./log.js";
import { bindModels, chosen, loadModels } from "./models.js";
import { bindNotice, tell } from "./notice.js";
import { setOptions } from "./options.js";
import { loaded, loadTools, tools } from "./server_tools.js";
import { bindSettings, openSettings } from "./settings.js";
import { bindSidebar } from "./sidebar.js";
import { showPlace, showStarters } from "./starters.js";
import { Store } from "./store.js";
import { bindTheme } from "./theme.js";
import { bindToolsSwitch } from "./tools_switch.js";

// What those import: named here, the browser asks for all of it at once, and only after the style has come.
import "./archive.js";
import "./catalogue.js";
import "./conversation_list.js";
import "./exchange.js";
import "./formula.js";
import "./growing.js";
import "./letters.js";
import "./local.js";
import "./markdown.js";
import "./parser.js";
import "./reply.js";
import "./row_menu.js";
import "./sanitizer.js";
import "./signal.js";
import "./tab_lock.js";
import "./thought.js";
import "./turns.js";
import "./typesetter.js";
import "./vendor/dompurify.js";
import "./vendor/markdown-it.js";

function connectServer() {
  loadModels();
  loadTools();
}

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
  returned.listen(connectServer); // it may serve another model now
  connectServer();
  const store = new Store();
  const readList = bindSidebar(store);
  const problem = await store.open();
  connect(store);
  await reopen();
  if (problem) tell(problem, { bad: true });
  readList(problem);
  if (matchMedia("(pointer: fine)").matches) $("input").focus(); // on a phone, a keyboard would cover the page
}

start();
