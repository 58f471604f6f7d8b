// The drawer of sampling parameters: what is in a request beside the conversation.

import { setAttributes } from "./element.js";

const NUMBERS = [
  "temperature",
  "top_p",
  "min_p",
  "max_completion_tokens",
  "seed",
  "frequency_penalty",
  "presence_penalty",
];
const SCHEMA = "response_format";
const SCHEMA_NAME = "answer";

export class Parameters {
  #drawer;
  #fields; // by the name that the API knows them under

  constructor(drawer) {
    this.#drawer = drawer;
    this.#fields = new Map([...drawer.querySelectorAll("[name]")].map((field) => [field.name, field]));
    this.#fields.get(SCHEMA).addEventListener("input", () => this.#checkSchema());
    drawer.addEventListener("input", ({ target }) => {
      if (target.name !== SCHEMA) this.#complain(target, "");
      this.#summarize();
    });
    // A browser cannot point at a field that is folded away.
    drawer.addEventListener("invalid", () => (drawer.open = true), { capture: true });
    this.#summarize();
  }

  /** Fields of a request; what is left empty is not sent. */
  fields() {
    const numbers = NUMBERS.filter((name) => this.#text(name)).map((name) => [name, Number(this.#text(name))]);
    const stop = this.#text("stop").split("\n").filter(Boolean);
    const schema = this.#text(SCHEMA).trim();
    const isSchema = schema !== "" && problemOf(schema) === ""; // asking is refused otherwise; copying goes on without
    return {
      ...Object.fromEntries(numbers),
      ...(stop.length ? { stop } : {}),
      ...(isSchema ? { [SCHEMA]: schemaFormat(JSON.parse(schema)) } : {}),
    };
  }

  /** What stands before the conversation. */
  systemMessages() {
    const content = this.#text("system").trim();
    return content ? [{ role: "system", content }] : [];
  }

  clearErrors() {
    for (const field of this.#fields.values()) if (field.name !== SCHEMA) this.#complain(field, "");
    this.#checkSchema();
  }

  /** Shows a server's error at the field it names; false where there is no such field. */
  showError({ param, message }) {
    const field = this.#fields.get(param?.split(/[.[]/)[0]);
    if (field === undefined) return false;
    this.#drawer.open = true;
    this.#complain(field, message);
    return true;
  }

  #text(name) {
    return this.#fields.get(name).value;
  }

  #checkSchema() {
    const field = this.#fields.get(SCHEMA);
    const problem = problemOf(field.value.trim());
    field.setCustomValidity(problem);
    this.#complain(field, problem);
  }

  #complain(field, message) {
    const line = this.#drawer.querySelector(`#${field.getAttribute("aria-describedby")}`);
    line.textContent = message;
    setAttributes(field, { "aria-invalid": message ? "true" : null });
  }

  #summarize() {
    const shown = [
      `temperature ${this.#text("temperature") || "of the server"}`,
      this.#text("seed") ? `seed ${this.#text("seed")}` : "",
      this.#text("max_completion_tokens") ? `at most ${this.#text("max_completion_tokens")} tokens` : "",
      this.#text(SCHEMA).trim() ? "JSON by a schema" : "",
    ];
    this.#drawer.querySelector(".summary").textContent = shown.filter(Boolean).join(" · ");
  }
}

function problemOf(text) {
  if (!text) return "";
  try {
    const schema = JSON.parse(text);
    const isSchema = typeof schema === "object" && schema !== null && !Array.isArray(schema);
    return isSchema ? "" : 'A JSON schema is an object, as {"type": "object"}.';
  } catch (error) {
    return `This is not JSON yet: ${error.message}`;
  }
}

function schemaFormat(schema) {
  return { type: "json_schema", json_schema: { name: SCHEMA_NAME, strict: true, schema } };
}
