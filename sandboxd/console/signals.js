// What can be done to a process, as buttons: signals, and its end.
import { call } from "./api.js";
import { confirm, guarded, h, toast } from "./ui.js";

const SIGNALS = [
  ["TERM", "ask it to end"], ["INT", "as Ctrl+C"], ["HUP", "reload, or hang up"], ["QUIT", "end with a core dump"],
  ["USR1", "the program's own"], ["USR2", "the program's own"], ["STOP", "pause"], ["CONT", "go on"],
];

const short = (command) => (command.length > 60 ? `${command.slice(0, 59)}…` : command);

/** Ask, and kill a process with all that it has started. Resolve when it is gone, or is to stay. */
export async function kill({ id, command }) {
  if (!(await confirm(`Kill “${short(command)}” and all that it has started?`, "Kill"))) return;
  await guarded(() => call("kill_process", { id }));
}

/** Ask, and kill what a process that has ended has left behind. */
export async function endSurvivors({ id, command }, pids) {
  const what = pids.length === 1 ? `process ${pids[0]}` : `${pids.length} processes (${pids.slice(0, 8).join(", ")}${pids.length > 8 ? ", …" : ""})`;
  if (await confirm(`Kill the ${what} that “${short(command)}” has left behind?`, "Kill")) await guarded(() => call("kill_process", { id }));
}

/** Show the menu of signals below a button. `done` is called when one was sent. */
export function signalMenu(button, { id, pid }, done) {
  const send = (name) => guarded(async () => {
    menu.hidePopover();
    await call(`processes/${id}/signal`, { signal: name });
    toast(`SIG${name} was sent to process ${pid}`);
    done();
  });
  const items = SIGNALS.map(([name, text]) => h("button", { role: "menuitem", onclick: () => send(name) }, `SIG${name}`, h("span", {}, text)));
  const menu = h("div", { class: "menu", popover: "auto", role: "menu", "aria-label": `Signals to process ${pid}`, onkeydown: (event) => {
    const at = items.indexOf(document.activeElement);
    const next = { ArrowDown: at + 1, ArrowUp: at - 1 + items.length, Home: 0, End: items.length - 1 }[event.key];
    if (event.key === "Tab") menu.hidePopover();
    if (next === undefined) return;
    event.preventDefault();
    items[next % items.length].focus();
  } }, items);
  menu.addEventListener("toggle", (event) => {
    if (event.newState !== "closed") return;
    button.setAttribute("aria-expanded", "false");
    if (menu.contains(document.activeElement) || document.activeElement === document.body) button.focus();
    menu.remove();
  });
  document.body.append(menu);
  menu.showPopover();
  const place = button.getBoundingClientRect();
  const { width, height } = menu.getBoundingClientRect();
  const below = place.bottom + 4 + height < innerHeight;
  menu.style.left = `${Math.max(8, Math.min(place.left, innerWidth - width - 8))}px`;
  menu.style.top = `${below ? place.bottom + 4 : Math.max(8, place.top - height - 4)}px`;
  button.setAttribute("aria-expanded", "true");
  items[0].focus();
}

const MARKS = { running: "●", completed: "✓", failed: "✕", killed: "■" };

/** How a process is, as text with a mark and a colour. `detail`: its ExecutionDetails, or its entry in /list_processes. */
export function badge(detail) {
  const { status } = detail;
  let text = status;
  if (detail.timed_out || detail.idle_timed_out) text = "timed out";
  else if (detail.oom_killed) text = "out of memory";
  else if (detail.signal && status === "failed") text = detail.signal;
  else if (status === "failed" && detail.exit_code > 0) text = `failed (${detail.exit_code})`;
  return h("span", { class: `state ${status}` }, h("span", { class: "mark", "aria-hidden": "true" }, MARKS[status] ?? "?"), text);
}
