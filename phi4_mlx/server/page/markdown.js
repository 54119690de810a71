/** Markdown: text to nodes, redrawn while it grows. */
import { copy, iconButton, make } from "./dom.js";

// ---- Markdown: blocks ----------------------------------------------------------------------------------------------
// Lines -> blocks -> nodes; each line and character is read a bounded number of times. `growing` means that more text
// will follow: marks that are still open at the end are then treated as closed, so nothing flickers.

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6}) +(.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const TABLE_RULE = /^[\s|:-]*$/;
const DEPTH_LIMIT = 12; // of lists and quotes; deeper ones are shown as source text

const width = (space) => space.replaceAll("\t", "    ").length;
const cellsOf = (line) =>
  line.trim().replaceAll("\\|", "\0").replace(/^\|/, "").replace(/\|$/, "").split("|")
    .map((cell) => cell.replaceAll("\0", "|").trim());

function startsTable(lines, i, growing) {
  if (!lines[i].includes("|")) return false;
  const rule = lines[i + 1] ?? "";
  if (!TABLE_RULE.test(rule)) return false;
  if (growing && i + 2 >= lines.length && lines[i].trimStart().startsWith("|")) return true; // its rule has not come yet
  return rule.includes("-") && rule.includes("|") && cellsOf(rule).length === cellsOf(lines[i]).length;
}

function kindOf(lines, i, growing) {
  const line = lines[i];
  if (!line.trim()) return "blank";
  if (FENCE.test(line)) return "fence";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (ITEM.test(line)) return "list";
  return startsTable(lines, i, growing) ? "table" : "paragraph";
}

/** For each kind of block with several lines: the end of the block that starts at line i. */
const END = {
  fence(lines, i) {
    const mark = FENCE.exec(lines[i])[1];
    for (i += 1; i < lines.length; i++) {
      const line = lines[i].trim();
      if (line.startsWith(mark) && line === mark[0].repeat(line.length)) return i + 1;
    }
    return i;
  },
  quote(lines, i) {
    while (i < lines.length && QUOTE.test(lines[i])) i++;
    return i;
  },
  table(lines, i) {
    while (i < lines.length && lines[i].includes("|")) i++;
    return i;
  },
  list(lines, i, growing) {
    const [, space, mark] = ITEM.exec(lines[i]);
    const [base, numbered] = [width(space), /\d/.test(mark)];
    let end = i + 1; // after the last line that is not blank
    for (i = end; i < lines.length; i++) {
      const kind = kindOf(lines, i, growing);
      if (kind === "blank") continue;
      const inside = width(/^[ \t]*/.exec(lines[i])[0]) > base + 1;
      const next = kind === "list" && /\d/.test(ITEM.exec(lines[i])[2]) === numbered;
      const goesOn = kind === "paragraph" && end === i; // a wrapped line need not be indented
      if (!inside && !next && !goesOn) break;
      end = i + 1;
    }
    return end;
  },
  paragraph(lines, i, growing) {
    for (i += 1; i < lines.length; i++) {
      const kind = kindOf(lines, i, growing);
      const isNumber = kind === "list" && /^\s*\d/.test(lines[i]) && !/^\s*1[.)]/.test(lines[i]); // "in\n1969. Then"
      if (kind !== "paragraph" && !isNumber) break;
    }
    return i;
  },
};

function blocksOf(lines, growing) {
  const blocks = [];
  for (let i = 0; i < lines.length;) {
    const kind = kindOf(lines, i, growing);
    const end = END[kind]?.(lines, i, growing) ?? i + 1;
    if (kind !== "blank") blocks.push({ kind, lines: lines.slice(i, end), growing: growing && end === lines.length });
    i = end;
  }
  return blocks;
}

function appendBlocks(parent, lines, growing, depth) {
  if (depth > DEPTH_LIMIT) return parent.append(lines.join("\n"));
  for (const block of blocksOf(lines, growing)) parent.append(NODE[block.kind](block, depth));
}

