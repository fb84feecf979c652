/** What is known of one of the two services, and how it is found out. */

import { Scrape } from "./metrics.js";
import { ServerError } from "./server.js";

const WINDOW_S = 60;
const PAUSE_S = 10;

/** A service that is asked again and again; a failure stays its own. */
export class Side {
  /** @type {{phase: string, done_bytes: number, total_bytes: number, elapsed_s: number,
   *   remaining_s: number | null} | null} */
  readiness = null;
  /** What /v1/models says of the model. */
  model = null;
  /** What /v1/quantization says. */
  report = null;
  /** Scrapes of the last minute, the newest last. @type {Scrape[]} */
  scrapes = [];
  /** @type {ServerError | null} */
  problem = null;
  /** Why there are no metrics although the service answers. @type {ServerError | null} */
  metricsProblem = null;
  #askAgainAt = 0;
  #isAsking = false;

  /**
   * @param {import("./server.js").Server} server
   * @param {"own" | "twin"} role
   */
  constructor(server, role) {
    this.server = server;
    this.role = role;
  }

  /** Whether it has told all that can be told in its phase, or failed to. */
  get isKnown() {
    if (this.problem !== null || this.report !== null) return true;
    return this.readiness !== null && this.readiness.phase !== "ready";
  }

  get isReady() {
    return this.readiness?.phase === "ready" && this.report !== null && this.problem === null;
  }

  /** How the page calls it: its scheme, and which one it is. */
  get label() {
    return `${this.model?.scheme ?? "…"} (${this.role === "own" ? "this service" : "twin"})`;
  }

  /** Ask what is not known yet, or changes; what failed is asked again after a pause. */
  async refresh() {
    const now = performance.now() / 1000;
    if (this.#isAsking || (this.problem !== null && now < this.#askAgainAt)) return;
    this.#isAsking = true;
    try {
      await this.#refresh();
      this.problem = null;
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      if (error.kind !== "key") this.#forget();
      this.problem = error;
      this.#askAgainAt = error.kind === "key" ? Infinity : now + PAUSE_S;
    } finally {
      this.#isAsking = false;
    }
  }

  /** Ask at once next time, as there is a new key. */
  useKey(key) {
    this.server.key = key;
    this.#askAgainAt = 0;
  }

  async #refresh() {
    this.readiness = await this.server.readiness();
    if (this.readiness.phase === "ready" && this.report === null) {
      this.model = (await this.server.json("v1/models")).data[0];
      this.report = await this.server.json("v1/quantization");
    }
    if (this.metricsProblem === null) await this.#scrape();
  }

  async #scrape() {
    try {
      const scrape = new Scrape(await this.server.text("metrics"));
      this.scrapes = [...this.scrapes.filter(({ at }) => scrape.at - at <= WINDOW_S), scrape];
    } catch (error) {
      if (!(error instanceof ServerError) || !["key", "refused"].includes(error.kind)) throw error;
      this.metricsProblem = error;
    }
  }

  /** It may come back as another one. */
  #forget() {
    this.readiness = this.model = this.report = this.metricsProblem = null;
    this.scrapes = [];
  }
}

/** Why the twin cannot be compared; null if it can. */
export function twinProblem(own, twin) {
  if (twin.problem !== null) return twin.problem.message;
  if (!twin.isKnown) return "The twin has not answered yet.";
  if (twin.readiness.phase !== "ready") return `The twin takes no requests: its phase is ${twin.readiness.phase}.`;
  if (own.model !== null && own.model.id !== twin.model.id) {
    return `The twin serves ${twin.model.id} and this service ${own.model.id}: different models cannot be compared.`;
  }
  return null;
}
