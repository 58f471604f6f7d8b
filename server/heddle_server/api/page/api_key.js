// The key that the server wants, if it wants one: kept until the tab is closed, and never part of an address.

const STORED = "heddle-api-key";

let key = read();

/** Tells "refused" (with the server's message) and "changed". */
export const keyEvents = new EventTarget();

export function hasKey() {
  return key !== "";
}

export function useKey(newKey) {
  key = newKey;
  try {
    sessionStorage.setItem(STORED, key);
  } catch {
    // forbidden by the browser: the key then lasts as long as the page
  }
  keyEvents.dispatchEvent(new Event("changed"));
}

export function authorization() {
  return hasKey() ? { authorization: `Bearer ${key}` } : {};
}

export function tellRefused(message) {
  keyEvents.dispatchEvent(new CustomEvent("refused", { detail: message }));
}

function read() {
  try {
    return sessionStorage.getItem(STORED) ?? "";
  } catch {
    return "";
  }
}
