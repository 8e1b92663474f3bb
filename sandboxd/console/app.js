// The page: login, navigation by location.hash ("#/log/<id>"), and the view that is shown. Each view is a module that
// exports mount(root, parameter); it fills the element and returns a function that ends what it has started.
import { call, setToken, state, token } from "./api.js";
import { guarded, h, icon } from "./ui.js";

const VIEWS = [
  ["overview", "Overview", "M3 13h4l3-8 4 14 3-8h4"],
  ["processes", "Processes", "M4 6h16M4 12h16M4 18h10"],
  ["terminal", "Terminal", "M5 7l5 5-5 5M12 18h7"],
  ["files", "Files", "M3 6.5h6l2 2.5h10v10H3z"],
  ["ports", "Ports", "M8 3v5M16 3v5M6 8h12v4a6 6 0 0 1-12 0zM12 18v3"],
];

// Views that are not in the navigation, and the one of which they are a part.
const PARTS = { log: "processes" };

const THEME = "sandboxd-theme";
const THEMES = { auto: "Automatic", light: "Light", dark: "Dark" };

const element = (id) => document.getElementById(id);
const main = element("view");
let unmount = () => {};
let turn = 0; // of the views that were asked for, the last one counts

function setTheme(theme) {
  if (theme === "auto") localStorage.removeItem(THEME);
  else localStorage.setItem(THEME, theme);
  document.documentElement.dataset.theme = theme;
  document.querySelector("meta[name=color-scheme]").content = theme === "auto" ? "light dark" : theme;
}

const links = new Map(VIEWS.map(([name, text, path]) => [name, h("a", { href: `#/${name}` }, icon(path), h("span", {}, text))]));
const scheme = h("select", { "aria-label": "Colours", title: "Colours", onchange: () => setTheme(scheme.value) },
  Object.entries(THEMES).map(([name, text]) => h("option", { value: name }, text)));
const out = h("button", { class: "quiet", onclick: logOut }, "Log out");

function logOut() {
  sessionStorage.clear(); // the views keep there what is open
  location.reload(); // and texts that were not saved in memory, of which the browser warns
}

function end() {
  turn += 1;
  try {
    unmount();
  } finally {
    unmount = () => {};
  }
}

function showLogin(message = "") {
  end();
  element("views").hidden = out.hidden = true;
  document.title = "Log in · sandboxd";
  const field = h("input", { id: "token", type: "password", autocomplete: "off", required: true, spellcheck: "false", autocapitalize: "off" });
  const problem = h("p", { class: "problem", role: "alert" }, message);
  const submit = h("button", { class: "primary" }, "Log in");
  const form = h("form", { class: "login", onsubmit: async (event) => {
    event.preventDefault();
    submit.disabled = true;
    problem.textContent = "";
    setToken(field.value);
    try {
      await call("status");
      await show();
    } catch (error) {
      setToken(null);
      problem.textContent = error.status === 401 ? "The daemon does not accept this token." : `${error.message}.`;
      submit.disabled = false;
      field.select();
    }
  } },
    h("h1", {}, "Log in"),
    h("p", {}, "The token is the daemon's ", h("code", {}, "SANDBOX_SECRET"), ". It stays in this tab, until you close it or log out."),
    h("label", { for: "token" }, "Token"), field, submit, problem);
  main.className = "at-login";
  main.replaceChildren(form);
  field.focus();
}

function drawNavigation(current) {
  element("views").hidden = out.hidden = false;
  for (const [name, link] of links) {
    if (name === current) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

/** Show the view that the address names. */
async function show() {
  if (!token()) return showLogin();
  const [, name = "", parameter = ""] = /^#\/([a-z]+)\/?(.*)$/.exec(location.hash) ?? [];
  const current = PARTS[name] ?? name;
  const view = VIEWS.find((each) => each[0] === current);
  if (!view) return location.replace("#/processes");
  end();
  const mine = turn;
  drawNavigation(current);
  document.title = `${view[1]} · sandboxd`;
  const root = h("div", { class: "root" });
  const first = main.className === ""; // after the page was loaded, which has its beginning in focus
  main.className = `at-${name}`;
  main.replaceChildren(root);
  if (!first && document.activeElement === document.body) main.focus({ preventScroll: true }); // what had the focus is gone
  try {
    const module = await import(`./${name}.js`);
    const ended = mine === turn ? await module.mount(root, parameter) : () => {};
    if (mine === turn) unmount = ended;
    else ended();
  } catch (error) {
    if (mine !== turn) return undefined;
    const text = error instanceof TypeError ? "This view cannot be loaded." : `${error.message}.`;
    root.replaceChildren(h("p", { class: "problem", role: "alert" }, text, " ", h("button", { onclick: () => guarded(show) }, "Try again")));
  }
  return undefined;
}

state.addEventListener("unauthorized", () => { if (!main.querySelector(".login")) showLogin("The daemon no longer accepts the token. Log in again."); });
state.addEventListener("unreachable", () => { element("connection").textContent = "The daemon cannot be reached"; });
state.addEventListener("reachable", () => { element("connection").textContent = ""; });
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); main.focus(); });
addEventListener("hashchange", show);
element("views").append(...links.values());
element("tools").append(scheme, out);
scheme.value = localStorage.getItem(THEME) ?? "auto";
setTheme(scheme.value);
show();
