/** Requests to a service, and what went wrong with them in words. */

const TIMEOUT_MS = 5000;

/** Why a request has no answer that can be used. */
export class ServerError extends Error {
  /**
   * @param {"unreachable" | "slow" | "key" | "refused" | "cancelled"} kind
   * @param {string} message
   */
  constructor(kind, message) {
    super(message);
    this.kind = kind;
  }
}

/** One service. Its key is kept for this tab only. */
export class Server {
  #storageName;

  /**
   * @param {string} base URL that routes are relative to
   * @param {string} name how messages call it
   * @param {string} hint what else may be the reason if it cannot be reached
   */
  constructor(base, name, hint = "") {
    this.base = base;
    this.name = name;
    this.hint = hint;
    this.#storageName = `pennyweight key ${base}`;
  }

  get key() {
    return sessionStorage.getItem(this.#storageName) ?? "";
  }

  set key(value) {
    sessionStorage.setItem(this.#storageName, value);
  }

  /** JSON of a route; `body` makes it a POST. */
  async json(route, options = {}) {
    const response = await this.open(route, { timeoutMs: TIMEOUT_MS, ...options });
    return this.#read(response.json());
  }

  /** Text of a route that takes no key. */
  async text(route) {
    const response = await this.open(route, { timeoutMs: TIMEOUT_MS, withKey: false });
    return this.#read(response.text());
  }

  /** How far it is: what /readyz says, whatever its status. */
  async readiness() {
    const response = await this.#send("readyz", { timeoutMs: TIMEOUT_MS, withKey: false });
    return this.#read(response.json());
  }

  /**
   * A response with status 200, not read yet.
   * @param {string} route
   * @param {{body?: object, signal?: AbortSignal, timeoutMs?: number, withKey?: boolean}} options
   */
  async open(route, options) {
    const response = await this.#send(route, options);
    if (response.ok) return response;
    throw new ServerError(response.status === 401 ? "key" : "refused", await this.#refusal(response));
  }

  async #send(route, { body, signal, timeoutMs, withKey = true }) {
    const headers = {};
    if (withKey && this.key) headers.Authorization = `Bearer ${this.key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const signals = [signal, timeoutMs && AbortSignal.timeout(timeoutMs)].filter(Boolean);
    return this.#read(
      fetch(new URL(route, this.base), {
        method: body === undefined ? "GET" : "POST",
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal: AbortSignal.any(signals),
        cache: "no-store",
        credentials: "omit",
      }),
    );
  }

  async #read(promise) {
    try {
      return await promise;
    } catch (error) {
      throw this.failure(error);
    }
  }

  /** What a failed request or stream means. */
  failure(error) {
    if (error instanceof ServerError) return error;
    if (error.name === "AbortError") return new ServerError("cancelled", "cancelled");
    if (error.name === "TimeoutError") {
      return new ServerError("slow", `${this.name} did not answer within ${TIMEOUT_MS / 1000} seconds.`);
    }
    if (error instanceof SyntaxError) {
      return new ServerError("refused", `${this.name} answered something else than JSON.`);
    }
    return new ServerError("unreachable", `${this.name} cannot be reached. ${this.hint}`.trim());
  }

  async #refusal(response) {
    const answer = await response.json().catch(() => null);
    const message = answer?.error?.message;
    return `${this.name}: ${typeof message === "string" ? message : `status ${response.status}`}`;
  }
}
