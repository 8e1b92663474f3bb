// Adds a style sheet to the page, once.

/** Resolve when it is there. `href`: relative to the page. Rejects if it cannot be had. */
export function stylesheet(href) {
  const found = [...document.styleSheets].some((sheet) => sheet.href === new URL(href, document.baseURI).href);
  if (found) return Promise.resolve();
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = href;
  return new Promise((resolve, reject) => {
    link.onload = () => resolve();
    link.onerror = () => { link.remove(); reject(new Error(`cannot load ${href}`)); };
    document.head.append(link);
  });
}
