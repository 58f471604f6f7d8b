// The panes beside each other: added, removed, asked and stopped together.

import { Pane } from "./pane.js";

const MAX_PANES = 6; // as many requests as a browser sends to one server at a time

export class Panes {
  #list;
  #template;
  #page;
  #onChange;
  #panes = [];
  #run = null; // what stops the answers under way
  #ended = Promise.resolve(); // when the last of them have

  /** `onChange` is called when panes come or go, and when they begin or end to answer. */
  constructor(list, template, page, onChange) {
    this.#list = list;
    this.#template = template;
    this.#page = page;
    this.#onChange = onChange;
  }

  get areAnswering() {
    return this.#run !== null;
  }

  get areFull() {
    return this.#panes.length >= MAX_PANES;
  }

  get isEmpty() {
    return this.#panes.length === 0;
  }

  /** A pane for a card's adapter, or for the base; where there is no more room the last one becomes it. */
  add(card) {
    if (this.areFull) return this.#panes.at(-1).choose(card);
    const pane = new Pane(this.#template, this.#page, card, () => this.#remove(pane));
    this.#panes.push(pane);
    this.#list.append(pane.element);
    return this.#onChange();
  }

  /** Asks all panes the same at the same time; whatever they are answering is stopped. */
  ask(question) {
    this.stop();
    const run = (this.#run = new AbortController());
    this.#onChange();
    // What was stopped belongs to the conversation, so its end is waited for.
    this.#ended = this.#ended.then(() => this.#askAll(question, run));
  }

  stop() {
    this.#run?.abort();
  }

  clear() {
    this.stop();
    for (const pane of this.#panes) pane.clear();
  }

  async #askAll(question, run) {
    await Promise.all(this.#panes.map((pane) => pane.ask(question, run.signal)));
    if (this.#run !== run) return;
    this.#run = null;
    this.#onChange();
  }

  #remove(pane) {
    const index = this.#panes.indexOf(pane);
    pane.clear();
    this.#panes.splice(index, 1);
    pane.element.remove();
    this.#onChange();
    const next = this.#panes[Math.min(index, this.#panes.length - 1)];
    (next?.element.querySelector(".remove") ?? document.getElementById("add-pane")).focus();
  }
}