/** Makes the node for each kind of block. */
const NODE = {
  fence({ lines }) {
    const code = make("code", { textContent: codeOf(lines) });
    const language = FENCE.exec(lines[0])[2].trim().split(/\s/)[0];
    const button = iconButton("copy", "Copy code", () => copy(code.textContent, button));
    const caption = make("figcaption", {}, make("span", {}, language || "text"), button);
    return make("figure", {}, caption, make("pre", { tabIndex: 0 }, code));
  },
  heading({ lines, growing }) {
    const [, marks, text] = HEADING.exec(lines[0]);
    return inline(make(`h${marks.length}`), text, growing);
  },
  rule: () => make("hr"),
  quote({ lines, growing }, depth) {
    const quote = make("blockquote");
    appendBlocks(quote, lines.map((line) => line.replace(QUOTE, "")), growing, depth + 1);
    return quote;
  },
  list({ lines, growing }, depth) {
    const [, , mark] = ITEM.exec(lines[0]);
    const list = /\d/.test(mark) ? make("ol", { start: parseInt(mark, 10) }) : make("ul");
    const items = itemsOf(lines);
    items.forEach((item, i) => {
      const element = make("li");
      appendBlocks(element, item, growing && i === items.length - 1, depth + 1);
      list.append(element);
    });
    return list;
  },
  table({ lines }) {
    const [head, rule = "", ...rows] = lines;
    const sides = cellsOf(rule).map((cell) => (!cell.endsWith(":") ? "" : cell.startsWith(":") ? ".center" : ".right"));
    const row = (line, tag) => {
      const cells = cellsOf(line).slice(0, cellsOf(head).length);
      return make("tr", {}, ...cells.map((cell, i) => inline(make(tag + (sides[i] ?? "")), cell)));
    };
    const body = make("tbody", {}, ...rows.map((line) => row(line, "td")));
    return make("div.table", { tabIndex: 0 }, make("table", {}, make("thead", {}, row(head, "th")), body));
  },
  paragraph: ({ lines, growing }) => inline(make("p"), lines.map((line) => line.trim()).join("\n"), growing),
};

function codeOf([first, ...lines]) {
  const [, mark] = FENCE.exec(first);
  const last = lines.at(-1)?.trim() ?? "";
  const closed = last.startsWith(mark) && last === mark[0].repeat(last.length);
  const indent = /^ */.exec(first)[0].length;
  return (closed ? lines.slice(0, -1) : lines).map((line) => dedent(line, indent)).join("\n");
}

/** The items of a list, each as a list of lines without the item's indent. */
function itemsOf(lines) {
  const items = [];
  const base = width(ITEM.exec(lines[0])[1]);
  let indent = 0;
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && width(item[1]) <= base + 1) {
      indent = width(item[0]);
      items.push([line.slice(item[0].length)]);
    } else {
      items.at(-1).push(dedent(line.replace(/^[ \t]+/, (space) => " ".repeat(width(space))), indent));
    }
  }
  return items;
}

function dedent(line, columns) {
  return line.slice(Math.min(columns, /^ */.exec(line)[0].length));
}

/** An element with Markdown text, redrawn while the text grows. */
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.drawn = []; // the source of each block on the page
  }

  /** Draws the text; an unchanged block keeps its node, and so its selection, scroll position and buttons. */
  draw(text, growing) {
    const blocks = blocksOf(text.split("\n"), growing);
    blocks.forEach((block, i) => this.drawBlock(block, i));
    this.drawn.length = blocks.length;
    while (this.element.childNodes.length > blocks.length) this.element.lastChild.remove();
  }

  drawBlock(block, i) {
    const source = [block.kind, block.growing, ...block.lines].join("\n");
    if (this.drawn[i] === source) return;
    const old = this.element.childNodes[i];
    const sameCode = block.kind === "fence" && this.drawn[i]?.startsWith("fence\ntrue") && block.lines.length > 1;
    if (sameCode) old.querySelector("code").textContent = codeOf(block.lines);
    else if (old) old.replaceWith(NODE[block.kind](block, 0));
    else this.element.append(NODE[block.kind](block, 0));
    this.drawn[i] = source;
  }
}

// ---- Markdown: text in a line --------------------------------------------------------------------------------------

