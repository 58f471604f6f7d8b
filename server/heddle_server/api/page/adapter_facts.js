// What an adapter is, changes and costs, as its card says it: terms, each with one line or several.

import { element } from "./element.js";
import { bytes, counted, percent } from "./numbers.js";

const ALL_TOKENS = "all tokens";

/** Of a card, what comes from its files: [term, line, ...]. `share` is the part of the pool, where that is known. */
export function factsOf(card, share = null) {
  const { method, rank, sites, positions, num_virtual_tokens: numTokens } = card;
  const facts = [
    ["Method", rank ? `${method}, rank ${rank}` : method],
    ["Changes", ...linesOf(sites)],
    ...(positions === ALL_TOKENS ? [] : [["Acts on", positions]]),
    ...(numTokens ? [["Tokens", `puts ${counted(numTokens, "token")} before every prompt`]] : []),
    ["File", bytes(card.size_bytes)],
    ["Page pool", costOf(card, share)],
  ];
  return facts.filter(([, line]) => line);
}

/** A list of terms and what stands beside each. */
export function definitions(rows) {
  const list = element("dl", { class: "report" });
  for (const [term, ...lines] of rows) {
    list.append(element("dt", {}, term), ...lines.map((line) => element("dd", {}, line)));
  }
  return list;
}

function costOf({ pool_bytes_estimate: numBytes, pool_pages: numPages }, share) {
  if (numBytes === null) return null;
  const ofPool = share === null ? "" : `, ${percent(share)} of it`;
  return `${counted(numBytes, "byte")}: ${counted(numPages, "page")}${ofPool}`;
}

/** Modules in one place that are equally many share a line: model.layers.*.mlp.{up_proj,down_proj}, 24 each. */
function linesOf(sites) {
  const lines = new Map();
  for (const [pattern, count] of Object.entries(sites)) {
    const end = pattern.lastIndexOf(".") + 1;
    const place = end ? pattern.slice(0, end) : pattern;
    const key = `${count} ${place}`;
    if (!lines.has(key)) lines.set(key, { place, count, names: [] });
    lines.get(key).names.push(end ? pattern.slice(end) : "");
  }
  return [...lines.values()].map(({ place, count, names }) => {
    const number = count > 1 ? `, ${count.toLocaleString("en")}${names.length > 1 ? " each" : ""}` : "";
    return place + (names.length > 1 ? `{${names.join(",")}}` : names[0]) + number;
  });
}
