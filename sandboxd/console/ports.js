// The view of ports: who listens, what the proxy forwards to, and what is behind a port.
import { call, raw } from "./api.js";
import { stylesheet } from "./stylesheet.js";
import { guarded, h, poll } from "./ui.js";

const INTERVAL = 3000;

/** What a port answers to `GET /`, in words. */
async function answer(port, signal) {
  const response = await raw(`proxy/${port}/`, { signal, redirect: "manual" });
  if (response.type === "opaqueredirect") return "It redirects.";
  const type = response.headers.get("Content-Type")?.split(";")[0] ?? "";
  const text = type === "text/html" ? (await response.text()).slice(0, 100_000) : "";
  const title = text && new DOMParser().parseFromString(text, "text/html").title;
  if (!text) await response.body?.cancel();
  return [`${response.status} ${response.statusText}`.trim(), type, title && `“${title}”`].filter(Boolean).join(", ");
}

class View {
  constructor(root) {
    this.controller = new AbortController();
    this.answers = new Map(); // by port
    this.bound = "";
    this.drawn = "";
    this.body = h("tbody", {});
    this.table = h("table", { hidden: true }, h("thead", {}, h("tr", {}, ...["Port", "Addresses", "Process", "Proxy", "Answer"].map((name) => h("th", { scope: "col" }, name)))), this.body);
    this.empty = h("p", { hidden: true }, "Nothing listens in the sandbox.");
    this.state = h("p", { class: "ports-state", role: "status" });
    this.number = h("input", { type: "number", min: "1", max: "65535", required: true, inputmode: "numeric", placeholder: "8000" });
    this.form = h("form", { class: "ports-form", onsubmit: (event) => { event.preventDefault(); this.bind(Number(this.number.value)); } },
      h("label", {}, "Port ", this.number), h("button", {}, "Bind"));
    root.replaceChildren(h("div", { class: "ports" }, h("h1", {}, "Ports"), this.state, this.form, this.table, this.empty));
  }

  async refresh() {
    const { signal } = this.controller;
    try {
      const [{ ports }, status] = await Promise.all([call("ports", undefined, { signal }), call("port_status", undefined, { signal })]);
      this.draw(ports, status, await this.commands(ports, signal));
    } catch (error) {
      if (!signal.aborted) this.state.textContent = error.message;
    }
  }

  /** The command of each execution that listens. */
  async commands(ports, signal) {
    if (!ports.some((each) => each.execution)) return new Map();
    const { processes } = await call("list_processes", undefined, { signal });
    return new Map(processes.map((each) => [each.id, each.command]));
  }

  draw(ports, status, commands) {
    const now = JSON.stringify([ports, status, [...commands], [...this.answers]]);
    if (now === this.drawn) return; // the focus stays where it is
    this.drawn = now;
    this.last = [ports, status, commands];
    this.bound = status.port;
    const proxy = status.proxy_port;
    this.say(proxy);
    const focused = document.activeElement?.dataset?.key;
    this.body.replaceChildren(...ports.map((each) => this.row(each, proxy, commands.get(each.execution))));
    if (focused) this.body.querySelector(`[data-key="${focused}"]`)?.focus();
    this.table.hidden = !ports.length;
    this.empty.hidden = ports.length > 0;
  }

  say(proxy) {
    if (!this.bound) {
      this.state.replaceChildren(`The proxy (port ${proxy}) forwards to no port. Bind one to reach it from outside without a token.`);
      return;
    }
    this.state.replaceChildren(`The proxy (port ${proxy}) forwards to port ${this.bound}: whoever reaches it needs no token. `, this.link(proxy), " ",
      h("button", { type: "button", "data-key": "unbind", onclick: () => this.unbind() }, "Unbind"));
  }

  /** A link to the proxy. It is another origin, so that what is served there cannot act for this page. */
  link(proxy) {
    if (proxy === "0") return ""; // it listens on a Unix socket only
    const host = location.hostname.includes(":") ? `[${location.hostname.replace(/^\[|\]$/g, "")}]` : location.hostname;
    return h("a", { href: `${location.protocol}//${host}:${proxy}/`, target: "_blank", rel: "noopener noreferrer" }, "Open");
  }

  row(each, proxy, command) {
    const { port } = each;
    const process = each.execution
      ? [h("a", { href: `#/log/${each.execution}` }, command ?? each.execution), each.pid ? ` (pid ${each.pid})` : ""]
      : [each.pid ? `pid ${each.pid}` : "unknown"];
    const key = (name) => ({ type: "button", "data-key": `${name}-${port}` });
    return h("tr", { "data-port": String(port) },
      h("td", { class: "ports-number" }, String(port)),
      h("td", {}, each.addresses.join(", ")),
      h("td", { class: "ports-process" }, ...process),
      h("td", {}, each.bound ? h("span", {}, "bound ", this.link(proxy))
        : h("button", { ...key("bind"), "aria-label": `Bind port ${port}`, onclick: () => this.bind(port) }, "Bind")),
      h("td", {}, h("button", { ...key("try"), "aria-label": `Ask port ${port} for its page`, onclick: () => this.try(port) }, "Ask"), " ", this.answers.get(port) ?? ""));
  }

  async act(work) {
    await guarded(work);
    await this.refresh();
  }

  /** Forward to a port, in place of the one that is bound. */
  bind(port) {
    return this.act(async () => {
      if (this.bound) await call("unbind_port", { port: this.bound });
      await call("bind_port", { port: String(port) });
      this.number.value = "";
    });
  }

  unbind() {
    return this.act(() => call("unbind_port", { port: this.bound }));
  }

  async try(port) {
    this.answers.set(port, "…");
    this.draw(...this.last);
    try {
      this.answers.set(port, await answer(port, AbortSignal.any([this.controller.signal, AbortSignal.timeout(10_000)])));
    } catch (error) {
      this.answers.set(port, error.message);
    }
    if (!this.controller.signal.aborted) this.draw(...this.last);
  }

}

/** Fill `root`; return a function that ends it. */
export async function mount(root) {
  await stylesheet("ports.css");
  const view = new View(root);
  const end = poll(() => view.refresh(), INTERVAL);
  return () => {
    end();
    view.controller.abort();
  };
}
