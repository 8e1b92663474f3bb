// Loads xterm.js, and lets it style itself under the page's Content-Security-Policy.
import { stylesheet } from "./stylesheet.js";

/** Stands for a <style> element, which the policy forbids: its text is an adopted style sheet. */
class AdoptedStyle extends HTMLElement {
  #sheet = new CSSStyleSheet();

  connectedCallback() {
    document.adoptedStyleSheets = [...document.adoptedStyleSheets, this.#sheet];
  }

  disconnectedCallback() {
    document.adoptedStyleSheets = document.adoptedStyleSheets.filter((sheet) => sheet !== this.#sheet);
  }

  set textContent(text) {
    this.#sheet.replaceSync(text);
  }
}
customElements.define("adopted-style", AdoptedStyle);

/** Set an attribute; that of the style, which the policy forbids as well, by the element's style object. */
function setAttribute(name, value) {
  if (name === "style") this.style.cssText = value;
  else Element.prototype.setAttribute.call(this, name, value);
}

/**
 * Have what xterm.js makes obey the policy. It makes its rules as <style> elements, and gives colours to spans by an
 * attribute. Return a function that undoes it.
 */
export function obeyPolicy() {
  document.createElement = (name, options) => {
    const element = Document.prototype.createElement.call(document, name === "style" ? "adopted-style" : name, options);
    if (name === "span") element.setAttribute = setAttribute;
    return element;
  };
  return () => { delete document.createElement; };
}

/** Return the classes Terminal, FitAddon and SearchAddon. Rejects if `make console` was not called. */
export async function load() {
  const [xterm, fit, search] = await Promise.all([
    import("./vendor/xterm.mjs"),
    import("./vendor/addon-fit.mjs"),
    import("./vendor/addon-search.mjs"),
    stylesheet("vendor/xterm.css"),
  ]);
  return { Terminal: xterm.Terminal, FitAddon: fit.FitAddon, SearchAddon: search.SearchAddon };
}
