// Requests in work, from the press of the button to their images, their failure or their end. Where the server takes
// orders, a request is one and outlives the page. Elsewhere it is a stream, which ends with the page.

import { decode, draw, ServerError } from "./api.js";
import { isOfOrder, Orders, pause } from "./jobs.js";
import { findText, keepText } from "./session.js";

const KEY = "work";
// A browser opens six connections to an HTTP/1.1 server, and nginx allows eight per address. Leave some to other tabs.
const MAX_SENT = 4;

export class Work {
  // Calls `onChange(job)` after each change, and `onImage(job, image)` for each image, which says whether it was kept.
  constructor({ onChange, onImage }) {
    Object.assign(this, { onChange, onImage, jobs: [], orders: new Orders(), ended: new Set() });
    addEventListener("storage", ({ key }) => isOfOrder(key) && this.#compare());
  }

  add(fields) {
    const order = this.orders.isFound ? this.orders.make(fields) : null;
    return this.#begin({ fields, order, said: order ? "Sent to the server" : "Waits in this page" });
  }

  // Shows the orders of earlier visits and of other tabs, if they belong to the API key.
  async findOrders() {
    await this.orders.find();
    this.#compare();
  }

  // The server ends its work, too.
  cancel(job) {
    job.controller.abort();
    if (job.order) this.orders.cancel(job.order);
    this.#tell(job, { state: "cancelled", said: "Cancelled" });
    this.#drop(job);
  }

  dismiss(job) {
    this.#drop(job);
    if (job.order) this.orders.remove(job.order);
  }

  // The jobs that were in work when the page was left. Their connections and their work have ended.
  recoverLost() {
    for (const { fields, uploads, said } of JSON.parse(findText(KEY) ?? "[]")) {
      const job = { fields, uploads, state: "lost", share: null, preview: null };
      job.said = `The page was left during this request (${said}). The server has ended it: there is no image.`;
      this.jobs.push(job);
      this.onChange(job);
    }
  }

  #begin(about) {
    const job = { state: "waiting", share: null, preview: null, controller: new AbortController(), ...about };
    this.jobs.push(job);
    this.#tell(job, {});
    this.#sendNext();
    return job;
  }

  // Another tab may have placed orders, or have ended them.
  #compare() {
    this.jobs.filter(({ order }) => order && this.orders.isTaken(order)).forEach((job) => this.#leave(job));
    const isNew = ({ id }) => !this.ended.has(id) && !this.jobs.some(({ order }) => order?.id === id);
    for (const order of this.orders.list().filter(isNew)) this.#begin({ fields: order.fields, order, said: "Asks the server about it" });
  }

  #leave(job) {
    job.controller.abort();
    this.#tell(job, { state: "left", said: "" });
    this.#drop(job);
  }

  #drop(job) {
    this.jobs = this.jobs.filter((each) => each !== job);
    this.#remember();
    this.#sendNext();
  }

  #tell(job, changes) {
    Object.assign(job, changes);
    this.#remember();
    this.onChange(job);
  }

  #remember() {
    const kept = this.jobs.filter((job) => isOpen(job) && !job.order).map(({ fields, said }) => {
      const names = Object.keys(fields).filter((name) => fields[name] instanceof Blob);
      const others = Object.entries(fields).filter(([name]) => !names.includes(name));
      return { fields: Object.fromEntries(others), uploads: names, said };
    });
    keepText(KEY, JSON.stringify(kept));
  }

  #sendNext() {
    const sent = this.jobs.filter((job) => job.state === "sent" && !job.order);
    const next = this.jobs.find((job) => job.state === "waiting" && (job.order || sent.length < MAX_SENT));
    if (next) this.#send(next);
  }

  async #send(job) {
    this.#tell(job, { state: "sent", said: job.order ? job.said : "Sent to the server" });
    let images = 0;
    let isKept = true;
    try {
      for await (const event of this.#ask(job)) {
        if (!isOpen(job)) return; // cancelled, or another tab has it
        if (event.type === "left") return this.#leave(job);
        if (event.type === "image_generation.completed") {
          images += 1;
          isKept = (await this.onImage(job, readImage(event))) && isKept;
        } else this.#tell(job, { error: null, ...describe(event) });
      }
      const wanted = job.fields.num_images_per_prompt ?? 1;
      if (images < wanted) throw new TypeError("the answer ended early");
      this.#tell(job, { state: "done", said: "Done" });
      this.#end(job, isKept);
    } catch (error) {
      if (!isOpen(job)) return;
      if (job.order && !job.order.isAccepted) this.orders.remove(job.order);
      this.#tell(job, { ...explain(error, job), error, share: null });
      this.#sendNext();
    }
  }

  // The server still has the images that this browser has not kept. The next visit fetches them again.
  #end(job, isKept) {
    if (isKept) return this.dismiss(job);
    if (job.order) this.ended.add(job.order.id);
    this.#drop(job);
  }

  // A server that is busy or loads its model has not begun: ask again.
  async *#ask(job) {
    const { signal } = job.controller;
    if (job.order) return yield* this.orders.follow(job.order, signal);
    for (;;) {
      try {
        return yield* draw(job.fields, signal);
      } catch (error) {
        if (!error.isBusy || job.share !== null) throw error;
        this.#tell(job, { said: `${sentence(error.message)}. Asks again in ${error.retryAfter} s` });
        await pause(error.retryAfter, signal);
      }
    }
  }
}

export const isOpen = (job) => job.state === "waiting" || job.state === "sent";

function explain(error, job) {
  const isServers = error instanceof ServerError;
  if (error.isGone) return { state: "lost", said: "The server no longer has this order: it removes orders some time after their end. Its images are lost." };
  if (isServers) return { state: "failed", said: error.message };
  if (!(error instanceof TypeError)) console.error(error);
  return { state: "lost", said: `The connection to the server broke (${job.said}), and the image is lost. The server may be restarting.` };
}

export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function describe(event) {
  switch (event.type) {
    case "queue":
      return { share: null, said: event.place === 0 ? "Is next" : event.place === 1 ? "1 request is before this one" : `${event.place} requests are before this one` };
    case "begun":
      return { share: null, said: event.attempt > 1 ? "The server begins again: its first attempt was lost" : "The server begins" };
    case "away":
      return { said: `${sentence(event.message)}. Asks again in ${event.seconds} s: the order is kept`, error: event.error };
    case "compiling":
      return { said: `The server compiles ${event.parts.join(", ")} first` };
    case "progress":
      return { share: event.step / event.total, said: `Step ${event.step} of ${event.total}, ${showTime(event.seconds_left)} left` };
    case "image_generation.partial_image":
      return { preview: readFile(event) };
    default:
      return {};
  }
}

function readImage({ parameters, unet_calls, warnings, source, ...event }) {
  return { file: readFile(event), parameters, calls: unet_calls, warnings, source };
}

const readFile = ({ file, b64_json, output_format }) => file ?? decode(b64_json, output_format);

function showTime(seconds) {
  const whole = Math.ceil(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}
