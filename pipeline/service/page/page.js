// The page: its state is its address, so that reload, back and sharing just work.

import { MapView } from "./map.js";

const $ = (id) => document.getElementById(id);
const uploads = new Map(); // pictures the visitor brought, by number; they live as long as the tab
const found = new Map(); // answers by request, so that back is instant
let apiKey = sessionStorage.getItem("api-key") ?? "";
let info = null;
let map = null;
let running = new AbortController();
const MAX_OFFSET = 1000; // the service leaves out no more

// ---------------------------------------------------------------------- asking the service

class Problem extends Error {
  constructor(status, body) {
    super(body.detail ?? `The service answered ${status}.`);
    this.status = status;
    this.where = body.where;
  }
}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (apiKey) headers.set("X-API-Key", apiKey);
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { detail: "The service cannot be reached." });
  }
  if (response.status === 401) {
    await askForKey();
    return ask(path, options);
  }
  if (!response.ok) throw new Problem(response.status, await response.json().catch(() => ({})));
  return response;
}

const askJson = async (path, options) =>
  JSON.parse(await (await ask(path, options)).text(), keepDigits);

// Integers of 64 bits that JavaScript would round stay the text they are in the answer.
function keepDigits(_, value, context) {
  const rounded = Number.isInteger(value) && !Number.isSafeInteger(value);
  return rounded && /^-?\d+$/.test(context?.source) ? context.source : value;
}

let asking = null;

function askForKey() {
  asking ??= new Promise((resolve, reject) => {
    $("key-error").hidden = !apiKey;
    $("key-form").onsubmit = () => {
      apiKey = $("key").value.trim();
      sessionStorage.setItem("api-key", apiKey);
      asking = null;
      resolve();
    };
    $("ask-key").onclose = () => {
      if (!asking) return;
      asking = null;
      reject(new Problem(401, { detail: "Nothing is shown here without an API key." }));
    };
    $("ask-key").showModal();
  });
  return asking;
}

// As a parameter, not in the path: browsers tidy up "./", "../" and "//" there, escaped or not.
const imageUrl = (key, size) => `v1/image?${new URLSearchParams({ key, size })}`;

async function loadBlob(key, size) {
  return (await ask(imageUrl(key, size))).blob();
}

async function showImage(image, key, size) {
  if (!apiKey) {
    image.src = imageUrl(key, size);
    return;
  }
  try {
    image.src = URL.createObjectURL(await loadBlob(key, size));
    image.onload = () => URL.revokeObjectURL(image.src);
  } catch {
    image.dispatchEvent(new Event("error"));
  }
}

// ---------------------------------------------------------------------- the address

function readState() {
  const query = new URLSearchParams(location.search);
  const upload = uploads.has(history.state?.upload) ? history.state.upload : null;
  return {
    key: (upload === null && query.get("key")) || null,
    upload,
    filter: query.get("filter") ?? "",
    k: Number(query.get("k")) || 24,
    exact: query.has("exact"),
    view: query.get("view") === "map" ? "map" : "grid",
  };
}

function addressOf(state) {
  const query = new URLSearchParams();
  if (state.key) query.set("key", state.key);
  if (state.filter) query.set("filter", state.filter);
  if (state.k !== 24) query.set("k", state.k);
  if (state.exact) query.set("exact", "");
  if (state.view === "map") query.set("view", "map");
  return `?${query}`;
}

function go(changes) {
  const state = { ...readState(), ...changes };
  if (changes.key) state.upload = null;
  history.pushState({ upload: state.upload }, "", addressOf(state));
  return render();
}

const goTo = (key) => go({ key, view: "grid" }).then(() => scrollTo({ top: 0 }));

addEventListener("popstate", () => render());

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='?'], a#home");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  if (link.id === "home") history.pushState({}, "", "./");
  else if (link.dataset.key) history.pushState({}, "", link.search);
  else history.pushState({ upload: readState().upload }, "", link.search || "?");
  if ($("details").open) $("details").close();
  render();
  if (link.dataset.key) scrollTo({ top: 0 });
});

// ---------------------------------------------------------------------- showing

