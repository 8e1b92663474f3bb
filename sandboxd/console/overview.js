// The view of the whole: processor, memory, disk, processes, streams and stalls, as charts of the last minutes.
import { call } from "./api.js";
import { Chart } from "./chart.js";
import { bytes, duration, h, poll, toast } from "./ui.js";

const INTERVAL = 2000;
const SPAN = 300; // seconds that a chart shows

// Kept while the page lives, so that a chart has a past when its view is shown again.
const history = [];

/** The values of metrics without labels, by name; those with labels are added up. */
function sums(metrics) {
  const found = {};
  for (const { samples } of metrics) for (const { name, value } of samples) found[name] = (found[name] ?? 0) + value;
  return found;
}

const percent = (part) => `${(100 * part).toFixed(part < 0.1 ? 1 : 0)} %`;
const count = (n, one, many) => `${n.toLocaleString()} ${n === 1 ? one : many}`;
const milliseconds = (seconds) => (seconds < 1 ? `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms` : `${seconds.toFixed(1)} s`);

/** What was added to a counter per second between two samples; null without two, or after a restart of the daemon. */
function rate(name, before, now) {
  const difference = now.values[name] - before?.values[name];
  return difference >= 0 && now.time > before.time && now.time - before.time < 5 * INTERVAL / 1000 ? difference / (now.time - before.time) : null;
}

/** The bound below which all delays of the reactor between two samples were, from its histogram, whose counts add up. */
function stall(before, now) {
  let longest = 0, smaller = 0;
  for (const [bound, total] of now.delays) {
    const added = total - (before.delays.get(bound) ?? 0);
    if (added > smaller) longest = bound;
    smaller = added;
  }
  return Number.isFinite(longest) ? longest : now.values.sandboxd_reactor_delay_longest_seconds;
}

class View {
  constructor(root) {
    this.controller = new AbortController();
    const chart = (title, options = {}) => new Chart(title, { span: SPAN, ...options });
    const latest = (name) => () => history.at(-1)?.values[name] ?? 1;
    this.charts = {
      processor: chart("Processor", { limit: latest("sandboxd_machine_processors"), format: (value) => count(value, "processor", "processors") }),
      memory: chart("Memory", { limit: latest("sandboxd_machine_memory_bytes"), format: bytes }),
      disk: chart("Disk", { limit: latest("sandboxd_machine_disk_bytes"), format: bytes }),
      processes: chart("Processes", { limit: () => 4, format: String }),
      output: chart("Output", { limit: () => 1024, format: (value) => `${bytes(value)}/s` }),
      requests: chart("Requests", { limit: () => 2, format: (value) => `${Math.round(value)}/s` }),
      streams: chart("Streams", { limit: () => 4, format: String, names: ["events", "WebSockets"] }),
      stalls: chart("Stalls", { limit: () => 0.05, format: milliseconds }),
    };
    this.facts = h("p", { class: "summary" });
    root.replaceChildren(h("div", { class: "head" }, h("h1", {}, "Overview"), this.facts),
      h("div", { class: "charts" }, Object.values(this.charts).map((each) => each.element)));
  }

  async refresh() {
    const { signal } = this.controller;
    try {
      const [{ metrics }, status] = await Promise.all([call("metrics.json", undefined, { signal }), call("status", undefined, { signal })]);
      const delays = metrics.find((each) => each.name === "sandboxd_reactor_delay_seconds").samples
        .filter(({ name }) => name.endsWith("_bucket")).map(({ labels, value }) => [labels.le === "+Inf" ? Infinity : Number(labels.le), value]);
      this.add({ time: performance.now() / 1000, values: sums(metrics), delays: new Map(delays) }, status);
    } catch (error) {
      if (!signal.aborted && error.status !== 0) toast(error.message, "error");
    }
  }

  add(sample, status) {
    const before = history.at(-1);
    const worked = rate("sandboxd_machine_processor_seconds_total", before, sample);
    const cpu = worked === null ? null : Math.min(worked, sample.values.sandboxd_machine_processors); // the times are not quite those of the samples
    const output = rate("sandboxd_output_bytes_total", before, sample);
    const requests = rate("sandboxd_http_requests_total", before, sample);
    const { values } = sample;
    Object.assign(sample, { cpu, output, requests, stall: before ? stall(before, sample) : null });
    if (before) before.delays = null; // only the last are needed
    history.push(sample);
    while (history[0].time < sample.time - SPAN - 10) history.shift();
    this.facts.textContent = `Version ${status.version}, up for ${duration(status.uptime)}, ${status.idle ? `idle for ${duration(status.idle)}` : "in use"}`;
    const { processor, memory, disk, processes, output: written, requests: asked, streams, stalls } = this.charts;
    const series = (...values) => history.map((each) => [each.time, ...values.map((value) => value(each) ?? null)]);
    const gauge = (name) => (each) => each.values[name];
    const unknown = "unknown";
    const cores = values.sandboxd_machine_processors;
    processor.draw(series((each) => each.cpu), cpu === null ? "–" : cores ? percent(cpu / cores) : unknown, cores ? `of ${count(cores, "processor", "processors")}` : "");
    const share = (chart, name) => {
      const used = values[`${name}_used_bytes`], all = values[`${name}_bytes`];
      chart.draw(series(gauge(`${name}_used_bytes`)), all ? percent(used / all) : unknown, all ? `${bytes(used)} of ${bytes(all)}` : "");
    };
    share(memory, "sandboxd_machine_memory");
    share(disk, "sandboxd_machine_disk");
    const ended = values.sandboxd_executions_ended_total ?? 0;
    processes.draw(series(gauge("sandboxd_executions_running")), count(values.sandboxd_executions_running, "running", "running"), `${ended.toLocaleString()} have ended`);
    written.draw(series((each) => each.output), output === null ? "–" : `${bytes(output)}/s`, `${bytes(values.sandboxd_output_bytes_total)} in all; readers missed ${count(values.sandboxd_stream_dropped_records_total ?? 0, "line", "lines")}`);
    asked.draw(series((each) => each.requests), requests === null ? "–" : `${requests.toFixed(requests < 10 ? 1 : 0)}/s`, `${values.sandboxd_http_requests_total.toLocaleString()} in all`);
    streams.draw(series(gauge("sandboxd_streams"), gauge("sandboxd_websockets")), count(values.sandboxd_streams, "open", "open"),
      `${count(values.sandboxd_websockets, "WebSocket", "WebSockets")} (dashed)`);
    stalls.draw(series((each) => each.stall), sample.stall === null ? "–" : sample.stall ? `under ${milliseconds(sample.stall)}` : "none", `longest ever ${milliseconds(values.sandboxd_reactor_delay_longest_seconds)}`);
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
