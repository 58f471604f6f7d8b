// An adapter's two files out of what somebody dropped or chose: a folder as PEFT saves it, or the files themselves.

export const CONFIG = "adapter_config.json";
export const WEIGHTS = "adapter_model.safetensors";

const PICKLES = /\.(bin|pt|pth|ckpt)$/;
const MAX_SHOWN = 8;

/** What a drop holds: {files, folder}, with the folder's name or "". Read within the event, as browsers want it. */
export function filesOfDrop(transfer) {
  const items = [...transfer.items].filter((item) => item.kind === "file");
  const folder = items.map((item) => item.webkitGetAsEntry()).find((entry) => entry?.isDirectory);
  if (folder) return filesOfFolder(folder);
  return Promise.resolve({ files: items.map((item) => item.getAsFile()), folder: "" });
}

/** The same for a file dialog. */
export function filesOfField(field) {
  const files = [...field.files];
  return { files, folder: files[0]?.webkitRelativePath.split("/").at(-2) ?? "" };
}

/** The adapter's two files; throws what is missing, in words that say what to do. */
export function adapterFiles(files) {
  const config = files.find((file) => file.name === CONFIG);
  const weights = files.find((file) => file.name === WEIGHTS);
  if (config && weights) return { config, weights };
  const missing = [...(config ? [] : [CONFIG]), ...(weights ? [] : [WEIGHTS])];
  const verb = missing.length > 1 ? "are" : "is";
  throw new Error(`${foundText(files)} ${missing.join(" and ")} ${verb} missing. ${advice(files)}`);
}

function foundText(files) {
  const names = files.slice(0, MAX_SHOWN).map((file) => file.name);
  const numMore = files.length - names.length;
  return names.length ? `Found ${names.join(", ")}${numMore ? ` and ${numMore} more` : ""}.` : "Found no files.";
}

function advice(files) {
  if (files.some((file) => PICKLES.test(file.name))) {
    return "Only safetensors are taken: save them with PEFT's save_pretrained(..., safe_serialization=True).";
  }
  return "Drop the folder that PEFT's save_pretrained wrote, or both files together.";
}

async function filesOfFolder(folder) {
  const reader = folder.createReader();
  const entries = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) break; // a reader gives at most a hundred at a time
    entries.push(...some);
  }
  const files = entries.filter((entry) => entry.isFile).map((entry) => new Promise(entry.file.bind(entry)));
  return { files: await Promise.all(files), folder: folder.name };
}
