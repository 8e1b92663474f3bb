// A terminal of the sandbox over a WebSocket: /processes/<id>/attach. Reconnects, and goes on behind the last byte that
// it has; the daemon keeps the output meanwhile.
import { ApiError, call, socket } from "./api.js";

const STDIN = 0, STDOUT = 1, STATUS = 3, RESIZE = 4;

// Bytes of one message to stdin; the daemon takes messages up to 1 MiB.
const MESSAGE = 64 * 1024;

// Bytes of what is typed while there is no connection: a line or two.
const TYPED_AHEAD = 4096;

// A WebSocket cannot be paused: with so many bytes not yet drawn it is closed, and opened again when few are left.
const HIGH_WATER = 4 * 1024 * 1024;
const LOW_WATER = 256 * 1024;

// Milliseconds until the next attempt to connect: at first, and at most.
const FIRST = 250, LONGEST = 8000;

// Close codes of RFC 6455, section 7.4.1, with which the daemon refuses what was sent: to connect again would not help.
const REFUSALS = [1002, 1003, 1007, 1008, 1009];

/** How it ended, from the status that Kubernetes' protocol has for it. */
function exitCode(status) {
  if (status.status === "Success") return 0;
  const cause = status.details?.causes?.find((each) => each.reason === "ExitCode");
  return Number(cause?.message ?? -1);
}

/**
 * Calls its handler:
 * - output(data, history, drawn): bytes; history: written before this page has connected, so that questions in it are
 *   not to be answered; drawn is to be called when they are drawn.
 * - gap(dropped): so many lines are no longer kept.
 * - connected(again), disconnected(milliseconds), ended(code), failed(message).
 */
export class Attachment {
  #handler;
  #socket = null;
  #timer = 0;
  #delay = FIRST;
  #position = 0; // bytes of the output that have come
  #current = 0; // bytes that had been written when this connection was made
  #undrawn = 0;
  #draining = false;
  #attached = false; // the daemon has said so
  #lost = false;
  #over = false;
  #size = null;
  #typed = new Uint8Array(); // while there was no connection

  constructor(id, handler) {
    this.id = id;
    this.#handler = handler;
    this.reconnect = this.reconnect.bind(this);
    addEventListener("online", this.reconnect);
    this.#connect();
  }

  /** Do not wait for the next attempt. */
  reconnect() {
    if (this.#timer) this.#connect();
  }

  /** Hang up. The process goes on. */
  close() {
    this.#over = true;
    removeEventListener("online", this.reconnect);
    this.#hangUp();
  }

  /** Type bytes. Without a connection some are kept until there is one; more are lost. */
  write(data) {
    if (!this.#attached) {
      if (this.#typed.length + data.length <= TYPED_AHEAD) this.#typed = Uint8Array.of(...this.#typed, ...data);
      return;
    }
    for (let start = 0; start < data.length; start += MESSAGE) this.#send(STDIN, data.subarray(start, start + MESSAGE));
  }

  resize(cols, rows) {
    this.#size = { Width: cols, Height: rows };
    this.#send(RESIZE, new TextEncoder().encode(JSON.stringify(this.#size)));
  }

  #send(channel, data) {
    if (!this.#attached || this.#socket?.readyState !== WebSocket.OPEN) return;
    const message = new Uint8Array(1 + data.length);
    message[0] = channel;
    message.set(data, 1);
    this.#socket.send(message);
  }

  #hangUp() {
    this.#attached = false;
    clearTimeout(this.#timer);
    this.#timer = 0;
    const old = this.#socket;
    this.#socket = null;
    if (old) {
      old.onopen = old.onmessage = old.onclose = null;
      old.close();
    }
  }

  #connect() {
    this.#hangUp();
    const made = socket(`processes/${encodeURIComponent(this.id)}/attach?events=true&offset=${this.#position}`, ["v5.channel.k8s.io"]);
    let opened = false;
    made.binaryType = "arraybuffer";
    made.onopen = () => { opened = true; };
    made.onmessage = ({ data }) => (typeof data === "string" ? this.#event(JSON.parse(data)) : this.#message(new Uint8Array(data)));
    made.onclose = ({ code, reason }) => this.#closed(opened, code, reason);
    this.#socket = made;
  }

  #event(event) {
    if (event.event === "started") {
      this.#attached = true;
      this.#current = event.bytes;
      this.#delay = FIRST;
      if (this.#size) this.resize(this.#size.Width, this.#size.Height);
      if (!this.#draining) this.#handler.connected(this.#lost);
      this.#draining = this.#lost = false;
      const typed = this.#typed;
      this.#typed = new Uint8Array();
      this.write(typed);
    } else if (event.event === "gap") {
      this.#position = event.offset;
      this.#handler.gap(event.dropped);
      if (this.#size) { // another size for a moment has a program that uses the whole screen draw it anew
        const { Width, Height } = this.#size;
        this.resize(Width, Math.max(1, Height - 1));
        this.resize(Width, Height);
      }
    }
  }

  #message(message) {
    const data = message.subarray(1);
    if (message[0] === STDOUT) {
      const old = Math.min(data.length, Math.max(0, this.#current - this.#position));
      this.#position += data.length;
      this.#output(data.subarray(0, old), true);
      this.#output(data.subarray(old), false);
      if (this.#undrawn > HIGH_WATER) {
        this.#draining = true;
        this.#hangUp();
      }
    } else if (message[0] === STATUS) {
      this.#over = true;
      this.#handler.ended(exitCode(JSON.parse(new TextDecoder().decode(data))));
    }
  }

  #output(data, history) {
    if (!data.length) return;
    this.#undrawn += data.length;
    this.#handler.output(data, history, () => {
      this.#undrawn -= data.length;
      if (this.#draining && !this.#socket && !this.#over && this.#undrawn < LOW_WATER) this.#connect();
    });
  }

  async #closed(opened, code, reason) {
    this.#socket = null;
    this.#attached = false;
    if (this.#over) return;
    if (REFUSALS.includes(code)) return this.#fail(reason || `closed with ${code}`);
    this.#lost = true;
    const delay = this.#delay * (0.75 + Math.random() / 2);
    this.#delay = Math.min(this.#delay * 2, LONGEST);
    this.#timer = setTimeout(() => this.#connect(), delay);
    this.#handler.disconnected(delay);
    if (opened) return;
    try { // the browser does not say why it was refused
      await call(`processes/${encodeURIComponent(this.id)}`);
    } catch (error) {
      if (error instanceof ApiError && [400, 401, 403, 404].includes(error.status) && !this.#over) this.#fail(error.message);
    }
  }

  #fail(message) {
    this.close();
    this.#handler.failed(message);
  }
}
