/** Puts the page together, and keeps it up to date while somebody looks at it. */

import { byId, element } from "./dom.js";
import { bytes, number } from "./format.js";
import { showLayers } from "./layers.js";
import { showLive } from "./live.js";
import { onMemoryChoice, showMemory } from "./memory.js";
import { Playground } from "./playground.js";
import { Server } from "./server.js";
import { Side, twinProblem } from "./side.js";

const POLL_MS = 2000;
const LOADING_POLL_MS = 500;
const NOT_LOADING = ["ready", "draining", "failed"];
const PHASES = {
  draining: "This service is ending: it finishes what it has begun and takes nothing new.",
  failed: "This service has failed; its log has the reason.",
};

const base = new URL(".", document.baseURI).href;
const own = new Side(new Server(base, "This service"), "own");

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Try until it works: a page that has arrived has a service to ask. */
const patiently = (ask) => ask().catch(() => pause(POLL_MS).then(() => patiently(ask)));

/** The other service, if there is one. */
async function findTwin() {
  const { twin } = await own.server.json("web/page.json");
  if (twin === null) return null;
  const hint = `It is down, or does not let this page read: it needs --cors-origin ${location.origin}.`;
  return new Side(new Server(`${twin}/`, `The twin ${twin}`, hint), "twin");
}

function showPhase() {
  const phase = own.readiness?.phase ?? "no answer";
  const isLoading = own.readiness !== null && !NOT_LOADING.includes(phase);
  byId("model").textContent = own.report === null ? "" : describe(own);
  if (byId("phase").textContent !== phase) byId("phase").textContent = phase;
  byId("phase").dataset.phase = phase;
  byId("loading").hidden = !isLoading;
  if (isLoading) showLoading(own.readiness);
}

const describe = ({ model, report }) => `${model.id}, ${report.recipe}, context ${number(model.max_model_len)}`;

function showLoading({ phase, done_bytes: done, total_bytes: total, elapsed_s: elapsed, remaining_s: left }) {
  const bar = byId("loading-bar");
  if (total > 0) {
    bar.max = total;
    bar.value = done;
  } else {
    bar.removeAttribute("value");
  }
  const amount = total > 0 ? `, ${bytes(done)} of ${bytes(total)}` : "";
  const ahead = left > 0 ? `, about ${Math.ceil(left)} s left` : "";
  byId("loading-text").textContent = `${phase}${amount}, ${elapsed.toFixed(1)} s so far${ahead}`;
}

function showNotices(twin) {
  const problems = [PHASES[own.readiness?.phase], own.problem?.message];
  if (twin?.isKnown && own.isReady) problems.push(twinProblem(own, twin));
  const notices = problems.filter(Boolean);
  const shown = [...byId("notices").children].map((child) => child.textContent);
  if (shown.join("\n") !== notices.join("\n")) {
    byId("notices").replaceChildren(...notices.map((text) => element("p", { class: "notice" }, text)));
  }
}

/** Ask a side for ever, at its own pace, so that a slow one holds nothing up. */
async function follow(side, show) {
  for (;;) {
    if (!document.hidden) await side.refresh().then(show);
    const isLoading = side.readiness !== null && !NOT_LOADING.includes(side.readiness.phase);
    await pause(isLoading ? LOADING_POLL_MS : POLL_MS);
  }
}

function keyForm(side, show) {
  const form = byId(`key-${side.role}`);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    side.useKey(form.querySelector("input").value.trim());
    form.reset();
    form.hidden = true;
    side.refresh().then(show);
  });
}

async function main() {
  const twin = await patiently(findTwin);
  const sides = twin === null ? [own] : [own, twin];
  const askKey = (side) => (byId(`key-${side.role}`).hidden = false);
  const playground = new Playground(own, twin, askKey);
  const show = () => {
    showPhase();
    showNotices(twin);
    playground.showState();
    for (const side of sides) if (side.problem?.kind === "key") askKey(side);
    showMemory(sides);
    showLayers(sides);
    showLive(sides);
  };
  for (const side of sides) keyForm(side, show);
  onMemoryChoice(show);
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) for (const side of sides) side.refresh().then(show);
  });
  await Promise.all(sides.map((side) => follow(side, show)));
}

await main();
