// Chooses the base or one of the adapters: a field to search in, and a list that the server fills page by page.

import { ADAPTERS, BASE, getAdapter, getJson } from "./api.js";
import { badgesOf } from "./adapter_badges.js";
import { element } from "./element.js";

const PAGE_SIZE = 50;
const TYPING_MS = 150; // so long nothing is typed before the server is asked
const NEAR_END_PX = 80;

let numPickers = 0;

export class Picker {
  #root;
  #button;
  #panel;
  #search;
  #list;
  #hint;
  #baseName;
  #onChoose;
  #cards = new Map(); // by option
  #active = null;
  #lastId = null; // where the next page begins; null when there is none
  #loading = new AbortController();
  #isLoading = false;
  #typing = 0;

  /** `root` holds the parts; `onChoose` gets a card, or null for the base. */
  constructor(root, baseName, onChoose) {
    this.#root = root;
    this.#baseName = baseName;
    this.#onChoose = onChoose;
    [this.#button, this.#panel, this.#search, this.#list, this.#hint] = [
      ".chosen",
      ".choices",
      ".search",
      ".options",
      ".hint",
    ].map((selector) => root.querySelector(selector));
    const id = `picker-${++numPickers}`;
    this.#list.id = `${id}-options`;
    this.#search.setAttribute("aria-controls", this.#list.id);
    this.#button.addEventListener("click", () => (this.#panel.hidden ? this.#open() : this.#close()));
    this.#search.addEventListener("input", () => {
      clearTimeout(this.#typing);
      this.#typing = setTimeout(() => this.#find(), TYPING_MS);
    });
    this.#search.addEventListener("keydown", (event) => this.#onKey(event));
    this.#list.addEventListener("scroll", () => this.#loadMore());
    this.#list.addEventListener("click", ({ target }) => this.#choose(target.closest("li")));
    this.#list.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
    root.addEventListener("focusout", ({ relatedTarget }) => {
      if (!root.contains(relatedTarget)) this.#hide();
    });
  }

  /** Shows what is chosen: a card, or null for the base. */
  show(card) {
    this.#button.replaceChildren(...labelOf(card));
    this.#button.setAttribute("aria-label", `Model of this pane: ${card ? card.id : BASE}. Choose another`);
  }

  #open() {
    this.#panel.hidden = false;
    this.#button.setAttribute("aria-expanded", "true");
    this.#search.value = "";
    this.#search.focus();
    this.#find();
  }

  #hide() {
    this.#panel.hidden = true;
    this.#button.setAttribute("aria-expanded", "false");
    this.#loading.abort();
  }

  #close() {
    this.#hide();
    this.#button.focus();
  }

  async #find() {
    this.#loading.abort();
    this.#loading = new AbortController();
    const text = this.#search.value.trim();
    const isBase = BASE.includes(text.toLowerCase());
    this.#cards.clear();
    this.#list.replaceChildren(...(isBase ? [this.#option(null)] : []));
    this.#list.scrollTop = 0;
    // A reference to one version is looked up as it is; anything else is a part of a name.
    await (text.includes("@") ? this.#loadReference(text) : this.#loadPage(text, null));
    this.#activate(this.#list.firstElementChild);
  }

  #loadReference(reference) {
    return this.#load(async (signal) => [await getAdapter(reference, signal)]);
  }

  #loadPage(text, after) {
    return this.#load(async (signal) => {
      const page = await getJson(ADAPTERS, { limit: PAGE_SIZE, q: text || null, after }, signal);
      this.#lastId = page.has_more ? page.last_id : null;
      return page.data;
    });
  }

  async #loadMore() {
    const isNearEnd = this.#list.scrollHeight - this.#list.scrollTop - this.#list.clientHeight < NEAR_END_PX;
    if (isNearEnd && this.#lastId !== null && !this.#isLoading) {
      await this.#loadPage(this.#search.value.trim(), this.#lastId);
    }
  }

  async #load(cards) {
    const { signal } = this.#loading;
    this.#isLoading = true;
    this.#lastId = null;
    try {
      const found = await cards(signal);
      if (signal.aborted) return;
      this.#list.append(...found.map((card) => this.#option(card)));
      this.#hint.textContent = this.#found();
    } catch (error) {
      if (!signal.aborted) this.#hint.textContent = error.message;
    } finally {
      if (!signal.aborted) this.#isLoading = false;
    }
  }

  #found() {
    if (this.#cards.size === 0) return "No adapter has this in its name.";
    const more = this.#lastId === null ? "" : "; more follow when you scroll, or type to search";
    return `${this.#cards.size} shown${more}`;
  }

  #option(card) {
    const option = element("li", { role: "option", "aria-selected": "false" });
    option.id = `${this.#list.id}-${this.#cards.size}`;
    this.#cards.set(option, card);
    option.append(...labelOf(card));
    const about = card ? card.description : this.#baseName;
    if (about) option.append(element("span", { class: "about" }, about));
    return option;
  }

  #activate(option) {
    this.#active?.setAttribute("aria-selected", "false");
    this.#active = option;
    option?.setAttribute("aria-selected", "true");
    option?.scrollIntoView({ block: "nearest" });
    this.#search.setAttribute("aria-activedescendant", option?.id ?? "");
  }

  #onKey(event) {
    const actions = {
      ArrowDown: () => this.#activate(this.#active?.nextElementSibling ?? this.#list.firstElementChild),
      ArrowUp: () => this.#activate(this.#active?.previousElementSibling ?? this.#list.lastElementChild),
      Enter: () => this.#choose(this.#active),
      Escape: () => this.#close(),
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    event.stopPropagation();
    actions[event.key]();
  }

  #choose(option) {
    if (!this.#cards.has(option)) return;
    const card = this.#cards.get(option);
    this.#close();
    this.show(card);
    this.#onChoose(card);
  }
}

function labelOf(card) {
  const badges = card ? badgesOf(card) : [element("span", { class: "badge" }, "no adapter")];
  return [
    element("span", { class: "name" }, card ? card.id : BASE),
    element("span", { class: "badges" }, ...badges),
  ];
}