async function render() {
  const state = readState();
  const focused = document.activeElement;
  $("filter").value = state.filter;
  $("k").value = String(state.k);
  $("exact").checked = state.exact;
  $("view-grid").href = addressOf({ ...state, view: "grid" });
  $("view-map").href = addressOf({ ...state, view: "map" });
  showView(state);
  showQuery(state);
  running.abort();
  running = new AbortController();
  showProblem(null);
  try {
    await showResults(state);
  } catch (error) {
    if (error.name !== "AbortError") showProblem(error);
  } finally {
    $("grid").removeAttribute("aria-busy");
  }
  if (document.activeElement === document.body && focused !== document.body) focusCard();
}

async function showResults(state) {
  if (isAsked(state)) await showNeighbours(state);
  else if (state.view === "grid") await showSample(state);
  else showNoMarks();
  if (state.view === "map") await showMap(state);
}

const isAsked = ({ key, upload }) => key !== null || upload !== null;

// What was focused is gone: go on at the same image if it is there again, else at the first.
function focusCard(key) {
  const links = [...$("grid").querySelectorAll(".pick")].filter((link) => link.offsetParent);
  const link = links.find((other) => other.dataset.key === key) ?? links[0] ?? $("main");
  link.focus({ preventScroll: true });
}

function showProblem(error) {
  const inFilter = error?.where === "filter";
  $("error").hidden = !error || inFilter;
  $("filter-error").hidden = !inFilter;
  $(inFilter ? "filter-error" : "error").textContent = error?.message ?? "";
  $("filter").setAttribute("aria-invalid", String(inFilter));
  $("retry-place").hidden = !error || inFilter;
  $("retry").textContent = error?.status === 401 ? "Enter the API key" : "Try again";
  if (error) $("status").textContent = "";
  if (error && !inFilter) $("grid").replaceChildren();
}

function showView({ view }) {
  document.body.dataset.view = view;
  for (const name of ["grid", "map"]) {
    $(`${name}-view`).hidden = view !== name;
    if (view === name) $(`view-${name}`).setAttribute("aria-current", "page");
    else $(`view-${name}`).removeAttribute("aria-current");
  }
}

function showQuery(state) {
  const { key, upload } = state;
  const asked = isAsked(state);
  $("exact").closest("label").hidden = !asked; // only what acts on what is shown
  $("k").closest(".field").hidden = !asked && state.view === "map";
  const mine = uploads.get(upload);
  $("frame").hidden = !asked || (!mine && info?.images === false);
  $("query-title").textContent = mine ? mine.name : key === null ? "Find similar images" : baseName(key);
  $("view-grid").textContent = asked ? "Neighbours" : "Some images";
  document.title = asked ? `${mine ? mine.name : baseName(key)} · Image lookups` : "Image lookups";
  const hints = {
    first: info?.image_queries === false
      ? "Start from an indexed image below."
      : "Drop or paste a picture anywhere on this page, choose one, or start from an indexed one below.",
    mine: "Your picture, looked up among the indexed ones.",
    key: `In ${key?.slice(0, key.lastIndexOf("/")) || "the collection"}`,
  };
  $("query-text").textContent = mine ? hints.mine : key !== null ? hints.key : hints.first;
  $("query-image").alt = asked ? "The query" : "";
  $("query-image").onerror = () => ($("frame").hidden = true);
  $("classes").hidden = true;
  if (mine) $("query-image").src = mine.url;
  else if (key !== null && info?.images !== false) showImage($("query-image"), key, 512);
}

async function showSample({ filter, k }) {
  $("grid").setAttribute("aria-busy", "true");
  const { items } = await remember(["sample", filter, k], () => askSample(k, filter));
  const rows = info ? number(info.rows) : "the";
  const some = filter ? "images that fulfil the filter" : `of ${rows} indexed images`;
  $("status").textContent = items.length ? `${items.length} ${some}, at random` : NONE;
  fillGrid(items, { scored: false });
  showNoMarks();
}

const NONE = "No image fulfils the filter";

function askSample(n, filter, signal = running.signal) {
  return askJson(`v1/sample?${new URLSearchParams({ n, filter })}`, { signal });
}

function showNoMarks() {
  $("more").hidden = true;
  map?.setMarks(null, []);
}

