/** Text from one service, or from two side by side. */

import { byId, element } from "./dom.js";
import { rate, seconds } from "./format.js";
import { Run, firstDifference, generate } from "./generation.js";
import { ServerError } from "./server.js";
import { twinProblem } from "./side.js";

const MAX_SEED = 2 ** 31;
const SLOW_S = 5;

/** One text on the page. */
class Output {
  constructor(label) {
    this.run = new Run();
    this.text = element("pre", { class: "output" });
    this.figures = element("p", { class: "figures" });
    this.node = element("article", { class: "side" }, element("h3", {}, label), this.text, this.figures);
  }

  /** Write what has come since the last time. */
  update() {
    while (this.text.childNodes.length < this.run.pieces.length) {
      this.text.append(document.createTextNode(this.run.pieces[this.text.childNodes.length].text));
    }
  }

  /** Point at a token. */
  mark(index) {
    const piece = this.run.pieces.findIndex(({ numTokens }) => numTokens > index);
    const node = this.text.childNodes[piece];
    if (node === undefined || node.nodeName === "MARK") return;
    node.replaceWith(element("mark", { title: "the first token that differs" }, node.textContent));
  }

  /** Speed so far, and what else there is to say. */
  tell(state, isProblem = false) {
    const { run } = this;
    const figures = [`${run.tokenIds.length} tokens`, rate(run.tokensPerS), `first after ${seconds(run.firstTokenS)}`];
    this.figures.textContent = run.firstTokenS === null ? state : [...figures, state].join(" · ");
    this.figures.classList.toggle("problem", isProblem);
  }
}

/** The form and its outputs. */
export class Playground {
  #own;
  #twin;
  #onKeyWanted;
  /** @type {AbortController | null} */
  #running = null;

  /**
   * @param {import("./side.js").Side} own
   * @param {import("./side.js").Side | null} twin
   * @param {(side: import("./side.js").Side) => void} onKeyWanted
   */
  constructor(own, twin, onKeyWanted) {
    this.#own = own;
    this.#twin = twin;
    this.#onKeyWanted = onKeyWanted;
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#generate();
    });
    byId("cancel").addEventListener("click", () => this.#running?.abort());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#running?.abort();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
    });
  }

  /** As far as the service is ready, and not busy for this page. */
  showState() {
    byId("generate").disabled = this.#running !== null || !this.#own.isReady;
    byId("cancel").disabled = this.#running === null;
    const hasNoChat = this.#own.model !== null && !this.#own.model.has_chat_template;
    byId("chat-hint").hidden = !hasNoChat;
    for (const radio of document.getElementsByName("mode")) if (radio.value === "chat") radio.disabled = hasNoChat;
  }

  async #generate() {
    if (this.#running !== null || !this.#own.isReady) return;
    this.#running = new AbortController();
    this.showState();
    const request = readForm();
    const own = new Output(this.#own.label);
    const twin = this.#twin && new Output(this.#twin.label);
    const outputs = twin ? [own, twin] : [own];
    byId("sides").replaceChildren(...outputs.map(({ node }) => node));
    byId("difference").textContent = "";
    const compare = () => twin && markDifference(own, twin);
    const runs = [this.#run(this.#own, own, request, compare)];
    if (twin) runs.push(this.#runTwin(twin, request, compare));
    await Promise.all(runs);
    this.#running = null;
    this.showState();
    tellOutcome(own, twin, request);
  }

  async #runTwin(output, request, compare) {
    const problem = twinProblem(this.#own, this.#twin);
    if (problem !== null) output.tell(problem, true);
    else await this.#run(this.#twin, output, request, compare);
  }

  /** Generate into an output; whatever goes wrong is told there and nowhere else. */
  async #run(side, output, request, compare) {
    const tell = () => {
      const silentS = Math.floor(output.run.silentS);
      output.tell(silentS >= SLOW_S ? `slow: nothing for ${silentS} s` : "…");
    };
    const watch = setInterval(tell, 1000);
    const onChange = () => {
      output.update();
      tell();
      compare();
    };
    tell();
    try {
      await generate(side.server, request, output.run, { signal: this.#running.signal, onChange });
      output.tell(output.run.finishReason ?? "no end");
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      output.tell(error.message, error.kind !== "cancelled");
      if (error.kind === "key") this.#onKeyWanted(side);
    } finally {
      clearInterval(watch);
    }
  }
}

/** The request; a seed in any case, so that two services draw alike. */
function readForm() {
  const read = (id) => byId(id).valueAsNumber;
  const seed = byId("seed").value === "" ? Math.floor(Math.random() * MAX_SEED) : read("seed");
  return {
    mode: document.querySelector("input[name=mode]:checked").value,
    prompt: byId("prompt").value,
    sampling: { max_tokens: read("max-tokens"), temperature: read("temperature"), top_p: read("top-p"), seed },
  };
}

function markDifference(own, twin) {
  const index = firstDifference(own.run, twin.run);
  if (index === null) return;
  own.mark(index);
  twin.mark(index);
  byId("difference").textContent = `The first token that differs is number ${index + 1}.`;
}

function tellOutcome(own, twin, { sampling }) {
  const seed = `Seed ${sampling.seed}.`;
  const isSame = twin && own.run.isComplete && twin.run.isComplete && firstDifference(own.run, twin.run) === null;
  const said = isSame ? `All ${own.run.tokenIds.length} tokens are the same.` : byId("difference").textContent;
  byId("difference").textContent = `Ended. ${said} ${seed}`;
}
