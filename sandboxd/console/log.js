// The view of a process's log: the lines that are kept, and new ones as they come.
import { after, paint, plain, walk } from "./ansi.js";
import { ApiError, call, events } from "./api.js";
import { LineList } from "./lines.js";
import { badge, endSurvivors, kill, signalMenu } from "./signals.js";
import { bytes, duration, guarded, h, poll } from "./ui.js";

// What the page keeps: the oldest lines give way to new ones.
const MAX_LINES = 50_000;
const MAX_CHARACTERS = 16 * 1024 * 1024;

// Characters of one line: what is longer goes on in a further one.
const MAX_LINE = 64 * 1024;

// Characters of a line that are drawn.
const MAX_DRAWN = 10_000;

const CHUNK = 500; // lines that are dropped at once

const pad = (n, width = 2) => String(n).padStart(width, "0");

let lastTime = ["", ""];

/** A time as "14:03:07.123", in the browser's zone. */
function clock(text) {
  if (lastTime[0] !== text) {
    const time = new Date(text);
    lastTime = [text, text && `${pad(time.getHours())}:${pad(time.getMinutes())}:${pad(time.getSeconds())}.${pad(time.getMilliseconds(), 3)}`];
  }
  return lastTime[1];
}

/** Return what finds matches in a text: `/.../` and `/.../i` are regular expressions. Throws SyntaxError for one that is none. */
function matcher(query) {
  const [, source, flags] = /^\/(.+)\/(i?)$/.exec(query) ?? [];
  const escaped = query.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  return source ? new RegExp(source, `g${flags}`) : new RegExp(escaped, "gi");
}

/** The lines that the page keeps: at most so many, and so many characters. */
class Store {
  constructor() {
    this.lines = [];
    this.begin = 0; // of `lines`: what is before was dropped
    this.characters = 0;
    this.dropped = 0;
    this.styles = { stdout: null, stderr: null };
    this.open = { stdout: null, stderr: null }; // lines that are not finished
  }

  get full() { return this.lines.length - this.begin > MAX_LINES || this.characters > MAX_CHARACTERS; }

  /** Add a record; return its line, and whether that is a new one. */
  add(number, { stream, data, timestamp, partial }) {
    const open = this.open[stream];
    let line = open;
    if (open && open.text.length + data.length <= MAX_LINE) {
      this.characters -= open.text.length;
      const text = open.text + data;
      const cut = text.lastIndexOf("\r", text.length - 2) + 1; // what a progress bar has overwritten
      open.style = after(text.slice(0, cut), open.style);
      open.text = text.slice(cut);
    } else {
      line = { number, stream, time: timestamp, text: data, style: this.styles[stream], continued: Boolean(open) };
      this.lines.push(line);
    }
    this.characters += line.text.length;
    this.styles[stream] = after(data, this.styles[stream]);
    this.open[stream] = partial ? line : null;
    return [line, line !== open];
  }

  addGap(number, dropped) {
    const line = { number, gap: dropped, text: "" };
    this.open = { stdout: null, stderr: null };
    this.lines.push(line);
    return line;
  }

  /** Drop the oldest lines; return the number of the first that is left. */
  trim() {
    // Some more than there have to go, so that this is rare.
    const goes = () => this.size > MAX_LINES - CHUNK || this.characters > MAX_CHARACTERS * 0.97;
    for (const full = this.full; full && this.size > 1 && goes(); this.begin += 1) {
      this.characters -= this.lines[this.begin].text.length;
      this.dropped += 1;
      this.lines[this.begin] = undefined;
    }
    if (this.begin > this.lines.length / 2) {
      this.lines.splice(0, this.begin);
      this.begin = 0;
    }
    return this.lines[this.begin]?.number ?? 0;
  }

  * [Symbol.iterator]() {
    for (let at = this.begin; at < this.lines.length; at += 1) yield this.lines[at];
  }

  get size() { return this.lines.length - this.begin; }
}

const OPTIONS = [["wrap", "Wrap", true], ["times", "Times", false], ["numbers", "Numbers", true]];
const remembered = { wrap: true, times: false, numbers: true }; // while the page lives