async function showNeighbours(state) {
  $("grid").setAttribute("aria-busy", "true");
  const answer = await search(state, 0);
  showAnswer(state, answer, answer.results);
}

function showAnswer(state, answer, results) {
  if (info && answer.generation !== info.generation) loadInfo();
  const took = `${answer.took.search_ms.toFixed(1)} ms`;
  const embed = state.upload === null ? "" : `, the picture ${answer.took.embed_ms.toFixed(0)} ms`;
  $("status").textContent = results.length
    ? `${results.length} neighbours, found in ${took}${embed}`
    : NONE;
  fillGrid(results, { scored: true });
  showClasses(answer.classes);
  map?.setMarks(state.key, results.map((result) => result.key));
  $("more").hidden = answer.results.length < state.k || results.length > MAX_OFFSET;
  $("more").onclick = async () => {
    $("more").disabled = true;
    try {
      const next = await search(state, results.length);
      const first = results.length;
      showAnswer(state, next, [...results, ...next.results]);
      $("grid").children[first]?.querySelector("a").focus();
    } catch (error) {
      showProblem(error);
    } finally {
      $("more").disabled = false;
    }
  };
}

function search(state, offset) {
  const id = [state.key, state.upload, state.filter, state.k, state.exact, offset];
  return remember(id, () => requestSearch(state, offset));
}

async function remember(id, request) {
  const name = JSON.stringify(id);
  if (!found.has(name)) {
    if (found.size > 50) found.delete(found.keys().next().value);
    found.set(name, await request());
  }
  return found.get(name);
}

function requestSearch({ key, upload, filter, k, exact }, offset) {
  const include = info?.classes ? ["metadata", "classes"] : ["metadata"];
  const options = { k, offset, exact, include, ...(filter.trim() ? { filter } : {}) };
  const request = { method: "POST", signal: running.signal };
  if (upload === null) {
    request.headers = { "Content-Type": "application/json" };
    request.body = JSON.stringify({ query: { key }, ...options });
  } else {
    request.body = new FormData();
    request.body.append("image", uploads.get(upload).file);
    request.body.append("options", JSON.stringify(options));
  }
  return askJson("v1/search", request);
}

function showClasses(classes) {
  $("classes").hidden = !classes?.length;
  $("classes").replaceChildren(
    ...(classes ?? []).map(({ index, probability }) =>
      element("li", `class ${index} · ${(100 * probability).toFixed(1)} %`),
    ),
  );
}

// ---------------------------------------------------------------------- cards and details

function element(name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

const number = (value) => value.toLocaleString("en");
const baseName = (key) => key.slice(key.lastIndexOf("/") + 1) || key;

function fillGrid(results, { scored }) {
  const focused = document.activeElement;
  const inside = $("grid").contains(focused);
  $("grid").replaceChildren(...results.map((result) => makeCard(result, scored)));
  if (inside) focusCard(focused.closest(".card").querySelector(".pick").dataset.key);
}

function makeCard({ key, score, metadata }, scored) {
  const card = $("card").content.cloneNode(true).firstElementChild;
  const name = baseName(key);
  const link = card.querySelector("a");
  link.href = addressOf({ ...readState(), key, upload: null, view: "grid" });
  link.dataset.key = key;
  link.setAttribute("aria-label", `Search from ${name}${scored ? `, score ${score.toFixed(3)}` : ""}`);
  card.querySelector(".meter").hidden = !scored;
  card.querySelector(".meter span").style.width = `${Math.max(0, Math.min(1, score)) * 100}%`;
  card.querySelector(".score").textContent = scored ? score.toFixed(3) : "";
  card.querySelector(".score").hidden = !scored;
  card.querySelector(".name").textContent = name;
  card.querySelector(".name").title = key;
  card.querySelector(".info").setAttribute("aria-label", `Details of ${name}`);
  card.querySelector(".info").onclick = () => showDetails(key, metadata);
  card.querySelector(".facts").append(...listFacts(metadata).slice(0, 4).map(makeFact));
  fillThumb(card.querySelector(".thumb"), key, name);
  return card;
}

function fillThumb(thumb, key, name) {
  const image = thumb.querySelector("img");
  const blank = () => {
    thumb.classList.add("empty");
    thumb.dataset.text = name;
  };
  image.onerror = blank;
  if (info?.images === false) blank();
  else showImage(image, key, 256);
}

function listFacts(metadata) {
  const { width, height, ...others } = metadata ?? {};
  const facts = Object.entries(others).filter(([, value]) => value !== null && value !== "");
  if (width && height) facts.push(["size", `${width} × ${height}`]);
  return facts.map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : String(value)]);
}

