/** A cell for each layer, coloured by the relative error of its weights. */

import { byId, element } from "./dom.js";
import { bytes, number } from "./format.js";

const KEYS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };

/** Reports that are drawn now. */
let drawn = [];

/** Show the strips of the sides that are loaded, all on one scale. */
export function showLayers(sides) {
  const loaded = sides.filter((side) => side.report !== null);
  const reports = loaded.map((side) => side.report);
  if (reports.length === drawn.length && reports.every((report, i) => report === drawn[i])) return;
  drawn = reports;
  const largest = Math.max(...reports.flatMap((report) => report.layers.map((layer) => layer.relative_error)), 0);
  byId("layers").replaceChildren(...loaded.map((side) => strip(side, largest)));
  byId("layer-detail").textContent =
    `An empty cell is 0, a full one ${share(largest)}, a hatched one is not quantized. ` +
    "Point at a cell, or go along with the arrow keys.";
}

function strip(side, largest) {
  const cells = side.report.layers.map((layer) => cell(layer, largest));
  cells[0]?.setAttribute("tabindex", "0");
  const attributes = { class: "strip", role: "listbox", "aria-orientation": "horizontal" };
  const list = element("div", { ...attributes, "aria-label": `Layers of ${side.label}` }, ...cells);
  list.addEventListener("keydown", (event) => {
    const step = KEYS[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(cells.length - 1, cells.indexOf(document.activeElement) + step));
    cells[next].focus();
  });
  list.addEventListener("focusin", ({ target }) => {
    for (const each of cells) each.setAttribute("tabindex", each === target ? "0" : "-1");
    for (const each of cells) each.setAttribute("aria-selected", String(each === target));
  });
  return element("div", { class: "strip-row" }, element("span", { class: "name" }, side.label), list);
}

function cell(layer, largest) {
  const text = describe(layer);
  const made = element("div", {
    class: layer.scheme === "none" ? "cell kept" : "cell",
    role: "option",
    tabindex: "-1",
    title: text,
    "aria-label": text,
    "aria-selected": "false",
  });
  made.style.setProperty("--error-share", `${largest > 0 ? (100 * layer.relative_error) / largest : 0}%`);
  const show = () => (byId("layer-detail").textContent = text);
  made.addEventListener("focus", show);
  made.addEventListener("pointerenter", show);
  return made;
}

const share = (ratio) => `${number(100 * ratio)} %`;

/** A layer in words. */
function describe({ name, scheme, shape, bytes: size, relative_error: error, sqnr_db: sqnr, reason }) {
  const parts = [`${name}: ${scheme}`, `error ${share(error)}`];
  if (sqnr !== null) parts.push(`${number(sqnr)} dB`);
  parts.push(bytes(size), shape.join(" × "));
  if (reason) parts.push(reason);
  return parts.join(", ");
}
