/** What the weights take, against what they took before; and the memory for keys and values. */

import { byId, element, fillTable, isNews } from "./dom.js";
import { bytes, number, percent } from "./format.js";

const KINDS = [
  ["codes", "codes"],
  ["scales", "scales and zero points"],
  ["unquantized", "unquantized"],
];
const KV = ["kv", "keys and values"];
const ORIGINAL = ["original", "original weights"];
const MAX_KV_RATIO = 2;

const withKv = byId("with-kv");
let isKvChosen = false;

const fidelity = (side, name) => side.scrapes.at(-1)?.value(`fidelity_${name}`);
const kvBytes = (side) => side.scrapes.at(-1)?.value("memory_bytes", { kind: "kv_cache" }) ?? null;

/** Show the sides that are loaded. */
export function showMemory(sides) {
  const loaded = sides.filter((side) => side.report !== null);
  if (!loaded.length) return;
  const original = Math.max(...loaded.map((side) => side.report.original_bytes));
  if (!isKvChosen) withKv.checked = loaded.every((side) => (kvBytes(side) ?? 0) <= MAX_KV_RATIO * original);
  const rows = [["original", [[ORIGINAL, loaded[0].report.original_bytes]]]];
  for (const side of loaded) {
    const parts = KINDS.map((kind) => [kind, side.report.weight_bytes[kind[0]]]);
    if (withKv.checked) parts.push([KV, kvBytes(side) ?? 0]);
    rows.push([side.label, parts]);
  }
  fillTable(byId("memory-table"), "Bytes of weights, keys and values", table(loaded));
  if (!isNews(byId("memory-bars"), rows)) return;
  const longest = Math.max(...rows.map(([, parts]) => sum(parts)));
  byId("memory-bars").replaceChildren(...rows.map(([label, parts]) => bar(label, parts, longest)));
  byId("memory-legend").replaceChildren(
    ...[ORIGINAL, ...KINDS, ...(withKv.checked ? [KV] : [])].map(([kind, text]) =>
      element("li", {}, element("span", { class: `swatch ${kind}` }), text),
    ),
  );
}

/** When somebody chooses what is drawn. */
export function onMemoryChoice(show) {
  withKv.addEventListener("change", () => {
    isKvChosen = true;
    show();
  });
}

const sum = (parts) => parts.reduce((total, [, size]) => total + size, 0);

function bar(label, parts, longest) {
  const text = parts.map(([[, name], size]) => `${name} ${bytes(size)}`).join(", ");
  const track = element("div", { class: "bar", role: "img", "aria-label": `${label}: ${text}` });
  for (const [[kind, name], size] of parts) {
    const part = element("span", { class: kind, title: `${name}: ${bytes(size)}` });
    part.style.width = `${(100 * size) / longest}%`;
    track.append(part);
  }
  const total = element("span", { class: "size" }, bytes(sum(parts)));
  return element("div", { class: "row" }, element("span", { class: "name" }, label), track, total);
}

function table(loaded) {
  const row = (name, read) => [name, ...loaded.map((side) => read(side))];
  return [
    ["", ...loaded.map((side) => side.label)],
    row("original weights", ({ report }) => bytes(report.original_bytes)),
    row("weights", ({ report }) => bytes(report.weight_bytes.total)),
    row("saved", ({ report }) => percent(report.saving_ratio)),
    ...KINDS.map(([kind, text]) => row(text, ({ report }) => bytes(report.weight_bytes[kind]))),
    row("bits per parameter", ({ report }) => number(report.bits_per_parameter)),
    row("KL from the original, nats", (side) => number(fidelity(side, "kl_nats"))),
    row("same likeliest token", (side) => percent(fidelity(side, "top1_ratio"))),
    row("keys and values", (side) => bytes(kvBytes(side))),
    row("process", (side) => bytes(side.scrapes.at(-1)?.value("memory_bytes", { kind: "rss" }))),
  ];
}
