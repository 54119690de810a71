/** The sidebar: all conversations, the search in them, and what one can do with them. On a phone it covers the page. */
import { answering, current, fresh, newId, open, opened, openById, save } from "../conversation.js";
import { $, icon, iconButton, make } from "../dom.js";
import { exchangeOf } from "../exchange.js";
import { newConversation } from "../log.js";
import { download, fileName, fromJson, toJson, toMarkdown } from "../storage/archive.js";
import { Catalogue } from "../storage/catalogue.js";
import { keep, recall } from "../storage/local.js";
import { ConversationList } from "./conversation_list.js";
import { RowMenu } from "./row_menu.js";

const JSON_TYPE = "application/json";
const narrow = matchMedia("(max-width: 56rem)");

/** True if the sidebar is beside the page and the user has not closed it. */
const isWanted = () => !narrow.matches && recall("localStorage", "sidebar", true);

class Sidebar {
  /** @param {import("../storage/store.js").Store} store */
  constructor(store) {
    this.store = store;
    this.catalogue = new Catalogue(store);
    this.stays = false; // what the line below the list tells
    this.list = new ConversationList({
      open: (id) => this.openConversation(id),
      menu: (button, id) => this.menu.open(button, id),
      rename: (id, title) => this.rename(id, title),
      remove: (id) => this.remove(id),
    });
    this.menu = new RowMenu([
      { label: "Rename", run: (id) => this.list.rename(id) },
      { label: "Export as Markdown", run: (id) => this.export(id, "md") },
      { label: "Export as JSON", run: (id) => this.export(id, "json") },
      { label: "Delete", run: (id) => this.remove(id) },
    ]);
    const search = { type: "search", placeholder: "Search", ariaLabel: "Search conversations", autocomplete: "off" };
    this.search = make("input.field", search);
    this.told = make("p.told", { role: "status" });
    this.warning = make("p.note.bad");
    const file = { type: "file", accept: `.json,${JSON_TYPE}`, hidden: true, ariaLabel: "File to import" };
    this.file = make("input", file);
    this.build();
    this.bind();
  }

  build() {
    const button = (label, onclick, mark = "") =>
      make("button.plain", { type: "button", onclick }, ...(mark ? [icon(mark), label] : [label]));
    const begin = button("New", () => this.begin(), "new");
    begin.ariaLabel = "New conversation";
    const close = iconButton("close", "Close the list", () => this.show(false), ".close");
    $("sidebar").append(
      make("div.head", {}, make("h2", {}, "Conversations"), begin, close),
      this.search, this.list.element, this.told, this.warning,
      make("div.foot", {}, button("Export all", () => this.exportAll()), button("Import", () => this.file.click())),
      this.menu.element, this.file,
    );
  }

  bind() {
    this.catalogue.changed.listen(() => this.draw());
    opened.listen(() => {
      this.draw();
      if (narrow.matches) this.show(false);
    });
    this.search.addEventListener("input", () => this.redraw());
    this.search.addEventListener("keydown", (event) => this.onSearchKey(event));
    this.file.addEventListener("change", () => this.import());
    $("sidebar").addEventListener("keydown", (event) => this.onKey(event));
    $("sidebar-toggle").addEventListener("click", () => this.show($("sidebar").hidden));
    $("sidebar-shade").addEventListener("click", () => this.show(false));
    narrow.addEventListener("change", () => this.show(isWanted(), false));
  }

  /** Shows or hides the sidebar; on a wide page the choice is kept. */
  show(visible, chosen = true) {
    const covers = visible && narrow.matches;
    $("sidebar").hidden = !visible;
    $("sidebar-shade").hidden = !covers;
    $("chat").inert = covers; // the focus stays in the sidebar
    $("sidebar-toggle").ariaExpanded = String(visible);
    if (!chosen) return;
    if (!narrow.matches) keep("localStorage", "sidebar", visible);
    if (visible) this.search.focus();
    else $("sidebar-toggle").focus();
  }

