// Puts text on the clipboard, also where the page came over plain HTTP from another machine.

/** Whether the browser allowed it. */
export async function copy(text) {
  if (!navigator.clipboard) return copyFromField(text); // not offered without a secure connection
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

function copyFromField(text) {
  const focused = document.activeElement;
  const field = document.createElement("textarea");
  field.value = text;
  field.className = "visually-hidden";
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isCopied;
}
