// Asks the server what a file says about how its image was made.

import { ask } from "./api.js";

const PATH = "/predictions/diffusion_fast/1.0/metadata";
// Metadata is behind one of these marks: our own, a PNG's texts, and the codes of EXIF's UserComment. The server answers
// between two steps of an image. A photo without a mark does not wait for that.
const MARKS = /urn:sdxl_server|(tEXt|iTXt|zTXt)(parameters|prompt)\0|UNICODE\0|ASCII\0\0\0/;

// Returns {request, warnings, made_with}, or null if the file has none or the server does not answer.
export async function readMetadata(bytes) {
  if (!MARKS.test(new TextDecoder("latin1").decode(bytes))) return null;
  try {
    return await (await ask(PATH, { method: "POST", body: bytes, type: "application/octet-stream" })).json();
  } catch {
    return null;
  }
}
