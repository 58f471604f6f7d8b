// The field for the API key: it appears when the server asks for one, and stays away where none is needed.

import { keyEvents, hasKey, useKey } from "./api_key.js";

/** `button` shows the form again, once there is a key to change. */
export function offerKeyForm(form, button) {
  const field = form.querySelector("input");
  const reason = form.querySelector(".reason");

  function show(text) {
    reason.textContent = text;
    if (!form.hidden) return;
    form.hidden = false;
    field.focus();
  }

  keyEvents.addEventListener("refused", ({ detail }) => {
    show(hasKey() ? `This key was not accepted: ${detail}` : detail);
  });
  button.addEventListener("click", () => show(""));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.hidden = true;
    button.hidden = false;
    useKey(field.value.trim());
    field.value = "";
  });
  button.hidden = !hasKey();
}
