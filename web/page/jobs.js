// Orders: requests that the server keeps as jobs (docs/jobs.md), so that they outlive the page. This browser remembers
// each in localStorage, which its tabs share, and its uploads in IndexedDB, until its images are in the gallery.

import { ask, encodeFields, findToken, ServerError } from "./api.js";
import { openStore } from "./database.js";

const PREFIX = "order-"; // of the names in localStorage
const FIND_SECONDS = 10; // then the server has no jobs
const ANSWER_SECONDS = 30;
const FILE_SECONDS = 600; // of an upload or an image
const PREVIEW_SECONDS = 3;
const HIDDEN_SECONDS = 10; // between two questions of a tab in the background: nginx limits the requests of an address
const MAX_AGE = 30 * 86_400e3; // ms; an order of another API key that never came back
const openUploads = openStore("orders", "uploads");

export class Orders {
  #known = new Set(); // the ids of the jobs that the server has listed for this API key
  #owner = ""; // the API key's digest
  #sending = new WeakMap(); // the requests on their way, by order
  #cancelling = new Set();
  #round = null;
  #seconds = 0; // until the next question

  isFound = false; // the server takes jobs

  // Asks whether the server takes jobs, again after the API key has changed.
  async find() {
    this.#owner = await digest(findToken());
    readOrders().filter(({ made }) => made < Date.now() - MAX_AGE).forEach((order) => this.remove(order));
    try {
      await this.#readJobs(FIND_SECONDS);
      this.isFound = true;
    } catch (error) {
      if (error.status !== 429) return;
      await pause(error.retryAfter);
      await this.find();
    }
  }

  make(fields) {
    const uploads = Object.keys(fields).filter((name) => fields[name] instanceof Blob);
    return { id: makeId(), owner: this.#owner, made: Date.now(), fields, uploads };
  }

  // Returns the orders in this browser that belong to the API key, the oldest first.
  list() {
    const own = readOrders().filter(({ id, owner }) => owner === this.#owner || this.#known.has(id));
    own.filter(({ id, isCancelled }) => isCancelled && !this.#cancelling.has(id)).forEach((order) => this.cancel(order));
    return own.filter(({ isCancelled }) => !isCancelled).sort((one, other) => one.made - other.made);
  }

  // Yields the events of `draw`, and: `away` when the server does not answer, `left` when the order is not this tab's any
  // more. Aborting only ends the questions.
  async *follow(order, signal) {
    const isWhole = await restoreUploads(order);
    signal.throwIfAborted();
    if (!order.isKept) this.#keep(order);
    if (!order.isAccepted && isWhole) yield* this.#send(order, signal);
    const preview = { step: null, at: 0 };
    for (let index = 0; ; ) {
      try {
        const job = await this.#findJob(order);
        signal.throwIfAborted();
        if (job.state === "failed") throw new ServerError(job.message);
        if (job.state === "left" || job.state === "cancelled") {
          if (job.state === "cancelled") this.remove(order);
          yield { type: "left" };
          return;
        }
        if (job.state === "done") {
          for (; index < job.pictures.length; index += 1) yield await readImage(order, index);
          return;
        }
        yield describe(job);
        if (job.preview) yield* readPreview(job, preview);
      } catch (error) {
        if (signal.aborted || !isAway(error)) throw error;
        if (error.status !== 429) yield makeAway(error); // too many questions tell nothing about the order
        this.#seconds = error.retryAfter ?? 5;
      }
    }
  }

  // Returns when the server has cancelled the job. A reload goes on with it.
  async cancel(order) {
    this.#cancelling.add(order.id);
    this.#keep(Object.assign(order, { isCancelled: true }));
    await this.#sending.get(order); // a DELETE must not overtake its PUT
    try {
      await insist(() => read(`/jobs/${order.id}`, "json", { method: "DELETE" }));
    } catch {
      // the server does not have it
    }
    this.remove(order);
  }

  remove(order) {
    order.isKept = false;
    try {
      localStorage.removeItem(PREFIX + order.id);
    } catch {
      return; // the browser keeps no data of this page
    }
    openUploads("readwrite", (store) => store.delete(order.id)).catch(() => {});
  }

  // Says whether another tab has ended an order.
  isTaken({ id, isKept }) {
    const kept = readOrder(id);
    return Boolean(isKept && (!kept || kept.isCancelled));
  }

  // Without its uploads, which `follow` keeps: localStorage holds texts.
  #keep(order) {
    const fields = Object.fromEntries(Object.entries(order.fields).filter(([name]) => !order.uploads.includes(name)));
    try {
      localStorage.setItem(PREFIX + order.id, JSON.stringify({ ...order, fields, isKept: true }));
      order.isKept = true;
    } catch {
      order.isKept = false; // it ends with the page
    }
  }

  // The same order again is the same job, so a repetition draws nothing twice. The signal ends no request on its way.
  async *#send(order, signal) {
    const body = await encodeFields(order.fields);
    for (;;) {
      signal.throwIfAborted();
      const sending = read(`/jobs/${order.id}`, "json", { method: "PUT", body, seconds: FILE_SECONDS });
      this.#sending.set(order, sending.catch(() => {}));
      try {
        const { content, retryAfter } = await sending;
        this.#keep(Object.assign(order, { isAccepted: true }));
        this.#seconds = retryAfter;
        yield describe(content);
        return;
      } catch (error) {
        if (!isAway(error)) throw error;
        yield makeAway(error);
        await pause(error.retryAfter ?? 5, signal);
      }
    }
  }

  async #findJob(order) {
    // One question for all orders. The answer has the newest 100 jobs.
    this.#round ??= pause(this.#seconds)
      .then(() => this.#readJobs(ANSWER_SECONDS))
      .finally(() => (this.#round = null));
    const jobs = await this.#round;
    if (this.isTaken(order)) return { state: "left" };
    try {
      return jobs.find(({ id }) => id === order.id) ?? (await read(`/jobs/${order.id}`, "json")).content;
    } catch (error) {
      if (error.isGone && order.owner !== this.#owner) return { state: "left" };
      throw error;
    }
  }

  async #readJobs(seconds) {
    const { content, retryAfter } = await read("/jobs", "json", { seconds }).catch((error) => {
      throw error.status === 404 ? new ServerError("the server takes no orders now", { status: 503 }) : error;
    });
    this.#known = new Set(content.map(({ id }) => id));
    this.#seconds = Math.max(retryAfter, document.hidden ? HIDDEN_SECONDS : 1);
    return content;
  }
}

export const isOfOrder = (name) => name === null || name.startsWith(PREFIX); // null: all was cleared

function readOrders() {
  try {
    const ids = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX)).map((name) => name.slice(PREFIX.length));
    return ids.map(readOrder).filter(Boolean);
  } catch {
    return [];
  }
}

function readOrder(id) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + id));
  } catch {
    return null;
  }
}

