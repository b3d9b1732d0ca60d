// The web UI: it joins the form, the requests in work, the shown image and the gallery.

import { keepToken, readContract, ServerError, takeToken } from "./api.js";
import { announce, button, find, make } from "./dom.js";
import { Form } from "./form.js";
import { MAX_BYTES, MAX_IMAGES, openGallery } from "./gallery.js";
import { paintMask } from "./mask.js";
import { pickFile, readUpload } from "./uploads.js";
import { isOpen, sentence, Work } from "./work.js";

const UPLOADS = ["image", "mask_image"];
const ENDS = { done: "The image is done.", cancelled: "Cancelled.", left: "" }; // left: another tab has it

const start = { image: null, mask_image: null }; // the uploads, which are not fields of the form
const rows = new Map(); // of the list of work, by job
let form, gallery, connecting = null, images = [], selected = null;
let tellFormIsMade;
const formIsMade = new Promise((resolve) => (tellFormIsMade = resolve));
const work = new Work({ onChange: showJob, onImage: keepImage });

// The server

// One attempt at a time, also when several requests lost the server.
function connect() {
  connecting ??= reachServer().finally(() => (connecting = null));
  return connecting;
}

// After the API key has changed. An attempt under way may have used the old one.
function reconnect() {
  return connecting ? connecting.then(connect) : connect();
}

async function reachServer() {
  for (;;) {
    try {
      await work.findOrders();
      return useContract(await readContract());
    } catch (error) {
      if (error.isRefused) return askForToken(error.message);
      const said = error instanceof ServerError ? sentence(error.message) : "The server does not answer";
      find("server").textContent = `${said}. Asks again in 5 s`;
      await new Promise((resolve) => setTimeout(resolve, 5000));
    }
  }
}

function useContract(schema) {
  find("server").textContent = "Ready";
  if (form) return;
  const places = { first: find("first"), withImage: find("with-image"), others: find("others") };
  // Ask for the most previews by default.
  form = new Form(schema, places, { partial_images: schema.properties.partial_images?.maximum });
  find("start").hidden = !("image" in schema.properties);
  find("start-paint").hidden = !("mask_image" in schema.properties);
  find("form").hidden = false;
  tellFormIsMade();
  find("field-prompt").focus({ preventScroll: true });
}

function askForToken(message) {
  find("server").textContent = "Needs an API key";
  if (message) find("token-message").textContent = `${sentence(message)}.`.replace("..", ".");
  if (find("token").open) return;
  find("token-input").value = "";
  find("token").showModal();
}

// The form

function submit() {
  form.clearErrors();
  const uploads = Object.entries(start).filter(([, file]) => file);
  draw({ ...form.read(), ...Object.fromEntries(uploads) });
}

function draw(fields) {
  selected = null;
  work.add(fields);
  if (matchMedia("(max-width: 59.99rem)").matches) find("stage").scrollIntoView({ block: "start" });
}

function recall({ parameters, uploads = {}, warnings = [] }) {
  const unknown = form.write(parameters);
  useStart(uploads.image ?? null, uploads.mask_image ?? null);
  const rest = unknown.length ? ` This server has no field for ${unknown.join(", ")}.` : "";
  announce(`The form has the settings of that image.${rest}`);
  if (warnings.length) tellStart(`${warnings.map(sentence).join(". ")}.`, "note");
  find("field-prompt").focus();
}

function useStart(image, mask = null) {
  Object.assign(start, { image, mask_image: mask });
  form.leaveSize(image !== null);
  find("drop").hidden = image !== null;
  find("chosen").hidden = image === null;
  find("start-unmask").hidden = find("start-mask").hidden = mask === null;
  find("start-paint").textContent = mask ? "Paint on" : "Paint a mask";
  showFile(find("start-image"), image);
  showFile(find("start-mask"), mask);
  tellStart(null);
}

function tellStart(message, kind = "error") {
  Object.assign(find("start-error"), { textContent: message ?? "", className: kind, hidden: message === null });
  if (message === null) return;
  announce(message);
  find("start-error").scrollIntoView({ block: "nearest" });
}

// `transfer` is from a drop, a paste or an input of files.
async function takeFile(transfer) {
  if (find("mask").open) return; // it is painted on the image before
  try {
    const file = pickFile(transfer); // at once: a transfer is empty after its event
    await formIsMade;
    const { parameters, warnings, image, note } = await readUpload(file);
    if (parameters) return recall({ parameters, warnings });
    useStart(image);
    find("start-image").scrollIntoView({ block: "nearest" });
    if (note) tellStart(note, "note");
    else announce(`${file.name} is the image to start from.`);
  } catch (error) {
    tellStart(error.message);
  }
}

async function paint() {
  try {
    const mask = await paintMask(start.image, start.mask_image);
    if (mask) useStart(start.image, mask);
  } catch {
    tellStart("This browser cannot show the image, so no mask can be painted.");
  }
}

function showFile(image, file) {
  if (image.src) URL.revokeObjectURL(image.src);
  if (file) image.src = URL.createObjectURL(file);
  else image.removeAttribute("src");
}

