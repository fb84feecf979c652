/** Prometheus text, and percentiles of what happened between two scrapes. */

const PREFIX = "pennyweight_";
const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const NUMBERS = { "+Inf": Infinity, "-Inf": -Infinity, NaN };

const ESCAPES = { n: "\n", '"': '"', "\\": "\\" };

const unescaped = (text) => text.replace(/\\(.)/g, (_, letter) => ESCAPES[letter] ?? letter);
const toNumber = (text) => NUMBERS[text] ?? Number(text);

/** All series of one moment. */
export class Scrape {
  /** @type {Map<string, {labels: Record<string, string>, value: number}[]>} */
  #samples = new Map();

  /** @param {string} text */
  constructor(text) {
    this.at = performance.now() / 1000;
    for (const line of text.split("\n")) {
      const match = line.startsWith("#") ? null : SAMPLE.exec(line);
      if (!match) continue;
      const pairs = [...(match[2] ?? "").matchAll(LABEL)];
      const labels = Object.fromEntries(pairs.map(([, name, value]) => [name, unescaped(value)]));
      const samples = this.#samples.get(match[1]) ?? [];
      samples.push({ labels, value: toNumber(match[3]) });
      this.#samples.set(match[1], samples);
    }
  }

  /** Sum of the samples of a series that have these labels; null if there is none. */
  value(name, wanted = {}) {
    const samples = (this.#samples.get(PREFIX + name) ?? []).filter(({ labels }) =>
      Object.entries(wanted).every(([label, value]) => labels[label] === value),
    );
    return samples.length ? samples.reduce((sum, { value }) => sum + value, 0) : null;
  }

  /** Observations up to each bound, of all label values together. */
  buckets(name) {
    const counts = new Map();
    for (const { labels, value } of this.#samples.get(`${PREFIX}${name}_bucket`) ?? []) {
      const bound = toNumber(labels.le);
      counts.set(bound, (counts.get(bound) ?? 0) + value);
    }
    return [...counts].map(([bound, count]) => ({ bound, count })).sort((a, b) => a.bound - b.bound);
  }
}

/** What a counter grew by; null if it is not there, or began anew. */
export function growth(older, newer, name) {
  const [before, after] = [older.value(name), newer.value(name)];
  return before === null || after === null || after < before ? null : after - before;
}

/**
 * A percentile of what a histogram observed between two scrapes, linear within a bucket as in PromQL.
 * @returns {number | null} null if it observed nothing
 */
export function quantile(older, newer, name, share) {
  const before = new Map(older.buckets(name).map(({ bound, count }) => [bound, count]));
  const counts = newer.buckets(name).map(({ bound, count }) => ({ bound, count: count - (before.get(bound) ?? 0) }));
  const total = counts.at(-1)?.count ?? 0;
  if (!(total > 0)) return null;
  const rank = share * total;
  const index = counts.findIndex(({ count }) => count >= rank);
  const lower = index === 0 ? { bound: 0, count: 0 } : counts[index - 1];
  const upper = counts[index];
  if (upper.bound === Infinity) return lower.bound;
  const within = upper.count - lower.count;
  return within > 0 ? lower.bound + ((upper.bound - lower.bound) * (rank - lower.count)) / within : upper.bound;
}
