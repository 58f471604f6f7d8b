// An answer's tokens, coloured by how likely the model held them, and what it might have said instead.

import { element } from "./element.js";
import { percent } from "./numbers.js";
import { keepReachable, rove } from "./roving.js";

export const NUM_ALTERNATIVES = 5;
const LEAST_PROBABILITY = [0.9, 0.6, 0.3, 0.1, 0]; // of each colour, from sure to unlikely

/** The list of tokens; `inspector` shows the one that is pointed at, or reached by the arrow keys. */
export function heatView(tokens, inspector) {
  const list = element("div", { class: "tokens", role: "listbox", "aria-label": "Tokens of the reply" });
  const entries = new Map();
  for (const entry of tokens) {
    const option = tokenOption(entry);
    entries.set(option, entry);
    list.append(option);
  }
  rove(list, (option) => inspector.replaceChildren(...(option === null ? legend() : details(entries.get(option)))));
  keepReachable(list);
  inspector.replaceChildren(...legend());
  return list;
}

function tokenOption(entry) {
  const heat = LEAST_PROBABILITY.findIndex((least) => Math.exp(entry.logprob) >= least);
  const attributes = { class: "token", role: "option", tabindex: "-1", "data-heat": heat, "aria-label": spoken(entry) };
  return element("span", attributes, entry.token);
}

function spoken({ token, logprob, top_logprobs: top }) {
  const others = top.filter((other) => other.token !== token).map((other) => `${visible(other.token)} ${share(other)}`);
  const instead = others.length ? `; instead: ${others.join(", ")}` : "";
  return `${visible(token)}, ${percent(Math.exp(logprob))}${instead}`;
}

/** The alternatives as bars; the token that was chosen is among them, or stands before them. */
function details({ token, logprob, top_logprobs: top }) {
  const isAmongThem = top.some((other) => other.token === token);
  const rows = isAmongThem ? top : [{ token, logprob }, ...top];
  return rows.map((row) => {
    const bar = element("span", { class: "share" });
    bar.style.setProperty("--share", Math.exp(row.logprob));
    const kind = row.token === token ? "alternative taken" : "alternative";
    return element("span", { class: kind }, element("code", {}, visible(row.token)), bar, share(row));
  });
}

/** What the colours mean, while no token is looked at. */
function legend() {
  const colours = LEAST_PROBABILITY.map((least, heat) => {
    const words = least ? `${least * 100} % and more` : "less";
    return element("li", {}, element("span", { class: "token", "data-heat": heat }, words));
  });
  const hint = element("p", {}, "How likely each token was. Point at one, or use the arrow keys, for what else was.");
  return [hint, element("ul", { class: "heat-legend" }, ...colours)];
}

function share({ logprob }) {
  return percent(Math.exp(logprob));
}

/** A token with its blanks to be seen. */
function visible(token) {
  return token.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "(end)";
}