class View {
  constructor(root, id) {
    this.id = id;
    this.controller = new AbortController();
    this.signal = this.controller.signal;
    this.store = new Store();
    this.match = null;
    this.following = true;
    this.top = 0; // where it was scrolled to last
    this.paused = false;
    this.held = 0; // lines that have come while it is paused
    this.wake = () => {};
    this.frame = 0;
    this.ended = false;

    this.title = h("h1", { class: "mono log-command" }, id);
    this.facts = h("span", { class: "log-facts" });
    this.actions = h("span", { class: "log-actions" });
    this.search = h("input", { type: "search", placeholder: "Find: text or /regular expression/", "aria-label": "Show only lines that contain", spellcheck: "false", autocapitalize: "off", oninput: () => this.seek() });
    this.found = h("span", { class: "summary number", role: "status" });
    this.which = h("select", { "aria-label": "Which stream", onchange: () => this.rebuild() },
      h("option", { value: "" }, "Both"), h("option", { value: "stdout" }, "stdout"), h("option", { value: "stderr" }, "stderr"));
    this.pauseButton = h("button", { "aria-pressed": "false", onclick: () => this.pause(!this.paused) }, "Pause");
    const toggles = OPTIONS.map(([name, text]) => h("button", { class: "toggle", "aria-pressed": String(remembered[name]), onclick: ({ currentTarget }) => {
      remembered[name] = !remembered[name];
      currentTarget.setAttribute("aria-pressed", String(remembered[name]));
      this.restyle();
    } }, text));
    this.scroller = h("div", { class: "lines", tabindex: "0", role: "region", "aria-label": "Log", onscroll: () => this.scrolled(), onkeydown: (event) => this.key(event) });
    this.older = h("p", { class: "log-divider", hidden: true });
    this.last = h("p", { class: "log-divider", hidden: true });
    this.scroller.append(this.older);
    this.list = new LineList(this.scroller, (line) => this.row(line));
    this.scroller.append(this.last);
    this.state = h("span", { class: "log-state", role: "status" });
    this.kept = h("span", { class: "number" });
    this.bottom = h("button", { class: "log-bottom primary", hidden: true, onclick: () => this.follow() }, "↓ Newest");
    root.replaceChildren(
      h("div", { class: "head log-head" }, h("a", { href: "#/processes", class: "small", "aria-label": "All processes" }, "←"), this.title, this.facts, h("span", { class: "spring" }), this.actions),
      h("div", { class: "card log" },
        h("div", { class: "log-bar" }, this.search, this.found, this.which, h("span", { class: "log-toggles" }, toggles),
          this.pauseButton),
        h("div", { class: "log-frame" }, this.scroller, this.bottom),
        h("div", { class: "log-foot" }, this.state, h("span", { class: "spring" }), this.kept, h("button", { class: "small", onclick: () => this.download() }, "Download"))));
    this.observer = new ResizeObserver(() => { this.list.reset(); this.schedule(); });
    this.observer.observe(this.scroller);
    this.restyle();
  }

  /** The element of a line. */
  row(line) {
    if (line.gap !== undefined) return h("div", { class: "log-divider" }, `${line.gap.toLocaleString()} ${line.gap === 1 ? "line is" : "lines are"} no longer kept`);
    const drawn = line.text.length > MAX_DRAWN ? line.text.slice(0, MAX_DRAWN) : line.text;
    const text = h("span", { class: "text" });
    walk(drawn, line.style, (piece, style) => {
      for (const part of this.marked(piece)) {
        if (!style) {
          text.append(part);
          continue;
        }
        const span = h("span", {}, part);
        paint(span, style);
        text.append(span);
      }
    });
    if (drawn !== line.text) text.append(h("span", { class: "muted" }, ` … ${bytes(line.text.length - drawn.length)} more; download the log to see them`));
    return h("div", { class: `row ${line.stream}` },
      h("span", { class: "gutter" }, h("span", { class: "n" }, String(line.number)), h("time", {}, clock(line.time)), h("span", { class: "s" }, line.stream === "stderr" ? "err" : "out")),
      line.continued ? h("span", { class: "muted", title: "The line above goes on here" }, "↪") : null, text);
  }

