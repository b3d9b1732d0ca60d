// Turns a file that was chosen, dropped or pasted into an image that the server takes.

import { readMetadata } from "./metadata.js";

const MAX_UPLOAD = 22e6; // bytes; in base64 and with a mask they stay below max_request_size, 32 MiB
const MAX_READ = 100e6; // bytes; a larger file is not opened
const MAX_PIXELS = 50e6; // the server reads no more in some formats
const MAX_SIDE = 4096; // of a converted image; a canvas on iOS holds no more
const SVG_SIDE = 1024; // of a drawing, which is sharp at each size
const HEAD = 64; // bytes that name the format

// The formats that the server takes: IMAGE_FORMATS of request/fields.py.
export const ACCEPTED = ["JPEG", "PNG", "WebP", "AVIF", "GIF", "TIFF", "BMP"];
const PARTLY_SHOWN = ["AVIF", "TIFF"]; // some browsers cannot show them
const VIDEO = "a video";
const SIGNATURES = {
  JPEG: /^\xff\xd8\xff/,
  PNG: /^\x89PNG/,
  WebP: /^RIFF.{4}WEBP/s,
  GIF: /^GIF8/,
  TIFF: /^(II[*+]\0|MM\0[*+])/,
  BMP: /^BM/,
  AVIF: /^.{4}ftyp(.{4})*?avi[fs]/s, // the first brand or a later one
  HEIC: /^.{4}ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)/s,
  "JPEG XL": /^(\xff\x0a|\0\0\0\x0cJXL )/,
  SVG: /^(\xef\xbb\xbf)?\s*<(svg|\?xml|!doctype svg|!--)/i,
  PDF: /^%PDF/,
  [VIDEO]: /^(.{4}(ftyp|moov|mdat|wide)|\x1aE\xdf\xa3|RIFF.{4}AVI |\0\0\x01\xba)/s,
};

// Returns the file of a drop or a paste. Of several files it is the first image.
export function pickFile(transfer) {
  const files = [...transfer.files];
  const image = files.find(({ type }) => type.startsWith("image/"));
  const folder = [...(transfer.items ?? [])].map((item) => item.webkitGetAsEntry?.()).find((entry) => entry?.isDirectory);
  if (!image && folder) throw new Error(`${folder.name} is a folder: drop one image file.`);
  if (!files.length) throw new Error("This is the address of an image, not its file: copy the image and paste it here, or save it and drop the file.");
  return image ?? files[0];
}

// Returns {parameters, warnings} of an image whose file says how it was made, or {image, note} to start from. An error's message is for the user.
export async function readUpload(file) {
  if (/^(audio|video)\//.test(file.type)) throw new Error(`${file.name} is ${file.type}, no image.`);
  if (file.size > MAX_READ) throw new Error(`${file.name} has ${show(file.size)}: an image file has at most ${show(MAX_READ)}.`);
  const format = findFormat(await readBytes(file.slice(0, HEAD), file.name));
  if (format === VIDEO) throw new Error(`${file.name} is ${VIDEO}, no image.`);
  const bytes = await readBytes(file, file.name); // a copy: the file may change or vanish before it is sent
  const made = await readMetadata(bytes);
  if (made) return { parameters: made.request, warnings: made.warnings };
  const image = new Blob([bytes], { type: format === "SVG" ? "image/svg+xml" : file.type });
  const shown = await loadImage(image).catch(() => null);
  const isAccepted = ACCEPTED.includes(format) && file.size <= MAX_UPLOAD;
  if (shown && isAccepted) await checkWhole(image, file.name, format);
  if (!shown && isAccepted && PARTLY_SHOWN.includes(format)) return { image, note: `This browser cannot show ${format}. The server can read it.` };
  if (!shown) throw new Error(`${file.name} ${explain(format, file.size)}`);
  if (isAccepted && shown.naturalWidth * shown.naturalHeight <= MAX_PIXELS) return { image };
  return { image: await convert(shown, format) };
}

function explain(format, size) {
  const formats = `Use ${ACCEPTED.join(", ")}.`;
  if (!format) return `is no image that this browser can read. ${formats}`;
  if (!ACCEPTED.includes(format)) return `is ${format}, which neither this browser nor the server can read. ${formats}`;
  if (size > MAX_UPLOAD) return `has ${show(size)}, and this browser cannot reduce it. The server takes at most ${show(MAX_UPLOAD)}.`;
  return `is a damaged ${format}, or too large for this browser.`;
}

const show = (size) => (size < 1e9 ? `${Math.round(size / 1e5) / 10} MB` : `${(size / 1e9).toFixed(1)} GB`);

function findFormat(bytes) {
  const head = String.fromCharCode(...new Uint8Array(bytes));
  return Object.keys(SIGNATURES).find((name) => SIGNATURES[name].test(head));
}

function readBytes(blob, name) {
  return blob.arrayBuffer().catch((error) => {
    throw new Error(`${name} cannot be read: ${error.message}`);
  });
}

// An img shows the first part of a damaged file, which the server refuses.
function checkWhole(image, name, format) {
  return createImageBitmap(image).then((bitmap) => bitmap.close(), () => {
    throw new Error(`${name} is a damaged ${format}.`);
  });
}

// createImageBitmap reads no SVG, and older browsers ignore the orientation there.
export function loadImage(blob) {
  const image = new Image();
  const loaded = new Promise((resolve, reject) => Object.assign(image, { onload: () => resolve(image), onerror: () => reject(new Error("no image")) }));
  image.src = URL.createObjectURL(blob);
  return loaded.finally(() => URL.revokeObjectURL(image.src));
}

export function makeCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

export function saveCanvas(canvas, type = "image/png") {
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("This browser cannot convert the image."))), type, 0.95);
  });
}

// Draws the image anew, on white as the server does.
function convert(image, format) {
  const longest = Math.max(image.naturalWidth, image.naturalHeight);
  if (!longest) throw new Error("The drawing has no width and height: save it as PNG.");
  const scale = format === "SVG" ? SVG_SIDE / longest : Math.min(1, MAX_SIDE / longest);
  const [width, height] = [image.naturalWidth, image.naturalHeight].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = makeCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(image, 0, 0, width, height);
  return saveCanvas(canvas, format === "SVG" ? "image/png" : "image/jpeg");
}
