// The page at `/`: one question to the base and its adapters, side by side.
// Uses the public API only, and shows what the server says as text, never as HTML.

const CHAT_URL = "v1/chat/completions";
const MODELS_URL = "v1/models";
const ADAPTERS_URL = "v1/adapters";
const HTTP1_CONNECTIONS = 6; // what browsers open to one server over HTTP/1.1
const MAX_TICKED = 16; // a server may have hundreds of adapters: the user ticks the rest
const COPY_TEXT = "Copy as curl";
const COPIED_MS = 2000;

const askForm = document.getElementById("ask-form");
const question = document.getElementById("question");
const stopButton = document.getElementById("stop");
const askAllBox = document.getElementById("ask-all");
const cardList = document.getElementById("cards");
const cardTemplate = document.getElementById("card");
const notice = document.getElementById("notice");
const spoken = document.getElementById("spoken");
const summary = document.getElementById("summary");
const uploadForm = document.getElementById("upload-form");
const uploadButton = document.getElementById("upload-button");
const uploadResult = document.getElementById("upload-result");

const cards = new Map(); // by model name
let run = new AbortController();
let lastRun = Promise.resolve();

class Card {
  constructor(model) {
    this.name = model.id;
    this.question = null; // the one that the shown answer belongs to
    this.element = cardTemplate.content.firstElementChild.cloneNode(true);
    this.box = this.part("ticked");
    this.part("name").textContent = model.id;
    this.part("kind").textContent = model.parent === null ? "base" : "adapter";
    const copyButton = this.part("copy");
    copyButton.setAttribute("aria-label", `Copy as curl: ${model.id}`);
    copyButton.addEventListener("click", () => copy(curlCommand(this.name, this.question ?? question.value), copyButton));
    this.box.addEventListener("change", showTicks);
  }

  part(className) {
    return this.element.querySelector(`.${className}`);
  }

  show(state) {
    this.part("state").textContent = state;
  }

  clear(state = "") {
    this.question = null;
    this.part("answer").textContent = "";
    this.part("error").hidden = true;
    this.part("numbers").hidden = true;
    this.part("first-token").textContent = "–";
    this.part("speed").textContent = "–";
    this.part("source").textContent = "–";
    this.show(state);
  }

  async ask(text, signal) {
    this.question = text;
    this.show("Answering …");
    try {
      await this.stream(await post(CHAT_URL, JSON.stringify(chatRequest(this.name, text)), signal));
      speak(`${this.name}: ${this.part("answer").textContent || "an empty answer"}`);
    } catch (error) {
      if (signal.aborted) this.show("Stopped.");
      else this.fail(error);
    }
  }

  async stream({ response, sentAt }) {
    let finishReason = null;
    let hasText = false;
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      const text = choice?.delta.content;
      if (text && !hasText) {
        hasText = true;
        this.part("numbers").hidden = false;
        this.part("first-token").textContent = `${Math.round(performance.now() - sentAt)} ms`;
      }
      if (text) this.part("answer").append(text);
      finishReason = choice?.finish_reason ?? finishReason;
      if (event.heddle) this.part("source").textContent = sourceText(event.heddle);
      if (event.usage) this.part("speed").textContent = speedText(event.usage.completion_tokens, sentAt);
    }
    if (finishReason === "length") this.show("Cut off at the length limit.");
    else this.show(hasText ? "" : "An empty answer.");
  }

  fail(error) {
    this.part("error").textContent = error.message;
    this.part("error").hidden = false;
    this.show("");
    speak(`${this.name}: error. ${error.message}`);
  }
}

function chatRequest(adapter, text) {
  return {
    adapter,
    messages: [{ role: "user", content: text }],
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  };
}

function speedText(numTokens, sentAt) {
  const perSecond = numTokens / ((performance.now() - sentAt) / 1000);
  return `${perSecond < 10 ? perSecond.toFixed(1) : Math.round(perSecond)} tokens/s`;
}

function sourceText({ cache, load_ms: loadMs }) {
  if (cache === null) return "–";
  return cache === "device" ? "on the device" : `from ${cache}, ${Math.round(loadMs)} ms`;
}

function curlCommand(adapter, text) {
  const body = JSON.stringify(chatRequest(adapter, text)).replaceAll("'", String.raw`'\''`);
  return `curl -N '${new URL(CHAT_URL, document.baseURI)}' -H 'Content-Type: application/json' -d '${body}'`;
}

// Requests

async function send(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch {
    throw new Error("The server did not answer.");
  }
  if (!response.ok) throw new Error(await errorMessage(response));
  return response;
}

