// Control sequences of terminals (ECMA-48) in lines of output: colours and attributes become styles, all else is left out.

// CSI sequences, with their parameters and final byte; OSC and other strings; other escape sequences; control characters.
const SEQUENCE = /\x1b(?:\[([0-?]*)[ -/]*([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\|$)|[PX^_][^\x1b]*(?:\x1b\\|$)|[ -/]*[0-~]|$)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]/g;

const CONTROL = /[\x00-\x08\x0b-\x1f\x7f]/;

const FLAGS = { 1: "bold", 2: "dim", 3: "italic", 4: "underline", 7: "inverse", 8: "conceal", 9: "strike" };
const OFF = { 22: ["bold", "dim"], 23: ["italic"], 24: ["underline"], 27: ["inverse"], 28: ["conceal"], 29: ["strike"] };

/** A colour of the 256: a number below 16, or "#rrggbb". */
function indexed(n) {
  if (n < 16) return n;
  const hex = (value) => value.toString(16).padStart(2, "0");
  if (n >= 232) return `#${hex(8 + (n - 232) * 10).repeat(3)}`;
  const level = (value) => hex(value ? 55 + value * 40 : 0);
  return `#${level(Math.floor((n - 16) / 36))}${level(Math.floor((n - 16) / 6) % 6)}${level((n - 16) % 6)}`;
}

/** The colour after 38 or 48, in either form ("38;5;n", "38:2::r:g:b"), and how many parameters it takes. */
function extended(parts, at) {
  const sub = parts[at].split(":");
  const separate = sub.length === 1;
  const numbers = (separate ? parts.slice(at + 1, at + 5) : sub.slice(1)).map(Number);
  const byte = (value) => Number.isInteger(value) && value >= 0 && value < 256;
  if (numbers[0] === 5 && byte(numbers[1])) return [indexed(numbers[1]), separate ? 2 : 0];
  const rgb = separate ? numbers.slice(1, 4) : numbers.slice(-3);
  if (numbers[0] !== 2 || rgb.length < 3 || !rgb.every(byte)) return [undefined, separate ? parts.length : 0];
  return [`#${rgb.map((value) => value.toString(16).padStart(2, "0")).join("")}`, separate ? 4 : 0];
}

/** The style after SGR parameters; null is the default one. */
function select(parameters, style) {
  let next = { ...style };
  const parts = parameters.split(";");
  for (let at = 0; at < parts.length; at += 1) {
    const n = Number.parseInt(parts[at] || "0", 10);
    if (n === 0) next = {};
    else if (n === 4 && parts[at] === "4:0") delete next.underline;
    else if (n in FLAGS) next[FLAGS[n]] = true;
    else if (n in OFF) for (const flag of OFF[n]) delete next[flag];
    else if (n === 38 || n === 48) {
      const [colour, taken] = extended(parts, at);
      if (colour !== undefined) next[n === 38 ? "fg" : "bg"] = colour;
      at += taken;
    } else if (n === 39) delete next.fg;
    else if (n === 49) delete next.bg;
    else if (n >= 30 && n < 38) next.fg = n - 30;
    else if (n >= 40 && n < 48) next.bg = n - 40;
    else if (n >= 90 && n < 98) next.fg = n - 82;
    else if (n >= 100 && n < 108) next.bg = n - 92;
  }
  return Object.keys(next).length ? next : null;
}

/**
 * Call `each(text, style)` for the pieces of a line, and return the style behind it. What a carriage return would let
 * the line overwrite is left out.
 * @param style that of the line's beginning, or null.
 */
export function walk(line, style, each) {
  const behind = line.trimEnd().lastIndexOf("\r") + 1;
  let at = 0;
  const piece = (end) => {
    const from = Math.max(at, behind);
    if (end > from) each(line.slice(from, end).replaceAll("\r", ""), style);
  };
  for (const match of line.matchAll(SEQUENCE)) {
    piece(match.index);
    at = match.index + match[0].length;
    if (match[2] === "m" && !/[<-?]/.test(match[1])) style = select(match[1], style);
  }
  piece(line.length);
  return style;
}

const nothing = () => {};

/** The style behind a line. */
export const after = (line, style) => (line.includes("\x1b") ? walk(line, style, nothing) : style);

/** A line without control sequences. */
export function plain(line) {
  if (!CONTROL.test(line)) return line;
  let text = "";
  walk(line, null, (piece) => { text += piece; });
  return text;
}

/** The classes and custom properties that draw a style; the style sheet adapts the colours to the page's scheme. */
export function paint(element, style) {
  const names = ["sgr"];
  for (const [property, value] of Object.entries(style)) {
    if (typeof value === "string") {
      names.push(`${property}-rgb`);
      element.style.setProperty(`--${property}-rgb`, value);
    } else names.push(value === true ? property : `${property}-${value}`);
  }
  element.className = names.join(" ");
}