  /** The pieces of a text, those that are sought marked. */
  marked(text) {
    if (!this.match) return [text];
    const parts = [];
    let at = 0;
    for (const found of text.matchAll(this.match)) {
      if (!found[0]) continue;
      parts.push(text.slice(at, found.index), h("mark", {}, found[0]));
      at = found.index + found[0].length;
    }
    parts.push(text.slice(at));
    return parts.filter((part) => part !== "");
  }

  wanted(line) {
    if (line.gap !== undefined) return true;
    if (this.which.value && line.stream !== this.which.value) return false;
    if (!this.match) return true;
    this.match.lastIndex = 0;
    return this.match.test(plain(line.text));
  }

  restyle() {
    for (const [name] of OPTIONS) this.scroller.classList.toggle(name, remembered[name]);
    const anchor = this.following;
    this.list.reset();
    if (anchor) this.list.end();
    else this.list.update();
  }

  seek() {
    clearTimeout(this.seeking);
    this.seeking = setTimeout(() => {
      const query = this.search.value;
      try {
        this.match = query ? matcher(query) : null;
        this.search.setCustomValidity("");
      } catch (error) {
        this.search.setCustomValidity(error.message);
        this.search.reportValidity();
        return;
      }
      this.rebuild();
    }, 150);
  }

  /** Take the lines that are wanted now. */
  rebuild() {
    this.list.clear();
    this.held = 0;
    for (const line of this.store) if (this.wanted(line)) this.list.push(line);
    this.following = true;
    this.draw();
    this.list.end();
  }

  /** Read the log to its end, over as many connections as it takes. */
  async read() {
    const onstate = (state, delay) => this.say(state === "open" ? "Live" : state === "connecting" ? "Connecting…" : `Connection lost; trying again in ${Math.max(1, Math.round(delay / 1000))} s`);
    try {
      for await (const { id, event, data } of events(`process_logs_streaming?id=${encodeURIComponent(this.id)}`, { signal: this.signal, onstate })) {
        if (event === "log") this.add(...this.store.add(Number(id), data));
        else if (event === "gap") this.add(this.store.addGap(Number(id), data.dropped), true);
        else if (event === "complete") this.complete();
        else if (event === "error") throw new ApiError(data.error, 404);
        // While it is paused the page keeps as much as ever, then it reads no further; the daemon waits for nobody.
        while (this.paused && this.store.full && !this.signal.aborted) await new Promise((resolve) => { this.wake = resolve; });
      }
    } catch (error) {
      if (!this.signal.aborted) this.say(`${error.message}.`, "bad");
    }
  }

  add(line, isNew) {
    if (!isNew) this.list.touch();
    else if (this.paused) this.held += 1;
    else if (this.wanted(line)) this.list.push(line);
    this.schedule();
  }

  complete() {
    this.ended = true;
    this.say("Ended");
    this.look();
  }

  say(text, kind = "") {
    this.state.className = `log-state ${kind || (text === "Live" ? "live" : "")}`;
    this.state.textContent = this.paused ? "Paused" : text;
    this.said = text;
  }

  schedule() {
    this.frame ||= requestAnimationFrame(() => { this.frame = 0; this.draw(); });
  }

  draw() {
    if (!this.paused) {
      const first = this.store.trim();
      this.list.dropBefore(first);
    }
    this.older.hidden = !this.store.dropped;
    this.older.textContent = `${this.store.dropped.toLocaleString()} older lines are no longer kept by this page`;
    if (this.following && !this.paused) this.list.end();
    else this.list.update();
    this.top = this.scroller.scrollTop;
    this.bottom.hidden = this.following || this.list.atEnd;
    this.pauseButton.textContent = this.paused ? `Resume${this.held ? ` (${this.held.toLocaleString()} new)` : ""}` : "Pause";
    const size = this.store.size.toLocaleString();
    this.found.textContent = this.match ? `${this.list.count.toLocaleString()} of ${size}` : "";
    this.kept.textContent = `${size} lines`;
  }

