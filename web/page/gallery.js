// The gallery of images in this browser's IndexedDB: {id, file, parameters, uploads, calls, source}.

import { openStore } from "./database.js";

export const MAX_IMAGES = 200;
export const MAX_BYTES = 500e6; // with the uploads of each image; Safari asks its user above 1 GB
const use = openStore("gallery", "pictures", { keyPath: "id", autoIncrement: true }); // named so by earlier versions

// Fails where the browser keeps no data of this page.
export async function openGallery() {
  await use("readonly", (store) => store.count());
  return { list, add, remove };
}

// Returns all images, the newest first.
async function list() {
  return (await use("readonly", (store) => store.getAll())).reverse();
}

// Returns the image's id, and the ids of the removed ones. Two tabs that add the image of one source add it once.
async function add(image) {
  const leaving = [];
  let id;
  await use("readwrite", (store) => {
    const reading = store.getAll();
    reading.onsuccess = () => {
      id = reading.result.find(({ source }) => source && source === image.source)?.id;
      if (id !== undefined) return;
      leaving.push(...findLeaving([...reading.result, image]));
      leaving.forEach((each) => store.delete(each));
      store.add(image).onsuccess = ({ target }) => (id = target.result);
    };
    return reading;
  });
  return { id, leaving };
}

function remove(id) {
  return use("readwrite", (store) => store.delete(id));
}

// Returns the ids of the oldest images that exceed a limit. The newest image stays.
function findLeaving(images) {
  const newest = [...images].reverse();
  let bytes = 0;
  const first = newest.findIndex((image, index) => {
    bytes += measure(image);
    return index > 0 && (index >= MAX_IMAGES || bytes > MAX_BYTES);
  });
  return first < 0 ? [] : newest.slice(first).map(({ id }) => id);
}

function measure({ file, uploads = {} }) {
  return [file, ...Object.values(uploads)].reduce((bytes, { size }) => bytes + size, 0);
}
