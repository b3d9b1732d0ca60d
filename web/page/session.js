// What this tab remembers: in sessionStorage, or until a reload where the browser blocks it or it is full.

const memory = new Map();

export function keepText(name, text) {
  memory.set(name, text);
  try {
    sessionStorage.setItem(name, text);
  } catch {
    // the memory has it
  }
}

export function findText(name) {
  try {
    return memory.get(name) ?? sessionStorage.getItem(name);
  } catch {
    return null;
  }
}
