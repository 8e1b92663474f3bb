// Uploads and downloads: with progress, resumed where they were broken off. They go on while another view is shown.
import { ApiError, call, raw, token } from "./api.js";
import { base, encodePath, join, parent } from "./paths.js";

// Larger files are sent in parts of this size, so that an upload that breaks off goes on behind the last one.
const PART = 8 * 1024 * 1024;

// What arrives is put aside in pieces of this size, which the browser need not keep in memory.
const PIECE = 8 * 1024 * 1024;

// Downloads from this size on go straight to the disk where the browser can do that.
const LARGE = 1024 * 1024 * 1024;

const UPLOADS = 2;  // at a time
const ATTEMPTS = 8;

const pause = (milliseconds, signal) => new Promise((resolve, reject) => {
  signal.throwIfAborted();
  const timer = setTimeout(resolve, milliseconds);
  signal.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
});

/** Return `work()`; if the connection breaks, try again after a pause. */
async function persistently(transfer, work) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await work(attempt);
    } catch (error) {
      transfer.signal.throwIfAborted();
      if ((error instanceof ApiError && ![0, 502, 503, 504].includes(error.status)) || attempt === ATTEMPTS) throw error;
      transfer.update("waiting for the connection");
      await pause(Math.min(250 * 2 ** attempt, 10_000), transfer.signal);
    }
  }
}

/** The stat of a file, or null if there is none. Browsers report a 404 as an error, even if it is expected. */
export async function stat(path) {
  if ("error" in (await call("stat_file", { path }))) return null;
  return call(`files/stat?path=${encodePath(path)}&follow=true`);
}

/** Something that is sent or received. Fires `change` events. */
class Transfer extends EventTarget {
  #abort = new AbortController();

  constructor(kind, name, size) {
    super();
    this.kind = kind;
    this.name = name;
    this.size = size; // null if it is not known
    this.done = 0;
    this.note = "";
    this.state = "active"; // then done, failed or cancelled
    this.began = performance.now();
    this.before = 0; // bytes that needed no transfer
  }

  get signal() { return this.#abort.signal; }

  /** Bytes per second. */
  get rate() { return (this.done - this.before) / Math.max(0.1, (performance.now() - this.began) / 1000); }

  update(note, done = this.done) {
    this.note = note;
    this.done = done;
    this.dispatchEvent(new Event("change"));
  }

  end(state, note = "") {
    this.state = state;
    this.update(note);
  }

  cancel() { this.#abort.abort(); }
}

/** Send with progress, which fetch() has none of. Resolves to the reply. */
function put(path, body, headers, transfer, before) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const abort = () => request.abort();
    request.open("PUT", new URL(`../${path}`, document.baseURI));
    request.setRequestHeader("Authorization", `Bearer ${token()}`);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => transfer.update("", before + event.loaded);
    request.onload = () => {
      let reply = {};
      try { reply = JSON.parse(request.responseText); } catch { /* of something between */ }
      if (request.status < 300) resolve(reply);
      else reject(new ApiError(reply.error ?? `HTTP status ${request.status}`, request.status));
    };
    request.onerror = () => reject(new ApiError("The connection has broken", 0));
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    request.onloadend = () => transfer.signal.removeEventListener("abort", abort);
    transfer.signal.addEventListener("abort", abort);
    request.send(body);
  });
}

/** The name under which the parts of a file are gathered: the same if the same file is uploaded to that path again. */
function partial(path, file) {
  let hash = 0n;
  for (const character of `${base(path)}\0${file.size}\0${file.lastModified}`) {
    hash = BigInt.asUintN(64, (hash ^ BigInt(character.codePointAt(0))) * 0x100000001b3n + 0x9e3779b97f4a7c15n);
  }
  return join(parent(path), `.upload-${hash.toString(16)}.part`);
}

async function upload(transfer, file, path, existing) {
  const mode = existing ? `&mode=${existing.mode}` : "";
  if (file.size <= PART) {
    await persistently(transfer, (attempt) => {
      const unchanged = existing ? { "If-Match": existing.etag } : { "If-None-Match": "*" };
      return put(`files?path=${encodePath(path)}`, file, attempt === 1 ? unchanged : {}, transfer, 0);
    });
    return;
  }
  const part = partial(path, file);
  let offset = null;
  try {
    while (offset === null || offset < file.size) {
      await persistently(transfer, async () => {
        if (offset === null) { // at first, and whenever it is not known how much of the last part has arrived
          const there = (await stat(part))?.size ?? 0;
          offset = there <= file.size ? there : 0;
          if (!transfer.done && offset) transfer.before = offset;
        }
        const at = offset;
        if (at === file.size && at) return;
        offset = null;
        await put(`files?path=${encodePath(part)}&offset=${at}${mode}`, file.slice(at, at + PART), {}, transfer, at);
        offset = at + Math.min(PART, file.size - at);
        transfer.update("", offset);
      });
    }
    await persistently(transfer, async (attempt) => {
      try {
        await call("files/move", { from: part, to: path, overwrite: true });
      } catch (error) { // an attempt whose reply was lost may have moved it
        if (attempt === 1 || error.status !== 404 || (await stat(path))?.size !== file.size) throw error;
      }
    });
  } catch (error) {
    if (transfer.signal.aborted) await raw(`files?path=${encodePath(part)}`, { method: "DELETE" }).catch(() => {});
    throw error;
  }
}

