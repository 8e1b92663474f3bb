// The view of terminals: a tab for each. Closing a tab, or the page, leaves the process running; it can be taken over
// here or on another device.
import { call } from "./api.js";
import { Attachment } from "./attachment.js";
import { load, obeyPolicy } from "./emulator.js";
import { stylesheet } from "./stylesheet.js";
import { confirm, h, toast } from "./ui.js";

// Where the open tabs are kept, so that they are there again when the page is loaded again.
const KEY = "sandboxd-terminals";
const SCROLLBACK = 10_000;
const FONT = 'ui-monospace, "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace';
const LIGHT = {
  background: "#ffffff", foreground: "#1f2328", cursor: "#1f2328", cursorAccent: "#ffffff", selectionBackground: "#b6d7ff",
  black: "#24292f", red: "#cf222e", green: "#116329", yellow: "#7d4e00", blue: "#0550ae", magenta: "#8250df", cyan: "#1b7c83",
  white: "#6e7781", brightBlack: "#57606a", brightRed: "#a40e26", brightGreen: "#1a7f37", brightYellow: "#633c01",
  brightBlue: "#0969da", brightMagenta: "#6639ba", brightCyan: "#3192aa", brightWhite: "#8c959f",
};
const DARK = {
  background: "#10141a", foreground: "#d6dbe1", cursor: "#d6dbe1", cursorAccent: "#10141a", selectionBackground: "#2f5a8f",
  black: "#484f58", red: "#ff7b72", green: "#3fb950", yellow: "#d29922", blue: "#58a6ff", magenta: "#bc8cff", cyan: "#39c5cf",
  white: "#b1bac4", brightBlack: "#6e7681", brightRed: "#ffa198", brightGreen: "#56d364", brightYellow: "#e3b341",
  brightBlue: "#79c0ff", brightMagenta: "#d2a8ff", brightCyan: "#56d4dd", brightWhite: "#f0f6fc",
};
const FOUND = {
  matchBackground: "#ffe08a", matchOverviewRuler: "#d29922", activeMatchBackground: "#ff9b50", activeMatchColorOverviewRuler: "#ff9b50",
};
const HELP = "Ctrl+Shift+C copies, Ctrl+Shift+V pastes, Ctrl+Shift+F searches, Ctrl+Shift+↑ leaves the terminal.";

// What a terminal answers to a program's questions, such as what it is, and where the cursor is.
const ANSWER = /^\x1b(\[[?>=]?[\d;]*\$?[cRnty]|\[[IO]$|[\]P])/;

// Keys that a phone's keyboard lacks, and what they send.
const KEYS = [["Esc", "\x1b"], ["Tab", "\t"], ["Ctrl", null], ["←", "D"], ["↓", "B"], ["↑", "A"], ["→", "C"], ["/", "/"], ["|", "|"], ["-", "-"]];

const system = matchMedia("(prefers-color-scheme: dark)");
const theme = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen === "dark" || (chosen !== "light" && system.matches) ? DARK : LIGHT;
};
const time = () => new Date().toLocaleTimeString();
const short = (id) => id.slice(0, 8);

/** The processes that have a terminal and run. */
async function running() {
  const { processes } = await call("list_processes");
  const found = await Promise.all(
    processes.filter((each) => each.status === "running")
      .map((each) => call(`processes/${each.id}`).catch(() => null)),  // it may have gone meanwhile
  );
  return found.filter((each) => each?.tty && each.status === "running");
}