  scrolled() {
    const top = this.scroller.scrollTop;
    if (this.list.atEnd) this.following = true;
    else if (top < this.top - 1) this.following = false; // by the user: the page itself follows the end
    this.top = top;
    this.schedule();
  }

  follow() {
    if (this.paused) this.pause(false);
    this.following = true;
    this.schedule();
    this.scroller.focus();
  }

  pause(paused) {
    this.paused = paused;
    this.pauseButton.setAttribute("aria-pressed", String(paused));
    if (!paused) {
      this.wake();
      this.rebuild();
    }
    this.say(this.said ?? "");
    this.schedule();
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "/") this.search.focus();
    else if (event.key === "p") this.pause(!this.paused);
    else if (event.key === "End") this.follow();
    else if (event.key === "Home") { this.following = false; this.scroller.scrollTop = 0; } else return;
    event.preventDefault();
  }

  download() {
    const parts = this.store.dropped ? [`[${this.store.dropped} older lines are not in this file]\n`] : [];
    for (const line of this.store) {
      if (line.gap !== undefined) parts.push(`[${line.gap} lines are no longer kept]\n`);
      else if (!this.which.value || line.stream === this.which.value) parts.push(line.text, "\n");
    }
    const url = URL.createObjectURL(new Blob(parts, { type: "text/plain" }));
    h("a", { href: url, download: `${this.id}.log` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }

  /** Show how the process is. */
  async look() {
    let found;
    try {
      found = await call(`processes/${encodeURIComponent(this.id)}`, undefined, { signal: this.signal });
    } catch (error) {
      if (error.status === 404) this.settled = true;
      return;
    }
    if (this.title.textContent !== found.command) {
      this.title.textContent = found.command;
      this.title.title = found.command.slice(0, 2000);
    }
    const running = found.status === "running";
    const left = running ? [] : found.survivors;
    const end = found.ended_at ? new Date(found.ended_at) : Date.now();
    const ran = duration((end - new Date(found.started_at)) / 1000);
    this.facts.replaceChildren(badge(found), h("span", { class: "muted" }, `pid ${found.pid}, ${running ? "for" : "ran"} ${ran}`));
    const actions = `${found.status} ${left}`;
    if (actions !== this.drawnActions) {
      this.drawnActions = actions;
      const signal = h("button", { class: "small", "aria-haspopup": "menu", "aria-expanded": "false", onclick: () => signalMenu(signal, found, () => this.look()) }, "Signal");
      this.actions.replaceChildren(...[
        running && found.tty && h("a", { class: "small", href: `#/terminal/${this.id}` }, "Terminal"),
        (running || left.length > 0) && signal,
        running && h("button", { class: "small danger", onclick: async () => { await kill(found); await this.look(); } }, "Kill"),
        left.length > 0 && h("button", { class: "small danger", onclick: async () => { await endSurvivors(found, left); await this.look(); } }, `Kill ${left.length} left behind`),
      ].filter(Boolean));
    }
    if (this.ended && !running) {
      const how = found.signal ? `by ${found.signal}` : `with exit code ${found.exit_code}`;
      this.last.hidden = false;
      this.last.textContent = `Ended ${how} after ${ran}`;
      this.schedule();
    }
    this.settled = !running && !left.length;
  }

  dispose() {
    this.controller.abort();
    this.wake();
    this.observer.disconnect();
    cancelAnimationFrame(this.frame);
    clearTimeout(this.seeking);
  }
}

/** Fill `root`; return a function that ends it. `parameter`: the id of a process. */
export async function mount(root, parameter) {
  if (!parameter) {
    location.replace("#/processes");
    return () => {};
  }
  const view = new View(root, decodeURIComponent(parameter));
  guarded(() => view.read());
  const end = poll(() => (view.settled ? null : view.look()), 2000);
  return () => {
    end();
    view.dispose();
  };
}
