// What is told of an adapter in a line: where it is, method and rank, version, and what is said about it.

import { element } from "./element.js";

const TIERS = {
  device: "on the device: starts at once",
  host: "in host memory: a short load before its first token",
  disk: "on disk: a load before its first token",
};

export function badgesOf(card) {
  const { method, rank, version, tier, status, reason, pinned, tags } = card;
  return [
    badge(tier, `tier ${tier}`, TIERS[tier]),
    badge(rank ? `${method} r${rank}` : method, "method"),
    badge(`v${version}`, "version"),
    ...(status === "ready" ? [] : [badge(status, "status", reason)]),
    ...(pinned ? [badge("pinned", "pinned", "stays on the device")] : []),
    ...tags.map((tag) => badge(tag, "tag")),
  ];
}

function badge(text, kind, title = null) {
  return element("span", { class: `badge ${kind}`, title }, text);
}
