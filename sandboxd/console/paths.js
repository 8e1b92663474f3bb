// Paths of the sandbox. A byte of a name that is not UTF-8 is a lone surrogate, U+DC80 to U+DCFF, as in the API's JSON.

/** Percent-encode it for a query or for the page's address. Slashes stay. */
export function encodePath(path) {
  return Array.from(path, (character) => {
    const code = character.charCodeAt(0);
    if (character === "/") return character;
    if (character.length === 1 && code >= 0xdc80 && code <= 0xdcff) return `%${(code - 0xdc00).toString(16)}`;
    return encodeURIComponent(character);
  }).join("");
}

/** The other way round. */
export function decodePath(text) {
  return text.replace(/(?:%[0-9a-f]{2})+/gi, (run) => {
    const bytes = run.slice(1).split("%");
    let path = "";
    while (bytes.length) {
      let length = 4;
      for (; length; length -= 1) {
        try {
          const found = decodeURIComponent(`%${bytes.slice(0, length).join("%")}`);
          if (Array.from(found).length === 1) { path += found; break; }
        } catch { /* no character of that length */ }
      }
      if (!length) path += String.fromCharCode(0xdc00 + parseInt(bytes[0], 16));
      bytes.splice(0, length || 1);
    }
    return path;
  });
}

export const base = (path) => path.slice(path.lastIndexOf("/") + 1);
export const parent = (path) => path.slice(0, path.lastIndexOf("/")) || "/";
export const join = (directory, name) => (directory.endsWith("/") ? directory + name : `${directory}/${name}`);
