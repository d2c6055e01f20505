// Filters as text: taken apart into the conditions that "and" joins, and written again.

const TOKEN = /\s*(?:"((?:[^"]|"")*)"|'((?:[^']|'')*)'|([(),])|(!=|<=|>=|\^=|[=<>~])|([^\s"'(),=<>~!^]+))/y;
const OPENERS = { "(": 1, ")": -1 };

function readTokens(text) {
  const tokens = [];
  TOKEN.lastIndex = 0;
  while (text.slice(TOKEN.lastIndex).trim()) {
    const start = TOKEN.lastIndex;
    const match = TOKEN.exec(text);
    if (!match) return null;
    const [, double, single, mark, operator, word] = match;
    const quoted = double?.replaceAll('""', '"') ?? single?.replaceAll("''", "'");
    const isQuoted = quoted !== undefined;
    tokens.push({ value: quoted ?? mark ?? operator ?? word, isQuoted, start, end: TOKEN.lastIndex });
  }
  return tokens;
}

// Conditions that "and" joins at the top; a text with an "or" there, or with a mistake, is one condition.
export function splitConditions(text) {
  if (!text.trim()) return [];
  const tokens = readTokens(text);
  if (!tokens) return [{ text: text.trim(), tokens: [] }];
  const parts = [[]];
  let depth = 0;
  for (const token of tokens) {
    if (!token.isQuoted) depth += OPENERS[token.value] ?? 0;
    const word = !token.isQuoted && !depth && token.value.toLowerCase();
    if (word === "or") return [{ text: `(${text.trim()})`, tokens: [] }];
    if (word === "and") parts.push([]);
    else parts.at(-1).push(token);
  }
  return parts
    .filter((part) => part.length)
    .map((part) => ({ text: text.slice(part[0].start, part.at(-1).end).trim(), tokens: part }));
}

// What conditions of the plainest form say about a column: its values, its bounds, or null.
function readCondition({ tokens }, column) {
  const [first, second, ...rest] = tokens;
  if (!first || !second || first.value !== column || second.isQuoted) return null;
  const operator = second.value.toLowerCase();
  if (operator === "in") return { values: rest.filter((t) => t.isQuoted || !"(),".includes(t.value)).map((t) => t.value) };
  if (rest.length !== 1) return null;
  const [{ value }] = rest;
  return { "=": { values: [value] }, ">=": { low: value }, "<=": { high: value } }[operator] ?? null;
}

export function readFacet(text, column) {
  return splitConditions(text).reduce(
    (facet, condition) => ({ ...facet, ...readCondition(condition, column) }),
    { values: [], low: "", high: "" },
  );
}

export function writeFacet(text, column, { values, low, high }) {
  const others = splitConditions(text).filter((one) => !readCondition(one, column));
  const name = quote(column);
  const texts = others.map((one) => one.text);
  if (values.length === 1) texts.push(`${name} = ${quote(values[0])}`);
  if (values.length > 1) texts.push(`${name} in (${values.map(quote).join(", ")})`);
  if (low !== "") texts.push(`${name} >= ${quote(low)}`);
  if (high !== "") texts.push(`${name} <= ${quote(high)}`);
  return texts.join(" and ");
}

const WORDS = new Set(["and", "or", "not", "in", "is", "null"]);

function quote(value) {
  const text = String(value);
  if (/^[\w.+-][\w.:+-]*$/.test(text) && !WORDS.has(text.toLowerCase())) return text;
  return `"${text.replaceAll('"', '""')}"`;
}
