// The engine as it is now: its page pool, and how fast it works. Asked once a second, while somebody looks.

import { CACHE, getJson } from "./api.js";
import { keyEvents } from "./api_key.js";
import { Chart } from "./chart.js";
import { element } from "./element.js";
import { History } from "./history.js";
import { NOTHING, bytes, milliseconds } from "./numbers.js";
import { KINDS, PageMap, nameOf } from "./page_map.js";

const INTERVAL_MS = 1000;
const NUM_SAMPLES = 60;
const NUM_LATENCIES = 40;
const NUM_ADAPTERS = 500; // drawn by name; what is left is one run

export class EngineView {
  #root;
  #map;
  #throughput;
  #requests;
  #latency;
  #speeds = new History(NUM_SAMPLES);
  #running = new History(NUM_SAMPLES);
  #waiting = new History(NUM_SAMPLES);
  #firstTexts = new History(NUM_LATENCIES);
  #totals = new History(NUM_LATENCIES);
  #before = null; // {seconds, tokens} of the last answer
  #isForbidden = false;

  constructor(root) {
    this.#root = root;
    this.#map = new PageMap(this.#part("#map"), this.#part("#map-caption"));
    this.#throughput = new Chart(this.#part("#throughput"), NUM_SAMPLES, 1);
    this.#requests = new Chart(this.#part("#requests"), NUM_SAMPLES, 2, String);
    this.#latency = new Chart(this.#part("#latency"), NUM_LATENCIES, 2, milliseconds);
    this.#part("#pool-details").addEventListener("toggle", () => this.#look());
    keyEvents.addEventListener("changed", () => (this.#isForbidden = false));
  }

  /** Looks now and from now on. */
  async watch() {
    for (;;) {
      if (document.visibilityState === "visible" && !this.#isForbidden) await this.#look();
      await new Promise((resolve) => setTimeout(resolve, INTERVAL_MS));
    }
  }

  /** Adds one request of this page's own to the latencies. */
  addLatency({ firstTextMs, totalMs }) {
    if (firstTextMs === null) return;
    this.#firstTexts.add(firstTextMs);
    this.#totals.add(totalMs);
    this.#latency.draw(this.#firstTexts, this.#totals);
  }

  #part(selector) {
    return this.#root.querySelector(selector);
  }

  async #look() {
    try {
      this.#show(await getJson(CACHE, { limit: NUM_ADAPTERS }));
      this.#part("#engine-problem").textContent = "";
    } catch (error) {
      this.#isForbidden = error.status === 401 || error.status === 403; // a key may be allowed to ask, not to look
      this.#part("#engine-problem").textContent = error.message;
      this.#before = null;
    }
  }

  #show(cache) {
    this.#map.draw(cache);
    this.#showLegend(cache.pool);
    this.#showTables(cache);
    const isTold = cache.counters !== null; // a key without the scope admin is not told what all have it do
    for (const figure of ["#throughput", "#requests"]) this.#part(figure).hidden = !isTold;
    if (isTold) this.#showWork(cache);
    else this.#before = null;
  }

  #showWork(cache) {
    const now = { seconds: performance.now() / 1000, tokens: cache.counters.computed_tokens };
    if (this.#before !== null && now.tokens >= this.#before.tokens) {
      // Counters of a new engine begin anew.
      this.#speeds.add((now.tokens - this.#before.tokens) / (now.seconds - this.#before.seconds));
    }
    this.#before = now;
    this.#running.add(cache.requests.running);
    this.#waiting.add(cache.requests.waiting);
    this.#throughput.draw(this.#speeds);
    this.#requests.draw(this.#running, this.#waiting);
  }

  #showLegend({ pages, num_pages: numPages, page_bytes: pageBytes }) {
    for (const kind of Object.keys(KINDS)) {
      this.#part(`#legend-${kind}`).textContent = pages[kind].toLocaleString("en");
    }
    const size = `${bytes(numPages * pageBytes)} in ${numPages.toLocaleString("en")} pages of ${bytes(pageBytes)}`;
    this.#part("#pool-size").textContent = size;
  }

  #showTables({ pool, adapters, num_adapters: numAdapters }) {
    if (!this.#part("#pool-details").open) return;
    const kinds = Object.entries(KINDS).map(([kind, words]) => row(words, pool.pages[kind]));
    this.#part("#pool-table tbody").replaceChildren(...kinds);
    const rows = adapters.map((adapter) => {
      const { tier, pages, uses, references, pinned } = adapter;
      return row(nameOf(adapter), tier, pages, uses ?? NOTHING, references ?? NOTHING, pinned ? "yes" : "no");
    });
    if (numAdapters > adapters.length) rows.push(row(`and ${numAdapters - adapters.length} more`));
    this.#part("#adapter-table tbody").replaceChildren(...rows);
  }
}

function row(name, ...cells) {
  const data = cells.map((cell) => element("td", {}, String(cell)));
  return element("tr", {}, element("th", { scope: "row" }, name), ...data);
}
