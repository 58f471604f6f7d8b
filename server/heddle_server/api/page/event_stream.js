// Server-sent events out of a response.

const END = "[DONE]";

/** The JSON of each event until the stream says that it is done; throws where it breaks off before. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) throw new Error("The answer broke off before its end.");
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const data = dataOf(frame);
      if (data === END) return;
      if (data !== "") yield JSON.parse(data);
    }
  }
}

/** Lines that begin with a colon are comments: they keep the connection alive. */
function dataOf(frame) {
  const lines = frame.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice("data:".length).trimStart()).join("\n");
}
