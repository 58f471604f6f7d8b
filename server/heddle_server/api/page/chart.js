// A small chart of one or two histories over time, newest at the right, with the values said in words too.

import { setAttributes, shape } from "./element.js";
import { rate } from "./numbers.js";

const WIDTH = 300;
const HEIGHT = 56;

export class Chart {
  #figure;
  #capacity;
  #area = shape("polygon", { class: "area" }); // under the first line
  #lines;
  #format;

  /** `figure` has an svg and a caption with one `.value` per line; `format` writes a value for people. */
  constructor(figure, capacity, numLines, format = rate) {
    this.#figure = figure;
    this.#capacity = capacity;
    this.#format = format;
    this.#lines = Array.from({ length: numLines }, () => shape("polyline", { class: "line" }));
    const svg = figure.querySelector("svg");
    setAttributes(svg, { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    svg.append(this.#area, ...this.#lines);
  }

  draw(...histories) {
    const highest = Math.max(...histories.map((history) => history.highest), Number.MIN_VALUE);
    const values = this.#figure.querySelectorAll(".value");
    histories.forEach((history, index) => {
      this.#lines[index].setAttribute("points", this.#points(history.values, highest));
      values[index].textContent = this.#format(history.last);
    });
    this.#area.setAttribute("points", this.#under(histories[0].values, highest));
    const peak = histories[0].values.length ? `max ${this.#format(Math.max(...histories.map((h) => h.highest)))}` : "";
    this.#figure.querySelector(".peak").textContent = peak;
    const title = this.#figure.querySelector("figcaption").textContent.replace(/\s+/g, " ").trim();
    this.#figure.querySelector("svg").setAttribute("aria-label", title);
  }

  #points(values, highest) {
    const tops = values.map((value) => HEIGHT - 2 - (value / highest) * (HEIGHT - 4));
    return tops.map((top, index) => `${this.#left(index, values)},${top}`).join(" ");
  }

  #under(values, highest) {
    if (values.length === 0) return "";
    return `${this.#left(0, values)},${HEIGHT} ${this.#points(values, highest)} ${WIDTH},${HEIGHT}`;
  }

  #left(index, values) {
    return WIDTH - ((values.length - 1 - index) * WIDTH) / (this.#capacity - 1);
  }
}
