// heddle's API as this page uses it. What goes wrong becomes an `ApiError` with the server's own words.

import { authorization, tellRefused } from "./api_key.js";

export const CHAT = "v1/chat/completions";
export const MODELS = "v1/models";
export const ADAPTERS = "v1/adapters";
export const VALIDATE = "v1/adapters/validate";
export const CACHE = "v1/cache";

export const BASE = "base"; // what the base answers to, whatever it is called

const UNAUTHORIZED = 401;
const NO_ANSWER = "The server did not answer. Is it still running?";

class ApiError extends Error {
  /** `status` is 0 where no answer came; `param` and `code` are null where the server names none. */
  constructor(message, status, { param = null, code = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

/** The JSON at a path; parameters of null are left out. */
export async function getJson(path, parameters = {}, signal = undefined) {
  const given = Object.entries(parameters).filter(([, value]) => value !== null);
  const query = given.length ? `?${new URLSearchParams(given)}` : "";
  return (await send(path + query, { signal })).json();
}

/** The card that an adapter's reference means. */
export function getAdapter(reference, signal = undefined) {
  return getJson(`${ADAPTERS}/${reference.split("/").map(encodeURIComponent).join("/")}`, {}, signal);
}

/** The response to a JSON body, as soon as its head is there. */
export function postJson(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return send(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

/** The JSON that answers a form. `onProgress` gets the share sent so far, which `fetch` cannot tell. */
export function postForm(path, form, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    request.responseType = "json";
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", ({ loaded, total }) => onProgress(total ? loaded / total : 1));
    request.addEventListener("load", () => {
      if (request.status < 300 && request.response !== null) resolve(request.response);
      else reject(errorOf(request.status, request.response));
    });
    request.addEventListener("error", () => reject(new ApiError(NO_ANSWER, 0)));
    request.addEventListener("abort", () => reject(signal.reason));
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

async function send(path, { headers = {}, ...options }) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers, ...authorization() } });
  } catch (error) {
    throw options.signal?.aborted ? error : new ApiError(NO_ANSWER, 0);
  }
  if (!response.ok) throw errorOf(response.status, await response.json().catch(() => null));
  return response;
}

/** The error in OpenAI's envelope, whether it came as an answer or as an event of a stream. */
export function errorOf(status, content) {
  const { message, ...rest } = content?.error ?? { message: `The server answered with status ${status}.` };
  if (status === UNAUTHORIZED) tellRefused(message);
  return new ApiError(message, status, rest);
}
