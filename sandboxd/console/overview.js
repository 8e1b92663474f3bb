import { h } from "./ui.js";

export async function mount(root) {
  root.replaceChildren(h("p", {}, "This view is not built yet."));
  return () => {};
}
