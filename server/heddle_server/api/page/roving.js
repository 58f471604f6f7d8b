// One tab stop for many things: arrow keys move among them, as among the options of a list.

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

/** The children of `list` with role "option"; `onVisit` gets the one that has the focus or the pointer, or null. */
export function rove(list, onVisit) {
  const options = () => [...list.querySelectorAll('[role="option"]')];

  list.addEventListener("keydown", (event) => {
    const all = options();
    const index = all.indexOf(document.activeElement);
    const last = all.length - 1;
    const next = { Home: 0, End: last }[event.key] ?? index + STEPS[event.key];
    if (index < 0 || Number.isNaN(next)) return;
    event.preventDefault();
    all[Math.min(Math.max(next, 0), last)].focus();
  });
  list.addEventListener("focusin", ({ target }) => {
    for (const option of options()) option.setAttribute("tabindex", option === target ? "0" : "-1");
    onVisit(target);
  });
  list.addEventListener("focusout", () => onVisit(null));
  list.addEventListener("pointerover", ({ target }) => onVisit(target.closest('[role="option"]')));
  list.addEventListener("pointerleave", () => onVisit(list.querySelector('[role="option"]:focus')));
}

/** Sees to it that one of the options can be reached by the tab key. */
export function keepReachable(list) {
  if (list.querySelector('[role="option"][tabindex="0"]')) return;
  list.querySelector('[role="option"]')?.setAttribute("tabindex", "0");
}
