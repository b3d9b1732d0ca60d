// Paints a mask, white on black, at the size of the image. White is drawn anew.

import { find } from "./dom.js";
import { loadImage, makeCanvas, saveCanvas } from "./uploads.js";

const MAX_SIDE = 2048; // of the mask; it needs the image's aspect ratio, not its size
const MAX_UNDO = 20;
const PAINT = "#ff2d78"; // seen on most images; the mask itself is white

// Returns a PNG, or null if painting was cancelled. `earlier` is a mask to continue.
export async function paintMask(start, earlier) {
  const image = await loadImage(start);
  const painting = new Painting(image, earlier && (await loadImage(earlier)));
  return painting.run();
}

class Painting {
  constructor(image, earlier) {
    this.dialog = find("mask");
    this.canvas = find("mask-canvas");
    const scale = Math.min(1, MAX_SIDE / Math.max(image.width, image.height));
    Object.assign(this.canvas, { width: Math.round(image.width * scale), height: Math.round(image.height * scale) });
    this.context = this.canvas.getContext("2d");
    this.image = image;
    this.layer = makeCanvas(this.canvas.width, this.canvas.height);
    this.paint = this.layer.getContext("2d", { willReadFrequently: true });
    this.paint.lineCap = this.paint.lineJoin = "round";
    if (earlier) this.#load(earlier);
    this.undone = [];
    this.cursor = { x: this.canvas.width / 2, y: this.canvas.height / 2 };
    this.#show();
  }

  run() {
    const listening = new AbortController();
    const listen = (node, events) => {
      for (const [name, act] of Object.entries(events)) node.addEventListener(name, act, { signal: listening.signal });
    };
    listen(this.canvas, {
      pointerdown: (event) => this.#begin(event),
      pointermove: (event) => this.#move(event),
      pointerup: () => (this.last = null),
      pointercancel: () => (this.last = null),
      keydown: (event) => this.#press(event),
      focus: () => this.#show(),
      blur: () => this.#show(),
    });
    listen(find("mask-undo"), { click: () => this.#undo() });
    listen(find("mask-invert"), { click: () => this.#change(() => this.#invert()) });
    listen(find("mask-clear"), { click: () => this.#change(() => this.paint.clearRect(0, 0, this.layer.width, this.layer.height)) });
    this.dialog.returnValue = "";
    this.dialog.showModal();
    return new Promise((resolve) => {
      listen(this.dialog, {
        close: () => {
          listening.abort();
          resolve(this.dialog.returnValue === "use" ? this.#export() : null);
        },
      });
    });
  }

  get #width() {
    return (Number(find("mask-size").value) / 100) * Math.min(this.canvas.width, this.canvas.height);
  }

  #begin(event) {
    if (event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.#keep();
    this.last = this.#place(event);
    this.#stroke(this.last, this.last, event);
  }

  #move(event) {
    if (!this.last) return;
    const passed = event.getCoalescedEvents?.() ?? []; // the pointer's places between two frames
    for (const each of passed.length ? passed : [event]) {
      const place = this.#place(each);
      this.#stroke(this.last, place, each);
      this.last = place;
    }
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    return { x: ((event.clientX - box.left) / box.width) * this.canvas.width, y: ((event.clientY - box.top) / box.height) * this.canvas.height };
  }

  #stroke(from, to, { pointerType, pressure }) {
    this.paint.globalCompositeOperation = find("mask-erase").checked ? "destination-out" : "source-over";
    this.paint.lineWidth = this.#width * (pointerType === "pen" ? 0.25 + 0.75 * pressure : 1);
    this.paint.strokeStyle = PAINT;
    this.paint.beginPath();
    this.paint.moveTo(from.x, from.y);
    this.paint.lineTo(to.x + 0.01, to.y); // a line without length draws no dot
    this.paint.stroke();
    this.paint.globalCompositeOperation = "source-over";
    this.#show();
  }

  // Arrows move the brush, space paints: no pointer is needed.
  #press(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in moves) {
      const [x, y] = moves[event.key].map((each) => (each * this.#width) / 2);
      this.cursor = { x: clamp(this.cursor.x + x, this.canvas.width), y: clamp(this.cursor.y + y, this.canvas.height) };
      this.#show();
    } else if (event.key === " ") {
      this.#keep();
      this.#stroke(this.cursor, this.cursor, event);
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) this.#undo();
    else return;
    event.preventDefault();
  }

  #keep() {
    this.undone.push(this.paint.getImageData(0, 0, this.layer.width, this.layer.height));
    if (this.undone.length > MAX_UNDO) this.undone.shift();
  }

  #change(act) {
    this.#keep();
    act();
    this.#show();
  }

  #undo() {
    const before = this.undone.pop();
    if (before) this.paint.putImageData(before, 0, 0);
    this.#show();
  }

  #invert() {
    fill(this.paint, PAINT, "source-out");
  }

  // Load an earlier mask: white becomes paint.
  #load(earlier) {
    this.paint.drawImage(earlier, 0, 0, this.layer.width, this.layer.height);
    const pixels = this.paint.getImageData(0, 0, this.layer.width, this.layer.height);
    for (let at = 0; at < pixels.data.length; at += 4) pixels.data[at + 3] = pixels.data[at];
    this.paint.putImageData(pixels, 0, 0);
    fill(this.paint, PAINT, "source-in");
  }

  #show() {
    const { context, canvas } = this;
    context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 0.6;
    context.drawImage(this.layer, 0, 0);
    context.globalAlpha = 1;
    if (!canvas.matches(":focus-visible")) return;
    context.lineWidth = Math.max(1, canvas.width / 250);
    for (const [colour, extra] of [["black", 0], ["white", context.lineWidth]]) {
      context.strokeStyle = colour;
      context.beginPath();
      context.arc(this.cursor.x, this.cursor.y, this.#width / 2 + extra, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  #export() {
    const whole = makeCanvas(this.layer.width, this.layer.height);
    const context = whole.getContext("2d");
    context.drawImage(this.layer, 0, 0);
    fill(context, "white", "source-in");
    fill(context, "black", "destination-over");
    return saveCanvas(whole);
  }
}

const clamp = (value, most) => Math.min(Math.max(value, 0), most);

function fill(context, colour, operation) {
  context.globalCompositeOperation = operation;
  context.fillStyle = colour;
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  context.globalCompositeOperation = "source-over";
}