const URL_IN_TEXT = /https?:\/\/[^\s<>"`*\]|]*[^\s<>"`*\]|.,;:!?'_)]/; // ends before the sentence's punctuation
const MARK = /\\[\\`*_{}#+.!|~>$-]|`+|\*+|_+|~~|!?\[|\]|\n|<https?:\/\/[^\s<>]+>/;
const TOKEN = new RegExp(`${MARK.source}|${URL_IN_TEXT.source}`, "g");
const LINK_END = /\]\(<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?: +"[^"\n]*")?\)/y;
const LINK_TAIL = /\]\([^\s]*$/y; // of a link whose address is still being written
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del", "[": "span" };
const OPEN_LIMIT = 24; // open marks at a time; keeps the tree flat and the work linear

/** Fills an element with text, emphasis, code and links; returns the element. */
function inline(element, text, growing = false) {
  new InlineWriter(element, text, growing).write();
  return element;
}

class InlineWriter {
  constructor(root, text, growing) {
    this.text = growing ? text.slice(0, marksEnd(text)) : text; // the meaning of marks at the end is not known yet
    this.growing = growing;
    this.at = 0; // the text before this index is done
    this.plain = ""; // the content of the next text node
    this.open = [{ mark: "", element: root }]; // elements that have begun and not ended; the root stays
    this.lastTicks = new Map(); // length of a run of backticks -> where the last such run starts
    for (const { 0: run, index } of this.text.matchAll(/`+/g)) this.lastTicks.set(run.length, index);
  }

  write() {
    TOKEN.lastIndex = 0;
    for (let match; (match = TOKEN.exec(this.text)); TOKEN.lastIndex = this.at) {
      this.plain += this.text.slice(this.at, match.index);
      this.at = match.index + match[0].length;
      this.take(match[0], match.index);
    }
    this.plain += this.text.slice(this.at);
    this.put();
    while (!this.growing && this.open.length > 1) this.dissolve();
  }

  take(token, start) {
    const first = token[0];
    if (token === "\n") this.put(make("br"));
    else if (first === "\\") this.plain += token.slice(1);
    else if (first === "`") this.code(token, start);
    else if (token === "[" || token === "![") this.begin("[", token);
    else if (first === "]") this.bracket(start);
    else if (first === "<") this.address(token.slice(1, -1), token);
    else if (first === "h") this.address(token, token);
    else this.emphasis(token, start);
  }

  /** Appends the pending text and a node to the innermost open element. */
  put(node = "") {
    this.open.at(-1).element.append(...[this.plain, node].filter(Boolean));
    this.plain = "";
  }

  code(ticks, start) {
    const closed = this.lastTicks.get(ticks.length) > start;
    if (!closed && !this.growing) return void (this.plain += ticks);
    const end = closed ? this.closingTicks(ticks) : this.text.length;
    const code = this.text.slice(this.at, end).replaceAll("\n", " ");
    const padded = code.startsWith(" ") && code.endsWith(" ") && code.trim(); // "`` `a` ``"
    this.put(make("code", {}, padded ? code.slice(1, -1) : code));
    this.at = closed ? end + ticks.length : end;
  }

  /** The start of the closing run, which exists; parsing continues after it, so all searches together are linear. */
  closingTicks(ticks) {
    const runs = /`+/g;
    runs.lastIndex = this.at;
    for (;;) {
      const { 0: run, index } = runs.exec(this.text);
      if (run.length === ticks.length) return index;
    }
  }

  emphasis(run, start) {
    const [before, after] = [this.text[start - 1] ?? " ", this.text[this.at] ?? " "];
    const inWord = run[0] === "_" && /[\p{L}\p{N}]/u.test(before) && /[\p{L}\p{N}]/u.test(after);
    let left = run.length > 3 || inWord ? 0 : run.length;
    const text = left ? "" : run;
    while (left && /\S/.test(before)) {
      const found = this.open.findLast(({ mark }) => mark[0] === run[0] && mark.length <= left);
      if (!found) break;
      this.end(found);
      left -= found.mark.length;
    }
    while (left && /\S/.test(after) && this.open.length < OPEN_LIMIT) {
      const mark = run.slice(0, Math.min(2, left));
      this.begin(mark, mark);
      left -= mark.length;
    }
    this.plain += text || run.slice(0, left);
  }

  /** Opens an element for `mark`; `source` replaces it if it is never closed. */
  begin(mark, source) {
    if (this.open.length >= OPEN_LIMIT) return void (this.plain += source);
    const element = make(TAGS[mark]);
    this.put(element);
    this.open.push({ mark, source, element });
  }

  end(found) {
    this.put();
    while (this.open.at(-1) !== found) this.dissolve();
    this.open.pop();
  }

  /** Undoes the innermost mark, which was only text. */
  dissolve() {
    this.put();
    const { source, element } = this.open.pop();
    element.replaceWith(source, ...element.childNodes);
  }

  bracket(start) {
    const label = this.open.findLast(({ mark }) => mark === "[");
    LINK_END.lastIndex = LINK_TAIL.lastIndex = start;
    const link = label && LINK_END.exec(this.text);
    const url = link && safeUrl(link[1]);
    if (url) {
      this.end(label);
      label.element.replaceWith(linkTo(url, ...label.element.childNodes));
      this.at = start + link[0].length;
    } else if (label && !link && this.growing && LINK_TAIL.test(this.text)) {
      this.end(label);
      this.at = this.text.length;
    } else {
      if (label && label === this.open.at(-1)) this.dissolve();
      this.plain += "]";
    }
  }

  address(text, source) {
    const url = !this.open.some(({ mark }) => mark === "[") && safeUrl(text); // a link's label may itself be an address
    if (url) this.put(linkTo(url, text));
    else this.plain += source;
  }
}

function marksEnd(text) {
  let end = text.length;
  while (end && "*_~`".includes(text[end - 1])) end--;
  return end;
}

/** The address if a user may follow it, else null; "javascript:" and the like are refused. */
function safeUrl(text) {
  try {
    const url = new URL(text);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function linkTo(href, ...children) {
  return make("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

