// What the server says of an adapter before it is uploaded: what it is and takes, or why it is refused.

import { definitions, factsOf } from "./adapter_facts.js";
import { element } from "./element.js";

export function reportOf(validation) {
  const { card, memory } = validation;
  return definitions([
    ...factsOf(card, memory.pool_share),
    ["Name", nameText(validation)],
    ["Content", card.digest],
  ]);
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
