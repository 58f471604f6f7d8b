// How a reply is shown: text while it comes, then its numbers, and where its adapter came from.

import { element } from "./element.js";
import { heatView } from "./heat_view.js";
import { NOTHING, counted, milliseconds, rate } from "./numbers.js";

const ENDS = { stop: "finished", length: "token limit" };
const NUMBERS = ["First token", "Speed", "Load", "Answer", "Prompt", "End"];
const ORIGINS = {
  device: "its adapter was on the device",
  host: "its adapter came from host memory",
  disk: "its adapter came from disk",
};

export class ReplyView {
  #reasoning = element("div", { class: "reasoning", hidden: true });
  #answer = element("div", { class: "answer" });
  #state = element("p", { class: "state" });
  #error = element("p", { class: "error", hidden: true });
  #numbers = new Map();
  #reply = null;

  constructor(name) {
    const list = element("dl", { class: "numbers" });
    for (const label of NUMBERS) {
      const value = element("dd", {}, NOTHING);
      this.#numbers.set(label, value);
      list.append(element("div", {}, element("dt", {}, label), value));
    }
    const label = `Reply of ${name}`;
    this.element = element("article", { class: "turn reply", "aria-label": label });
    this.element.append(this.#reasoning, this.#answer, this.#error, this.#state, list);
  }

  say(state) {
    this.#state.textContent = state;
  }

  append(text, isReasoning) {
    this.say("");
    if (isReasoning) this.#reasoning.hidden = false;
    (isReasoning ? this.#reasoning : this.#answer).append(text);
  }

  finish(reply) {
    this.#reply = reply;
    const { source, usage, finishReason } = reply;
    this.#set("First token", milliseconds(source?.ttft_ms ?? null));
    this.#set("Speed", reply.tokensPerSecond === null ? NOTHING : `${rate(reply.tokensPerSecond)} tok/s`);
    this.#set("Load", source?.cache ? milliseconds(source.load_ms) : NOTHING);
    this.#set("Answer", usage ? counted(usage.completion_tokens, "token") : NOTHING);
    this.#set("Prompt", promptText(usage));
    this.#set("End", ENDS[finishReason] ?? finishReason ?? NOTHING);
    this.say(originText(source));
    this.element.classList.toggle("cold", source?.cache === "disk" || source?.cache === "host");
  }

  fail(message) {
    this.say("");
    this.#error.textContent = message;
    this.#error.hidden = false;
  }

  /** Tokens with their probabilities in place of the text, or back; replies that came without them stay text. */
  showHeat(isOn, inspector) {
    if (!this.#reply?.tokens.length) return;
    this.#answer.replaceChildren(isOn ? heatView(this.#reply.tokens, inspector) : this.#reply.text);
  }

  #set(label, text) {
    this.#numbers.get(label).textContent = text;
  }
}

function promptText(usage) {
  if (!usage) return NOTHING;
  const numCached = usage.prompt_tokens_details?.cached_tokens;
  return `${usage.prompt_tokens}${numCached ? `, ${numCached} cached` : ""}`;
}

/** Where the weights were: this is where a cold start is explained. */
function originText(source) {
  if (!source?.cache) return "the base alone";
  const load = source.cache === "device" ? "" : `: ${milliseconds(source.load_ms)}, once`;
  return ORIGINS[source.cache] + load;
}

/** One line for those who listen instead of looking. */
export function spokenReply(name, reply) {
  return `${name}: ${reply.text || "an empty answer"} (${counted(reply.usage?.completion_tokens ?? 0, "token")})`;
}
