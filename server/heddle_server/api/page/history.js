// The last values of a number, as many as a chart shows.

export class History {
  #capacity;
  values = [];

  constructor(capacity) {
    this.#capacity = capacity;
  }

  add(value) {
    this.values.push(value);
    if (this.values.length > this.#capacity) this.values.shift();
  }

  get last() {
    return this.values.at(-1) ?? null;
  }

  get highest() {
    return this.values.length ? Math.max(...this.values) : 0;
  }
}
