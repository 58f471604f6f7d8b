// The page pool as a map: every page a cell, filled row by row; each adapter is one run of cells that tells its name.

import { element, setAttributes, shape } from "./element.js";
import { bytes, counted } from "./numbers.js";
import { keepReachable, rove } from "./roving.js";

const MAX_CELLS = 48 * 30; // a larger pool has several pages to a cell
const SHAPE = 2.75; // cells across for one down
const CELL = 10;
const NUM_NAMES = 4; // told while nothing is pointed at
const LEAST_WIDTH = 2; // of a run, so that the smallest adapter can be seen and pointed at

/** What pages hold, in the order in which they are drawn. */
export const KINDS = {
  adapter: "adapters",
  loading: "loading",
  kv: "running requests",
  cached: "kept prefixes",
  free: "free",
};

export class PageMap {
  #list;
  #svg = shape("svg", { role: "presentation" });
  #grid = shape("path", { class: "grid" });
  #caption;
  #runs = new Map(); // by digest, or by kind: the drawn group
  #reports = new Map(); // by an adapter's group: what its caption says
  #summary = "";
  #isResting = true; // nothing is pointed at

  /** `list` is where the map is drawn; `caption` tells what is pointed at. */
  constructor(list, caption) {
    this.#list = list;
    this.#caption = caption;
    setAttributes(list, { role: "listbox", "aria-label": "Adapters on the device, page by page" });
    this.#svg.append(this.#grid);
    list.append(this.#svg);
    rove(list, (group) => this.#describe(group));
  }

  /** Draws one answer of GET /v1/cache. */
  draw({ pool, adapters }) {
    const pagesPerCell = Math.ceil(pool.num_pages / MAX_CELLS);
    const numCells = Math.ceil(pool.num_pages / pagesPerCell);
    const numRows = Math.ceil(Math.sqrt(numCells / SHAPE));
    const numColumns = Math.ceil(numCells / numRows);
    setAttributes(this.#svg, { viewBox: `0 0 ${numColumns * CELL} ${numRows * CELL}` });
    const runs = runsOf(pool, adapters);
    const keys = new Set(runs.map(({ key }) => key));
    for (const key of this.#runs.keys()) if (!keys.has(key)) this.#drop(key);
    let start = 0;
    runs.forEach((run, index) => {
      const group = this.#groupOf(run.key, index);
      const cells = rectangles(start, start + run.numPages, numColumns, pagesPerCell);
      group.replaceChildren(...cells.map((each) => shape("rect", each)));
      this.#tell(group, run);
      start += run.numPages;
    });
    this.#drawGrid(numColumns, numRows);
    this.#tellAll(runs);
    keepReachable(this.#list);
  }

  /** The group of a run, at its place: those who go from one to the next by keyboard go as the eye does. */
  #groupOf(key, index) {
    if (!this.#runs.has(key)) this.#runs.set(key, shape("g"));
    const group = this.#runs.get(key);
    if (this.#svg.children[index] !== group) this.#svg.insertBefore(group, this.#svg.children[index]);
    return group;
  }

  #tell(group, { kind, label = null, report }) {
    setAttributes(group, { class: `run ${kind}`, role: label && "option", "aria-label": label });
    if (label && !group.hasAttribute("tabindex")) group.setAttribute("tabindex", "-1");
    if (report) this.#reports.set(group, report);
    if (group.matches(":focus, :hover")) this.#describe(group);
  }

  #drop(key) {
    const group = this.#runs.get(key);
    if (group.matches(":focus, :hover")) this.#describe(null);
    group.remove();
    this.#reports.delete(group);
    this.#runs.delete(key);
  }

  #drawGrid(numColumns, numRows) {
    const down = Array.from({ length: numColumns - 1 }, (_, index) => `M${(index + 1) * CELL} 0V${numRows * CELL}`);
    const across = Array.from({ length: numRows - 1 }, (_, index) => `M0 ${(index + 1) * CELL}H${numColumns * CELL}`);
    this.#grid.setAttribute("d", [...down, ...across].join(""));
  }

  /** The rest of the caption: who is on the device, while nobody is pointed at. */
  #tellAll(runs) {
    const names = runs.filter(({ name }) => name).map(({ name }) => name);
    const numMore = names.length - NUM_NAMES;
    const more = numMore > 0 ? ` and ${numMore} more` : "";
    this.#summary = names.length
      ? `On the device: ${names.slice(0, NUM_NAMES).join(", ")}${more}.`
      : "No adapter is on the device yet: the first request for one brings it.";
    if (this.#isResting) this.#describe(null);
  }

  #describe(group) {
    const report = this.#reports.get(group);
    this.#isResting = report === undefined;
    this.#caption.replaceChildren(...(report ?? [this.#summary]));
  }
}

/** What an adapter is called: its first name, or its digest where it was deleted and is still in use. */
export function nameOf({ names, digest }) {
  if (names.length === 0) return digest.slice(0, 19);
  return names.length > 1 ? `${names[0]} +${names.length - 1}` : names[0];
}

function runsOf({ pages }, adapters) {
  const onDevice = adapters.filter(({ tier, pages: numPages }) => tier === "device" && numPages > 0);
  onDevice.sort((first, second) => nameOf(first).localeCompare(nameOf(second))); // by use they would change places
  const numListed = onDevice.reduce((sum, adapter) => sum + adapter.pages, 0);
  return [
    ...onDevice.map(adapterRun),
    { key: "adapter", kind: "adapter others", numPages: Math.max(0, pages.adapter - numListed) },
    ...Object.keys(KINDS)
      .filter((kind) => kind !== "adapter")
      .map((kind) => ({ key: kind, kind, numPages: pages[kind] })),
  ].filter(({ numPages }) => numPages > 0);
}

function adapterRun(adapter) {
  const words = [
    `${counted(adapter.pages, "page")}, ${bytes(adapter.size_bytes)}`,
    adapter.uses === null ? "" : `used ${counted(adapter.uses, "time")}`, // another tenant's are not told
    adapter.references ? `${adapter.references} running` : "",
    adapter.pinned ? "pinned" : "",
  ];
  const told = words.filter(Boolean).join(" · ");
  return {
    key: adapter.digest,
    name: nameOf(adapter),
    kind: `adapter${adapter.pinned ? " is-pinned" : ""}`,
    numPages: adapter.pages,
    label: `${nameOf(adapter)}: ${told}`,
    report: [element("strong", {}, nameOf(adapter)), ` ${told}`],
  };
}

/** The cells of a run of pages: what is left of its first row, whole rows, and what it has of the last. */
function rectangles(start, end, numColumns, pagesPerCell) {
  const pagesPerRow = numColumns * pagesPerCell;
  const scale = CELL / pagesPerCell;
  const rects = [];
  for (let row = Math.floor(start / pagesPerRow); row * pagesPerRow < end; row++) {
    const left = Math.max(start - row * pagesPerRow, 0);
    const right = Math.min(end - row * pagesPerRow, pagesPerRow);
    const above = rects.at(-1);
    const width = Math.max((right - left) * scale, LEAST_WIDTH);
    if (above?.x === left * scale && above.width === width) above.height += CELL;
    else rects.push({ x: left * scale, y: row * CELL, width, height: CELL });
  }
  return rects;
}
