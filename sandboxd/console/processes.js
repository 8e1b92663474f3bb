// The view of processes: a table of all, a form that starts one, and what can be done to each.
import { ApiError, call } from "./api.js";
import { badge, endSurvivors, kill, signalMenu } from "./signals.js";
import { bytes, duration, guarded, h, poll, toast } from "./ui.js";

const INTERVAL = 1500;

// Rows that are drawn until all are asked for.
const ROWS = 200;

// Details that are asked for at once, of processes that have ended: whether they have left others behind.
const QUERIES = 2;

const clock = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const calendar = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "medium" });

function moment(text) {
  const time = new Date(text);
  const today = time.toDateString() === new Date().toDateString();
  return h("time", { datetime: text, title: calendar.format(time) }, (today ? clock : calendar).format(time));
}

const seconds = (process) => (new Date(process.completed_at ?? Date.now()) - new Date(process.started_at)) / 1000;

/** Return the variables in lines of NAME=value. Throws an Error that names a line that is none. */
function variables(text) {
  const env = {};
  for (const line of text.split("\n")) {
    if (!line.trim()) continue;
    const equals = line.indexOf("=");
    if (equals < 1) throw new Error(`Environment: “${line}” is not of the form NAME=value`);
    env[line.slice(0, equals).trim()] = line.slice(equals + 1);
  }
  return env;
}

/** One process, as a row that is drawn anew where it has changed, and a second row with its details. */
class Row {
  constructor(view, process) {
    this.view = view;
    this.details = null;
    this.open = false;
    this.survivors = [];
    this.state = h("td", { class: "p-state" });
    this.ran = h("td", { class: "p-ran number" });
    this.actions = h("td", { class: "p-actions" });
    this.toggle = h("button", { class: "quiet p-toggle", "aria-expanded": "false", "aria-label": `Details of process ${process.pid}`, onclick: () => this.unfold(!this.open) }, "▸");
    this.element = h("tr", { "data-id": process.id },
      h("td", { class: "p-fold" }, this.toggle), this.state,
      h("td", { class: "p-command" }, h("a", { href: `#/log/${process.id}`, title: process.command.slice(0, 2000) }, process.command.slice(0, 400))),
      h("td", { class: "p-pid number" }, h("span", { class: "label" }, "pid "), String(process.pid)),
      h("td", { class: "p-started" }, moment(process.started_at)), this.ran, this.actions);
    this.more = h("tr", { class: "p-more", hidden: true }, h("td", {}), h("td", { colspan: "6" }));
    this.update(process);
  }

  update(process) {
    this.process = process;
    const ran = duration(seconds(process));
    if (this.ran.textContent !== ran) this.ran.textContent = ran;
    const drawn = `${process.status} ${this.details?.status} ${this.survivors} ${this.details?.tty ? "tty" : ""}`;
    if (drawn === this.drawn) return;
    this.drawn = drawn;
    const focused = this.actions.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    this.state.replaceChildren(badge(this.details?.status === process.status ? this.details : process));
    const refresh = () => this.view.refresh();
    const pid = process.pid;
    const signal = h("button", { class: "small", "data-key": "signal", "aria-haspopup": "menu", "aria-expanded": "false", "aria-label": `Send a signal to process ${pid}`,
      onclick: () => signalMenu(signal, process, refresh) }, "Signal");
    const buttons = [h("a", { class: "small", href: `#/log/${process.id}`, "aria-label": `Log of process ${pid}` }, "Log")];
    if (process.status === "running") {
      if (this.details?.tty) buttons.push(h("a", { class: "small", href: `#/terminal/${process.id}`, "aria-label": `Terminal of process ${pid}` }, "Terminal"));
      buttons.push(signal, h("button", { class: "small danger", "data-key": "kill", "aria-label": `Kill process ${pid}`,
        onclick: async () => { await kill(process); refresh(); } }, "Kill"));
    } else if (this.survivors.length) {
      this.state.append(h("span", { class: "state left" }, h("span", { class: "mark", "aria-hidden": "true" }, "▲"), `${this.survivors.length} left behind`));
      buttons.push(signal, h("button", { class: "small danger", "data-key": "kill", "aria-label": `Kill what process ${pid} has left behind`,
        onclick: async () => { await endSurvivors(process, this.survivors); await this.look(); refresh(); } }, "Kill them"));
    }
    this.actions.replaceChildren(...buttons);
    if (focused) (this.actions.querySelector(`[data-key="${focused}"]`) ?? this.toggle).focus({ preventScroll: true });
  }

  /** Whether its details have to be asked for: once while it runs and once when it has ended, and while it is of interest. */
  get due() {
    return !this.details || this.details.status !== this.process.status || this.open || this.survivors.length > 0;
  }

