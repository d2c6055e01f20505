// Pictures the visitor brought. They are kept in the browser's own store, so that a reload finds them.

const KEPT = 20;
const MAX_AGE_MS = 24 * 3600 * 1000;
const uploads = new Map(); // by number: { file, name, url }

function openStore(mode) {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("lookups", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("uploads");
    request.onerror = () => reject(request.error);
    request.onsuccess = () => resolve(request.result.transaction("uploads", mode).objectStore("uploads"));
  });
}

const waitFor = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

export const findUpload = (id) => uploads.get(id);
export const hasUpload = (id) => uploads.has(id);

// Returns its number, which is the time it came at. Where there is no store it lives as long as the tab.
export async function keepUpload(file) {
  const id = Date.now();
  const name = file.name || "Pasted picture";
  uploads.set(id, { file, name, url: URL.createObjectURL(file) });
  try {
    const store = await openStore("readwrite");
    store.put({ file, name }, id);
    const known = (await waitFor(store.getAllKeys())).sort();
    for (const old of known.filter((key, i) => i < known.length - KEPT || key < id - MAX_AGE_MS)) store.delete(old);
  } catch {
    // A private window may have no store; the picture is searched with all the same.
  }
  return id;
}

// Brings a picture of before the reload back, if the address is about one.
export async function recallUpload(id) {
  if (id === undefined || id === null || uploads.has(id)) return;
  try {
    const kept = await waitFor((await openStore("readonly")).get(id));
    if (kept) uploads.set(id, { ...kept, url: URL.createObjectURL(kept.file) });
  } catch {
    // As if it had been thrown away.
  }
}