async function download(transfer, path, write) {
  let tag = null;
  await persistently(transfer, async () => {
    const headers = tag && transfer.done ? { Range: `bytes=${transfer.done}-`, "If-Range": tag } : {};
    const response = await raw(path, { headers, signal: transfer.signal });
    if (!response.ok) throw await failure(response);
    if (response.status !== 206 && transfer.done) {
      transfer.done = 0;
      await write(null);
    }
    tag = response.headers.get("ETag");
    const length = response.headers.get("Content-Length");
    if (length !== null && !response.headers.get("Content-Encoding")) transfer.size = transfer.done + Number(length);
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      await write(value);
      transfer.update("", transfer.done + value.length);
    }
  });
}

/** The error of a response. */
export async function failure(response) {
  const reply = await response.json().catch(() => ({}));
  return new ApiError(reply.error ?? `HTTP status ${response.status}`, response.status);
}

/** Gathers what arrives as one Blob. */
class Pieces {
  #blobs = [];
  #chunks = [];
  #size = 0;

  write(chunk) {
    if (chunk === null) {
      this.#blobs = [];
      this.#chunks = [];
      this.#size = 0;
      return;
    }
    this.#chunks.push(chunk);
    this.#size += chunk.length;
    if (this.#size >= PIECE) this.#put();
  }

  #put() {
    this.#blobs.push(new Blob(this.#chunks));
    this.#chunks = [];
    this.#size = 0;
  }

  blob() {
    this.#put();
    return new Blob(this.#blobs);
  }
}

/** Let the browser save something under a name. */
function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** All transfers, newest last. Fires `change` events if there is one more or less, and `stored` with a directory. */
class Transfers extends EventTarget {
  list = [];
  #waiting = [];
  #uploading = 0;

  constructor() {
    super();
    addEventListener("beforeunload", (event) => {
      if (this.list.some((each) => each.state === "active")) event.preventDefault();
    });
  }

  #add(transfer) {
    this.list.push(transfer);
    this.dispatchEvent(new Event("change"));
    return transfer;
  }

  /** Take those out that are over. */
  clear() {
    this.list = this.list.filter((each) => each.state === "active");
    this.dispatchEvent(new Event("change"));
  }

  /** Upload a file. `existing`: the stat of what is there and is to be replaced, or null. */
  upload(file, path, existing) {
    const transfer = this.#add(new Transfer("upload", base(path), file.size));
    transfer.update("waiting");
    transfer.signal.addEventListener("abort", () => transfer.end("cancelled"));
    this.#waiting.push([transfer, file, path, existing]);
    this.#next();
  }

  async #next() {
    if (this.#uploading === UPLOADS || !this.#waiting.length) return;
    const [transfer, file, path, existing] = this.#waiting.shift();
    if (transfer.signal.aborted) return this.#next();
    this.#uploading += 1;
    transfer.began = performance.now();
    await this.#run(transfer, () => upload(transfer, file, path, existing));
    this.#uploading -= 1;
    if (transfer.state === "done") this.dispatchEvent(new CustomEvent("stored", { detail: parent(path) }));
    return this.#next();
  }

  async #run(transfer, work) {
    try {
      await work();
      if (transfer.size !== null) transfer.done = transfer.size;
      transfer.end("done");
    } catch (error) {
      transfer.end(transfer.signal.aborted ? "cancelled" : "failed", transfer.signal.aborted ? "" : error.message);
    }
  }

  /** Save a file here, or a directory as an archive. `size`: that of the file. */
  async download(path, { directory = false, size = null } = {}) {
    const name = directory ? `${base(path) || "root"}.tar.gz` : base(path);
    let file = null;
    if (size !== null && size >= LARGE && window.showSaveFilePicker) {
      try {
        file = await (await window.showSaveFilePicker({ suggestedName: name })).createWritable();
      } catch (error) {
        if (error.name === "AbortError") return;
      }
    }
    const transfer = this.#add(new Transfer("download", name, size));
    const source = directory ? `archive?path=${encodePath(path)}&format=tar.gz` : `files?path=${encodePath(path)}`;
    await this.#run(transfer, async () => {
      if (file) {
        await download(transfer, source, (chunk) => (chunk === null ? file.truncate(0).then(() => file.seek(0)) : file.write(chunk)))
          .catch(async (error) => { await file.abort(); throw error; });
        await file.close();
      } else {
        const pieces = new Pieces();
        await download(transfer, source, (chunk) => pieces.write(chunk));
        save(pieces.blob(), name);
      }
    });
  }
}

export const transfers = new Transfers();
