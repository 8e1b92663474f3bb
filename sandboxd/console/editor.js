// A text editor for one file, which never overwrites what somebody else has saved meanwhile unless the user wants it.
import { raw } from "./api.js";
import { encodePath } from "./paths.js";
import { failure } from "./transfers.js";
import { bytes, h, toast } from "./ui.js";

// More than this is shown only, and of that the beginning.
const LARGEST = 2 * 1024 * 1024;

// Texts that were changed and not saved, by path, so that another view in between does not lose them.
const drafts = new Map();

addEventListener("beforeunload", (event) => { if (drafts.size) event.preventDefault(); });

const button = (text, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, text);

/** How lines end, "\n" or "\r\n"; null if it differs, which a text area would not keep. */
function lineEnd(text) {
  const count = (pattern) => text.match(pattern)?.length ?? 0;
  const returns = count(/\r/g);
  if (!returns) return "\n";
  return returns === count(/\r\n/g) && returns === count(/\n/g) ? "\r\n" : null;
}

/** Read a response, up to `LARGEST` bytes; `whole`: that was all. */
async function beginning(response) {
  const chunks = [];
  let size = 0;
  for (const reader = response.body.getReader(); size <= LARGEST;) {
    const { done, value } = await reader.read();
    if (done) break;
    chunks.push(value);
    size += value.length;
  }
  const data = await new Blob(chunks).arrayBuffer();
  return { data: data.slice(0, LARGEST), whole: size <= LARGEST };
}

export class Editor {
  constructor(path, signal) {
    this.path = path;
    this.signal = signal;
    this.tag = null; // of the version that the text was made from
    this.end = "\n";
    this.before = "";
    this.area = h("textarea", {
      class: "editor-text", "aria-label": `Text of ${path}`, spellcheck: "false", autocapitalize: "off", autocomplete: "off", wrap: "off",
      oninput: () => { this.note.textContent = ""; this.changed(); }, onkeydown: (event) => this.key(event),
    });
    this.note = h("span", { class: "files-facts", role: "status" });
    this.saving = button("Save", () => this.save(), { disabled: true, title: "Ctrl+S" });
    this.undoing = button("Discard changes", () => this.discard(), { disabled: true });
    this.bar = h("div", { class: "editor-bar" }, this.saving, this.undoing, this.note);
    this.conflict = h("div", { class: "editor-conflict", role: "alert", hidden: true });
    this.element = h("div", { class: "editor", hidden: true }, this.bar, this.conflict, this.area);
  }

  /** Get the file, or what was not saved of it. */
  async load() {
    const controller = new AbortController();
    const response = await raw(`files?path=${encodePath(this.path)}`, { signal: AbortSignal.any([this.signal, controller.signal]) });
    if (!response.ok) throw await failure(response);
    const { data, whole } = await beginning(response);
    if (!whole) controller.abort();
    const tag = response.headers.get("ETag"); // none for what the kernel makes up, as in /proc
    this.element.hidden = false;
    this.conflict.hidden = true;
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: whole, ignoreBOM: true }).decode(data);
    } catch {
      text = null;
    }
    if (text === null || text.includes("\0")) {
      this.element.replaceChildren(h("p", {}, "This is no text."));
      return;
    }
    const end = lineEnd(text);
    this.area.readOnly = !whole || end === null || tag === null;
    this.bar.hidden = false;
    this.saving.hidden = this.undoing.hidden = this.area.readOnly;
    if (!whole) this.note.textContent = `The first ${bytes(data.byteLength)}; too long to be edited here.`;
    else if (end === null) this.note.textContent = "Its lines end in different ways, which would be lost: read only.";
    else this.note.textContent = "";
    this.take(text.replaceAll("\r\n", "\n"), tag, end ?? "\n");
  }

  async discard() {
    drafts.delete(this.path);
    try {
      await this.load();
    } catch (error) {
      if (error.name !== "AbortError") toast(error.message, "error");
    }
  }

  take(text, tag, end) {
    const draft = this.area.readOnly ? undefined : drafts.get(this.path);
    [this.before, this.tag, this.end] = draft ? [draft.before, draft.tag, draft.end] : [text, tag, end];
    this.area.value = draft ? draft.text : text;
    if (draft) this.note.textContent = draft.tag === tag ? "With your changes, which are not saved yet." : "With your changes, which are not saved yet; the file has changed since.";
    this.changed();
  }

  changed() {
    if (this.area.readOnly) return;
    const changed = this.area.value !== this.before;
    this.saving.disabled = this.undoing.disabled = !changed;
    if (changed) drafts.set(this.path, { text: this.area.value, before: this.before, tag: this.tag, end: this.end });
    else drafts.delete(this.path);
  }

  key(event) {
    if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "s") return;
    event.preventDefault();
    if (!this.saving.disabled && !this.saving.hidden) this.save();
  }

  /** Save the text if the file is still the version that it was made from. */
  async save() {
    const text = this.area.value;
    this.saving.disabled = true;
    try {
      const response = await raw(`files?path=${encodePath(this.path)}`, {
        method: "PUT",
        headers: this.tag === null ? { "If-None-Match": "*" } : { "If-Match": this.tag },
        body: this.end === "\n" ? text : text.replaceAll("\n", this.end),
      });
      if (response.status === 412) return await this.differ((await response.json()).etag);
      if (!response.ok) throw await failure(response);
      this.tag = (await response.json()).etag;
      this.before = text;
      this.conflict.hidden = true;
      this.note.textContent = `Saved ${new Date().toLocaleTimeString()}.`;
    } catch (error) {
      toast(error.message, "error");
    }
    return this.changed();
  }

  /** The file is another by now: show what it is, and let the user choose. */
  async differ(tag) {
    let theirs = null;
    if (tag !== null) {
      const response = await raw(`files?path=${encodePath(this.path)}`);
      theirs = response.ok ? new TextDecoder().decode((await beginning(response)).data) : "";
      tag = response.headers.get("ETag") ?? tag;
    }
    this.conflict.replaceChildren(
      h("p", {}, theirs === null ? "The file was removed since you opened it. Your text is below." : "The file was changed since you opened it. This is what it is now; your text is below."),
      theirs === null ? "" : h("textarea", { class: "editor-text", "aria-label": "The file as it is now", readonly: true, wrap: "off", rows: "8" }, theirs),
      h("div", { class: "files-actions" },
        button(theirs === null ? "Save it all the same" : "Overwrite with mine", () => { this.tag = tag; this.save(); }),
        theirs === null ? "" : button("Take theirs, discard mine", () => this.discard())));
    this.conflict.hidden = false;
    this.conflict.scrollIntoView({ block: "nearest" });
    this.saving.disabled = false;
  }

  dispose() {
    this.conflict.hidden = true;
  }
}
