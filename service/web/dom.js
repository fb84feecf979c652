/** Elements of the page. Text goes in as text nodes only, so that nothing a model writes becomes markup. */

/**
 * @param {string} id
 * @returns {HTMLElement}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (found === null) throw new Error(`the page has no element ${id}`);
  return found;
}

/**
 * A new element.
 * @param {string} tag
 * @param {Record<string, string>} [attributes]
 * @param {...(Node | string)} children
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** The same for a drawing. */
export function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const written = new WeakMap();

/** Whether something else than the last time is to be written there; what is the same stays, with its selection. */
export function isNews(node, content) {
  const text = JSON.stringify(content);
  if (written.get(node) === text) return false;
  written.set(node, text);
  return true;
}

/**
 * Write a table whose first row and first column are headings.
 * @param {HTMLElement} table
 * @param {string} caption
 * @param {string[][]} rows
 */
export function fillTable(table, caption, rows) {
  if (!isNews(table, rows)) return;
  const [head, ...body] = rows;
  const row = ([name, ...texts]) =>
    element("tr", {}, element("th", { scope: "row" }, name), ...texts.map((text) => element("td", {}, text)));
  table.replaceChildren(
    element("caption", { class: "unseen" }, caption),
    element("thead", {}, element("tr", {}, ...head.map((text) => element("th", { scope: "col" }, text)))),
    element("tbody", {}, ...body.map(row)),
  );
}
