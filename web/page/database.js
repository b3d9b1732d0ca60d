// Transactions of IndexedDB.

// Returns a function that runs one transaction. Its end, not the request's, says that the data is kept. Browsers close
// idle connections, so each transaction opens its own.
export function openStore(name, store, options = {}) {
  return async (mode, act) => {
    const opening = indexedDB.open(name, 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(store, options);
    const database = await new Promise((resolve, reject) => {
      opening.onsuccess = () => resolve(opening.result);
      opening.onerror = () => reject(opening.error);
    });
    try {
      const transaction = database.transaction(store, mode);
      const request = act(transaction.objectStore(store));
      await new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = () => reject(transaction.error ?? new Error("it was interrupted"));
      });
      return request.result;
    } finally {
      database.close();
    }
  };
}
