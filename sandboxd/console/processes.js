// The view of processes.
import { call } from "./api.js";
import { guarded, h, poll } from "./ui.js";

export async function mount(root) {
  const rows = h("tbody", { id: "rows" });
  const command = h("input", { autocomplete: "off", required: true });
  const refresh = () => guarded(async () => {
    const { processes } = await call("list_processes");
    rows.replaceChildren(...processes.map((each) => h("tr", {}, h("td", {}, each.status), h("td", {}, String(each.pid)), h("td", {}, each.command))));
  });
  root.replaceChildren(h("h1", {}, "Processes"), h("form", { onsubmit: (event) => {
    event.preventDefault();
    guarded(async () => { await call("start_process", { cmd: command.value }); await refresh(); });
  } }, h("label", {}, "Command ", command), h("button", { class: "primary" }, "Start")), h("table", {}, rows));
  return poll(refresh, 1500);
}
