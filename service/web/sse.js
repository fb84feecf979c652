/** Server-sent events of a response that was asked for by POST, which EventSource cannot. */

const BLANK_LINE = /\r\n\r\n|\n\n|\r\r/;

/**
 * The data of each event; pieces of the stream may end anywhere, also inside a character.
 * @param {ReadableStream<Uint8Array>} stream
 * @returns {AsyncGenerator<string>}
 */
export async function* eventData(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held += value;
      const events = held.split(BLANK_LINE);
      held = events.pop();
      for (const event of events) {
        const data = event.split(/\r\n|\n|\r/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
