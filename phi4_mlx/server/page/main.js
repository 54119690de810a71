/** The page's start: makes each part work, then shows the conversation of this tab. */
import { returned } from "./api.js";
import { addToDraft, ask, bindComposer, edit } from "./composer.js";
import { connect, reopen } from "./conversation.js";
import { $ } from "./dom.js";
import { bindLog, newConversation } from "./log.js";
import { bindTray } from "./media/tray.js";
import { bindModels, chosen, loadModels } from "./models.js";
import { bindNotice, tell } from "./notice.js";
import { loaded, loadTools, tools } from "./server_tools.js";
import { bindKey } from "./settings/key.js";
import { setOptions } from "./settings/options.js";
import { bindSettings, openSettings } from "./settings/settings.js";
import { bindTheme } from "./settings/theme.js";
import { bindToolsSwitch } from "./settings/tools_switch.js";
import { bindSidebar } from "./sidebar/sidebar.js";
import { showPlace, showStarters } from "./starters.js";
import { Store } from "./storage/store.js";

// What those import: named here, the browser asks for all of it at once, and only after the style has come.
import "./exchange.js";
import "./media/medium.js";
import "./media/price.js";
import "./media/recorder.js";
import "./media/wav.js";
import "./reply.js";
import "./sidebar/conversation_list.js";
import "./sidebar/row_menu.js";
import "./signal.js";
import "./storage/archive.js";
import "./storage/catalogue.js";
import "./storage/local.js";
import "./storage/tab_lock.js";
import "./text/formula.js";
import "./text/growing.js";
import "./text/letters.js";
import "./text/markdown.js";
import "./text/parser.js";
import "./text/sanitizer.js";
import "./text/typesetter.js";
import "./thought.js";
import "./turns.js";
import "./vendor/dompurify.js";
import "./vendor/markdown-it.js";

function connectServer() {
  loadModels();
  loadTools();
}

/** Shows the starters each time the model or the tools have been read. */
function bindStarters() {
  let shown = null;
  const begin = (prompt, withTools) => {
    if (withTools) setOptions({ tools: true });
    ask(prompt);
  };
  const show = () => { if (shown) showStarters(shown, tools, begin); };
  chosen.listen((model) => {
    shown = { kind: "instruct", ...model };
    show();
  });
  loaded.listen(show);
  showPlace();
}

async function start() {
  bindNotice();
  bindLog({ edit, takeBack: addToDraft });
  bindComposer();
  bindTray();
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
