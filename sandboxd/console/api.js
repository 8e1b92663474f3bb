// Calls of the daemon's API. URLs are relative to the page, which may be served under a prefix. The token is kept in the
// tab's session storage.
const KEY = "sandboxd-token";

// Milliseconds until the next attempt to connect an event stream: at first, and at most.
const FIRST = 250, LONGEST = 8000;

// Milliseconds without a byte after which an event stream counts as broken; the daemon sends a comment every 15 s.
const SILENCE = 45_000;

/** Dispatches "unauthorized" when the daemon refuses the token, "reachable" and "unreachable" when that changes. */
export const state = new EventTarget();

let reachable = true;

/** @returns {string | null} */
export const token = () => sessionStorage.getItem(KEY);

/** Keep a token, or forget it if it is null. */
export function setToken(text) {
  if (text === null) sessionStorage.removeItem(KEY);
  else sessionStorage.setItem(KEY, text);
}

/** An error that the daemon has answered with. `status` is 0 if it could not be reached. */
export class ApiError extends Error {
  constructor(message, status, code = null) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
  }
}

function setReachable(now) {
  if (now !== reachable) state.dispatchEvent(new Event(now ? "reachable" : "unreachable"));
  reachable = now;
}

/** Send a request with the token; return the response, whatever its status. Throws ApiError if there is none. */
export async function raw(path, init = {}) {
  const headers = new Headers(init.headers);
  headers.set("Authorization", `Bearer ${token()}`);
  let response;
  try {
    response = await fetch(`../${path}`, { cache: "no-store", ...init, headers });
  } catch (error) {
    if (error.name === "AbortError" || error.name === "TimeoutError") throw error;
    setReachable(false);
    throw new ApiError("The daemon cannot be reached", 0);
  }
  setReachable(true);
  if (response.status === 401) {
    setToken(null);
    state.dispatchEvent(new Event("unauthorized"));
  }
  return response;
}

/** The error of a response that is none of 2xx. */
async function failure(response) {
  const reply = await response.json().catch(() => null);
  return new ApiError(reply?.error ?? `${response.status} ${response.statusText}`.trim(), response.status, reply?.code);
}

/** Return the JSON reply. With a body it is a POST. Throws ApiError for a status that is not 2xx, and for a reply with `error`. */
export async function call(path, body, { method, headers, signal } = {}) {
  const response = await raw(path, {
    method: method ?? (body === undefined ? "GET" : "POST"),
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal: signal ?? AbortSignal.timeout(30_000),
  });
  if (!response.ok) throw await failure(response);
  return response.status === 204 ? null : response.json();
}

/** Resolve after a time, or at once when `signal` is aborted. */
function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(done, milliseconds);
    function done() {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    }
    signal?.addEventListener("abort", done);
  });
}

/** Yield the events of one response; what comes after the last blank line is dropped, as the standard demands. */
async function* parsed(body, controller) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const timer = setTimeout(() => controller.abort(), SILENCE);
      const { value, done } = await reader.read().finally(() => clearTimeout(timer));
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const found = { id: null, event: "message", data: "" };
        for (const line of block.split("\n")) {
          const colon = line.indexOf(":");
          if (colon > 0) found[line.slice(0, colon)] = line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
        }
        if (found.data) yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/**
 * Yield the Server-Sent Events of a route, `data` decoded from JSON. Connects again, behind the last event, when the
 * connection breaks; ends after an event `complete` or `error`, and when `signal` is aborted.
 *
 * @param onstate is called with "connecting", "open", and "waiting" with the milliseconds until the next attempt.
 * Throws ApiError if the daemon refuses the request.
 */
export async function* events(path, { signal, lastId = null, onstate = () => {} } = {}) {
  let delay = FIRST;
  while (!signal?.aborted) {
    const controller = new AbortController();
    const abort = () => controller.abort();
    signal?.addEventListener("abort", abort);
    try {
      onstate("connecting");
      const url = lastId === null ? path : path.replace(/([?&])tail=\d+&?/, "$1").replace(/[?&]$/, "");
      const headers = { Accept: "text/event-stream", ...(lastId !== null && { "Last-Event-ID": lastId }) };
      const response = await raw(url, { headers, signal: controller.signal });
      if (!response.ok) throw await failure(response);
      onstate("open");
      for await (const found of parsed(response.body, controller)) {
        delay = FIRST;
        lastId = found.id ?? lastId;
        yield { ...found, data: JSON.parse(found.data) };
        if (found.event === "complete" || found.event === "error") return;
      }
    } catch (error) {
      if (signal?.aborted) return;
      if (error instanceof ApiError && error.status >= 400 && error.status < 500 && error.status !== 429) throw error;
    } finally {
      signal?.removeEventListener("abort", abort);
      controller.abort();
    }
    onstate("waiting", delay);
    await pause(delay * (0.75 + Math.random() / 2), signal);
    delay = Math.min(delay * 2, LONGEST);
  }
}

/** Open a WebSocket; browsers can send the token only as a subprotocol, as Kubernetes has it. */
export function socket(path, protocols) {
  const url = new URL(`../${path}`, document.baseURI);
  url.hash = "";
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  const binary = String.fromCharCode(...new TextEncoder().encode(token()));
  const bearer = btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return new WebSocket(url, [...protocols, `base64url.bearer.authorization.k8s.io.${bearer}`]);
}
