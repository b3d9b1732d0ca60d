// Reads the metadata of an image file, as sdxl_server/api/image_files.py writes it: from a PNG's text chunk
// `parameters`, or from the EXIF UserComment of a JPEG or WebP.

const EXIF_POINTER = 0x8769;
const USER_COMMENT = 0x9286;

// Returns {request, warnings, made_with}, or null if the file has none.
export function readMetadata(view) {
  try {
    const text = findText(view);
    const found = text === null ? null : JSON.parse(text);
    return typeof found?.request?.prompt === "string" ? found : null;
  } catch (error) {
    if (error instanceof RangeError || error instanceof SyntaxError) return null; // cut short, or from another program
    throw error;
  }
}

function findText(view) {
  if (view.getUint32(0) === 0x89504e47) return readPng(view);
  if (view.getUint16(0) === 0xffd8) return readComment(findJpegExif(view));
  if (readAscii(view, 0, 4) === "RIFF" && readAscii(view, 8, 4) === "WEBP") return readComment(findWebpExif(view));
  return null;
}

function readPng(view) {
  for (let at = 8; at + 12 <= view.byteLength; at += 12 + view.getUint32(at)) {
    const length = view.getUint32(at);
    const key = "parameters\0\0"; // the second byte: not compressed
    if (readAscii(view, at + 4, 4) === "iTXt" && readAscii(view, at + 8, key.length) === key) {
      const [, , ...text] = new TextDecoder().decode(slice(view, at + 8 + key.length + 1, at + 8 + length)).split("\0");
      return text.join("\0"); // after a language and a translated key, both empty
    }
  }
  return null;
}

function findJpegExif(view) {
  for (let at = 2; view.getUint8(at) === 0xff && view.getUint8(at + 1) !== 0xda; at += 2 + view.getUint16(at + 2)) {
    if (view.getUint8(at + 1) === 0xe1 && readAscii(view, at + 4, 6) === "Exif\0\0") {
      return slice(view, at + 10, at + 2 + view.getUint16(at + 2));
    }
  }
  return null;
}

function findWebpExif(view) {
  for (let at = 12; at + 8 <= view.byteLength; ) {
    const length = view.getUint32(at + 4, true);
    if (readAscii(view, at, 4) === "EXIF") {
      const exif = slice(view, at + 8, at + 8 + length);
      return readAscii(exif, 0, 6) === "Exif\0\0" ? slice(exif, 6, length) : exif;
    }
    at += 8 + length + (length % 2);
  }
  return null;
}

function readComment(exif) {
  if (exif === null) return null;
  const isLittle = readAscii(exif, 0, 2) === "II";
  const pointer = findEntry(exif, exif.getUint32(4, isLittle), EXIF_POINTER, isLittle);
  const entry = pointer && findEntry(exif, exif.getUint32(pointer + 8, isLittle), USER_COMMENT, isLittle);
  if (!entry) return null;
  const [length, start] = [exif.getUint32(entry + 4, isLittle), exif.getUint32(entry + 8, isLittle)];
  if (readAscii(exif, start, 8) !== "UNICODE\0") return null;
  return new TextDecoder("utf-16be").decode(slice(exif, start + 8, start + length));
}

// Returns where a tag's entry of twelve bytes begins, or undefined.
function findEntry(exif, directory, tag, isLittle) {
  const count = exif.getUint16(directory, isLittle);
  const entries = Array.from({ length: count }, (_, index) => directory + 2 + 12 * index);
  return entries.find((entry) => exif.getUint16(entry, isLittle) === tag);
}

function readAscii(view, at, length) {
  return String.fromCharCode(...Array.from({ length }, (_, index) => view.getUint8(at + index)));
}

function slice(view, start, end) {
  return new DataView(view.buffer, view.byteOffset + start, end - start);
}
