// Elements, dialogs and messages that the views share.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value); // by CSSOM, which the Content-Security-Policy permits
    else if (name !== "value") element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  if (props?.value !== undefined && props.value !== null) element.value = props.value; // a select needs its options first
  return element;
}

/** Make an element. Properties `on...` are listeners, `style` is an object, true is an attribute without a value. */
export const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);

/** The same for SVG. */
export const s = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);

/** Return an icon of lines on a grid of 24; it is hidden from screen readers. */
export const icon = (path) =>
  s("svg", { class: "icon", viewBox: "0 0 24 24", width: "18", height: "18", "aria-hidden": "true" }, s("path", { d: path }));

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** 1536 as "1.5 KiB". */
export function bytes(n) {
  let unit = 0;
  while (n >= 1024 && unit < UNITS.length - 1) {
    n /= 1024;
    unit += 1;
  }
  return `${unit && n < 100 ? n.toFixed(1) : Math.round(n)} ${UNITS[unit]}`;
}

/** Seconds as "12 s", "3 min 5 s", "2 h 10 min" or "3 d 4 h". */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** Ask a question; resolve to whether it was answered with yes. `action` is what the button says. */
export function confirm(text, action = "OK") {
  return new Promise((resolve) => {
    const dialog = h("dialog", { class: "dialog", "aria-label": text },
      h("form", { method: "dialog" }, h("p", {}, text),
        h("div", { class: "actions" }, h("button", { value: "" }, "Cancel"), h("button", { value: "yes", class: "primary" }, action))));
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
    dialog.querySelector(".primary").focus();
  });
}

/** Show a message for a while. `kind`: "info" or "error", which stays longer. */
export function toast(text, kind = "info") {
  const shown = document.getElementById("toasts");
  for (const same of [...shown.children]) if (same.firstChild.textContent === text) same.remove();
  const end = () => element.remove();
  const element = h("div", { class: `toast ${kind}` }, h("span", {}, text),
    h("button", { class: "quiet", "aria-label": "Dismiss", onclick: end }, "✕"));
  shown.append(element);
  while (shown.children.length > 4) shown.firstChild.remove();
  let timer = setTimeout(end, kind === "error" ? 12_000 : 5000);
  element.addEventListener("pointerenter", () => clearTimeout(timer));
  element.addEventListener("pointerleave", () => { timer = setTimeout(end, 5000); });
}

/** Do what may fail; show the error if it does. Resolve to its result, or to undefined. */
export async function guarded(action) {
  try {
    return await action();
  } catch (error) {
    if (error.name !== "AbortError") toast(error.message, "error");
    return undefined;
  }
}

/** Call `refresh` now and every `milliseconds` while the page is visible, never twice at a time; return what ends it. */
export function poll(refresh, milliseconds) {
  let timer = 0, ended = false, running = false;
  const turn = async () => {
    clearTimeout(timer);
    if (ended || running || document.hidden) return;
    running = true;
    await refresh();
    running = false;
    if (!ended) timer = setTimeout(turn, milliseconds);
  };
  document.addEventListener("visibilitychange", turn);
  turn();
  return () => {
    ended = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", turn);
  };
}
