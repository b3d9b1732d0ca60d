// Builds nodes from names, attributes and texts. Text stays text: no code of the web UI reads HTML.

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const find = (id) => document.getElementById(id);

export function button(text, onClick, attributes = {}) {
  return make("button", { type: "button", click: onClick, ...attributes }, text);
}

// For screen readers. The same text twice is read twice.
export function announce(text) {
  find("news").replaceChildren(make("p", {}, text));
}
