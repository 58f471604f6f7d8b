// The playground at `/`: puts its parts together. It uses the public API only.

import { ADAPTERS, BASE, MODELS, getJson } from "./api.js";
import { keyEvents } from "./api_key.js";
import { element } from "./element.js";
import { EngineView } from "./engine_view.js";
import { offerKeyForm } from "./key_form.js";
import { counted } from "./numbers.js";
import { Panes } from "./panes.js";
import { Parameters } from "./parameters.js";
import { offerThemes } from "./theme.js";
import { UploadDialog } from "./upload.js";

const NUM_FIRST_ADAPTERS = 2; // beside the base, when the page opens

const RETRY_MS = 2000; // while the server starts, or is away
const REFUSALS = [401, 403]; // another key may help; asking again does not
const QUANTIZATIONS = { nf4: "4 bit (NF4)", fp4: "4 bit (FP4)", int8: "8 bit" };

const form = byId("ask-form");
const question = byId("question");
const notice = byId("notice");
const spoken = byId("spoken");
const engine = new EngineView(byId("engine"));

const page = {
  baseName: "The base",
  parameters: new Parameters(byId("parameters")),
  question: () => question.value,
  onReply: (line, reply) => {
    speak(line);
    engine.addLatency(reply);
  },
  onFailure: speak,
};
const panes = new Panes(byId("panes"), byId("pane-template"), page, showState);
const uploadDialog = new UploadDialog(byId("upload-dialog"), showUploaded);

function byId(id) {
  return document.getElementById(id);
}

function ask() {
  if (panes.isEmpty) return;
  page.parameters.clearErrors();
  spoken.replaceChildren();
  panes.ask(question.value);
  question.select();
}

/** Finished answers and failures, for those who listen; nothing is said token by token. */
function speak(line) {
  spoken.append(element("p", {}, line));
}

function showState() {
  byId("stop").disabled = !panes.areAnswering;
  byId("ask").disabled = panes.isEmpty;
  byId("add-pane").disabled = panes.areFull;
}

function showUploaded(card) {
  panes.add(card);
  notice.textContent = `${card.reference} is uploaded: ask it now.`;
  question.focus();
}

async function showSummary() {
  const base = await getJson(`${MODELS}/${BASE}`);
  page.baseName = base.root;
  const context = base.max_model_len === null ? "" : `${counted(base.max_model_len, "token")} of context`;
  byId("summary").textContent = [base.root, QUANTIZATIONS[base.quantization], context].filter(Boolean).join(" · ");
}

/** The base, and the first adapters; a key may be allowed to ask, and not to look at adapters. */
async function start() {
  notice.textContent = "";
  try {
    await showSummary();
    if (!panes.isEmpty) return;
    panes.add(null);
    const { data } = await getJson(ADAPTERS, { limit: NUM_FIRST_ADAPTERS });
    for (const card of data) panes.add(card);
  } catch (error) {
    notice.textContent = error.message;
    if (!REFUSALS.includes(error.status)) setTimeout(start, RETRY_MS);
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && panes.areAnswering) panes.stop();
});
byId("stop").addEventListener("click", () => {
  panes.stop();
  question.focus();
});
byId("new-chat").addEventListener("click", () => {
  panes.clear();
  question.focus();
});
byId("add-pane").addEventListener("click", () => panes.add(null));
keyEvents.addEventListener("changed", start);

offerThemes(byId("theme"));
offerKeyForm(byId("key-form"), byId("change-key"));
uploadDialog.offer(document, [byId("upload-files"), byId("upload-folder")]);
showState();
start();
engine.watch();
