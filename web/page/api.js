// The server's API: the contract, and the events of a request.

import { findText, keepText } from "./session.js";

const MODEL = "/predictions/diffusion_fast";
const TOKEN = "token";

export class ServerError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = 5, isRefused = false } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter, isRefused });
  }

  // The server has not begun, so asking again draws nothing twice.
  get isBusy() {
    return this.status === 503 || this.status === 429;
  }

  // The server has jobs, and none of this id.
  get isGone() {
    return this.status === 404 && this.param === "id";
  }
}

// `python -m web` and `make page` pass the token in the address's fragment, which no request sends.
export function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return;
  keepToken(given);
  history.replaceState(null, "", location.pathname);
}

export function keepToken(token) {
  keepText(TOKEN, token);
}

export function findToken() {
  return findText(TOKEN) ?? "";
}

export async function readContract() {
  const answer = await ask(`${MODEL}/1.0/openapi.json`);
  return (await answer.json()).components.schemas.GenerationRequest;
}

// Yields the events of a stream. Uploaded images are Blobs. Aborting ends the work on the server.
export async function* draw(fields, signal) {
  const answer = await ask(MODEL, { method: "POST", body: await encodeFields({ ...fields, stream: true }), signal });
  for await (const event of readEvents(answer.body)) {
    if (event.type === "error") throw new ServerError(event.error.message, { status: event.error.code, param: event.error.param });
    yield event;
  }
}

export async function encodeFields(fields) {
  return JSON.stringify(await encodeFiles(fields));
}

// Returns a value with its files in base64. Those of controls are in objects of a list.
async function encodeFiles(value) {
  if (value instanceof Blob) return encode(value);
  if (Array.isArray(value)) return Promise.all(value.map(encodeFiles));
  if (value === null || typeof value !== "object") return value;
  const pairs = Object.entries(value).map(async ([name, each]) => [name, await encodeFiles(each)]);
  return Object.fromEntries(await Promise.all(pairs));
}

export async function ask(path, { type = "application/json", ...options } = {}) {
  const token = findToken();
  const headers = { ...(token && { Authorization: `Bearer ${token}` }), ...(options.body && { "Content-Type": type }) };
  const answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (!answer.ok) throw await readError(answer);
  return answer;
}

// Errors of the handler and of nginx have `error`. TorchServe's own have their fields at the top.
async function readError(answer) {
  const found = await answer.json().catch(() => ({}));
  const error = found.error ?? found;
  return new ServerError(error.message ?? `the server answered with status ${answer.status}`, {
    status: answer.status,
    param: error.param ?? null,
    retryAfter: Number(answer.headers.get("Retry-After")) || 5,
    isRefused: answer.status === 401 || error.type === "InvalidKeyException",
  });
}

// Yields the data of server-sent events, which includes the type. EventSource cannot send a POST.
async function* readEvents(body) {
  let held = [];
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held.push(value);
    // An event with an image comes in hundreds of chunks, which are joined once, at its end.
    if (!((held.at(-2) ?? "").slice(-1) + value).includes("\n\n")) continue;
    const blocks = held.join("").split("\n\n");
    held = [blocks.pop()];
    for (const block of blocks) {
      const line = block.split("\n").find((each) => each.startsWith("data: "));
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

async function encode(blob) {
  const reader = new FileReader();
  const done = new Promise((resolve, reject) => Object.assign(reader, { onload: resolve, onerror: () => reject(reader.error) }));
  reader.readAsDataURL(blob);
  await done;
  return reader.result.slice(reader.result.indexOf(",") + 1);
}

export function decode(text, kind) {
  const bytes = atob(text);
  const file = new Uint8Array(bytes.length);
  for (let index = 0; index < bytes.length; index += 1) file[index] = bytes.charCodeAt(index);
  return new Blob([file], { type: `image/${kind}` });
}
