// Requests in work. Each is a job from the press of the button to its images, its failure or its end.

import { decode, draw, ServerError } from "./api.js";
import { findText, keepText } from "./session.js";

const KEY = "work";
// A browser opens six connections to an HTTP/1.1 server, and nginx allows eight per address. Leave some to other tabs.
const MAX_SENT = 4;

export class Work {
  // Calls `onChange(job)` after each change, and `onImage(job, image)` for each image.
  constructor({ onChange, onImage }) {
    Object.assign(this, { onChange, onImage, jobs: [] });
  }

  add(fields) {
    const job = { fields, state: "waiting", said: "Waits in this page", share: null, preview: null, controller: new AbortController() };
    this.jobs.push(job);
    this.#tell(job, {});
    this.#sendNext();
    return job;
  }

  // The server ends its work, too.
  cancel(job) {
    job.controller.abort();
    this.#tell(job, { state: "cancelled", said: "Cancelled" });
    this.dismiss(job);
  }

  dismiss(job) {
    this.jobs = this.jobs.filter((each) => each !== job);
    this.#remember();
    this.#sendNext();
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

  #tell(job, changes) {
    Object.assign(job, changes);
    this.#remember();
    this.onChange(job);
  }

  #remember() {
    const kept = this.jobs.filter(isOpen).map(({ fields, said }) => {
      const names = Object.keys(fields).filter((name) => fields[name] instanceof Blob);
      const others = Object.entries(fields).filter(([name]) => !names.includes(name));
      return { fields: Object.fromEntries(others), uploads: names, said };
    });
    keepText(KEY, JSON.stringify(kept));
  }

  #sendNext() {
    const sent = this.jobs.filter((job) => job.state === "sent");
    const next = this.jobs.find((job) => job.state === "waiting");
    if (next && sent.length < MAX_SENT) this.#send(next);
  }

  async #send(job) {
    this.#tell(job, { state: "sent", said: "Sent to the server" });
    let images = 0;
    try {
      for await (const event of this.#ask(job)) {
        if (event.type === "image_generation.completed") {
          images += 1;
          await this.onImage(job, readImage(event));
        } else this.#tell(job, describe(event));
      }
      const wanted = job.fields.num_images_per_prompt ?? 1;
      if (images < wanted) throw new TypeError("the answer ended early");
      this.#tell(job, { state: "done", said: "Done" });
      this.dismiss(job);
    } catch (error) {
      if (job.state === "cancelled") return;
      const isServers = error instanceof ServerError;
      if (!isServers && !(error instanceof TypeError)) console.error(error);
      const lost = `The connection to the server broke (${job.said}), and the image is lost. The server may be restarting.`;
      this.#tell(job, { state: isServers ? "failed" : "lost", said: isServers ? error.message : lost, error, share: null });
      this.#sendNext();
    }
  }

  // A server that is busy or loads its model has not begun: ask again.
  async *#ask(job) {
    const { signal } = job.controller;
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

export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function describe(event) {
  switch (event.type) {
    case "queue":
      return { said: event.place === 1 ? "1 request is before this one" : `${event.place} requests are before this one` };
    case "compiling":
      return { said: `The server compiles ${event.parts.join(", ")} first` };
    case "progress":
      return { share: event.step / event.total, said: `Step ${event.step} of ${event.total}, ${showTime(event.seconds_left)} left` };
    case "image_generation.partial_image":
      return { preview: decode(event.b64_json, event.output_format) };
    default:
      return {};
  }
}

function readImage({ b64_json, output_format, parameters, unet_calls, warnings }) {
  return { file: decode(b64_json, output_format), parameters, calls: unet_calls, warnings };
}

function showTime(seconds) {
  const whole = Math.ceil(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}