  draw() {
    if (this.list.element.querySelector("input")) return; // a title is being written
    const query = this.search.value.trim();
    const found = this.catalogue.find(query);
    this.list.draw(found, { query, currentId: current.id });
    const none = query ? `No conversation has “${query}” in it.` : "No conversations yet.";
    if (!this.stays) this.told.replaceChildren(found.length ? (query ? `${found.length} found` : "") : none);
  }

  redraw() {
    this.stays = false;
    this.draw();
  }

  /** Tells of something done; it stays until the next thing that the user does here. */
  tell(text, action = "", run = () => {}) {
    this.stays = true;
    const button = make("button.plain", { type: "button", onclick: run, hidden: !action }, action);
    this.told.replaceChildren(text, button);
  }

  begin() {
    newConversation();
    if (narrow.matches) this.show(false, false);
    $("input").focus();
  }

  async openConversation(id) {
    this.stays = false;
    if (id !== current.id) await openById(id);
    if (narrow.matches) this.show(false, false);
    $("input").focus();
  }

  /** The conversation with an id that this tab works on, if any. */
  live(id) {
    return current.id === id ? current : [...answering].find((it) => it.id === id);
  }

  async rename(id, title) {
    const live = this.live(id);
    if (!live) return this.store.rename(id, title);
    live.title = title;
    await save(live);
  }

  async remove(id) {
    const live = this.live(id);
    if (live) await exchangeOf(live).stop();
    const removed = await this.store.remove(id);
    if (current.id === id) open(fresh());
    if (removed) this.tell(`“${this.nameOf(removed)}” has been deleted.`, "Undo", () => this.restore(removed));
  }

  async restore(removed) {
    await this.store.restore(removed);
    this.redraw();
  }

  nameOf({ id, title }) {
    return title || this.catalogue.get(id)?.title || "New conversation";
  }

  async export(id, extension) {
    const conversation = await this.store.load(id);
    if (!conversation) return;
    const text = extension === "md" ? toMarkdown(conversation) : toJson([conversation]);
    download(fileName(this.nameOf(conversation), extension), text, extension === "md" ? "text/markdown" : JSON_TYPE);
  }

  async exportAll() {
    const day = new Date().toISOString().slice(0, 10);
    download(`phi4_mlx-conversations-${day}.json`, toJson(await this.store.all()), JSON_TYPE);
  }

  /** Adds the conversations of a file; one whose id is taken gets another, and nothing is replaced. */
  async import() {
    const [file] = this.file.files;
    this.file.value = "";
    if (!file) return;
    try {
      const conversations = fromJson(await file.text());
      for (const it of conversations) await this.store.save({ ...it, id: newId(), revision: 0 });
      this.tell(`${conversations.length} imported from ${file.name}.`);
    } catch (error) {
      this.tell(error.message);
    }
  }

  onSearchKey(event) {
    if (event.key === "ArrowDown") this.list.focus();
    else if (event.key === "Escape" && this.search.value) {
      this.search.value = "";
      this.redraw();
    } else if (event.key === "Enter" && this.search.value.trim()) {
      const [first] = this.catalogue.find(this.search.value);
      if (first) this.openConversation(first.id);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  }

  onKey(event) {
    if (event.key !== "Escape" || this.menu.element.matches(":popover-open")) return;
    event.preventDefault(); // not for the answer that is being generated
    if (narrow.matches) this.show(false);
    else $("input").focus();
  }
}

/**
 * Makes the sidebar work.
 * @param {import("../storage/store.js").Store} store
 * @returns {(problem: string) => Promise<void>} reads the list, once the store is open; shows what is wrong with it
 */
export function bindSidebar(store) {
  const sidebar = new Sidebar(store);
  sidebar.show(isWanted(), false);
  return (problem) => {
    sidebar.warning.textContent = problem;
    return sidebar.catalogue.read();
  };
}
