// A request as a command or a program, quoted so that any text in it arrives as it was typed.

import { CHAT } from "./api.js";
import { hasKey } from "./api_key.js";

const KEY_VARIABLE = "HEDDLE_API_KEY"; // the key itself stays out of what is copied
const UNKNOWN_TO_OPENAI = new Set(["min_p"]); // the Python client takes these in `extra_body` only
const INDENT = "    ";

export const LANGUAGES = { curl: curlText, Python: pythonText, JavaScript: javaScriptText };

function curlText(request) {
  const words = [`curl -N ${shellQuoted(address(CHAT))}`, `-H 'Content-Type: application/json'`];
  if (hasKey()) words.push(`-H "Authorization: Bearer $${KEY_VARIABLE}"`);
  words.push(`-d ${shellQuoted(JSON.stringify(request, null, 2))}`);
  return `${words.join(" \\\n  ")}\n`;
}

function pythonText(request) {
  const fields = Object.entries(request);
  const known = fields.filter(([name]) => !UNKNOWN_TO_OPENAI.has(name));
  const extra = fields.filter(([name]) => UNKNOWN_TO_OPENAI.has(name));
  if (extra.length) known.push(["extra_body", Object.fromEntries(extra)]);
  const argumentLines = known.map(([name, value]) => `${INDENT}${name}=${pythonLiteral(value, INDENT)},\n`).join("");
  const key = hasKey() ? `os.environ["${KEY_VARIABLE}"]` : '"none"';
  return `${hasKey() ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(address("v1"))}, api_key=${key})
stream = client.chat.completions.create(
${argumentLines})
for chunk in stream:
    if chunk.choices and chunk.choices[0].delta.content:
        print(chunk.choices[0].delta.content, end="", flush=True)
print()
`;
}

function javaScriptText(request) {
  const key = hasKey() ? `process.env.${KEY_VARIABLE}` : '"none"';
  return `import OpenAI from "openai";

const client = new OpenAI({ baseURL: ${JSON.stringify(address("v1"))}, apiKey: ${key} });
const stream = await client.chat.completions.create(${JSON.stringify(request, null, 2)});
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");
}
console.log();
`;
}

function address(path) {
  return new URL(path, document.baseURI).href;
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", String.raw`'\''`)}'`;
}

/** JSON's strings and numbers are Python's too; its words and brackets are not quite. */
function pythonLiteral(value, indent) {
  const inner = indent + INDENT;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const lines = Array.isArray(value)
    ? value.map((each) => pythonLiteral(each, inner))
    : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${pythonLiteral(each, inner)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  if (lines.length === 0) return open + close;
  return `${open}\n${lines.map((line) => `${inner}${line},\n`).join("")}${indent}${close}`;
}
