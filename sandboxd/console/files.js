// The view of files: directories as a tree and as a table, previews, an editor, uploads and downloads.
import { call, raw } from "./api.js";
import { Editor } from "./editor.js";
import { base, decodePath, encodePath, join, parent } from "./paths.js";
import { stylesheet } from "./stylesheet.js";
import { failure, stat, transfers } from "./transfers.js";
import { bytes, confirm, guarded, h } from "./ui.js";

const PAGE = 1000;
const PICTURES = {
  png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", gif: "image/gif", webp: "image/webp", avif: "image/avif",
  svg: "image/svg+xml", bmp: "image/bmp", ico: "image/x-icon",
};
const LARGEST_PICTURE = 32 * 1024 * 1024;

const button = (text, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, text);
const address = (path) => `#/files${encodePath(path)}`;
const moment = (time) => new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

/** Ask for a text; resolve to null if the user does not want to. */
function ask(label, value = "") {
  return new Promise((resolve) => {
    const input = h("input", { type: "text", value, spellcheck: "false", autocapitalize: "off" });
    const dialog = h("dialog", { class: "dialog files-dialog", "aria-label": label }, h("label", {}, label, input));
    const answer = (text) => { dialog.remove(); resolve(text); };
    input.addEventListener("keydown", (event) => { if (event.key === "Enter") answer(input.value.trim() || null); });
    dialog.append(h("div", { class: "files-actions" }, button("Cancel", () => answer(null)),
      button("OK", () => answer(input.value.trim() || null), { class: "primary" })));
    dialog.addEventListener("cancel", () => answer(null));
    document.body.append(dialog);
    dialog.showModal();
    input.focus();
    const dot = value.lastIndexOf(".");
    input.setSelectionRange(0, dot > 0 ? dot : value.length);
  });
}

/** The directories, each loaded when it is opened. */
class Tree {
  constructor(top, show) {
    this.top = top;
    this.show = show;
    this.root = h("ul", { class: "files-tree", role: "tree", "aria-label": "Directories", onkeydown: (event) => this.key(event) });
    this.root.append(this.item(top, top));
  }

  /** Make the place of a directory: its item, which a list of those below it follows once that is loaded. */
  item(path, name) {
    const label = h("span", { class: "files-tree-name", onclick: () => this.show(path) }, name);
    const arrow = h("span", { class: "files-tree-arrow", "aria-hidden": "true", onclick: () => this.toggle(item) });
    const item = h("div", { role: "treeitem", "aria-expanded": "false", "aria-selected": "false", tabindex: "-1" }, arrow, label);
    item.path = path;
    return h("li", { role: "none" }, item);
  }

  get items() { return [...this.root.querySelectorAll("[role=treeitem]")].filter((item) => item.offsetParent); }

  find(path) { return [...this.root.querySelectorAll("[role=treeitem]")].find((item) => item.path === path); }

  async load(item) {
    const { entries } = await call(`files/list?path=${encodePath(item.path)}&type=dir&limit=${PAGE}`);
    const before = item.nextElementSibling;
    const open = new Map([...(before?.children ?? [])].map((each) => [each.firstElementChild.path, each]));
    before?.remove();
    item.removeAttribute("aria-owns");
    if (!entries.length) return;
    this.groups = (this.groups ?? 0) + 1;
    const group = h("ul", { role: "group", id: `directories-${this.groups}` });
    for (const entry of entries) {
      const path = join(item.path, entry.name);
      group.append(open.get(path) ?? this.item(path, entry.name));
    }
    item.after(group);
    item.setAttribute("aria-owns", group.id);
  }

  async expand(item) {
    if (item.getAttribute("aria-expanded") === "true") return;
    await this.load(item);
    item.setAttribute("aria-expanded", "true");
  }

  async toggle(item) {
    if (item.getAttribute("aria-expanded") === "true") item.setAttribute("aria-expanded", "false");
    else await guarded(() => this.expand(item));
  }

