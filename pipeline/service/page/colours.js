// Colours of points by a column: one each for its most frequent values, or a ramp over its range.

const GROUPS = ["#2f7ed8", "#e8662c", "#2ca25f", "#c23b8f", "#d6a700", "#7a5cc0", "#1aa7b5", "#b5542a", "#6b8e23", "#d1495b"];
const RAMP = ["#3b3a8f", "#2a788e", "#22a884", "#a5c93c", "#f0d43a"];
const OTHER = "#8a949c";

// Returns the colour of each point, by number, with the colours themselves and a legend.
export function makeColours(values, facet) {
  if (!values) return { palette: null, of: null, legend: [] };
  const isNumber = values.some((value) => typeof value === "number") && new Set(values).size > GROUPS.length;
  return isNumber ? makeRamp(values) : makeGroups(values, facet);
}

function makeGroups(values, facet) {
  const counts = new Map();
  for (const value of values) if (value !== null) counts.set(String(value), (counts.get(String(value)) ?? 0) + 1);
  const names = facet?.values.length
    ? facet.values.map(({ value }) => String(value))
    : [...counts].sort(([, a], [, b]) => b - a).map(([name]) => name);
  const shown = names.slice(0, GROUPS.length);
  const order = new Map(shown.map((name, i) => [name, i]));
  const of = values.map((value) => (value === null ? GROUPS.length : order.get(String(value)) ?? GROUPS.length));
  const legend = shown.map((text, i) => ({ text, colour: GROUPS[i] }));
  if (of.includes(GROUPS.length)) legend.push({ text: "others", colour: OTHER });
  return { palette: [...GROUPS, OTHER], of, legend };
}

function makeRamp(values) {
  const numbers = values.filter((value) => typeof value === "number").sort((a, b) => a - b);
  // By rank: one price of a million would leave all others one colour.
  const cuts = RAMP.slice(1).map((_, i) => numbers[Math.floor(((i + 1) * numbers.length) / RAMP.length)]);
  const find = (value) => (typeof value === "number" ? cuts.filter((cut) => value >= cut).length : RAMP.length);
  const short = (value) => Number(value.toPrecision(4)).toLocaleString("en");
  const legend = RAMP.map((colour, i) => ({
    colour,
    text: i ? `${short(cuts[i - 1])} and more` : `less than ${short(cuts[0])}`,
  }));
  const of = values.map(find);
  if (of.includes(RAMP.length)) legend.push({ text: "none", colour: OTHER });
  return { palette: [...RAMP, OTHER], of, legend };
}
