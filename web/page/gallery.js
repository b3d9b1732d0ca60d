// The gallery of images in this browser's IndexedDB: {id, file, parameters, uploads, calls}.

export const MAX_IMAGES = 200;
export const MAX_BYTES = 500e6; // with the uploads of each image; Safari asks its user above 1 GB
const STORE = "pictures"; // named so by earlier versions

// Fails where the browser keeps no data of this page.
export async function openGallery() {
  await use("readonly", (store) => store.count());
  return { list, add, remove };
}

// Returns all images, the newest first.
async function list() {
  return (await use("readonly", (store) => store.getAll())).reverse();
}

// Returns the image's id, and the ids of the removed ones.
async function add(image) {
  const leaving = [];
  const id = await use("readwrite", (store) => {
    store.getAll().onsuccess = ({ target }) => {
      leaving.push(...findLeaving([...target.result, image]));
      leaving.forEach((each) => store.delete(each));
    };
    return store.add(image);
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

// Runs one transaction. Its end, not the request's, says that the data is kept. Browsers close idle connections, so each
// transaction opens its own.
async function use(mode, act) {
  const opening = indexedDB.open("gallery", 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
  const database = await new Promise((resolve, reject) => {
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  try {
    const transaction = database.transaction(STORE, mode);
    const request = act(transaction.objectStore(STORE));
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error ?? new Error("it was interrupted"));
    });
    return request.result;
  } finally {
    database.close();
  }
}