  /** Show where a directory is. */
  async reveal(path) {
    let item = this.find(this.top);
    for (let at = join(this.top, "").length; item; at += 1) {
      if (item.path === path) break;
      await this.expand(item).catch(() => {});  // it may not be readable
      const end = path.indexOf("/", at);
      at = end < 0 ? path.length : end;
      item = this.find(path.slice(0, at)) ?? null;
    }
    for (const each of this.root.querySelectorAll("[aria-selected=true]")) each.setAttribute("aria-selected", "false");
    for (const each of this.root.querySelectorAll("[tabindex='0']")) each.tabIndex = -1;
    (item ?? this.find(this.top)).tabIndex = 0;
    item?.setAttribute("aria-selected", "true");
  }

  /** Load a directory anew, if it is shown. */
  async refresh(path) {
    const item = this.find(path);
    if (item?.getAttribute("aria-expanded") === "true") await this.load(item).catch(() => {});
  }

  async key(event) {
    const item = event.target.closest("[role=treeitem]");
    const items = this.items;
    const at = items.indexOf(item);
    const open = item.getAttribute("aria-expanded") === "true";
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 };
    if (event.key in moves) this.focus(items[moves[event.key]]);
    else if (event.key === "ArrowRight" && !open) await this.toggle(item);
    else if (event.key === "ArrowRight") this.focus(item.nextElementSibling?.querySelector("[role=treeitem]"));
    else if (event.key === "ArrowLeft" && open) await this.toggle(item);
    else if (event.key === "ArrowLeft") this.focus(item.closest("ul").previousElementSibling.closest("[role=treeitem]"));
    else if (event.key === "Enter" || event.key === " ") this.show(item.path);
    else return;
    event.preventDefault();
  }

  focus(item) {
    if (!item) return;
    for (const each of this.root.querySelectorAll("[tabindex='0']")) each.tabIndex = -1;
    item.tabIndex = 0;
    item.focus();
  }
}

/** What is sent and received. */
class TransferList {
  constructor() {
    this.element = h("section", { class: "files-transfers", "aria-label": "Uploads and downloads", hidden: true });
    this.rows = new Map();
    this.draw = this.draw.bind(this);
    transfers.addEventListener("change", this.draw);
    this.draw();
  }

  draw() {
    for (const each of this.rows.keys()) if (!transfers.list.includes(each)) this.rows.delete(each);
    for (const each of transfers.list) if (!this.rows.has(each)) this.rows.set(each, this.row(each));
    this.element.hidden = !this.rows.size;
    this.element.replaceChildren(h("div", { class: "files-transfers-head" }, h("h2", {}, "Transfers"), button("Clear", () => transfers.clear(), { title: "Take out those that are over" })), h("ul", {}, ...this.rows.values()));
  }

  row(transfer) {
    const progress = h("progress", { max: "1", "aria-label": transfer.name });
    const text = h("span", { class: "files-facts" });
    const cancel = button("Cancel", () => transfer.cancel(), { "aria-label": `Cancel ${transfer.name}` });
    const row = h("li", {}, h("span", { class: "files-name" }, `${transfer.kind === "upload" ? "↑" : "↓"} ${transfer.name}`), progress, text, cancel);
    const draw = () => {
      const { state, size, done, note, rate } = transfer;
      if (size) progress.value = done / size;
      else if (state !== "active") progress.value = state === "done" ? 1 : 0;
      row.dataset.state = state;
      cancel.hidden = state !== "active";
      const amount = state === "done" ? bytes(done) : size ? `${Math.floor((done / size) * 100)} % of ${bytes(size)}` : bytes(done);
      text.textContent = [state === "active" ? "" : state, amount, state === "active" && done ? `${bytes(rate)}/s` : "", note].filter(Boolean).join(", ");
    };
    transfer.addEventListener("change", draw);
    draw();
    return row;
  }

