// What the server says of an adapter before it is uploaded: what it is and takes, or why it is refused.

import { element } from "./element.js";
import { bytes, counted, percent } from "./numbers.js";

export function reportOf(validation) {
  const { card, memory } = validation;
  const share = `${percent(memory.pool_share)} of it`;
  const rows = [
    ["It is", card.rank ? `${card.method}, rank ${card.rank}` : card.method],
    ["File", bytes(card.size_bytes)],
    ["In the page pool", `${bytes(memory.bytes)}, ${counted(memory.pages, "page")}, ${share}`],
    ["Name", nameText(validation)],
    ["Content", card.digest],
  ];
  return definitions(rows.filter(([, value]) => value));
}

/** A refusal: which part it is about, the server's words, and the code to look up. */
export function refusalOf({ message, param = null, code = null }) {
  const title = param ? `Refused because of ${param}` : "Refused";
  return element(
    "div",
    { class: "refusal" },
    element("h3", {}, title),
    element("p", { class: "message" }, message),
    ...(code ? [element("p", { class: "small" }, "Error code ", element("code", {}, code))] : []),
  );
}

function nameText({ card, name_exists: exists, is_new_version: isNew, is_stored: isStored, stored_as: storedAs }) {
  const same = isStored ? ` The same content is here as ${storedAs.join(", ")}.` : "";
  if (!card.name) return `not given yet.${same}`;
  if (!exists) return `${card.name} is free.${same}`;
  if (!isNew) return `${card.name} has this very content as its newest version; nothing would change.`;
  return `a new version of ${card.name}; requests that name another version keep it.${same}`;
}

function definitions(rows) {
  const list = element("dl", { class: "report" });
  for (const [term, text] of rows) list.append(element("dt", {}, term), element("dd", {}, text));
  return list;
}
