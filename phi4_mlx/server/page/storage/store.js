/**
 * The conversations, kept in this browser alone: in IndexedDB, or in this tab's memory where the browser forbids that
 * or has no room. Tabs may work on the same conversation: nothing that one of them has written is overwritten.
 *
 * @typedef {import("../conversation.js").Conversation} Conversation
 * @typedef {Conversation & {created: number, revision: number}} Stored revision counts the saves
 */
import { labelOf, newId, titleOf } from "../conversation.js";
import { Signal } from "../signal.js";
import { isSound } from "./archive.js";
import { keep, names, recall } from "./local.js";

const NAME = "phi4_mlx";
const TABLE = "conversations";
const FORBIDDEN = "This browser keeps nothing for this page: conversations are lost when the tab is closed.";
const FULL = "The browser has no room left: this conversation is lost when the tab is closed. Delete or export some.";

/** Where this page rescues a conversation; another tab has its own state of it. */
const PAGE = newId();
const rescueName = (id) => `unsaved.${id}.${PAGE}`;

/** The rest of a request or a transaction of IndexedDB. */
function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = request.oncomplete = () => resolve(request.result);
    request.onerror = request.onabort = () => reject(request.error ?? new Error("aborted"));
  });
}

function openDatabase() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
  return finished(request);
}

/** True if nothing in one state of a conversation is missing in the other, which may have gone on. */
function covers(more, less) {
  const last = less.messages.length - 1;
  const messages = less.messages.every((message, i) => {
    const other = more.messages[i];
    if (other?.role !== message.role) return false;
    const sameCalls = JSON.stringify(other.tool_calls) === JSON.stringify(message.tool_calls);
    const grew = i === last && message.role === "assistant" && !message.finish;
    return grew ? other.content.startsWith(message.content) : sameCalls && other.content === message.content;
  });
  const asked = more.messages.filter((it) => it.role === "user");
  const found = [...more.queued, ...asked.map(({ content, media = [] }) => ({ text: content, media }))].map(labelOf);
  return messages && less.queued.every((question) => found.includes(labelOf(question)));
}

const lost = (media) => media?.map((medium) => ({ ...medium, url: "" }));

/** A conversation whose media are only named. */
const withoutMedia = (conversation) => ({
  ...conversation,
  messages: conversation.messages.map((it) => (it.media ? { ...it, media: lost(it.media) } : it)),
  attached: [],
});

/** A conversation with the media of a stored one where they are only named. */
const withMediaOf = (stored, conversation) => ({
  ...conversation,
  messages: conversation.messages.map((it, i) => {
    const named = it.media?.some(({ url }) => !url);
    return named ? { ...it, media: stored?.messages[i]?.media ?? it.media } : it;
  }),
});

const isGrowing = ({ messages }) => messages.at(-1)?.role === "assistant" && !messages.at(-1).finish;

/** What becomes of a conversation that is saved over the stored one, and what that changes in it. */
function reconcile(conversation, stored) {
  const created = stored?.created ?? conversation.created ?? Date.now();
  const change = { created, revision: (stored?.revision ?? 0) + 1 };
  if (!stored || stored.revision === conversation.revision) return ["same", change];
  if (!isGrowing(conversation) && covers(stored, conversation)) {
    return ["newer", { ...stored, ...change, draft: conversation.draft || stored.draft, attached: conversation.attached }];
  }
  if (covers(conversation, stored)) return ["same", { ...change, title: stored.title || conversation.title }];
  return ["copy", { id: newId(), title: `${conversation.title} (copy)`, created: Date.now(), revision: 1 }];
}

/** Keeps conversations; what cannot be kept in the browser stays in memory, and the user is told. */
export class Store {
  /** A conversation has changed; the value is { id, here }: `here` is true for changes by this tab. @type {Signal} */
  changed = new Signal();

  #database = null;
  #forbidden = false; // the user knows it
  #asked = false; // for storage that the browser does not evict
  #memory = new Map(); // what the browser could not keep, by id
  #saving = new Set(); // the conversations whose save is not finished
  #removed = new Set(); // ids that were removed in this tab; a late save does not bring them back
  #channel = "BroadcastChannel" in window ? new BroadcastChannel(NAME) : null;