// Work

function showJob(job) {
  if (ENDS[job.state] !== undefined) {
    rows.get(job)?.node.remove();
    rows.delete(job);
    announce(ENDS[job.state]);
    if (job.state === "left") readGallery();
  } else {
    const row = rows.get(job) ?? addRow(job);
    row.said.textContent = job.said;
    row.node.className = job.state;
    if (job.share === null) row.bar.removeAttribute("value");
    else row.bar.value = job.share;
    row.bar.hidden = !isOpen(job);
    row.actions.replaceChildren(...makeJobActions(job));
    if (!isOpen(job)) tellFailure(job);
    else if (job.error?.isRefused && !row.isRefused) askForToken(job.error.message);
    row.isRefused = job.error?.isRefused;
  }
  if (selected === null) showStage();
}

function addRow(job) {
  const row = { said: make("p", { class: "said" }), bar: make("progress", { max: 1, "aria-label": "Progress" }), actions: make("div", { class: "row" }) };
  row.node = make("li", {}, make("div", { class: "about" }, make("p", { class: "prompt" }, job.fields.prompt ?? ""), row.said), row.actions, row.bar);
  rows.set(job, row);
  find("work").append(row.node);
  return row;
}

function makeJobActions(job) {
  if (isOpen(job)) return rows.get(job).actions.children.length ? [...rows.get(job).actions.children] : [button("Cancel", () => work.cancel(job), { class: "quiet" })];
  const remove = () => {
    rows.get(job).node.remove();
    rows.delete(job);
    work.dismiss(job);
  };
  const isWhole = (job.order ?? job).uploads?.every((name) => job.fields[name]) ?? true;
  const again = () => (remove(), isWhole ? draw(job.fields) : recall({ parameters: job.fields }));
  const words = isWhole ? "Draw again" : "Use its settings"; // a reload ends a stream, and its files are gone
  return [button(words, again, { class: "quiet" }), button("Dismiss", remove, { class: "quiet" })];
}

function tellFailure(job) {
  announce(job.said);
  if (job.state === "lost") connect(); // it shows when the server is back
  if (job.error?.isRefused) askForToken(job.error.message);
  else if (job.error?.param && UPLOADS.includes(job.error.param)) tellStart(job.said);
  else if (job.error?.param) form.showError(job.error.param, job.said);
}

// Gallery

// Returns whether this browser has kept the image.
async function keepImage(job, { warnings, ...image }) {
  if (images.some(({ source }) => source && source === image.source)) return true; // by another tab, or before a reload
  const uploads = Object.fromEntries(UPLOADS.filter((name) => job.fields[name]).map((name) => [name, job.fields[name]]));
  const kept = { ...image, uploads, made: Date.now() };
  const entry = { ...kept };
  addTile(entry);
  showStage();
  let isKept = false;
  const news = warnings.map(sentence);
  try {
    if (!gallery) throw new Error("it keeps no data of this page");
    const { id, leaving } = await gallery.add(kept);
    entry.id = id;
    isKept = true;
    images.filter((each) => leaving.includes(each.id)).forEach(removeTile);
    const limit = images.length < MAX_IMAGES ? `${MAX_BYTES / 1e6} MB` : `${MAX_IMAGES} images`;
    if (leaving.length) news.push(`The gallery holds ${limit}: the oldest was removed. Download the ones that you want to keep`);
  } catch (error) {
    news.push(`This browser has not kept the image (${explainStorage(error)}): download it before you leave the page`);
  }
  tellGallery(news.join(". "));
  return isKept;
}

// Another tab has changed the gallery.
async function readGallery() {
  const kept = await gallery?.list().catch(() => null);
  if (!kept) return;
  const isSame = (one, other) => one.id === other.id || (one.source && one.source === other.source);
  images.filter((entry) => entry.id !== undefined && !kept.some(({ id }) => id === entry.id)).forEach(removeTile);
  kept.filter((entry) => !images.some((each) => isSame(each, entry))).reverse().forEach(addTile);
  showStage();
}

function addTile(entry) {
  const image = make("img", { alt: entry.parameters.prompt, loading: "lazy", decoding: "async" });
  showFile(image, entry.file);
  entry.tile = make("li", {}, button("", () => select(entry), { "aria-label": `Show: ${entry.parameters.prompt}` }));
  entry.tile.firstChild.append(image);
  images.unshift(entry);
  find("images").prepend(entry.tile);
  countImages();
}

function removeTile(entry) {
  showFile(entry.tile.querySelector("img"), null);
  entry.tile.remove();
  images = images.filter((each) => each !== entry);
  countImages();
}

function countImages() {
  find("gallery").hidden = images.length === 0;
  find("gallery-count").textContent = `${images.length} of at most ${MAX_IMAGES}, in this browser`;
}

function tellGallery(text) {
  find("gallery-news").textContent = text ? `${text}.` : "";
  find("gallery-news").hidden = !text;
}

const explainStorage = (error) => (error.name === "QuotaExceededError" ? "its storage is full" : error.message);