  dispose() { transfers.removeEventListener("change", this.draw); }
}

/** The files of what was dropped, with their paths; those in directories, too. */
async function dropped(items) {
  const found = [];
  const walk = async (entry, prefix) => {
    if (entry.isFile) {
      found.push({ name: prefix + entry.name, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) });
    } else {
      found.push({ name: prefix + entry.name, file: null });
      const reader = entry.createReader();
      for (;;) {
        const entries = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
        if (!entries.length) break;
        for (const each of entries) await walk(each, `${prefix}${entry.name}/`);
      }
    }
  };
  const files = [...items].filter((item) => item.kind === "file");
  const entries = files.map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());  // all now: later they are gone
  for (const entry of entries) {
    if (entry instanceof File) found.push({ name: entry.name, file: entry });
    else if (entry) await walk(entry, "");
  }
  return found;
}

class View {
  /** `top`: the directory that has all that may be seen. */
  constructor(root, top) {
    this.controller = new AbortController();
    this.top = top;
    this.tree = new Tree(top, (path) => { location.hash = address(path); });
    this.crumbs = h("nav", { class: "files-crumbs", "aria-label": "Path" });
    this.actions = h("div", { class: "files-actions" });
    this.content = h("div", { class: "files-content" });
    this.list = new TransferList();
    this.input = h("input", { type: "file", multiple: true, hidden: true, onchange: () => { this.upload([...this.input.files].map((file) => ({ name: file.name, file }))); this.input.value = ""; } });
    const side = h("details", { class: "files-side", open: matchMedia("(min-width: 700px)").matches }, h("summary", {}, "Directories"), this.tree.root);
    this.pane = h("section", { class: "files-pane", "aria-label": "Files" }, h("div", { class: "files-head" }, this.crumbs, this.actions), this.content, this.list.element);
    root.replaceChildren(h("h1", { class: "files-heading" }, "Files"), h("div", { class: "files" }, side, this.pane, this.input));
    this.pane.addEventListener("dragover", (event) => {
      if (![...event.dataTransfer.types].includes("Files")) return;
      event.preventDefault();
      event.dataTransfer.dropEffect = this.directory ? "copy" : "none";
      if (this.directory) this.pane.dataset.drop = "";
    });
    this.pane.addEventListener("dragleave", (event) => { if (!this.pane.contains(event.relatedTarget)) delete this.pane.dataset.drop; });
    this.pane.addEventListener("drop", async (event) => {
      event.preventDefault();
      delete this.pane.dataset.drop;
      if (this.directory) await this.upload(await dropped(event.dataTransfer.items));
    });
    this.stored = (event) => { if (event.detail === this.directory) this.again(); };
    transfers.addEventListener("stored", this.stored);
    this.directory = null;
    this.editor = null;
  }

  async open(path) {
    this.path = path;
    this.directory = null;
    this.draw(path);
    try {
      const info = await call(`files/stat?path=${encodePath(path)}&follow=true`, undefined, { signal: this.controller.signal });
      if (info.type === "dir") {
        this.directory = path;
        this.directoryActions(path);
        await this.table(path);
      } else {
        this.fileActions(path, info);
        await this.file(path, info);
      }
    } catch (error) {
      if (error.name === "AbortError") return;
      this.actions.replaceChildren();
      this.content.replaceChildren(h("p", { role: "alert" }, error.message));
    }
    await this.tree.reveal(this.directory ?? parent(path));
  }

  draw(path) {
    const inside = path === this.top || path.startsWith(join(this.top, ""));
    const names = inside ? path.slice(this.top.length).split("/").filter(Boolean) : [];
    const links = [h("a", { href: address(this.top) }, this.top)];
    if (names.length && this.top !== "/") links.push(h("span", { "aria-hidden": "true" }, "/"));
    names.forEach((name, index) => {
      const here = join(this.top, names.slice(0, index + 1).join("/"));
      links.push(h("a", index === names.length - 1 ? { href: address(here), "aria-current": "page" } : { href: address(here) }, name));
      if (index < names.length - 1) links.push(h("span", { "aria-hidden": "true" }, "/"));
    });
    this.crumbs.replaceChildren(...links);
  }