  /**
   * Opens the storage and takes in what a closed page or an older version has left.
   * @returns {Promise<string>} what the user must know; "" if the browser keeps the conversations
   */
  async open() {
    if (this.#channel) this.#channel.onmessage = ({ data: id }) => this.#follow(id);
    addEventListener("pagehide", () => this.#rescue());
    try {
      await this.#connect();
    } catch {
      this.#forbidden = true;
      return FORBIDDEN;
    }
    await this.#takeIn();
    return "";
  }

  /** Tells of a change by another tab, which may have brought a removed conversation back. */
  #follow(id) {
    this.#removed.delete(id);
    this.changed.tell({ id, here: false });
  }

  async #connect() {
    this.#database = await openDatabase();
    this.#database.onclose = () => { this.#database = null; };
    this.#database.onversionchange = () => { // the user deletes the data of the page
      this.#database?.close();
      this.#database = null;
    };
  }

  /**
   * A conversation.
   * @param {string} id
   * @returns {Promise<Stored | null>} null if there is none
   */
  async load(id) {
    const found = structuredClone(this.#memory.get(id)) ?? (await this.#read((table) => table.get(id)));
    return isSound(found) ? found : null;
  }

  /**
   * All conversations.
   * @returns {Promise<Stored[]>}
   */
  async all() {
    const kept = (await this.#read((table) => table.getAll())) ?? [];
    const others = kept.filter((it) => isSound(it) && !this.#memory.has(it.id));
    return [...others, ...structuredClone([...this.#memory.values()])];
  }

  /**
   * Keeps a conversation as it is now. If another tab has changed the stored one since this one was read, then the one
   * that has all of the other stays; if each has something of its own, this one gets a new id and both are kept.
   * @param {Conversation} conversation whose id, title, revision and, if the stored one is newer, messages are set
   * @returns {Promise<"same" | "newer" | "copy">} "newer": the stored one has been taken over
   */
  async save(conversation) {
    const { id } = conversation;
    if (this.#removed.has(id)) return "same";
    this.#saving.add(conversation);
    try {
      const outcome = await this.#put(conversation);
      this.#persist();
      this.#memory.delete(id);
      keep("localStorage", rescueName(id), undefined);
      return outcome;
    } catch (error) {
      this.#memory.set(conversation.id, structuredClone(conversation));
      if (!this.#forbidden) throw new Error(`${FULL} (${error.name})`);
      return "same";
    } finally {
      this.#saving.delete(conversation);
      this.#tell(conversation.id);
    }
  }

  /** Writes a conversation in one transaction, during which no other tab can write. */
  async #put(conversation) {
    if (!this.#database) await this.#connect();
    const transaction = this.#database.transaction(TABLE, "readwrite");
    const table = transaction.objectStore(TABLE);
    const done = finished(transaction);
    done.catch(() => {}); // told by the next line as well
    const stored = await finished(table.get(conversation.id));
    const [outcome, change] = reconcile(conversation, stored);
    Object.assign(conversation, change); // at once: the user may go on before the transaction ends
    table.put(conversation);
    await done;
    return outcome;
  }

  /**
   * Gives a conversation another title.
   * @param {string} id
   * @param {string} title
   */
  async rename(id, title) {
    const conversation = await this.load(id);
    if (conversation) await this.save(Object.assign(conversation, { title }));
  }

  /**
   * Removes a conversation.
   * @param {string} id
   * @returns {Promise<Stored | null>} the conversation, for `restore`
   */
  async remove(id) {
    const conversation = await this.load(id);
    this.#removed.add(id);
    this.#memory.delete(id);
    await this.#write((table) => table.delete(id));
    this.#tell(id);
    return conversation;
  }

  /**
   * Removes a conversation that has become empty, unless another tab has put something into it.
   * @param {Conversation} conversation
   */
  async discard(conversation) {
    const { id, revision = 0 } = conversation;
    const known = this.#memory.delete(id) || (revision > 0 && (await this.load(id))?.revision === revision);
    if (!known) return;
    await this.#write((table) => table.delete(id));
    this.#tell(id);
  }

  /**
   * Brings a removed conversation back.
   * @param {Stored} conversation
   */
  async restore(conversation) {
    this.#removed.delete(conversation.id);
    await this.save(conversation);
  }

  /** Asks the browser, once, not to evict the conversations when the disk is full. */
  #persist() {
    if (!this.#asked) navigator.storage?.persist?.().catch(() => {});
    this.#asked = true;
  }

  async #read(request) {
    if (!this.#database) return null;
    return finished(request(this.#database.transaction(TABLE).objectStore(TABLE)));
  }

  async #write(request) {
    if (!this.#database) return;
    const transaction = this.#database.transaction(TABLE, "readwrite");
    request(transaction.objectStore(TABLE));
    await finished(transaction);
  }

  #tell(id) {
    this.changed.tell({ id, here: true });
    if (!this.#memory.has(id)) this.#channel?.postMessage(id);
  }

  /** Keeps what is being saved in the small storage, which a page that is closed can still write to. */
  #rescue() {
    for (const conversation of this.#saving) {
      const name = rescueName(conversation.id);
      if (!keep("localStorage", name, conversation)) keep("localStorage", name, withoutMedia(conversation));
    }
  }

  /** Saves what a closed page has left in the small storage, and the one conversation of an older version. */
  async #takeIn() {
    for (const name of names().filter((it) => it.startsWith("unsaved."))) {
      const found = recall("localStorage", name, null);
      const conversation = isSound(found) ? withMediaOf(await this.load(found.id), found) : null;
      const done = !isSound(conversation) || (await this.save(conversation).then(() => true, () => false));
      if (done) keep("localStorage", name, undefined); // else at the next start
    }
    const old = fromOlderVersion(recall("localStorage", "messages", []));
    if (isSound(old) && old.messages.length) await this.save(old).catch(() => {});
    keep("localStorage", "messages", undefined);
  }
}

/** The conversation of the page that had only one. Its id is fixed: two tabs take it in once. */
function fromOlderVersion(value) {
  const ended = (it) => (it?.role === "assistant" ? { ...it, finish: it.finish || "interrupted" } : it);
  const messages = [value].flat().map(ended);
  const title = titleOf(String(messages[0]?.content ?? ""));
  const now = Date.now();
  return { id: "first", title, messages, created: now, updated: now, draft: "", queued: [], allowed: [], revision: 0 };
}
