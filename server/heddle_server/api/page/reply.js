// One answer as it comes: its text, its tokens, and what became of the time.

import { CHAT, errorOf, postJson } from "./api.js";
import { eventsOf } from "./event_stream.js";

export class Reply {
  text = "";
  tokens = []; // {token, logprob, top_logprobs} where the request asked for them
  finishReason = null;
  source = null; // the `heddle` object: which weights answered, and where they were
  usage = null;
  #sentAt = 0;
  #firstAt = null; // of the first and the last text, as this page saw them
  #lastAt = 0;

  /** Asks, and calls `onText` for each piece of text and whether it is reasoning; throws what goes wrong. */
  async receive(request, signal, onText) {
    this.#sentAt = performance.now();
    for await (const event of eventsOf(await postJson(CHAT, request, signal))) {
      if (event.error) throw errorOf(200, event);
      this.source = event.heddle ?? this.source;
      this.usage = event.usage ?? this.usage;
      for (const choice of event.choices) this.#add(choice, onText);
    }
  }

  /** From sending to the first text: the server's time, and the way there and back. */
  get firstTextMs() {
    return this.#firstAt === null ? null : this.#firstAt - this.#sentAt;
  }

  get totalMs() {
    return this.#firstAt === null ? null : this.#lastAt - this.#sentAt;
  }

  /** Of the tokens after the first, so that loading an adapter does not count; null where there are too few. */
  get tokensPerSecond() {
    const numAfterFirst = (this.usage?.completion_tokens ?? 0) - 1;
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    return numAfterFirst > 0 && seconds > 0 ? numAfterFirst / seconds : null;
  }

  #add({ delta, logprobs, finish_reason: finishReason }, onText) {
    this.finishReason = finishReason ?? this.finishReason;
    this.tokens.push(...(logprobs?.content ?? []));
    const piece = delta.content || delta.reasoning_content;
    if (finishReason || piece) this.#lastAt = performance.now();
    if (!piece) return;
    this.#firstAt ??= performance.now();
    this.text += delta.content ?? "";
    onText(piece, !delta.content);
  }
}
