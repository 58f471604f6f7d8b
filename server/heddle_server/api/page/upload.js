// Uploading an adapter: dropped or chosen, tried first, then sent and ready to be asked.

import { ADAPTERS, VALIDATE, postForm } from "./api.js";
import { CONFIG, WEIGHTS, adapterFiles, filesOfDrop, filesOfField } from "./dropped_files.js";
import { percent } from "./numbers.js";
import { refusalOf, reportOf } from "./validation_report.js";

const NOT_IN_A_NAME = /[^A-Za-z0-9._-]+/g;

export class UploadDialog {
  #dialog;
  #onUploaded;
  #files = null; // {config, weights}
  #sending = new AbortController();

  /** `onUploaded` gets the card of each adapter that was stored. */
  constructor(dialog, onUploaded) {
    this.#dialog = dialog;
    this.#onUploaded = onUploaded;
    this.#part("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#upload();
    });
    this.#name.addEventListener("change", () => this.#validate());
    this.#part(".close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => this.#sending.abort());
  }

  /** Takes files from a drop on `zone` and from the fields of a file dialog. */
  offer(zone, fields) {
    zone.addEventListener("dragover", (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      document.documentElement.classList.add("dropping");
    });
    zone.addEventListener("dragleave", ({ relatedTarget }) => {
      if (relatedTarget === null) document.documentElement.classList.remove("dropping");
    });
    zone.addEventListener("drop", (event) => {
      document.documentElement.classList.remove("dropping");
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      this.#open(filesOfDrop(event.dataTransfer));
    });
    for (const field of fields) {
      field.addEventListener("change", () => {
        if (field.files.length) this.#open(filesOfField(field));
        field.value = ""; // the same files can be chosen again
      });
    }
  }

  get #name() {
    return this.#part("[name=name]");
  }

  #part(selector) {
    return this.#dialog.querySelector(selector);
  }

  async #open(given) {
    const { files, folder } = await given;
    this.#name.value = folder.replaceAll(NOT_IN_A_NAME, "-");
    this.#files = null;
    this.#show("");
    this.#allow(false);
    if (!this.#dialog.open) this.#dialog.showModal();
    try {
      this.#files = adapterFiles(files);
    } catch (error) {
      this.#show("Nothing to upload", refusalOf(error));
      return;
    }
    await this.#validate();
    if (!this.#name.value) this.#name.focus();
  }

  async #validate() {
    if (this.#files === null) return;
    this.#allow(false);
    const validation = await this.#send(VALIDATE, "Checking");
    if (validation === null) return;
    this.#show("This adapter fits the base", reportOf(validation));
    this.#allow(true);
  }

  async #upload() {
    this.#allow(false);
    const card = await this.#send(ADAPTERS, "Uploading");
    if (card === null) return;
    this.#dialog.close();
    this.#onUploaded(card);
  }

  /** The server's answer, or null where it refused (which is shown) or where something newer is sent. */
  async #send(path, doing) {
    this.#sending.abort();
    this.#sending = new AbortController();
    const { signal } = this.#sending;
    const form = new FormData();
    if (this.#name.value) form.append("name", this.#name.value.trim());
    form.append(CONFIG, this.#files.config);
    form.append(WEIGHTS, this.#files.weights);
    this.#show(`${doing} …`);
    try {
      return await postForm(path, form, (share) => this.#progress(doing, share), signal);
    } catch (error) {
      if (!signal.aborted) this.#show("This adapter cannot be served", refusalOf(error));
      return null;
    } finally {
      if (!signal.aborted) this.#part("progress").hidden = true;
    }
  }

  #progress(doing, share) {
    const bar = this.#part("progress");
    bar.hidden = false;
    bar.value = share;
    this.#part(".state").textContent = share < 1 ? `${doing}: ${percent(share)} sent` : `${doing}: all sent`;
  }

  #show(state, ...report) {
    this.#part(".state").textContent = state;
    this.#part(".findings").replaceChildren(...report);
  }

  #allow(canUpload) {
    this.#part("[type=submit]").disabled = !canUpload;
  }
}
