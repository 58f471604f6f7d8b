// Light or dark: as the system has it, until somebody chooses. Loaded first, so that nothing is drawn twice.

const STORED = "heddle-theme";
const THEMES = ["system", "light", "dark"];

const root = document.documentElement;

function storedTheme() {
  try {
    return localStorage.getItem(STORED);
  } catch {
    return null; // storage may be forbidden; the choice then lasts as long as the page
  }
}

function choose(theme) {
  root.dataset.theme = THEMES.includes(theme) ? theme : THEMES[0];
  try {
    localStorage.setItem(STORED, root.dataset.theme);
  } catch {
    // as above
  }
}

/** Lets a select show and change the theme. */
export function offerThemes(select) {
  select.value = root.dataset.theme;
  select.addEventListener("change", () => choose(select.value));
}

choose(storedTheme());