/** One tab: a terminal that is drawn, and its attachment. */
class Tab {
  constructor(view, id, title) {
    this.id = id;
    this.title = title;
    this.over = false;
    this.ctrl = false;
    this.view = view;
    this.name = h("span", { class: "terminal-name" }, title);
    this.button = h("button", { type: "button", role: "tab", id: `tab-${id}`, "aria-controls": `panel-${id}`, "aria-keyshortcuts": "Delete", onclick: () => view.show(this) }, this.name);
    // For the mouse; by keyboard it is the key Delete, as a list of tabs has tabs only.
    this.closer = h("button", { type: "button", class: "terminal-close", "aria-hidden": "true", tabindex: "-1", title: "Close the tab; the process goes on (Delete)", onclick: () => view.close(this) }, "×");
    this.screen = h("div", { class: "terminal-screen" });
    this.size = h("div", { class: "terminal-size", hidden: true, "aria-hidden": "true" });
    this.state = h("div", { class: "terminal-state", role: "status" });
    this.panel = h("div", { class: "terminal-panel", role: "tabpanel", id: `panel-${id}`, "aria-labelledby": `tab-${id}`, hidden: true }, this.screen, this.size, this.state);
    const { Terminal, FitAddon, SearchAddon } = view.classes;
    this.terminal = new Terminal({
      allowProposedApi: true,  // decorations, for dividers and for what is found
      cursorBlink: true, fontFamily: FONT, fontSize: view.fontSize, lineHeight: 1.15, minimumContrastRatio: 4.5, scrollback: SCROLLBACK,
      theme: theme(), macOptionIsMeta: true,
    });
    this.fitting = new FitAddon();
    this.searching = new SearchAddon({ highlightLimit: 1000 });
    this.terminal.loadAddon(this.fitting);
    this.terminal.loadAddon(this.searching);
    this.terminal.attachCustomKeyEventHandler((event) => this.key(event));
    this.terminal.onData((data) => this.type(data));
    this.terminal.onBinary((data) => this.send(Uint8Array.from(data, (character) => character.charCodeAt(0))));
    this.terminal.onResize(({ cols, rows }) => this.resized(cols, rows));
    this.terminal.onTitleChange((text) => this.rename(text));
    this.searching.onDidChangeResults((found) => view.found(this, found));
    this.replaying = 0;  // pieces of history that are not drawn yet
    this.divider = null;  // that of the connection that is lost
  }

  /** Draw it into its panel, which has to be visible; it gets its size there. */
  open() {
    this.terminal.open(this.screen);
    this.terminal.textarea.setAttribute("aria-label", `Terminal. ${HELP}`);
    this.fit();
  }

  attach() {
    const close = () => h("button", { type: "button", onclick: () => this.view.close(this) }, "Close the tab");
    this.attachment = new Attachment(this.id, {
      output: (data, history, drawn) => this.output(data, history, drawn),
      gap: (dropped) => this.divide(`${dropped} lines are no longer kept`),
      connected: () => {
        this.say("");
        this.divider?.say(`reconnected ${time()}`);
        this.divider = null;
      },
      disconnected: (delay) => {
        this.divider ??= this.divide(`connection lost ${time()}`);
        const when = delay < 1500 ? "" : ` in ${Math.round(delay / 1000)} s`;
        this.say(`Connection lost. Trying again${when}.`, h("button", { type: "button", onclick: () => this.attachment.reconnect() }, "Try now"));
      },
      ended: (code) => {
        this.end();
        this.terminal.write("\x1b[?1049l\x1b[0m\x1b[?25l");  // out of the screen of a program that could not do it
        this.say(`Ended with exit code ${code}.`, close());
      },
      failed: (message) => {
        this.end();
        this.say(`${message}.`, close());
      },
    });
    this.resized(this.terminal.cols, this.terminal.rows);
    this.size.hidden = true;
  }

  output(data, history, drawn) {
    if (history) this.replaying += 1;
    else if (this.view.shown !== this) this.button.dataset.unseen = "";
    this.terminal.write(data, () => {
      if (history) this.replaying -= 1;
      drawn();
    });
  }

  /** What is typed, and what the terminal answers to the program: not to questions that were asked before. */
  type(data) {
    if (this.replaying && ANSWER.test(data)) return;
    if (this.ctrl && data.length === 1) {
      data = String.fromCharCode(data.toUpperCase().charCodeAt(0) & 31);
      this.view.setCtrl(this, false);
    }
    this.send(new TextEncoder().encode(data));
  }

  send(data) {
    if (!this.over) this.attachment?.write(data);
  }

  /** A key; return false if it is not for the process. */
  key(event) {
    if (event.type !== "keydown") return true;
    const { key, ctrlKey, shiftKey, metaKey } = event;
    const held = ctrlKey && shiftKey;
    const letter = key.toUpperCase();
    const done = () => { event.preventDefault(); return false; };
    if ((held && letter === "C") || (ctrlKey && key === "Insert")) {
      this.copy();
      return done();
    }
    if (ctrlKey && !shiftKey && letter === "C" && this.terminal.hasSelection()) {
      this.copy();
      this.terminal.clearSelection();
      return done();
    }
    if ((held && letter === "V") || (shiftKey && key === "Insert")) return false;  // the browser pastes
    if ((held || metaKey) && letter === "F") {
      this.view.search(true);
      return done();
    }
    if (held && key === "ArrowUp") {
      this.button.focus();
      return done();
    }
    return true;
  }

  /** Copy what is selected. Unlike navigator.clipboard, this works without TLS, too. */
  copy() {
    if (!this.terminal.hasSelection()) return toast("Select some text first.");
    this.terminal.focus();
    return document.execCommand("copy");
  }

