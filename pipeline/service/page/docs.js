// The API, shown from its own OpenAPI document.

const apiKey = sessionStorage.getItem("api-key"); // the page asks for it
const headers = apiKey ? { "X-API-Key": apiKey } : {};
const response = await fetch("openapi.json");
const document_ = await response.json();

function make(name, { text, className, children = [] } = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  made.append(...children);
  return made;
}

const nameOf = (reference) => reference.slice(reference.lastIndexOf("/") + 1);

// Returns nodes: a type in words, with links to the schemas it names.
function describeType(schema) {
  if (schema.$ref) {
    const link = make("a", { text: nameOf(schema.$ref) });
    link.href = `#${nameOf(schema.$ref)}`;
    return [link];
  }
  const options = schema.anyOf ?? schema.oneOf;
  if (options) return options.flatMap((option, i) => [...(i ? [" or "] : []), ...describeType(option)]);
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" | ")];
  if (schema.const !== undefined) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...describeType(schema.items ?? {})];
  if (schema.contentSchema) return ["JSON of ", ...describeType(schema.contentSchema)];
  if (schema.contentMediaType) return ["file"];
  const limits = [
    schema.minimum !== undefined && `≥ ${schema.minimum}`,
    schema.maximum !== undefined && `≤ ${schema.maximum}`,
    schema.maxLength !== undefined && `≤ ${schema.maxLength} characters`,
    schema.contentEncoding,
  ].filter(Boolean);
  return [[schema.type ?? "any", ...limits].join(", ")];
}

// Markdown's `code` is all that the descriptions use.
function describeText(text = "") {
  return text
    .split(/`+/)
    .map((part, i) => (i % 2 ? make("code", { text: part }) : part));
}

function makeRow(name, schema, required) {
  const fallback = schema.default === undefined || schema.default === null ? "" : ` = ${JSON.stringify(schema.default)}`;
  return make("tr", {
    children: [
      make("th", { children: [make("code", { text: name + (required ? "" : "?") })] }),
      make("td", { children: [...describeType(schema), fallback] }),
      make("td", { children: describeText(findDescription(schema)) }),
    ],
  });
}

// What may be null has its description one level down.
const findDescription = (schema) =>
  schema.description ?? schema.anyOf?.map(findDescription).find((text) => text);

function makeTable(rows) {
  return make("div", { className: "scroll", children: [make("table", { children: rows })] });
}

function makeSchema(name, schema) {
  const rows = Object.entries(schema.properties ?? {}).map(([key, value]) =>
    makeRow(key, value, schema.required?.includes(key)),
  );
  const section = make("article", {
    className: "block",
    children: [
      make("h3", { text: name }),
      make("p", { className: "hint", children: describeText(schema.description) }),
      makeTable(rows),
    ],
  });
  section.id = name;
  return section;
}

function makeOperation(path, method, operation) {
  const parts = [
    make("h3", { children: [make("span", { text: method.toUpperCase(), className: "method" }), make("code", { text: path })] }),
    make("p", { children: describeText(operation.description) }),
  ];
  const parameters = (operation.parameters ?? []).map((parameter) =>
    makeRow(parameter.name, { ...parameter.schema, description: parameter.description }, parameter.required),
  );
  if (parameters.length) parts.push(makeTable(parameters));
  for (const [type, { schema }] of Object.entries(operation.requestBody?.content ?? {})) {
    parts.push(make("p", { className: "body", children: ["Body ", make("code", { text: type }), ": ", ...describeBody(schema)] }));
  }
  const answers = Object.entries(operation.responses).map(([status, answer]) => {
    const schema = Object.values(answer.content ?? {})[0]?.schema;
    return make("tr", {
      children: [
        make("th", { children: [make("code", { text: status })] }),
        make("td", { children: schema ? describeType(schema) : [] }),
        make("td", { children: describeText(status === "200" ? "" : answer.description) }),
      ],
    });
  });
  parts.push(...makeExample(path, method, operation));
  const details = make("details", { children: [make("summary", { text: "Answers" }), makeTable(answers)] });
  return make("article", { className: "block", children: [...parts, details] });
}

// An example of each operation, about an image of this index: to copy, and to try from here.
const some = await fetch("v1/sample?n=2", { headers }).then((one) => (one.ok ? one.json() : { items: [] }));
const [key, other] = [...some.items.map((item) => item.key), "an/image.jpg", "another.jpg"];
const BODIES = {
  "/v1/search": { query: { key }, k: 3 },
  "/v1/search/batch": { searches: [{ query: { key }, k: 1 }, { query: { like: [key, other] }, k: 1 }] },
  "/v1/items": { keys: [key, other] },
};
const VALUES = { key, size: "256", n: "3", neighbours: "2" };
const MAX_SHOWN = 4000;

function makeExample(path, method, operation) {
  const given = (operation.parameters ?? []).filter(({ name, in: place }) => place === "query" && VALUES[name]);
  const query = new URLSearchParams(given.map(({ name }) => [name, VALUES[name]]));
  const address = path.slice(1).replace("{key}", encodeURIComponent(key)) + (given.length ? `?${query}` : "");
  const body = BODIES[path];
  const isPicture = method === "post" && !body;
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const command = [
    `curl ${quote(new URL(address, location.href).href)}`,
    apiKey ? '-H "X-API-Key: $KEY"' : "",
    body ? `-H 'Content-Type: application/json' -d ${quote(JSON.stringify(body))}` : "",
    isPicture ? "-F images=@picture.jpg" : "",
  ].filter(Boolean).join(" \\\n  ");
  const copy = make("button", { text: "Copy", className: "quiet" });
  copy.onclick = async () => {
    await navigator.clipboard?.writeText(command);
    copy.textContent = "Copied";
  };
  const answer = make("pre", { className: "answer" });
  answer.hidden = true;
  const attempt = make("button", { text: "Try it", className: "button" });
  attempt.onclick = async () => {
    const json = body && { method: "POST", body: JSON.stringify(body) };
    const type = body && { "Content-Type": "application/json" };
    const found = await fetch(address, { ...json, headers: { ...headers, ...type } });
    answer.replaceChildren(...(await showAnswer(found)));
    answer.hidden = false;
  };
  const buttons = make("p", { className: "actions", children: isPicture ? [copy] : [attempt, copy] });
  return [make("pre", { text: command }), buttons, answer];
}

async function showAnswer(found) {
  const type = found.headers.get("content-type") ?? "";
  const head = `${found.status} ${type}\n`;
  if (type.startsWith("image/")) {
    const image = make("img");
    image.alt = "The picture";
    image.src = URL.createObjectURL(await found.blob());
    return [head, image];
  }
  const text = await found.text();
  const shown = type.includes("json") ? JSON.stringify(JSON.parse(text), null, 2) : text;
  return [head + (shown.length > MAX_SHOWN ? `${shown.slice(0, MAX_SHOWN)}\n…` : shown)];
}

function describeBody(schema) {
  if (!schema.properties) return describeType(schema);
  return Object.entries(schema.properties).flatMap(([name, value], i) => [
    ...(i ? [" · "] : []),
    make("code", { text: name + (schema.required?.includes(name) ? "" : "?") }),
    " ",
    ...describeType(value),
  ]);
}

document.getElementById("description").append(...describeText(document_.info.description));
document.getElementById("operations").append(
  ...Object.entries(document_.paths).flatMap(([path, operations]) =>
    Object.entries(operations).map(([method, operation]) => makeOperation(path, method, operation)),
  ),
);
document.getElementById("schemas").append(
  ...Object.entries(document_.components.schemas).map(([name, schema]) => makeSchema(name, schema)),
);
