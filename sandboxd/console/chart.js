// A small chart of one or more series over time, as SVG.
import { h, s } from "./ui.js";

const WIDTH = 320, HEIGHT = 72;

/**
 * A card with a name, the value of now as text, and the values of before as a line.
 * @param title what it shows.
 * @param options `span`: seconds that are shown at most; `limit(samples)`: what the top is at least; `names`: of the series, if
 *   there are several: each has a dash of its own, and is named beside the value.
 */
export class Chart {
  constructor(title, { span, limit = () => 1, format, names = [""] }) {
    this.span = span;
    this.limit = limit;
    this.format = format;
    this.names = names;
    this.value = h("span", { class: "chart-value" }, "–");
    this.note = h("span", { class: "chart-note" });
    this.areas = names.map((_, index) => s("path", { class: `area series-${index}` }));
    this.lines = names.map((_, index) => s("path", { class: `line series-${index}` }));
    this.top = h("span", { class: "chart-top", "aria-hidden": "true" });
    this.svg = s("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title },
      s("path", { class: "grid", d: `M0 .5H${WIDTH}M0 ${HEIGHT / 2}H${WIDTH}M0 ${HEIGHT - 0.5}H${WIDTH}` }), this.areas, this.lines);
    this.element = h("section", { class: "card chart-card", "aria-label": title },
      h("div", { class: "chart-head" }, h("h2", {}, title), this.value), h("div", { class: "chart-frame" }, this.svg, this.top), this.note);
    this.title = title;
  }

  /**
   * @param samples [time in seconds, value of each series or null], the oldest first.
   * @param text the value of now; @param note what is below the chart.
   */
  draw(samples, text, note = "") {
    const now = samples.at(-1)?.[0] ?? 0;
    const span = Math.min(this.span, Math.max(60, now - (samples[0]?.[0] ?? 0)));
    const shown = samples.filter(([time]) => time >= now - span);
    const most = Math.max(this.limit(shown), ...shown.flatMap(([, ...values]) => values.map((value) => value ?? 0)));
    const x = (time) => (WIDTH * (1 - (now - time) / span)).toFixed(1);
    const y = (value) => (1 + (HEIGHT - 2) * (1 - value / most)).toFixed(1);
    this.names.forEach((_, series) => {
      let line = "", area = "", begun = null, last = null;
      for (const [time, ...values] of shown) {
        const value = values[series];
        if (value === null || value === undefined) {
          if (begun !== null) area += `L${x(last)} ${HEIGHT}L${x(begun)} ${HEIGHT}Z`;
          begun = null;
          continue;
        }
        const point = `${begun === null ? "M" : "L"}${x(time)} ${y(value)}`;
        line += point;
        area += point;
        begun ??= time;
        last = time;
      }
      if (begun !== null) area += `L${x(last)} ${HEIGHT}L${x(begun)} ${HEIGHT}Z`;
      this.lines[series].setAttribute("d", line);
      this.areas[series].setAttribute("d", area);
    });
    this.value.textContent = text;
    this.note.textContent = note;
    this.top.textContent = this.format(most);
    this.svg.setAttribute("aria-label", `${this.title}: ${text}. ${note}`);
  }
}