  async paste() {
    this.terminal.focus();
    try {
      this.terminal.paste(await navigator.clipboard.readText());
    } catch {
      toast("The browser does not permit this here; paste with Ctrl+Shift+V.");
    }
  }

  resized(cols, rows) {
    this.attachment?.resize(cols, rows);
    this.size.textContent = `${cols} × ${rows}`;
    this.size.hidden = false;
    clearTimeout(this.sizeTimer);
    this.sizeTimer = setTimeout(() => { this.size.hidden = true; }, 1000);
  }

  fit() {
    this.fitting.fit();
  }

  rename(text) {
    this.title = text || this.title;
    this.name.textContent = this.title;
    this.view.keep();
  }

  /** Draw a line, with a text, where the output is now; it changes nothing of the output. */
  divide(text) {
    const divider = { text, element: null, say(text) { this.text = text; if (this.element) this.element.firstChild.textContent = text; } };
    this.terminal.write("", () => {
      const marker = this.terminal.registerMarker(0);
      const decoration = this.terminal.registerDecoration({ marker, width: this.terminal.cols, layer: "top" });
      // None on the screen of an editor: there is no scrollback to divide.
      decoration?.onRender((element) => {
        divider.element = element;
        element.classList.add("terminal-divider");
        element.replaceChildren(h("span", {}, divider.text));
      });
    });
    return divider;
  }

  say(text, ...more) {
    this.state.replaceChildren(...(text ? [text, ...more] : []));
  }

  end() {
    this.over = true;
    this.terminal.options.disableStdin = true;
    this.button.dataset.over = "";
    this.view.keep();
  }

  dispose() {
    clearTimeout(this.sizeTimer);
    this.attachment?.close();
    this.terminal.dispose();
    this.button.parentElement?.remove();
    this.panel.remove();
  }
}

/** All tabs, and what is around them. */
class View {
  constructor(root, classes) {
    this.classes = classes;
    this.tabs = [];
    this.shown = null;
    this.fontSize = innerWidth < 600 ? 12 : 14;
    const button = (text, title, onclick, more = {}) => h("button", { type: "button", title, onclick, ...more }, text);
    this.list = h("div", { class: "terminal-tabs", role: "tablist", "aria-label": "Terminals", onkeydown: (event) => this.arrows(event) });
    this.query = h("input", { type: "search", "aria-label": "Search in the terminal", placeholder: "Search", oninput: () => this.find(true, true), onkeydown: (event) => this.searchKey(event) });
    this.count = h("output", {});
    this.searchBar = h("div", { class: "terminal-search", role: "search", hidden: true }, this.query, this.count,
      button("↑", "Find above", () => this.find(false), { "aria-label": "Find above" }),
      button("↓", "Find below", () => this.find(true), { "aria-label": "Find below" }),
      button("×", "Close the search", () => this.search(false), { "aria-label": "Close the search" }));
    this.actions = h("div", { class: "terminal-actions" },
      button("New", "Open a new terminal", () => this.start(), { class: "terminal-new" }),
      button("Running", "Terminals that run", () => this.choose()),
      this.forTab = h("span", { hidden: true },
        button("Search", "Ctrl+Shift+F", () => this.search(this.searchBar.hidden)),
        button("Copy", "Ctrl+Shift+C", () => this.shown?.copy()),
        navigator.clipboard?.readText ? button("Paste", "Ctrl+Shift+V", () => this.shown?.paste()) : "",
        button("End", "End the process of this tab", () => this.kill(this.shown))));
    this.ctrlKey = null;
    this.keys = h("div", { class: "terminal-keys", role: "group", "aria-label": "Keys" }, ...KEYS.map(([name, sends]) => this.keyButton(name, sends)));
    this.panels = h("div", { class: "terminal-panels" });
    this.chooser = h("div", { class: "terminal-chooser" });
    this.frame = h("div", { class: "terminal" }, h("h1", { class: "terminal-heading" }, "Terminal"), h("div", { class: "terminal-bar" }, this.list, this.actions), this.searchBar, this.panels, this.chooser, this.keys);
    root.replaceChildren(this.frame);
    this.fit = this.fit.bind(this);
    this.observer = new ResizeObserver(() => requestAnimationFrame(this.fit));
    this.observer.observe(this.panels);
    this.place = this.place.bind(this);
    visualViewport?.addEventListener("resize", this.place);
    addEventListener("resize", this.place);
    this.recolor = () => { for (const tab of this.tabs) tab.terminal.options.theme = theme(); };
    system.addEventListener("change", this.recolor);
    this.themes = new MutationObserver(this.recolor);
    this.themes.observe(document.documentElement, { attributeFilter: ["data-theme"] });
    // Whoever comes back to this page takes the terminal over: it gets the size of this one.
    this.take = () => { if (this.shown && !this.shown.over) this.shown.attachment.resize(this.shown.terminal.cols, this.shown.terminal.rows); };
    addEventListener("focus", this.take);
    this.place();
  }

