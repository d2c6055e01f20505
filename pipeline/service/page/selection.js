// The images that are selected, and what can be made of them: a table, a file.

const BATCH = 1000; // as many as one request may ask for

export class Selection {
  // changed() is called whenever another set of images is selected.
  constructor(changed) {
    this.rows = new Map(); // columns by key; null where they are not known yet
    this.changed = changed;
  }

  has(key) {
    return this.rows.has(key);
  }

  get keys() {
    return [...this.rows.keys()];
  }

  toggle(key, metadata, on = !this.rows.has(key)) {
    if (on) this.rows.set(key, metadata ?? null);
    else this.rows.delete(key);
    this.changed();
  }

  add(keys) {
    for (const key of keys) if (!this.rows.has(key)) this.rows.set(key, null);
    this.changed();
  }

  clear() {
    this.rows.clear();
    this.changed();
  }

  // Asks for the columns that are not known yet; askItems(keys) gives the items.
  async complete(askItems) {
    const unknown = this.keys.filter((key) => this.rows.get(key) === null);
    for (let first = 0; first < unknown.length; first += BATCH) {
      for (const { key, metadata } of await askItems(unknown.slice(first, first + BATCH))) this.rows.set(key, metadata);
    }
    return this.keys.map((key) => ({ key, ...this.rows.get(key) }));
  }
}

export const toJson = (rows) => JSON.stringify(rows, null, 2) + "\n";

// As RFC 4180 has it: lines end in CR LF, a mark in a value puts it in quotes.
export function toCsv(rows) {
  const names = [...new Set(rows.flatMap(Object.keys))];
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = [names, ...rows.map((row) => names.map((name) => row[name]))];
  return lines.map((line) => line.map(cell).join(",") + "\r\n").join("");
}

export function saveFile(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