  /** Show the directory anew, and the tree. */
  async again() {
    if (!this.directory) return;
    await guarded(() => this.table(this.directory));
    await this.tree.refresh(this.directory);
    if (document.activeElement === document.body) this.content.querySelector("a, button")?.focus(); // what had it is gone
  }

  directoryActions(path) {
    this.actions.replaceChildren(
      button("Upload", () => this.input.click(), { title: "Or drop files and folders here" }),
      button("New folder", () => guarded(async () => {
        const name = await ask("Name of the new folder");
        if (!name) return;
        const reply = await call("make_dir", { path: join(path, name) });
        if (!reply.success) throw new Error(reply.error);
        await this.again();
      })),
      button("New file", () => guarded(async () => {
        const name = await ask("Name of the new file");
        if (!name) return;
        const response = await raw(`files?path=${encodePath(join(path, name))}`, { method: "PUT", headers: { "If-None-Match": "*" }, body: "" });
        if (response.status === 412) throw new Error(`${name} exists already.`);
        if (!response.ok) throw await failure(response);
        location.hash = address(join(path, name));
      })),
      button("Download", () => transfers.download(path, { directory: true }), { title: "All of it, as an archive (tar.gz)" }),
      button("Refresh", () => this.again()));
  }

  fileActions(path, info) {
    this.actions.replaceChildren(
      button("Download", () => transfers.download(path, { size: info.size })),
      button("Rename", () => this.rename(path, info.name)),
      button("Delete", () => this.remove(path, info.type)));
  }

  async table(path) {
    const rows = h("tbody", {});
    const more = h("p", {});
    const load = async (after) => {
      const page = await call(`files/list?path=${encodePath(path)}&limit=${PAGE}&after=${encodePath(after)}`, undefined, { signal: this.controller.signal });
      rows.append(...page.entries.map((entry) => this.row(join(path, entry.name), entry)));
      more.replaceChildren(...(page.next === null ? [] : [button("Show more", () => guarded(() => load(page.next)))]));
      return page.entries.length;
    };
    const count = await load("");
    if (this.path !== path) return;
    this.content.replaceChildren(
      count ? h("table", {}, h("thead", {}, h("tr", {}, ...["Name", "Size", "Changed", "Actions"].map((name) => h("th", { scope: "col" }, name)))), rows)
        : h("p", { class: "files-empty" }, "This directory is empty. Drop files here, or use Upload."), more);
  }

  row(path, entry) {
    const marks = { dir: "/", link: ` → ${entry.target}`, file: "" }; // as in `ls -F`
    const link = h("a", { href: address(path) }, entry.name + (marks[entry.type] ?? ` (${entry.type})`));
    const label = (what) => ({ "aria-label": `${what} ${entry.name}`, class: "files-small" });
    return h("tr", { "data-type": entry.type },
      h("td", {}, link),
      h("td", { class: "files-number" }, entry.type === "file" ? bytes(entry.size) : ""),
      h("td", { class: "files-time", title: `${entry.mode} ${entry.owner ?? entry.uid}:${entry.group ?? entry.gid}` }, moment(entry.mtime)),
      h("td", { class: "files-row-actions" },
        entry.type === "file" ? button("Download", () => transfers.download(path, { size: entry.size }), label("Download"))
          : entry.type === "dir" ? button("Download", () => transfers.download(path, { directory: true }), label("Download")) : "",
        button("Rename", () => this.rename(path, entry.name), label("Rename")),
        button("Delete", () => this.remove(path, entry.type), label("Delete"))));
  }

