// One of the columns that are asked side by side: who answers, the conversation so far, and its tools.

import { definitions, factsOf } from "./adapter_facts.js";
import { BASE, getAdapter } from "./api.js";
import { copy } from "./clipboard.js";
import { LANGUAGES } from "./copy_as.js";
import { element } from "./element.js";
import { NUM_ALTERNATIVES } from "./heat_view.js";
import { Picker } from "./picker.js";
import { Reply } from "./reply.js";
import { ReplyView, spokenReply } from "./reply_view.js";

const NO_TOKENS = "Ask: the next reply brings its probabilities.";
const COPIED_MS = 2000;
const AT_END_PX = 40; // so near to its end a conversation follows what comes

export class Pane {
  #page;
  #picker;
  #card = null; // null: the base
  #turns = []; // what the model is told of the conversation
  #views = [];
  #lastRequest = null;
  #conversation = new AbortController(); // ended when another one begins
  #isHeatOn = false;

  /** `page` is what all panes share; `onRemove` is called when somebody closes this one. */
  constructor(template, page, card, onRemove) {
    this.#page = page;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.#picker = new Picker(this.#part("picker"), page.baseName, (chosen) => this.choose(chosen));
    this.#part("remove").addEventListener("click", onRemove);
    this.#part("heat").addEventListener("click", () => this.#toggleHeat());
    for (const button of this.element.querySelectorAll("[data-language]")) {
      button.addEventListener("click", () => this.#copyAs(button));
    }
    this.choose(card);
  }

  get name() {
    return this.#card ? this.#card.id : BASE;
  }

  /** Lets a card's adapter, or the base for null, answer from now on; the conversation begins anew. */
  choose(card) {
    this.#card = card;
    this.#picker.show(card);
    this.element.setAttribute("aria-label", this.name);
    this.#part("transcript").setAttribute("aria-label", `Conversation with ${this.name}`);
    this.#part("remove").setAttribute("aria-label", `Remove the pane of ${this.name}`);
    this.clear();
  }

  clear() {
    this.#conversation.abort();
    this.#conversation = new AbortController();
    this.#turns = [];
    this.#views = [];
    this.#lastRequest = null;
    this.#part("inspector").textContent = NO_TOKENS;
    this.#part("transcript").replaceChildren(element("div", { class: "empty" }, ...this.#introduction()));
  }

  /** Answers until `signal` says to stop; a conversation that is over stops its answer too. */
  async ask(question, signal) {
    const conversation = this.#conversation.signal;
    const stop = AbortSignal.any([signal, conversation]);
    const request = (this.#lastRequest = this.#request(question));
    const view = new ReplyView(this.name);
    const reply = new Reply();
    this.#begin(question, view);
    try {
      await reply.receive(request, stop, (...piece) => this.#follow(() => view.append(...piece)));
      this.#follow(() => view.finish(reply));
      if (this.#isHeatOn) view.showHeat(true, this.#part("inspector"));
      this.#page.onReply(spokenReply(this.name, reply), reply);
    } catch (error) {
      if (stop.aborted) view.say("stopped");
      else this.#fail(view, error);
    }
    if (reply.text && !conversation.aborted) this.#remember(question, reply.text);
    await this.#refreshCard();
  }

  #part(name) {
    return this.element.querySelector(`.${name}`);
  }

  #introduction() {
    if (this.#card === null) return [element("p", {}, `${this.#page.baseName} as it is, without an adapter.`)];
    const { tier, description } = this.#card;
    const start = tier === "device" ? "" : ` It is on ${tier}: the first reply waits for the load.`;
    const words = (description || `The base with the adapter ${this.name}.`) + start;
    return [element("p", {}, words), definitions(factsOf(this.#card))];
  }

  #request(question) {
    return {
      model: this.name,
      messages: [...this.#page.parameters.systemMessages(), ...this.#turns, { role: "user", content: question }],
      ...this.#page.parameters.fields(),
      ...(this.#isHeatOn ? { logprobs: true, top_logprobs: NUM_ALTERNATIVES } : {}),
      stream: true,
      stream_options: { include_usage: true },
    };
  }

  #begin(question, view) {
    this.#part("empty")?.remove();
    this.#views.push(view);
    this.#part("transcript").append(element("p", { class: "turn question" }, question), view.element);
    const isAway = this.#card !== null && this.#card.tier !== "device";
    view.say(isAway ? `waiting: the adapter was on ${this.#card.tier}` : "waiting for the first token");
    this.#part("transcript").scrollTop = this.#part("transcript").scrollHeight;
  }

  #fail(view, error) {
    this.#follow(() => view.fail(error.message));
    this.#page.parameters.showError(error);
    this.#page.onFailure(`${this.name}: ${error.message}`);
  }

  #remember(question, answer) {
    this.#turns.push({ role: "user", content: question }, { role: "assistant", content: answer });
  }

  /** Changes the conversation and stays at its end, unless somebody has scrolled back. */
  #follow(change) {
    const transcript = this.#part("transcript");
    const isAtEnd = transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < AT_END_PX;
    change();
    if (isAtEnd) transcript.scrollTop = transcript.scrollHeight;
  }

  /** Where the adapter is now; one that was deleted meanwhile keeps its last card. */
  async #refreshCard() {
    const asked = this.#card;
    if (asked === null) return;
    const card = await getAdapter(asked.id).catch(() => asked);
    if (this.#card !== asked) return;
    this.#card = card;
    this.#picker.show(card);
  }

  #toggleHeat() {
    this.#isHeatOn = !this.#isHeatOn;
    this.#part("heat").setAttribute("aria-pressed", this.#isHeatOn);
    const inspector = this.#part("inspector");
    inspector.hidden = !this.#isHeatOn;
    inspector.textContent = NO_TOKENS;
    for (const view of this.#views) view.showHeat(this.#isHeatOn, inspector);
  }

  async #copyAs(button) {
    const { language } = button.dataset;
    const request = this.#lastRequest ?? this.#request(this.#page.question());
    const isCopied = await copy(LANGUAGES[language](request));
    button.textContent = isCopied ? "copied" : "not allowed";
    setTimeout(() => (button.textContent = language), COPIED_MS);
  }
}