function makeFact([name, value]) {
  const fact = element("div");
  const shown = element("dd", value);
  shown.title = value;
  fact.append(element("dt", name), shown);
  return fact;
}

function showDetails(key, metadata) {
  $("details-title").textContent = key;
  $("details-image").alt = baseName(key);
  $("details-image").parentElement.hidden = info?.images === false;
  $("details-open").hidden = info?.images === false;
  $("details-image").removeAttribute("src");
  if (info?.images !== false) showImage($("details-image"), key, 512);
  $("details-columns").replaceChildren(
    ...listFacts(metadata).flatMap(([name, value]) => [element("dt", name), element("dd", value)]),
  );
  $("details-search").href = addressOf({ ...readState(), key, view: "grid" });
  $("details-search").dataset.key = key;
  $("details-open").href = imageUrl(key, "original");
  $("details-open").onclick = apiKey && ((event) => {
    event.preventDefault(); // a link cannot carry the API key
    const tab = open("", "_blank");
    loadBlob(key, "original").then((blob) => (tab.location = URL.createObjectURL(blob)), () => tab.close());
  });
  $("details-copy").onclick = async () => {
    await navigator.clipboard?.writeText(key);
    $("details-copy").textContent = "Copied";
    setTimeout(() => ($("details-copy").textContent = "Copy the key"), 1500);
  };
  $("details").showModal();
}
$("details").addEventListener("click", (event) => {
  if (event.target === $("details")) $("details").close();
});

// ---------------------------------------------------------------------- the map

async function showMap({ key, filter }) {
  if (!info?.map_points) return;
  map ??= new MapView($("map"), {
    load: async (key, size) => createImageBitmap(await loadBlob(key, size)),
    pick: goTo,
    describe: (key) => ($("map-text").textContent = key ?? mapText),
  });
  const id = ["map", info.generation, filter];
  const query = new URLSearchParams(filter ? { filter } : {});
  const points = await remember(id, () => askJson(`v1/map?${query}`, { signal: running.signal }));
  const some = number(points.keys.length);
  mapText = filter
    ? `${some} of ${number(info.map_points)} images fulfil the filter`
    : `${some} of ${number(info.rows)} images`;
  $("map-text").textContent = mapText;
  map.setPoints(points);
  const keys = [...document.querySelectorAll(".pick")].map((link) => link.dataset.key);
  if (isAsked(readState())) map.setMarks(key, keys);
}
let mapText = "";
$("zoom-in").onclick = () => map?.zoomBy(1.6);
$("zoom-out").onclick = () => map?.zoomBy(1 / 1.6);
$("zoom-fit").onclick = () => map?.fit();

// ---------------------------------------------------------------------- bringing a picture

function bring(file) {
  if (!file || info?.image_queries === false) return;
  const id = uploads.size + 1;
  uploads.set(id, { file, name: file.name || "Pasted picture", url: URL.createObjectURL(file) });
  go({ key: null, upload: id, view: "grid" });
  scrollTo({ top: 0 });
}