async function discard(entry) {
  try {
    if (entry.id !== undefined) await gallery.remove(entry.id); // undefined if it was not kept
    else if (entry.source) work.orders.remove({ id: entry.source.split("/")[0] });
  } catch (error) {
    return tellGallery(`This browser has not deleted the image (${explainStorage(error)})`);
  }
  removeTile(entry);
  selected = null;
  showStage();
  find("stage").focus();
}

// The shown image: the selected one, else the one in work, else the newest

function select(entry) {
  selected = entry;
  showStage();
  find("stage").scrollIntoView({ block: "nearest" });
}

function showStage() {
  const job = selected === null && work.jobs.find((each) => isOpen(each));
  const entry = job ? null : selected ?? images[0];
  for (const { tile } of images) tile.firstChild.toggleAttribute("aria-current", tile === entry?.tile);
  const file = job ? job.preview : entry?.file;
  const figure = find("shown");
  figure.classList.toggle("drawing", Boolean(job));
  const shown = file ?? job ?? null; // the job itself before its first preview
  if (shown !== null && figure.shown === shown) return;
  figure.shown = shown;
  const old = figure.querySelector("img");
  if (old) showFile(old, null);
  if (!file) return figure.replaceChildren(job ? make("div", { class: "blank" }) : find("empty") ?? makeEmpty());
  const image = make("img", { alt: job ? `In work: ${job.fields.prompt}` : entry.parameters.prompt });
  showFile(image, file);
  figure.replaceChildren(image, ...(entry ? [makeCaption(entry, image.src)] : []));
}

const makeEmpty = () => make("p", { id: "empty" }, "Describe the image and press Draw.");

function makeCaption(entry, address) {
  const { parameters, calls, uploads } = entry;
  const { seed, ...others } = parameters;
  const actions = [
    button("Use settings", () => recall(entry), { class: "quiet" }),
    button("New seed", () => draw({ ...others, ...uploads, partial_images: form.read().partial_images }), { class: "quiet" }),
    button("Start from it", () => (useStart(entry.file), find("start").scrollIntoView({ block: "nearest" }), find("start-paint").focus()), { class: "quiet" }),
    make("a", { href: address, download: makeName(entry), class: "quiet button" }, "Download"),
    button("Delete", () => discard(entry), { class: "quiet" }),
  ];
  const shown = { ...parameters, ...(calls && { "UNet calls": calls }) };
  const list = Object.entries(shown).filter(([name]) => name !== "prompt").map(([name, value]) =>
    make("div", {}, make("dt", {}, name.replaceAll("_", " ")), make("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value))));
  return make("figcaption", {},
    make("div", { class: "row wrap" }, ...actions),
    make("p", { class: "prompt" }, parameters.prompt),
    make("details", {}, make("summary", {}, seed === undefined ? "How it was made" : `Seed ${seed}, and how it was made`), make("dl", {}, ...list)));
}

function makeName({ file, parameters: { prompt, seed } }) {
  const words = prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["image"];
  return `${[...words.slice(0, 6), seed ?? "drawn"].join("-")}.${file.type.split("/")[1].replace("jpeg", "jpg")}`;
}

// Events

const isField = (node) => node.matches?.("input, textarea") ?? false;

function listen() {
  find("form").addEventListener("submit", (event) => (event.preventDefault(), submit()));
  find("form").addEventListener("reset", (event) => (event.preventDefault(), form.write({}), useStart(null)));
  find("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
  });
  find("start-file").addEventListener("change", ({ target }) => target.files.length && takeFile(target).then(() => (target.value = "")));
  find("start-remove").addEventListener("click", () => (useStart(null), find("start-file").focus()));
  find("start-unmask").addEventListener("click", () => (useStart(start.image), find("start-paint").focus()));
  find("start-paint").addEventListener("click", paint);
  find("token-change").addEventListener("click", () => askForToken());
  find("token-cancel").addEventListener("click", () => find("token").close());
  find("token").querySelector("form").addEventListener("submit", () => (keepToken(find("token-input").value.trim()), reconnect()));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      const { types } = event.dataTransfer;
      if (!types.includes("Files") && (!types.includes("text/uri-list") || isField(event.target))) return; // a text
      event.preventDefault();
      find("over").hidden = kind !== "dragover";
      if (kind === "drop") takeFile(event.dataTransfer);
    });
  }
  addEventListener("paste", (event) => {
    const { types } = event.clipboardData;
    const isText = types.includes("text/plain") && ["text/html", "text/rtf"].some((kind) => types.includes(kind)); // with its image
    if (!types.includes("Files") || (isText && isField(event.target))) return;
    event.preventDefault();
    takeFile(event.clipboardData);
  });
  addEventListener("hashchange", () => (takeToken(), reconnect()));
}

async function begin() {
  find("server").textContent = "Asking the server what it can do";
  takeToken();
  listen();
  try {
    gallery = await openGallery();
    await readGallery();
  } catch (error) {
    tellGallery(`This browser keeps no images (${explainStorage(error)})`);
  }
  await connect();
  work.recoverLost();
  showStage();
}

begin();
