// Numbers as people read them.

export const NOTHING = "–";

const KIB = 1024;

/** 0 ms, 7.3 ms, 182 ms, 1.4 s. */
export function milliseconds(amount) {
  if (amount === null) return NOTHING;
  if (amount >= 1000) return `${(amount / 1000).toFixed(1)} s`;
  return `${amount > 0 && amount < 10 ? amount.toFixed(1) : Math.round(amount)} ms`;
}

/** 0, 4.2, 96, 1,204: with a decimal only where it says something. */
export function rate(amount) {
  if (amount === null) return NOTHING;
  return amount > 0 && amount < 10 ? amount.toFixed(1) : Math.round(amount).toLocaleString("en");
}

/** 640 B, 641 KiB, 1.2 GiB. */
export function bytes(amount) {
  if (amount === null) return NOTHING;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log(Math.max(amount, 1)) / Math.log(KIB)));
  const scaled = amount / KIB ** power;
  return `${scaled < 10 && power > 0 ? scaled.toFixed(1) : Math.round(scaled)} ${units[power]}`;
}

/** 98.2 %, 0.04 %, < 0.01 %. */
export function percent(share) {
  const amount = share * 100;
  if (amount > 0 && amount < 0.01) return "< 0.01 %";
  return `${amount < 1 ? amount.toFixed(2) : amount.toFixed(1)} %`;
}

/** 1 page, 3 pages. */
export function counted(amount, noun) {
  return `${amount.toLocaleString("en")} ${noun}${amount === 1 ? "" : "s"}`;
}
