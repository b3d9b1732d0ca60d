// The gallery of images in this browser's IndexedDB: {id, file, parameters, uploads, calls}.

export const MAX_IMAGES = 200;
const STORE = "pictures";

export async function openGallery() {
  const request = indexedDB.open("gallery", 1);
  request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
  return new Gallery(await finish(request));
}

class Gallery {
  constructor(database) {
    this.database = database;
  }

  // Returns all images, the newest first.
  async list() {
    return (await finish(this.#use("readonly").getAll())).reverse();
  }

  // Returns the image with its id, and the ids of the removed ones.
  async add(image) {
    const store = this.#use("readwrite");
    const id = await finish(store.add(image));
    const ids = await finish(store.getAllKeys());
    const leaving = ids.slice(0, Math.max(0, ids.length - MAX_IMAGES));
    await Promise.all(leaving.map((each) => finish(store.delete(each))));
    return { kept: { ...image, id }, leaving };
  }

  remove(id) {
    return finish(this.#use("readwrite").delete(id));
  }

  #use(mode) {
    return this.database.transaction(STORE, mode).objectStore(STORE);
  }
}

function finish(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