// Keeps an order's uploads, or brings them back after a reload. Returns false if they are lost.
async function restoreUploads({ id, fields, uploads }) {
  if (!uploads.length) return true;
  const given = Object.fromEntries(uploads.filter((name) => fields[name]).map((name) => [name, fields[name]]));
  try {
    if (uploads.every((name) => given[name])) await openUploads("readwrite", (store) => store.put(given, id));
    else Object.assign(fields, await openUploads("readonly", (store) => store.get(id)));
  } catch {
    // the browser keeps no data of this page
  }
  return uploads.every((name) => fields[name]);
}

function describe({ state, place, step, total, seconds_left, attempt }) {
  if (state !== "running") return { type: "queue", place: place ?? 0 };
  return step === null ? { type: "begun", attempt } : { type: "progress", step, total, seconds_left };
}

async function* readPreview(job, last) {
  if (document.hidden || job.step === last.step || Date.now() - last.at < 1000 * PREVIEW_SECONDS) return;
  Object.assign(last, { step: job.step, at: Date.now() });
  const found = await read(`/jobs/${job.id}/preview`, "blob").catch(() => null); // it may have ended
  if (found) yield { type: "image_generation.partial_image", file: found.content };
}

async function readImage({ id, fields }, index) {
  const { content: file } = await read(`/jobs/${id}/pictures/${index}`, "blob", { seconds: FILE_SECONDS });
  const found = await read(`/jobs/${id}/pictures/${index}/metadata`, "json").then(({ content }) => content, (error) => {
    if (isAway(error)) throw error;
  });
  const others = Object.entries(fields).filter(([, value]) => !(value instanceof Blob));
  return {
    type: "image_generation.completed",
    file,
    parameters: found?.request ?? Object.fromEntries(others), // an operator can switch the metadata off
    unet_calls: found?.made_with?.unet_calls,
    warnings: found?.warnings ?? [],
    source: `${id}/${index}`,
  };
}

function isAway(error) {
  return error instanceof TypeError || error.isBusy || error.status >= 500 || Boolean(error.isRefused);
}

function makeAway(error) {
  const message = error.isBusy || error.isRefused ? error.message : "the server does not answer";
  return { type: "away", message, seconds: error.retryAfter ?? 5, error };
}

// Asks until the server answers.
async function insist(act) {
  for (;;) {
    try {
      return await act();
    } catch (error) {
      if (!isAway(error)) throw error;
      await pause(error.retryAfter ?? 5);
    }
  }
}

// Returns the content and the seconds until the next question.
async function read(path, kind, { seconds = ANSWER_SECONDS, ...options } = {}) {
  const controller = new AbortController();
  const timer = setTimeout(() => controller.abort(), 1000 * seconds);
  try {
    const answer = await ask(path, { ...options, signal: controller.signal });
    return { content: await answer[kind](), retryAfter: Number(answer.headers.get("Retry-After")) };
  } catch (error) {
    throw controller.signal.aborted ? new TypeError("no answer in time") : error;
  } finally {
    clearTimeout(timer);
  }
}

// Ends early when the tab comes to the front.
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", end);
      signal?.removeEventListener("abort", cut);
    };
    const end = () => (stop(), resolve());
    const cut = () => (stop(), reject(signal.reason));
    const timer = setTimeout(end, 1000 * seconds);
    document.addEventListener("visibilitychange", end);
    signal?.addEventListener("abort", cut);
  });
}

const makeId = () => writeHex(crypto.getRandomValues(new Uint8Array(16)));

// Says whose an order is, without the API key. Only a secure context has `subtle`.
async function digest(text) {
  const bytes = await crypto.subtle?.digest("SHA-256", new TextEncoder().encode(text));
  return bytes ? writeHex(new Uint8Array(bytes).slice(0, 12)) : "";
}

const writeHex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
