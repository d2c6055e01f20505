// The API, shown from its own OpenAPI document.

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
  const details = make("details", { children: [make("summary", { text: "Answers" }), makeTable(answers)] });
  return make("article", { className: "block", children: [...parts, details] });
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
