// Facets: what the columns hold, with counts and ranges; a click writes the filter.

import { readFacet, writeFacet } from "./filter.js";

const SHOWN = 8;
const FEW = 10; // numbers that are listed; of more, the range is more use
const LAST = new Set(["width", "height"]); // what every collection has
const number = (value) => value.toLocaleString("en");

function make(name, { text, className, children = [], ...attributes } = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// read() gives the filter's text, write(text) applies another.
export function showFacets(place, columns, { read, write }) {
  const worth = columns.filter((column) => column.values.length > 1 || isRange(column));
  const order = (column) => Number(LAST.has(column.name));
  worth.sort((a, b) => order(a) - order(b));
  const open = new Set([...place.querySelectorAll("details[open]")].map((one) => one.dataset.column));
  const known = place.children.length > 0;
  place.replaceChildren(
    ...worth.map((column, i) => {
      const used = isUsed(readFacet(read(), column.name));
      const body = column.values.length > 1 && !(isRange(column) && column.distinct > FEW) ? makeValues(column, { read, write }) : makeRange(column, { read, write });
      const details = make("details", { className: "facet", children: [make("summary", { text: column.name }), body] });
      details.dataset.column = column.name;
      details.open = used || (known ? open.has(column.name) : i < 4);
      return details;
    }),
  );
}

const isRange = ({ low, high }) => low !== null && low !== undefined && low !== high;
const isUsed = ({ values, low, high }) => values.length > 0 || low !== "" || high !== "";

function makeValues(column, { read, write }) {
  const list = make("ul", { className: "values" });
  const chosen = new Set(readFacet(read(), column.name).values);
  const most = Math.max(...column.values.map(({ count }) => count));
  const items = column.values.map(({ value, count }) => {
    const box = make("input", { type: "checkbox" });
    box.checked = chosen.has(String(value));
    box.onchange = () => {
      const facet = readFacet(read(), column.name);
      const values = facet.values.filter((other) => other !== String(value));
      if (box.checked) values.push(String(value));
      write(writeFacet(read(), column.name, { ...facet, values }));
    };
    const bar = make("meter", { min: 0, max: most, value: count, "aria-hidden": "true" });
    const name = make("span", { text: String(value), className: "value", title: String(value) });
    const label = make("label", { children: [box, name, bar, make("span", { text: number(count), className: "count" })] });
    return make("li", { children: [label] });
  });
  list.append(...items.slice(0, SHOWN));
  const hidden = items.slice(SHOWN);
  if (hidden.length && ![...hidden].some((item) => item.querySelector("input").checked)) {
    const more = make("button", { text: `${number(hidden.length)} more`, className: "quiet", type: "button" });
    more.onclick = () => more.parentElement.replaceWith(...hidden);
    list.append(make("li", { children: [more] }));
  } else {
    list.append(...hidden);
  }
  return list;
}

function makeRange(column, { read, write }) {
  const facet = readFacet(read(), column.name);
  const inputs = ["low", "high"].map((end) => {
    const input = make("input", {
      type: "text",
      inputmode: "decimal",
      placeholder: shorten(column[end]),
      "aria-label": `${end === "low" ? "Least" : "Most"} ${column.name}`,
    });
    input.value = facet[end];
    input.onchange = () =>
      write(writeFacet(read(), column.name, { ...readFacet(read(), column.name), [end]: input.value.trim() }));
    return input;
  });
  const row = make("div", { className: "ends", children: [inputs[0], make("span", { text: "to" }), inputs[1]] });
  return make("div", { children: column.bins.length > 1 ? [drawBins(column, facet), row] : [row] });
}

const shorten = (value) => (typeof value === "number" ? String(Number(value.toPrecision(6))) : String(value));

function drawBins({ bins, low, high }, facet) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${bins.length} 24`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const most = Math.max(...bins);
  const step = (high - low) / bins.length;
  bins.forEach((count, i) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = count ? Math.max(1, (24 * count) / most) : 0;
    const [from, to] = [low + i * step, low + (i + 1) * step];
    const isIn = (facet.low === "" || to >= Number(facet.low)) && (facet.high === "" || from <= Number(facet.high));
    for (const [name, value] of Object.entries({ x: i + 0.08, y: 24 - height, width: 0.84, height })) bar.setAttribute(name, value);
    bar.setAttribute("class", isIn ? "in" : "out");
    svg.append(bar);
  });
  return svg;
}
