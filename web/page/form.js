// The form, built from the server's schema of a request. A new field of the server appears here by itself.

import { make, button } from "./dom.js";

// The fields that are always shown, in this order. The others are folded.
const FIRST = ["prompt", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "scheduler", "seed", "num_images_per_prompt", "adapters"];
const WITH_IMAGE = ["strength", "resize_mode"]; // shown with the image to start from
const OWN = ["image", "mask_image", "invert_mask", "stream", "response_format"]; // set by the web UI itself
const LABELS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  num_images_per_prompt: "Images",
  partial_images: "Previews",
  unet_calls: "UNet calls",
  output_format: "File format",
  timeout: "Time limit in seconds",
};
const LONG_TEXT = 200;
const SLIDER_END = 150; // above it a slider is too coarse
const MAX_COLUMNS = 4;

export class Form {
  // `places`: {first, withImage, others}, the nodes for the fields. `own`: the web UI's own defaults.
  constructor(schema, places, own) {
    this.fields = new Map();
    this.own = own;
    for (const name of order(schema.properties)) {
      const { maxItems, enum: choices } = schema.properties[name];
      if (maxItems === 0 || choices?.every((each) => each === null)) continue; // nothing to choose on this server
      const field = new Field(name, schema.properties[name], schema.required?.includes(name));
      this.fields.set(name, field);
      const place = FIRST.includes(name) ? places.first : WITH_IMAGE.includes(name) ? places.withImage : places.others;
      place.append(field.node);
    }
    this.write({});
  }

  // Returns the fields that the user has set. The server chooses the others.
  read() {
    const given = [...this.fields].map(([name, field]) => [name, field.read()]);
    return Object.fromEntries(given.filter(([, value]) => value !== undefined));
  }

  // Shows these values, and the defaults of other fields; returns names that this server does not know.
  write(values) {
    for (const [name, field] of this.fields) field.write(values[name] ?? this.own[name]);
    return Object.keys(values).filter((name) => !this.fields.has(name) && !OWN.includes(name));
  }

  // With an image to start from, the server chooses the size by its aspect ratio, unless one is given.
  leaveSize(isByImage) {
    for (const name of ["width", "height"]) this.fields.get(name)?.leave(isByImage, "by the image");
  }

  clearErrors() {
    for (const field of this.fields.values()) field.showError(null);
  }

  // Returns false if there is no such field.
  showError(name, message) {
    const field = this.fields.get(name);
    field?.showError(message);
    return field !== undefined;
  }
}

function order(properties) {
  const names = Object.keys(properties).filter((name) => !OWN.includes(name));
  return [...FIRST.filter((name) => names.includes(name)), ...names.filter((name) => !FIRST.includes(name))];
}