async function post(url, body, signal) {
  const headers = typeof body === "string" ? { "Content-Type": "application/json" } : {};
  const sentAt = performance.now();
  return { response: await send(url, { method: "POST", headers, body, signal }), sentAt };
}

async function errorMessage(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) throw new Error("The answer broke off.");
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (frame === "data: [DONE]") return;
      if (frame.startsWith("data: ")) yield JSON.parse(frame.slice("data: ".length));
    }
  }
}

// Asking

function askTicked(text) {
  run.abort();
  run = new AbortController();
  const { signal } = run;
  lastRun = lastRun.then(() => askCards(text, signal));
}

async function askCards(text, signal) {
  const ticked = tickedCards();
  spoken.replaceChildren();
  for (const card of cards.values()) card.clear(card.box.checked ? "Waiting for its turn …" : "");
  showTicks();
  if (!ticked.length) notice.textContent = "Tick at least one model.";
  stopButton.disabled = false;
  // As many at once as the browser really sends, so that no card counts another one's time.
  const numAtOnce = Math.min(ticked.length, connectionLimit());
  const askInTurn = async () => {
    for (let card = ticked.shift(); card; card = ticked.shift()) await card.ask(text, signal);
  };
  await Promise.all(Array.from({ length: numAtOnce }, askInTurn));
  if (document.activeElement === stopButton) question.focus();
  stopButton.disabled = true;
}

function connectionLimit() {
  const protocol = performance.getEntriesByType("navigation")[0]?.nextHopProtocol;
  return ["h2", "h3"].includes(protocol) ? Infinity : HTTP1_CONNECTIONS;
}

function tickedCards() {
  return [...cards.values()].filter((card) => card.box.checked);
}

function showTicks() {
  const numTicked = tickedCards().length;
  askAllBox.checked = numTicked > 0 && numTicked === cards.size;
  askAllBox.indeterminate = numTicked > 0 && numTicked < cards.size;
  notice.textContent =
    numTicked > connectionLimit()
      ? `Browsers send ${HTTP1_CONNECTIONS} requests to a server at a time; the other cards wait for their turn.`
      : "";
}

function speak(text) {
  const line = document.createElement("p");
  line.textContent = text;
  spoken.append(line);
}

// Models

async function showModels() {
  try {
    const { data } = await (await send(MODELS_URL)).json();
    reconcile(data);
    const numAdapters = data.length - 1;
    summary.textContent = `${data[0].id} with ${numAdapters || "no"} adapter${numAdapters === 1 ? "" : "s"}`;
    showTicks();
  } catch (error) {
    notice.textContent = error.message;
  }
}

function reconcile(models) {
  const names = new Set(models.map((model) => model.id));
  for (const [name, card] of cards) {
    if (names.has(name)) continue;
    card.element.remove();
    cards.delete(name);
  }
  models.forEach((model, index) => {
    if (cards.has(model.id)) return;
    const card = new Card(model);
    card.box.checked = tickedCards().length < MAX_TICKED;
    cards.set(model.id, card);
    cardList.insertBefore(card.element, cardList.children[index] ?? null);
  });
}

async function upload() {
  uploadButton.disabled = true;
  uploadResult.className = "";
  uploadResult.textContent = "Uploading …";
  try {
    const { response } = await post(ADAPTERS_URL, new FormData(uploadForm));
    const adapter = await response.json();
    uploadForm.reset();
    await showModels();
    uploadResult.textContent = `${adapter.name} is ready to be asked (version ${adapter.version}).`;
  } catch (error) {
    uploadResult.className = "error";
    uploadResult.textContent = error.message;
  } finally {
    uploadButton.disabled = false;
  }
}

// Copying

async function copy(text, button) {
  const isCopied = await copied(text);
  button.textContent = isCopied ? "Copied" : "Not copied";
  speak(isCopied ? "Copied." : "The browser did not allow copying.");
  setTimeout(() => (button.textContent = COPY_TEXT), COPIED_MS);
}

async function copied(text) {
  if (!navigator.clipboard) return copiedFromField(text); // not offered to a page that came over plain HTTP
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

function copiedFromField(text) {
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

askForm.addEventListener("submit", (event) => {
  event.preventDefault();
  askTicked(question.value);
});
uploadForm.addEventListener("submit", (event) => {
  event.preventDefault();
  upload();
});
stopButton.addEventListener("click", () => run.abort());
askAllBox.addEventListener("change", () => {
  for (const card of cards.values()) card.box.checked = askAllBox.checked;
  showTicks();
});
window.addEventListener("focus", showModels); // adapters may have come by curl meanwhile
showModels();