  rename(path, name) {
    return guarded(async () => {
      const to = await ask(`New name of ${name}, or its new path`, name);
      if (!to || to === name) return;
      const target = to.startsWith("/") ? to : join(parent(path), to);
      await call("files/move", { from: path, to: target });
      if (this.directory) await this.again();
      else location.hash = address(target);
    });
  }

  remove(path, type) {
    return guarded(async () => {
      if (!(await confirm(type === "dir" ? `Delete the directory ${path} and all that is in it?` : `Delete ${path}?`, "Delete"))) return;
      if (type === "dir") {
        const reply = await call("delete_dir", { path });
        if (!reply.success) throw new Error(reply.error);
      } else {
        const response = await raw(`files?path=${encodePath(path)}`, { method: "DELETE" });
        if (!response.ok) throw await failure(response);
      }
      if (this.directory) await this.again();
      else location.hash = address(parent(path));
    });
  }

  async file(path, info) {
    const facts = h("p", { class: "files-facts" }, `${bytes(info.size)}, ${info.mode}, ${info.owner ?? info.uid}:${info.group ?? info.gid}, changed ${moment(info.mtime)}`);
    const picture = PICTURES[base(path).split(".").pop().toLowerCase()];
    if (info.type !== "file") {
      this.content.replaceChildren(facts, h("p", {}, `It is a ${info.type}: there is nothing to show.`));
    } else if (picture && info.size <= LARGEST_PICTURE) {
      const response = await raw(`files?path=${encodePath(path)}`, { signal: this.controller.signal });
      if (!response.ok) throw await failure(response);
      const url = URL.createObjectURL(new Blob([await response.arrayBuffer()], { type: picture }));
      this.controller.signal.addEventListener("abort", () => URL.revokeObjectURL(url));
      const image = h("img", { class: "files-picture", alt: base(path), src: url });
      image.addEventListener("error", () => image.replaceWith(h("p", {}, "The browser cannot show this picture.")));
      this.content.replaceChildren(facts, image);
    } else {
      this.editor = new Editor(path, this.controller.signal);
      this.content.replaceChildren(facts, this.editor.element);
      await this.editor.load();
    }
  }

  /** Upload files, `{name, file}`; a directory has no file. Ask before one is replaced. */
  upload(files) {
    const directory = this.directory;
    return guarded(async () => {
      for (const { name, file } of files) if (!file) await call("make_dir", { path: join(directory, name) });
      const wanted = files.filter(({ file }) => file).map(({ name, file }) => ({ path: join(directory, name), file }));
      const there = await Promise.all(wanted.map(({ path }) => stat(path)));
      const taken = wanted.filter((each, index) => there[index]);
      let replace = true;
      if (taken.length) {
        const names = taken.slice(0, 5).map(({ path }) => base(path)).join(", ") + (taken.length > 5 ? ` and ${taken.length - 5} more` : "");
        replace = await confirm(`Replace ${names}?`, "Replace");
      }
      wanted.forEach(({ path, file }, index) => { if (replace || !there[index]) transfers.upload(file, path, there[index]); });
      if (wanted.length < files.length) await this.again();
    });
  }

  dispose() {
    this.controller.abort();
    this.editor?.dispose();
    this.list.dispose();
    transfers.removeEventListener("stored", this.stored);
  }
}

/**
 * Fill `root`.
 *
 * @param {string} parameter the path to show, percent-encoded; empty for the one of before.
 * @returns a function that ends it.
 */
export async function mount(root, parameter) {
  const KEY = "sandboxd-path";
  const [{ root: top }] = await Promise.all([call("status"), stylesheet("files.css")]);
  const path = parameter ? `/${decodePath(parameter).replace(/^\/+|\/+$/g, "")}` : sessionStorage.getItem(KEY) ?? top ?? "/";
  sessionStorage.setItem(KEY, path);
  const view = new View(root, top ?? "/");
  await view.open(path);
  return () => view.dispose();
}