class Field {
  constructor(name, schema, isNeeded) {
    this.isGiven = false;
    this.initial = this.usual = schema.default;
    const isFirst = FIRST.includes(name) || WITH_IMAGE.includes(name);
    const id = `field-${name}`;
    this.control = makeControl(id, schema, { name, isSlider: isFirst });
    this.error = make("p", { id: `${id}-error`, class: "error", hidden: true });
    const words = make("p", { id: `${id}-words`, class: "words" }, (schema.description ?? "").replaceAll("`", ""));
    const label = LABELS[name] ?? makeLabel(name);
    const group = this.control.isGroup && { role: "group", "aria-labelledby": `${id}-label` };
    const caption = group ? make("span", { id: `${id}-label`, class: "label" }, label) : make("label", { for: id, class: "label" }, label);
    this.node = make("div", { class: `field ${name}`, ...group, input: () => this.#change(), change: () => this.#change() });
    this.node.append(caption, this.control.node, words, this.error);
    const input = group ? this.node : this.control.input ?? this.control.node;
    input.setAttribute("aria-describedby", `${words.id} ${this.error.id}`);
    if (isNeeded && !group) input.setAttribute("aria-required", "true");
  }

  read() {
    return this.isGiven ? this.control.get() : undefined;
  }

  write(value) {
    this.isGiven = value !== undefined;
    this.control.set(value ?? this.initial);
    this.showError(null);
  }

  // Shows words instead of the default.
  leave(isLeft, words) {
    this.initial = isLeft ? undefined : this.usual;
    (this.control.input ?? this.control.node).placeholder = isLeft ? words : "";
    if (!this.isGiven) this.control.set(this.initial);
  }

  showError(message) {
    const input = this.node.querySelector("input, select, textarea, button");
    this.error.textContent = message ?? "";
    this.error.hidden = message === null;
    if (message === null) return input?.removeAttribute("aria-invalid");
    input?.setAttribute("aria-invalid", "true");
    const folded = this.node.closest("details");
    if (folded) folded.open = true;
    return input?.focus();
  }

  #change() {
    this.isGiven = true;
    if (!this.error.hidden) this.showError(null);
  }
}

function makeLabel(name) {
  const words = name.replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
}

// Returns {node, get, set, isGroup?, input?}. `get` returns undefined for an empty control. A label is for `input`.
function makeControl(id, schema, { name = "", isSlider = false } = {}) {
  const kinds = [schema.type].flat().filter((kind) => kind !== "null");
  const [choice, object] = ["enum", "properties"].map((key) => schema.anyOf?.find((each) => key in each));
  if (choice && object) return makeNamed(id, choice, object);
  if (schema.contentEncoding) return makeFile(id);
  if (schema.enum) return makeChoice(id, schema.enum.filter((each) => each !== null));
  switch (kinds[0]) {
    case "boolean":
      return makeChoice(id, [true, false], { true: "yes", false: "no" });
    case "integer":
    case "number":
      return makeNumber(id, schema, kinds[0], { name, isSlider });
    case "array":
      return makeArray(id, schema);
    case "object":
      return makeObject(id, schema.properties ?? {});
    default:
      return makeText(id, schema, name);
  }
}

function makeText(id, { maxLength }, name) {
  const isLong = maxLength > LONG_TEXT;
  const node = isLong ? make("textarea", { id, rows: name === "prompt" ? 4 : 2 }) : make("input", { id, type: "text", autocomplete: "off" });
  return { node, get: () => node.value || undefined, set: (value) => (node.value = value ?? "") };
}

function makeNumber(id, schema, kind, { name, isSlider }) {
  const limits = { min: schema.minimum ?? schema.exclusiveMinimum, max: schema.maximum, step: schema.multipleOf ?? (kind === "integer" ? 1 : "any") };
  const input = make("input", { id, type: "number", inputmode: kind === "integer" ? "numeric" : "decimal", ...limits });
  const get = () => (Number.isNaN(input.valueAsNumber) ? undefined : input.valueAsNumber);
  const set = (value) => (input.value = value ?? "");
  if (name === "seed") return makeSeed(input, schema, get, set);
  if (!isSlider || schema.default === undefined || schema.maximum > SLIDER_END || schema.minimum === undefined) return { node: input, get, set };
  // The slider ends at four times the default. Larger values can be typed.
  const end = Math.min(schema.maximum, Math.max(1, 4 * schema.default));
  const step = kind === "integer" ? 1 : end <= 2 ? 0.05 : 0.5;
  const slider = make("input", { type: "range", min: schema.minimum, max: end, step, tabindex: -1, "aria-hidden": "true" });
  const follow = () => (slider.value = input.value);
  slider.addEventListener("input", () => (input.value = slider.value));
  input.addEventListener("input", follow);
  return { node: make("div", { class: "slider" }, slider, input), input, get, set: (value) => (set(value), follow()) };
}

function makeSeed(input, schema, get, set) {
  input.placeholder = "random";
  const roll = () => {
    set(crypto.getRandomValues(new Uint32Array(1))[0] % (schema.maximum + 1));
    input.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const die = button("⚄", roll, { class: "icon", "aria-label": "Roll a seed", title: "Roll a seed" });
  return { node: make("div", { class: "row" }, input, die), input, get, set };
}

function makeChoice(id, values, words = {}) {
  const options = values.map((value, index) => make("option", { value: index }, words[value] ?? String(value)));
  const node = make("select", { id }, make("option", { value: "" }, "–"), ...options);
  const set = (value) => (node.value = values.includes(value) ? values.indexOf(value) : "");
  return { node, get: () => values[node.value], set };
}

function makeArray(id, { items, minItems, maxItems }) {
  if (items?.type === "object" || items?.properties) return makeRows(id, items, maxItems);
  if (minItems === maxItems && maxItems <= MAX_COLUMNS) {
    const parts = Array.from({ length: maxItems }, (_, index) => makeControl(`${id}-${index}`, items));
    parts.forEach(({ node, input = node }, index) => input.setAttribute("aria-label", `${index + 1} of ${maxItems}`));
    const get = () => {
      const values = parts.map((part) => part.get());
      return values.every((value) => value === undefined) ? undefined : values.map((value) => value ?? null);
    };
    const set = (values) => parts.forEach((part, index) => part.set(values?.[index]));
    return { node: make("div", { class: "row" }, ...parts.map((part) => part.node)), get, set, isGroup: true };
  }
  return makeList(id, items);
}

// Values separated by commas. Text instead of a number is sent as it is, and the server refuses it.
function makeList(id, items) {
  const node = make("input", { id, type: "text", autocomplete: "off", placeholder: "separated by commas" });
  const isNumber = ["integer", "number"].includes(items?.type);
  const read = (text) => (isNumber && Number.isFinite(Number(text)) ? Number(text) : text);
  const split = () => node.value.split(",").map((text) => text.trim()).filter(Boolean).map(read);
  return { node, get: () => (node.value.trim() ? split() : undefined), set: (values) => (node.value = values?.join(", ") ?? "") };
}

function makeRows(id, items, maxItems = Infinity) {
  const rows = [];
  const list = make("div", { class: "rows" });
  let count = 0;
  const tell = () => {
    adder.disabled = rows.length >= maxItems;
    list.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const add = (value) => {
    const row = makeObject(`${id}-${count++}`, items.properties);
    row.set(value);
    rows.push(row);
    const remove = button("Remove", () => {
      rows.splice(rows.indexOf(row), 1);
      line.remove();
      adder.focus();
      tell();
    }, { class: "quiet" });
    const line = make("div", { class: "line" }, row.node, remove);
    list.append(line);
  };
  const adder = button("Add", () => {
    add(undefined);
    list.lastChild.querySelector("input, select, textarea").focus();
    tell();
  }, { class: "quiet" });
  const set = (values) => {
    rows.length = 0;
    list.replaceChildren();
    values?.forEach(add);
    adder.disabled = rows.length >= maxItems;
  };
  return { node: make("div", {}, list, adder), get: () => (rows.length ? rows.map((row) => row.get() ?? {}) : undefined), set, isGroup: true };
}

function makeObject(id, properties) {
  const parts = Object.entries(properties).map(([name, schema]) => [name, makeControl(`${id}-${name}`, schema), schema]);
  const nodes = parts.map(([name, { node, isGroup }, schema]) =>
    make("div", { class: "part", ...(isGroup && { role: "group", "aria-label": makeLabel(name) }) },
      isGroup ? make("span", {}, makeLabel(name)) : make("label", { for: `${id}-${name}`, title: schema.description }, makeLabel(name)), node));
  const get = () => {
    const given = parts.map(([name, part]) => [name, part.get()]).filter(([, value]) => value !== undefined);
    return given.length ? Object.fromEntries(given) : undefined;
  };
  const set = (values) => parts.forEach(([name, part, schema]) => part.set(values?.[name] ?? schema.default));
  return { node: make("div", { class: "parts" }, ...nodes), get, set, isGroup: true };
}

// A name, or an object of a name and options: {"name": "DPM++ 2M", "use_karras_sigmas": true}.
function makeNamed(id, choice, { properties: { name: _, ...options } }) {
  const names = makeChoice(id, choice.enum);
  const rest = makeObject(id, options);
  const node = make("div", {}, names.node, make("details", { class: "options" }, make("summary", {}, "Options"), rest.node));
  const get = () => {
    const [name, others] = [names.get(), rest.get()];
    return others ? { name, ...others } : name;
  };
  const set = (value) => {
    const { name, ...others } = typeof value === "object" && value ? value : { name: value };
    names.set(name);
    rest.set(others);
  };
  return { node, input: names.node, get, set };
}

function makeFile(id) {
  const node = make("input", { id, type: "file", accept: "image/*" });
  return { node, get: () => node.files[0], set: () => (node.value = "") };
}