  keyButton(name, sends) {
    const press = () => {
      const tab = this.shown;
      if (!tab) return;
      if (sends === null) this.setCtrl(tab, !tab.ctrl);
      else if (/^[A-D]$/.test(sends)) tab.type(`${tab.terminal.modes.applicationCursorKeysMode ? "\x1bO" : "\x1b["}${sends}`);
      else tab.type(sends);
      tab.terminal.focus();
    };
    const made = h("button", { type: "button", tabindex: "-1", onpointerdown: (event) => event.preventDefault(), onclick: press }, name);
    if (sends === null) this.ctrlKey = made;
    return made;
  }

  setCtrl(tab, on) {
    tab.ctrl = on;
    this.ctrlKey.setAttribute("aria-pressed", String(on));
  }

  /** Give the terminal the height that is left of the window, a keyboard on the screen deducted. */
  place() {
    const height = visualViewport?.height ?? innerHeight;
    const below = parseFloat(getComputedStyle(this.frame.closest("main")).paddingBottom);
    this.frame.style.height = `${Math.max(240, height - this.frame.getBoundingClientRect().top - scrollY - below)}px`;
  }

  fit() {
    if (this.shown && this.panels.clientHeight) this.shown.fit();
  }

  keep() {
    const tabs = this.tabs.filter((tab) => !tab.over).map(({ id, title }) => ({ id, title }));
    sessionStorage.setItem(KEY, JSON.stringify({ tabs, shown: this.shown?.id ?? null }));
  }

  /** Open the tabs that this browser tab had, and that of `id`. */
  async restore(id) {
    const kept = JSON.parse(sessionStorage.getItem(KEY) ?? '{"tabs":[],"shown":null}');
    for (const each of kept.tabs) this.add(each.id, each.title);
    const wanted = id || kept.shown;
    if (wanted && !this.tabs.some((tab) => tab.id === wanted)) {
      const found = await call(`processes/${encodeURIComponent(wanted)}`);
      if (found.tty) this.add(wanted, found.command);
      else toast("This process has no terminal.");
    }
    const tab = this.tabs.find((each) => each.id === wanted) ?? this.tabs[0];
    if (tab) this.show(tab);
    else await this.choose();
  }

  add(id, title) {
    const tab = new Tab(this, id, title || short(id));
    this.tabs.push(tab);
    this.list.append(h("span", { class: "terminal-tab", role: "presentation" }, tab.button, tab.closer));
    this.panels.append(tab.panel);
    tab.panel.hidden = false;
    for (const other of this.tabs) if (other !== tab) other.panel.hidden = true;
    this.chooser.hidden = true;
    this.panels.hidden = false;
    tab.open();
    tab.panel.hidden = this.shown !== tab;
    tab.attach();
    return tab;
  }

  async start() {
    try {
      const { cols, rows } = this.shown?.terminal ?? { cols: 80, rows: 24 };
      const started = await call("start_process", {
        tty: { cols, rows, term: "xterm-256color" }, env: { COLORTERM: "truecolor" },
      });
      const { command } = await call(`processes/${started.id}`);
      this.show(this.add(started.id, command.split("/").pop()));
    } catch (error) {
      toast(error.message, "error");
    }
  }

  show(tab) {
    this.shown = tab;
    this.chooser.hidden = true;
    this.panels.hidden = false;
    this.forTab.hidden = false;
    for (const each of this.tabs) {
      each.panel.hidden = each !== tab;
      each.button.setAttribute("aria-selected", String(each === tab));
      each.button.tabIndex = each === tab ? 0 : -1;
    }
    delete tab.button.dataset.unseen;
    this.setCtrl(tab, tab.ctrl);
    this.fit();
    tab.terminal.focus();
    this.keep();
  }

  /** Move along the tabs by the arrow keys, as ARIA has it. */
  arrows(event) {
    const at = this.tabs.indexOf(this.shown);
    const count = this.tabs.length;
    const to = { ArrowLeft: (at + count - 1) % count, ArrowRight: (at + 1) % count, Home: 0, End: count - 1 }[event.key];
    if (event.key === "ArrowDown" || event.key === "Escape") this.shown?.terminal.focus();
    else if (event.key === "Delete") this.close(this.shown);
    else if (to !== undefined) {
      this.show(this.tabs[to]);
      this.tabs[to].button.focus();
    } else return;
    event.preventDefault();
  }

