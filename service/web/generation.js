/** One generated text: its tokens as they come, and when. */

import { ServerError } from "./server.js";
import { eventData } from "./sse.js";

/** A text that grows. Times are of this browser, so that they include the network. */
export class Run {
  /** @type {number[]} */
  tokenIds = [];
  /** Pieces of text, each with the number of tokens that had come with it and before. */
  pieces = [];
  finishReason = null;
  #startedAt = performance.now();
  #firstAt = null;
  #lastAt = null;
  #numFirst = 0;

  /** Seconds from the request to the first token; null before it. */
  get firstTokenS() {
    return this.#firstAt === null ? null : (this.#firstAt - this.#startedAt) / 1000;
  }

  /** Tokens per second behind those that came first; null if there were no others. */
  get tokensPerS() {
    const numTokens = this.tokenIds.length - this.#numFirst;
    return numTokens > 0 ? numTokens / ((this.#lastAt - this.#firstAt) / 1000) : null;
  }

  /** Seconds since something came. */
  get silentS() {
    return (performance.now() - (this.#lastAt ?? this.#startedAt)) / 1000;
  }

  /** Whether no token is missing. */
  get isComplete() {
    return this.finishReason !== null;
  }

  /** The clock starts, when what goes before the request itself is done. */
  start() {
    this.#startedAt = performance.now();
  }

  /** Take what an event brought. */
  add({ text, token_ids: tokenIds, finish_reason: finishReason }) {
    if (tokenIds.length) {
      this.#lastAt = performance.now();
      if (this.#firstAt === null) {
        this.#firstAt = this.#lastAt;
        this.#numFirst = tokenIds.length;
      }
    }
    this.tokenIds.push(...tokenIds);
    if (text) this.pieces.push({ text, numTokens: this.tokenIds.length });
    this.finishReason = finishReason ?? null;
  }
}

/**
 * Generate into a run; `onChange` is called as it grows.
 * @param {import("./server.js").Server} server
 * @param {{mode: string, prompt: string, sampling: object}} request
 * @param {Run} run
 * @param {{signal: AbortSignal, onChange: () => void}} options
 */
export async function generate(server, { mode, prompt, sampling }, run, { signal, onChange }) {
  const source = mode === "chat" ? { token_ids: await chatTokens(server, prompt, signal) } : { prompt };
  run.start();
  const response = await server.open("generate", { body: { ...source, ...sampling, stream: true }, signal });
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError("refused", `${server.name}: ${event.error.message}`);
      run.add(event);
      onChange();
    }
  } catch (error) {
    throw server.failure(error);
  }
  throw new ServerError("unreachable", `${server.name} broke off in the middle of the text.`);
}

/** A message as the model's chat template writes it. */
async function chatTokens(server, prompt, signal) {
  const body = { messages: [{ role: "user", content: prompt }] };
  return (await server.json("tokenize", { body, signal })).tokens;
}

/**
 * Number of the first token, from 0, in which two runs differ; null as long as none does.
 * A text that ended differs from one that goes on.
 */
export function firstDifference(one, other) {
  const common = Math.min(one.tokenIds.length, other.tokenIds.length);
  for (let i = 0; i < common; i += 1) if (one.tokenIds[i] !== other.tokenIds[i]) return i;
  const shorter = one.tokenIds.length === common ? one : other;
  const isLonger = one.tokenIds.length !== other.tokenIds.length;
  return isLonger && shorter.isComplete ? common : null;
}