  /** Ask for the details. */
  async look() {
    try {
      this.details = await call(`processes/${this.process.id}`, undefined, { signal: this.view.signal });
    } catch (error) {
      if (error instanceof ApiError && error.status === 404) return; // it is no longer remembered
      throw error;
    }
    this.survivors = this.details.status === "running" ? [] : this.details.survivors;
    this.update(this.process);
    if (this.open) this.describe();
  }

  unfold(open) {
    this.open = open;
    this.toggle.setAttribute("aria-expanded", String(open));
    this.more.hidden = !open;
    if (open) guarded(() => this.look());
  }

  describe() {
    const found = this.details;
    const limits = Object.entries(found.limits).map(([name, value]) => `${name} ${value}`).join(", ");
    const facts = {
      Command: h("code", {}, found.command.slice(0, 20_000)),
      "Working directory": found.cwd ?? "the daemon's own", User: found.user ?? "the daemon's own",
      Terminal: found.tty && `${found.tty.cols} × ${found.tty.rows}`,
      Output: `${bytes(found.output.bytes)} in ${found.output.records.toLocaleString()} records${found.output.truncated ? `, kept from ${found.output.first.toLocaleString()} on` : ""}`,
      "Exit code": found.exit_code === null ? null : String(found.exit_code), Signal: found.signal,
      "Ended because": found.timed_out ? `its timeout of ${duration(found.timeout)} had passed` : found.idle_timed_out ? `it wrote nothing for ${duration(found.idle_timeout)}` : found.oom_killed ? "its memory limit was reached" : null,
      Timeout: found.timeout && duration(found.timeout), "Idle timeout": found.idle_timeout && duration(found.idle_timeout), Limits: limits,
      "Left behind": this.survivors.length ? `processes ${this.survivors.join(", ")}` : null, Id: h("code", {}, found.id),
    };
    const text = JSON.stringify({ ...found, output: found.output.bytes });
    if (text === this.described) return;
    this.described = text;
    this.more.lastChild.replaceChildren(h("dl", { class: "facts" }, Object.entries(facts).filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
      h("button", { class: "small", onclick: () => this.view.form.fill(found) }, "Start another like it"));
  }
}

/** The form that starts a process. */
class StartForm {
  constructor(started) {
    const text = (props) => h("input", { type: "text", autocomplete: "off", spellcheck: "false", autocapitalize: "off", ...props });
    const box = (label, title) => {
      const input = h("input", { type: "checkbox" });
      return [input, h("label", { class: "box", title }, input, label)];
    };
    this.command = text({ id: "command", class: "mono", required: true, placeholder: "python3 -m http.server 8000" });
    this.cwd = text({ class: "mono", placeholder: "the daemon's own" });
    this.user = text({ placeholder: "the daemon's own" });
    this.timeout = h("input", { type: "number", min: "0", step: "any", placeholder: "none", inputmode: "decimal" });
    this.env = h("textarea", { class: "mono", rows: "2", placeholder: "NAME=value", spellcheck: "false", autocapitalize: "off" });
    const [tty, ttyLabel] = box("Terminal", "It gets a pseudo-terminal, which opens when it has started");
    const [stdin, stdinLabel] = box("Open stdin", "Its stdin is a pipe, for the API; else it is /dev/null");
    const [merge, mergeLabel] = box("Merge stderr into stdout", "In the exact order of writing");
    const [login, loginLabel] = box("Login shell", "Its shell reads the profile");
    const [survive, surviveLabel] = box("Survive the daemon", "It may outlive a daemon that was killed");
    this.boxes = { tty, stdin, merge_stderr: merge, login, survive };
    const submit = h("button", { class: "primary" }, "Start");
    this.options = h("details", { class: "options" }, h("summary", {}, "Options"),
      h("div", { class: "fields" },
        h("label", {}, "Working directory", this.cwd), h("label", {}, "User", this.user), h("label", {}, "Timeout in seconds", this.timeout),
        h("label", { class: "wide" }, "Environment", this.env),
        h("div", { class: "boxes wide" }, ttyLabel, stdinLabel, mergeLabel, loginLabel, surviveLabel)));
    this.element = h("form", { class: "start card", onsubmit: async (event) => {
      event.preventDefault();
      submit.disabled = true;
      await guarded(async () => started(await call("start_process", this.body()), tty.checked));
      submit.disabled = false;
    } }, h("div", { class: "line" }, h("label", { for: "command" }, "Command"), this.command, submit), this.options);
  }

  /** The body of /start_process. */
  body() {
    const flags = Object.entries(this.boxes).filter(([, input]) => input.checked).map(([name]) => [name, true]);
    return {
      cmd: this.command.value, ...(this.cwd.value && { cwd: this.cwd.value }), ...(this.user.value && { user: this.user.value }),
      ...(this.timeout.value && { timeout: Number(this.timeout.value) }), ...(this.env.value.trim() && { env: variables(this.env.value) }),
      ...Object.fromEntries(flags),
    };
  }

