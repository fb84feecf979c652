/** What the services do now: queue, speed, latency, memory for keys and values. */

import { byId, drawing, element, fillTable } from "./dom.js";
import { number, percent, rate, seconds } from "./format.js";
import { growth, quantile } from "./metrics.js";

const [WIDTH, HEIGHT] = [600, 90];
const WINDOW_S = 60;

/** Show the newest scrapes. */
export function showLive(sides) {
  const shown = sides.filter((side) => side.scrapes.length || side.metricsProblem);
  fillTable(byId("live-table"), "Load and latency", rows(shown));
  byId("live-chart").replaceChildren(...chart(shown));
}

function rows(sides) {
  const newest = (name) => (side) => number(side.scrapes.at(-1)?.value(name));
  const latency = (name, share) => (side) => seconds(overMinute(side, (old, now) => quantile(old, now, name, share)));
  const pair = (name) => (side) => `${latency(name, 0.5)(side)} / ${latency(name, 0.99)(side)}`;
  const read = [
    ["running", newest("requests_running")],
    ["waiting", newest("requests_waiting")],
    ["speed now", (side) => rate(speeds(side).at(-1)?.value)],
    ["to first token, p50 / p99", pair("time_to_first_token_seconds")],
    ["between tokens, p50 / p99", pair("inter_token_seconds")],
    ["keys and values in use", (side) => percent(side.scrapes.at(-1)?.value("kv_utilization_ratio"))],
  ];
  const table = [["", ...sides.map((side) => side.label)], ...read.map(([name, of]) => [name, ...sides.map(of)])];
  for (const side of sides) if (side.metricsProblem) table.push(["no metrics", side.metricsProblem.message]);
  return table;
}

function overMinute({ scrapes }, compute) {
  return scrapes.length < 2 ? null : compute(scrapes[0], scrapes.at(-1));
}

/** Tokens per second between each two scrapes. */
function speeds({ scrapes }) {
  const made = [];
  for (let i = 1; i < scrapes.length; i += 1) {
    const [older, newer] = [scrapes[i - 1], scrapes[i]];
    const tokens = growth(older, newer, "generated_tokens_total");
    if (tokens !== null) made.push({ at: newer.at, value: tokens / (newer.at - older.at) });
  }
  return made;
}

/** Lines of the last minute, one for each side. */
function chart(sides) {
  const lines = sides.map((side) => ({ side, points: speeds(side) }));
  const highest = Math.max(1, ...lines.flatMap(({ points }) => points.map(({ value }) => value)));
  const now = performance.now() / 1000;
  const x = (at) => WIDTH * (1 - (now - at) / WINDOW_S);
  const y = (value) => HEIGHT - 4 - ((HEIGHT - 8) * value) / highest;
  const drawn = lines.map(({ side, points }) =>
    drawing("polyline", { class: side.role, points: points.map(({ at, value }) => `${x(at)},${y(value)}`).join(" ") }),
  );
  const swatch = (side) => element("span", { class: `swatch line-${side.role}` });
  const keys = sides.map((side) => element("span", {}, swatch(side), side.label));
  const box = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" };
  const label = `Generated tokens per second in the last minute, at most ${number(highest)}`;
  return [
    element("p", { class: "hint" }, `Tokens per second, last minute; top of the chart: ${number(highest)}`),
    drawing("svg", { ...box, role: "img", "aria-label": label }, ...drawn),
    element("p", { class: "legend" }, ...keys),
  ];
}
