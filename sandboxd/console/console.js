// The token stays in the tab's session storage. URLs are relative: the page may be served under a prefix.
const KEY = "sandboxd-token";
const element = (id) => document.getElementById(id);

async function call(path, body) {
  const response = await fetch(`../${path}`, {
    method: body ? "POST" : "GET",
    headers: { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` },
    body: body && JSON.stringify(body),
    signal: AbortSignal.timeout(10000),
  });
  const reply = await response.json();
  if (response.status === 401) {
    sessionStorage.removeItem(KEY);
    element("login").hidden = false;
    element("processes").hidden = true;
  }
  if (!response.ok) throw new Error(reply.error);
  return reply;
}

function row(process) {
  const line = document.createElement("tr");
  for (const text of [process.status, process.pid, process.command]) line.insertCell().textContent = text;
  const cell = line.insertCell();
  if (process.status === "running") {
    const button = document.createElement("button");
    button.textContent = "Kill";
    button.ariaLabel = `Kill process ${process.pid}`;
    button.onclick = () => guarded(async () => { await call("kill_process", { id: process.id }); await refresh(); });
    cell.append(button);
  }
  return line;
}

async function refresh() {
  const { processes } = await call("list_processes");
  element("login").hidden = true;
  element("processes").hidden = false;
  element("rows").replaceChildren(...processes.map(row));
}

async function guarded(action) {
  try { await action(); element("message").textContent = ""; } catch (error) { element("message").textContent = error.message; }
}

element("login").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, element("token").value);
  element("token").value = "";
  guarded(refresh);
};
element("start").onsubmit = (event) => {
  event.preventDefault();
  guarded(async () => { await call("start_process", { cmd: element("command").value }); element("command").value = ""; await refresh(); });
};
if (sessionStorage.getItem(KEY)) guarded(refresh);