  /** Take over the state of a process. */
  fill(found) {
    this.command.value = found.command;
    this.cwd.value = found.cwd ?? "";
    this.user.value = found.user ?? "";
    this.timeout.value = found.timeout ?? "";
    this.boxes.tty.checked = Boolean(found.tty);
    this.boxes.survive.checked = found.survive;
    this.options.open = Boolean(found.cwd || found.user || found.timeout || found.tty || found.survive);
    this.command.focus();
  }
}

class View {
  constructor(root) {
    this.controller = new AbortController();
    this.signal = this.controller.signal;
    this.rows = new Map(); // by id
    this.processes = [];
    this.all = false;
    this.queries = 0;
    this.form = new StartForm((process, terminal) => this.started(process, terminal));
    this.summary = h("span", { class: "summary", role: "status" });
    this.filter = h("input", { type: "search", placeholder: "Filter", "aria-label": "Filter by command, pid or id", oninput: () => this.draw() });
    this.which = h("select", { "aria-label": "Which processes", onchange: () => this.draw() },
      h("option", { value: "" }, "All"), h("option", { value: "running" }, "Running"), h("option", { value: "ended" }, "Ended"));
    this.body = h("tbody", { id: "rows" });
    this.table = h("table", { class: "processes" }, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, h("span", { class: "hidden" }, "Details")),
      ["State", "Command", "Pid", "Started", "Ran", "Actions"].map((name) => h("th", { scope: "col", class: name === "Pid" || name === "Ran" ? "number" : null }, name)))), this.body);
    this.empty = h("p", { class: "empty" });
    this.rest = h("button", { onclick: () => { this.all = true; this.draw(); } });
    root.replaceChildren(h("div", { class: "head" }, h("h1", {}, "Processes"), this.summary, h("span", { class: "spring" }), this.filter, this.which),
      this.form.element, h("div", { class: "card table" }, this.table, this.empty), this.rest);
    this.rest.hidden = this.table.hidden = true;
  }

  async started(process, terminal) {
    if (terminal) {
      location.hash = `#/terminal/${process.id}`;
      return;
    }
    this.form.command.value = "";
    toast(`Process ${process.pid} was started`);
    await this.refresh();
  }

  async refresh() {
    try {
      ({ processes: this.processes } = await call("list_processes", undefined, { signal: this.signal }));
    } catch (error) {
      if (!this.signal.aborted && error.status !== 0) toast(error.message, "error"); // the page says if there is no connection
      return;
    }
    this.draw();
    this.inquire();
  }

  draw() {
    const text = this.filter.value.trim().toLowerCase();
    const which = this.which.value;
    const shown = this.processes.filter((each) => (!which || (each.status === "running") === (which === "running"))
      && (!text || each.command.toLowerCase().includes(text) || String(each.pid) === text || each.id.startsWith(text))).reverse();
    const drawn = this.all ? shown : shown.slice(0, ROWS);
    const known = new Set(this.processes.map((each) => each.id));
    for (const id of this.rows.keys()) if (!known.has(id)) this.rows.delete(id);
    const wanted = [];
    for (const process of drawn) {
      const row = this.rows.get(process.id);
      if (row) row.update(process);
      else this.rows.set(process.id, new Row(this, process));
      const { element, more } = this.rows.get(process.id);
      wanted.push(element, more);
    }
    // Elements are moved only if they have to be: one that is moved loses the focus.
    const keep = new Set(wanted);
    for (const each of [...this.body.children]) if (!keep.has(each)) each.remove();
    wanted.forEach((each, index) => { if (this.body.children[index] !== each) this.body.insertBefore(each, this.body.children[index] ?? null); });
    const running = this.processes.filter((each) => each.status === "running").length;
    const summary = `${running} running, ${this.processes.length - running} ended`;
    if (this.summary.textContent !== summary) this.summary.textContent = summary;
    this.table.hidden = !drawn.length;
    this.empty.hidden = drawn.length > 0;
    this.empty.textContent = this.processes.length ? "No process is like that." : "No process was started yet.";
    this.rest.hidden = drawn.length === shown.length;
    this.rest.textContent = `Show all ${shown.length}`;
  }

  /** Ask for the details that are due, a few at a time, the newest first. */
  async inquire() {
    if (this.queries) return;
    const due = [...this.body.children].map((each) => this.rows.get(each.dataset.id)).filter((row) => row?.due);
    const next = async () => {
      this.queries += 1;
      try {
        while (due.length && !this.signal.aborted && !document.hidden) await due.shift().look();
      } catch { // the next refresh says so, if it lasts
      } finally {
        this.queries -= 1;
      }
    };
    await Promise.all(Array.from({ length: QUERIES }, next));
  }
}

/** Fill `root`; return a function that ends it. */
export async function mount(root) {
  const view = new View(root);
  const end = poll(() => view.refresh(), INTERVAL);
  return () => {
    end();
    view.controller.abort();
  };
}