const findPicture = (transfer) =>
  [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/") || !file.type);

$("file").addEventListener("change", () => {
  bring($("file").files[0]);
  $("file").value = "";
});
addEventListener("paste", (event) => {
  const picture = findPicture(event.clipboardData);
  if (picture) {
    event.preventDefault();
    bring(picture);
  }
});
let depth = 0;
addEventListener("dragenter", (event) => {
  if (![...event.dataTransfer.types].includes("Files")) return;
  depth += 1;
  $("dropping").hidden = false;
});
addEventListener("dragleave", () => {
  depth = Math.max(0, depth - 1);
  if (!depth) $("dropping").hidden = true;
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  $("dropping").hidden = true;
  bring(findPicture(event.dataTransfer));
});

$("random").onclick = async () => {
  try {
    const { items } = await askSample(1, readState().filter, null);
    if (items.length) goTo(items[0].key);
    else $("status").textContent = NONE;
  } catch (error) {
    showProblem(error);
  }
};
$("options").addEventListener("submit", (event) => {
  event.preventDefault();
  applyOptions();
});
$("k").onchange = applyOptions;
$("exact").onchange = applyOptions;

function applyOptions() {
  go({ filter: $("filter").value.trim(), k: Number($("k").value), exact: $("exact").checked });
}

// ---------------------------------------------------------------------- keyboard, theme, info

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input, select, textarea")) return;
  const card = event.target.closest?.(".card");
  if (event.key === "/") $("filter").focus();
  else if (event.key === "r") $("random").click();
  else if (event.key === "i" && card) card.querySelector(".info").click();
  else if (event.key.startsWith("Arrow") && card) moveFrom(card, event.key);
  else return;
  event.preventDefault();
});

function moveFrom(card, arrow) {
  const cards = [...$("grid").children];
  const top = cards[0].offsetTop;
  const perRow = cards.findIndex((other) => other.offsetTop !== top);
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perRow, ArrowDown: perRow };
  cards[cards.indexOf(card) + steps[arrow]]?.querySelector("a").focus();
}

const THEMES = ["auto", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  localStorage.setItem("theme", theme);
  map?.draw();
}
$("theme").onclick = () => {
  const now = document.documentElement.dataset.theme;
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
};

function ago(seconds) {
  const age = Date.now() / 1000 - seconds;
  const units = [["year", 31557600], ["month", 2629800], ["day", 86400], ["hour", 3600], ["minute", 60]];
  const [unit, length] = units.find(([, size]) => age >= size) ?? ["second", 1];
  return new Intl.RelativeTimeFormat("en", { numeric: "auto" }).format(-Math.floor(age / length), unit);
}

function fact(label, value, title) {
  const shown = element("span", `${label} `);
  shown.append(element("b", value));
  shown.title = title;
  return shown;
}

async function loadInfo() {
  info = await askJson("v1/info");
  const date = (seconds) => new Date(1000 * seconds).toLocaleString();
  const facts = [
    fact("images", number(info.rows), `${info.dim} dimensions, ${info.kind}`),
    fact("generation", info.generation, `built ${date(info.created_s)}`),
    fact("built", ago(info.created_s), date(info.created_s)),
  ];
  if (info.newest_image_s) facts.push(fact("newest image", ago(info.newest_image_s), date(info.newest_image_s)));
  if (info.recall != null) facts.push(fact("recall", info.recall.toFixed(3), "measured on held-out queries"));
  $("freshness").replaceChildren(...facts);
  $("choose").hidden = !info.image_queries;
  $("view-map").hidden = !info.map_points;
  const columns = info.columns.filter((column) => column.filterable);
  $("columns").replaceChildren(...columns.map(({ name }) => Object.assign(element("option"), { value: name })));
  showFilterHelp(columns);
}

function showFilterHelp(columns) {
  const text = columns.find(({ name, type }) => name !== "key" && type.includes("string"));
  const plain = columns.find(({ type }) => /int|float|double/.test(type));
  const parts = [plain && `${plain.name} >= 100`, text && `${text.name} = value`].filter(Boolean);
  $("filter").placeholder = parts.join(" and ") || "key ~ text";
  const names = columns.map(({ name }) => element("code", name));
  const help = names.flatMap((name, i) => (i ? [" ", name] : [name]));
  $("filter-help").replaceChildren("Columns: ", ...help, " · = != < <= > >= ~ (contains) in (…) and or not");
}

async function start() {
  try {
    await loadInfo();
    refreshing ??= setInterval(() => loadInfo().catch(() => {}), 60000);
  } catch (error) {
    showProblem(error);
    if (error.status === 401) return;
  }
  await render();
}
let refreshing = null;
$("retry").onclick = start;

setTheme(localStorage.getItem("theme") ?? "auto");
start();