  close(tab) {
    tab.dispose();
    const at = this.tabs.indexOf(tab);
    this.tabs.splice(at, 1);
    if (this.shown === tab) {
      this.shown = null;
      const next = this.tabs[at] ?? this.tabs[at - 1];
      if (next) this.show(next);
      else this.choose();
    }
    this.keep();
  }

  async kill(tab) {
    if (tab.over) return this.close(tab);
    if (!(await confirm(`End ${tab.title}, and all that runs in it?`, "End"))) return tab.terminal.focus();
    try {
      await call("kill_process", { id: tab.id, signal: "SIGHUP", grace: 2 });
    } catch (error) {
      toast(error.message, "error");
    }
    return undefined;
  }

  /** Show the terminals that run and have no tab here: those of other devices, or of tabs that were closed. */
  async choose() {
    this.forTab.hidden = this.panels.hidden = true;
    this.chooser.hidden = false;
    this.shown = null;
    for (const tab of this.tabs) { tab.button.setAttribute("aria-selected", "false"); tab.button.tabIndex = 0; }
    this.search(false, false);
    let found = [];
    try {
      found = await running();
    } catch (error) {
      toast(error.message, "error");
    }
    const rows = found.filter((each) => !this.tabs.some((tab) => tab.id === each.id)).map((each) =>
      h("li", {},
        h("span", { class: "terminal-command" }, each.command),
        h("span", { class: "terminal-facts" }, `pid ${each.pid}, ${each.tty.cols} × ${each.tty.rows}, since ${new Date(each.started_at).toLocaleString()}`),
        h("button", { type: "button", "aria-label": `Attach to ${each.command}, pid ${each.pid}`, onclick: () => this.show(this.add(each.id, each.command.split("/").pop())) }, "Attach")));
    const create = h("button", { type: "button", class: "primary", onclick: () => this.start() }, "New terminal");
    this.chooser.replaceChildren(
      rows.length ? h("h2", {}, "Terminals that run without a tab here") : h("p", {}, "No other terminal runs in the sandbox."),
      rows.length ? h("ul", {}, ...rows) : "", create, h("p", { class: "terminal-facts" }, HELP));
    create.focus();
  }

  search(open, focus = true) {
    this.searchBar.hidden = !open;
    if (open) {
      this.query.value = this.shown.terminal.getSelection() || this.query.value;
      this.query.focus();
      this.query.select();
      if (this.query.value) this.find(false);
    } else {
      for (const tab of this.tabs) tab.searching.clearDecorations();
      if (focus) this.shown?.terminal.focus();
    }
  }

  find(below, incremental = false) {
    const options = { decorations: FOUND, incremental: incremental && below };
    if (!this.query.value) { this.count.textContent = ""; this.shown?.searching.clearDecorations(); return; }
    if (below) this.shown?.searching.findNext(this.query.value, options);
    else this.shown?.searching.findPrevious(this.query.value, options);
  }

  found(tab, { resultIndex, resultCount }) {
    if (tab !== this.shown) return;
    this.count.textContent = !this.query.value ? "" : resultCount ? `${resultIndex + 1}/${resultCount}` : "none";
  }

  searchKey(event) {
    if (event.key === "Enter") this.find(!event.shiftKey);
    else if (event.key === "Escape") this.search(false);
    else return;
    event.preventDefault();
  }

  dispose() {
    this.observer.disconnect();
    visualViewport?.removeEventListener("resize", this.place);
    removeEventListener("resize", this.place);
    removeEventListener("focus", this.take);
    system.removeEventListener("change", this.recolor);
    this.themes.disconnect();
    for (const tab of this.tabs) tab.dispose();
  }
}

/**
 * Fill `root`.
 *
 * @param {string} parameter the id of a process to show; empty for those of before.
 * @returns a function that ends it.
 */
export async function mount(root, parameter) {
  let classes;
  try {
    [classes] = await Promise.all([load(), stylesheet("terminal.css")]);
  } catch {
    root.replaceChildren(h("p", {}, "The terminal needs xterm.js, which this installation lacks. Get it with ", h("code", {}, "make console"),
      " where sandboxd was installed from, install it again, and restart the daemon. Until then there is ",
      h("code", {}, "sandboxctl shell"), "."));
    return () => {};
  }
  const undo = obeyPolicy();
  const view = new View(root, classes);
  try {
    await view.restore(parameter);
  } catch (error) { // there is no such process, or the daemon does not answer
    toast(error.message, "error");
    await view.choose();
  }
  if (parameter && root.isConnected) history.replaceState(null, "", "#/terminal"); // loaded again, it shows the tab that was shown last
  return () => {
    view.dispose();
    undo();
  };
}
