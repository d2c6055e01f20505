// The page: its state is its address, so that reload, back and sharing just work.

import { showFacets } from "./facets.js";
import { MapView } from "./map.js";
import { makeColours } from "./colours.js";
import { Selection, saveFile, toCsv, toJson } from "./selection.js";
import { findUpload, hasUpload, keepUpload, recallUpload } from "./uploads.js";

const $ = (id) => document.getElementById(id);
const found = new Map(); // answers by request, so that back is instant
let apiKey = sessionStorage.getItem("api-key") ?? "";
let info = null;
let facets = [];
let map = null;
const selection = new Selection(() => showSelection());
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

const VIEWS = ["grid", "map", "groups", "failures"];

function readState() {
  const query = new URLSearchParams(location.search);
  const upload = hasUpload(history.state?.upload) ? history.state.upload : null;
  const like = upload === null ? query.getAll("like") : [];
  return {
    key: (upload === null && !like.length && query.get("key")) || null,
    upload,
    like,
    unlike: like.length ? query.getAll("unlike") : [],
    filter: query.get("filter") ?? "",
    k: Number(query.get("k")) || 24,
    exact: query.has("exact"),
    view: VIEWS.includes(query.get("view")) ? query.get("view") : "grid",
    colour: query.get("colour") ?? "",
  };
}

function addressOf(state) {
  const query = new URLSearchParams();
  if (state.key) query.set("key", state.key);
  for (const key of state.like) query.append("like", key);
  for (const key of state.unlike) query.append("unlike", key);
  if (state.filter) query.set("filter", state.filter);
  if (state.k !== 24) query.set("k", state.k);
  if (state.exact) query.set("exact", "");
  if (state.view !== "grid") query.set("view", state.view);
  if (state.colour) query.set("colour", state.colour);
  return `?${query}`;
}

const NO_QUERY = { key: null, upload: null, like: [], unlike: [] };

function go(changes) {
  const state = { ...readState(), ...changes };
  history.pushState({ upload: state.upload }, "", addressOf(state));
  return render();
}

const goTo = (key) => go({ ...NO_QUERY, key, view: "grid" }).then(() => scrollTo({ top: 0 }));

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
  await recallUpload(history.state?.upload);
  const state = readState();
  const focused = document.activeElement;
  $("filter").value = state.filter;
  $("k").value = String(state.k);
  $("exact").checked = state.exact;
  for (const view of VIEWS) $(`view-${view}`).href = addressOf({ ...state, view });
  $("no-filter").hidden = !state.filter;
  renderFacets();
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
  showSelection();
  if (document.activeElement === document.body && focused !== document.body) focusCard();
}

async function showResults(state) {
  if (state.view === "groups") return showGroups();
  if (state.view === "failures") return showFailures();
  if (isAsked(state)) await showNeighbours(state);
  else if (state.view === "grid") await showSample(state);
  else showNoMarks();
  if (state.view === "map") await showMap(state);
}

const isAsked = ({ key, upload, like }) => key !== null || upload !== null || like.length > 0;

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
  for (const name of VIEWS) {
    $(`${name}-view`).hidden = view !== name;
    if (view === name) $(`view-${name}`).setAttribute("aria-current", "page");
    else $(`view-${name}`).removeAttribute("aria-current");
  }
}

function showQuery(state) {
  const { key, upload, like, unlike } = state;
  const asked = isAsked(state);
  const searches = state.view === "grid" || state.view === "map";
  $("exact").closest("label").hidden = !asked || !searches; // only what acts on what is shown
  $("k").closest(".field").hidden = !searches || (!asked && state.view === "map");
  $("options").hidden = !searches;
  $("facets").hidden = !searches;
  const mine = findUpload(upload);
  const title = mine ? mine.name : key !== null ? baseName(key) : like.length ? nameExamples(state) : "Find similar images";
  $("frame").hidden = (!mine && key === null) || (!mine && info?.images === false);
  $("clear").hidden = !asked;
  $("query-title").textContent = title;
  $("query-title").title = key ?? "";
  $("view-grid").textContent = asked ? "Neighbours" : "Images";
  document.title = asked ? `${title} · Image lookups` : "Image lookups";
  const hints = {
    first: info?.image_queries === false
      ? "Start from an indexed image below."
      : "Drop or paste a picture anywhere on this page, choose one, or start from an indexed one below.",
    mine: "Your picture, looked up among the indexed ones.",
    like: "Click an example to leave it out.",
    key: `In ${key?.slice(0, Math.max(0, key.lastIndexOf("/"))) || "the collection"}`,
  };
  $("query-text").textContent = mine ? hints.mine : key !== null ? hints.key : like.length ? hints.like : hints.first;
  $("query-image").alt = asked ? "The query" : "";
  $("query-image").onerror = () => ($("frame").hidden = true);
  $("classes").hidden = true;
  if (mine) $("query-image").src = mine.url;
  else if (key !== null && info?.images !== false) showImage($("query-image"), key, 512);
  $("examples").hidden = !like.length;
  $("examples").replaceChildren(
    ...like.map((one) => makeExample(one, "like", state)),
    ...unlike.map((one) => makeExample(one, "unlike", state)),
  );
}

const count = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;

const nameExamples = ({ like, unlike }) =>
  `Like ${count(like.length, "image")}${unlike.length ? `, unlike ${count(unlike.length, "image")}` : ""}`;

function makeExample(key, kind, state) {
  const button = Object.assign(element("button"), { type: "button", className: kind, title: key });
  button.setAttribute("aria-label", `Leave out ${baseName(key)}, ${kind === "like" ? "an example" : "a counterexample"}`);
  const image = Object.assign(element("img"), { alt: "" });
  if (info?.images !== false) showImage(image, key, 64);
  button.append(image);
  button.onclick = () => {
    const left = { ...state, [kind]: state[kind].filter((other) => other !== key) };
    go(left.like.length ? left : { ...left, ...NO_QUERY });
  };
  const item = element("li");
  item.append(button);
  return item;
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
  map?.setGuest(null);
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
  const { key, upload, like, unlike, filter, k, exact } = state;
  const id = [key, upload, like, unlike, filter, k, exact, offset];
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

function requestSearch({ key, upload, like, unlike, filter, k, exact }, offset) {
  const include = info?.classes ? ["metadata", "classes"] : ["metadata"];
  const options = { k, offset, exact, include, ...(filter.trim() ? { filter } : {}) };
  const request = { method: "POST", signal: running.signal };
  if (upload === null) {
    request.headers = { "Content-Type": "application/json" };
    const query = like.length ? { like, unlike } : { key };
    request.body = JSON.stringify({ query, ...options });
  } else {
    request.body = new FormData();
    request.body.append("image", findUpload(upload).file);
    request.body.append("options", JSON.stringify(options));
  }
  return askJson("v1/search", request);
}

function showClasses(classes) {
  $("classes").hidden = !classes?.length;
  $("classes").replaceChildren(
    ...(classes ?? []).map(({ index, name, probability }) =>
      element("li", `${name ?? `class ${index}`} · ${(100 * probability).toFixed(1)} %`),
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
  link.href = addressOf({ ...readState(), ...NO_QUERY, key, view: "grid" });
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
  card.querySelector(".facts").append(...listFacts(metadata).filter(isPlain).slice(0, 3).map(makeFact));
  const box = card.querySelector(".select input");
  box.setAttribute("aria-label", `Select ${name}`);
  box.dataset.key = key;
  box.checked = selection.has(key);
  box.onchange = () => selection.toggle(key, metadata, box.checked);
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

// Plain values first, then the size, and lists and JSON, which are for programs, last.
function listFacts(metadata) {
  const { width, height, ...others } = metadata ?? {};
  const facts = Object.entries(others)
    .filter(([, value]) => value !== null && value !== "")
    .map(([name, value]) => [name, typeof value === "object" ? JSON.stringify(value) : String(value)]);
  const size = width && height ? [["size", `${width} × ${height}`]] : [];
  return [...facts.filter(isPlain), ...size, ...facts.filter((fact) => !isPlain(fact))];
}

const isPlain = ([, value]) => !/^[[{]/.test(value);

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
  $("details-search").href = addressOf({ ...readState(), ...NO_QUERY, key, view: "grid" });
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

async function showMap({ key, upload, filter, colour }) {
  if (!info?.map_points) return;
  map ??= new MapView($("map"), {
    load: async (key, size) => createImageBitmap(await loadBlob(key, size)),
    pick: goTo,
    describe: (key) => ($("map-text").textContent = key ?? mapText),
    enclose: (keys) => {
      selection.add(keys);
      useLasso(false);
    },
  });
  const id = ["map", info.generation, filter, colour];
  const query = new URLSearchParams({ ...(filter && { filter }), ...(colour && { column: colour }) });
  const points = await remember(id, () => askJson(`v1/map?${query}`, { signal: running.signal }));
  const some = number(points.keys.length);
  mapText = filter
    ? `${some} of ${number(info.map_points)} images fulfil the filter`
    : `${some} of ${number(info.rows)} images`;
  $("map-text").textContent = mapText;
  const colours = makeColours(points.values, facets.find(({ name }) => name === colour));
  map.setPoints(points, colours);
  $("colour-by").value = colour;
  $("legend").replaceChildren(
    ...colours.legend.map(({ colour: shown, text }) => {
      const entry = element("li", text);
      entry.prepend(Object.assign(element("canvas"), { width: 12, height: 12 }));
      const pen = entry.firstChild.getContext("2d");
      pen.fillStyle = shown;
      pen.fillRect(0, 0, 12, 12);
      return entry;
    }),
  );
  const keys = [...$("grid").querySelectorAll(".pick")].map((link) => link.dataset.key);
  if (isAsked(readState())) map.setMarks(key, keys);
  const mine = findUpload(upload);
  if (mine) placeUpload(mine, keys);
  map.setSelected(selection.keys);
}
let mapText = "";

// An upload lies where its nearest neighbours lie, those of them that the map has.
async function placeUpload(mine, keys) {
  map.setGuest({ near: keys.slice(0, 5), image: await createImageBitmap(mine.file) });
}

function useLasso(on) {
  map?.setLasso(on);
  $("lasso").setAttribute("aria-pressed", String(on));
}
$("lasso").onclick = () => useLasso($("lasso").getAttribute("aria-pressed") !== "true");
$("colour-by").onchange = () => go({ colour: $("colour-by").value });
$("zoom-in").onclick = () => map?.zoomBy(1.6);
$("zoom-out").onclick = () => map?.zoomBy(1 / 1.6);
$("zoom-fit").onclick = () => map?.fit();

// ---------------------------------------------------------------------- what to look through

async function showGroups() {
  const { groups, total, method, threshold } = await remember(["groups", info?.generation], () =>
    askJson("v1/duplicates?n=50", { signal: running.signal }),
  );
  const how = method === "bytes" ? "equal files" : `cosine ${threshold} and more`;
  const hint = method === "bytes" ? "; the index job finds similar ones with --near-duplicates" : "";
  $("status").textContent = total
    ? `${count(total, "group")}, ${how}${groups.length < total ? `, the ${groups.length} largest shown` : ""}${hint}`
    : `No duplicates: ${how}${hint}`;
  $("groups-view").replaceChildren(...groups.map(({ images }) => makeGroup(images)));
}

function makeGroup(images) {
  const head = element("h3", count(images.length, "image"));
  const others = Object.assign(element("button", "Select all but the first"), { type: "button", className: "button" });
  others.onclick = () => selection.add(images.slice(1).map(({ key }) => key));
  const bar = Object.assign(element("div"), { className: "group-bar" });
  bar.append(head, others);
  const list = Object.assign(element("ul"), { className: "grid" });
  list.append(...images.map((image) => makeCard(image, true)));
  const group = Object.assign(element("article"), { className: "group" });
  group.append(bar, list);
  return group;
}

async function showFailures() {
  const { counts, rows } = await remember(["failures", info?.generation], () =>
    askJson("v1/failures", { signal: running.signal }),
  );
  const parts = Object.entries(counts).map(([status, n]) => `${number(n)} ${status.replace("_", " ")}`);
  $("status").textContent = parts.length ? `No embedding: ${parts.join(", ")}` : "Every image has an embedding";
  const reasons = Map.groupBy(rows, ({ status }) => status);
  $("failures-view").replaceChildren(
    ...[...reasons].map(([status, some]) => {
      const part = Object.assign(element("article"), { className: "group" });
      const list = Object.assign(element("ul"), { className: "grid" });
      list.append(...some.map(makeFailure));
      const all = counts[status] ?? some.length;
      const shown = some.length < all ? `, ${number(some.length)} shown` : "";
      part.append(element("h3", `${status.replace("_", " ")}: ${count(all, "image")}${shown}`), list);
      return part;
    }),
  );
}

function makeFailure({ key, error, picture, first_bytes: bytes }) {
  const card = Object.assign(element("li"), { className: "card failure" });
  const thumb = Object.assign(element("span"), { className: "thumb" });
  const image = Object.assign(element("img"), { alt: `What can be shown of ${baseName(key)}` });
  image.onerror = () => image.replaceWith(element("code", bytes || "no bytes"));
  if (picture) image.src = picture;
  thumb.append(picture ? image : element("code", bytes || "no bytes"));
  const name = Object.assign(element("p", baseName(key)), { className: "name", title: key });
  card.append(thumb, name, Object.assign(element("p", error), { className: "reason" }));
  return card;
}

// ---------------------------------------------------------------------- the selection

function showSelection() {
  const keys = selection.keys;
  $("selection").hidden = !keys.length;
  $("selected").textContent = `${number(keys.length)} selected`;
  $("more-like").disabled = keys.length > MAX_EXAMPLES;
  const { key, like } = readState();
  $("less-like").disabled = keys.length > MAX_EXAMPLES || (key === null && !like.length);
  $("less-like").title = $("less-like").disabled ? "Search from an image first" : "";
  for (const box of document.querySelectorAll(".select input")) box.checked = selection.has(box.dataset.key);
  map?.setSelected(keys);
}
const MAX_EXAMPLES = 32; // the service takes no more

function addExamples(kind) {
  const { key, like, unlike } = readState();
  const first = like.length || key === null ? like : [key];
  const chosen = selection.keys;
  const others = (keys) => keys.filter((one) => !chosen.includes(one));
  const join = (keys) => [...others(keys), ...chosen].slice(-MAX_EXAMPLES);
  const examples = kind === "like" ? { like: join(first), unlike: others(unlike) } : { like: others(first), unlike: join(unlike) };
  selection.clear();
  go({ ...NO_QUERY, ...examples, view: "grid" });
}
$("more-like").onclick = () => addExamples("like");
$("less-like").onclick = () => addExamples("unlike");
$("select-none").onclick = () => selection.clear();

const askItems = async (keys) =>
  (await askJson("v1/items", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ keys }),
  })).items;

async function saveSelection(ending, type, write) {
  try {
    saveFile(`images.${ending}`, write(await selection.complete(askItems)), type);
  } catch (error) {
    showProblem(error);
  }
}
$("save-csv").onclick = () => saveSelection("csv", "text/csv", toCsv);
$("save-json").onclick = () => saveSelection("json", "application/json", toJson);

// ---------------------------------------------------------------------- bringing a picture

async function bring(file) {
  if (!file || info?.image_queries === false) return;
  go({ ...NO_QUERY, upload: await keepUpload(file), view: "grid" });
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
$("no-filter").onclick = () => go({ filter: "" });
$("clear").onclick = () => go(NO_QUERY);
$("filters").onclick = () => openPanel(!document.body.classList.contains("filtering"));
$("k").onchange = applyOptions;
$("exact").onchange = applyOptions;

function openPanel(open) {
  document.body.classList.toggle("filtering", open);
  $("filters").setAttribute("aria-expanded", String(open));
}

function applyOptions() {
  go({ filter: $("filter").value.trim(), k: Number($("k").value), exact: $("exact").checked });
}

// ---------------------------------------------------------------------- keyboard, theme, info

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input:not([type=checkbox]), select, textarea")) return;
  const card = event.target.closest?.(".card");
  if (event.key === "/") {
    openPanel(true);
    $("filter").focus();
  } else if (event.key === "x" && card) card.querySelector(".select input").click();
  else if (event.key === "r") $("random").click();
  else if (event.key === "i" && card) card.querySelector(".info").click();
  else if (event.key.startsWith("Arrow") && card) moveFrom(card, event.key);
  else return;
  event.preventDefault();
});

function moveFrom(card, arrow) {
  const cards = [...card.parentElement.children];
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
  const before = info?.generation;
  info = await askJson("v1/info");
  if (info.generation !== before) loadFacets();
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
  const shown = info.columns.filter(({ name, type }) => name !== "key" && !/list|struct|map/.test(type));
  $("colour-by").replaceChildren(new Option("nothing", ""), ...shown.map(({ name }) => new Option(name, name)));
  $("colour-by").value = readState().colour;
}

// Facets come when they are counted: nothing that is shown waits for them.
async function loadFacets() {
  try {
    facets = (await askJson("v1/facets")).columns;
  } catch {
    facets = [];
  }
  renderFacets();
}

function renderFacets() {
  const focused = document.activeElement?.closest(".facet") && labelOf(document.activeElement);
  showFacets($("facets"), facets, { read: () => readState().filter, write: (filter) => go({ filter }) });
  if (focused) [...$("facets").querySelectorAll("input, summary")].find((one) => labelOf(one) === focused)?.focus();
}

const labelOf = (control) =>
  control.closest(".facet").dataset.column + (control.getAttribute("aria-label") ?? control.closest("label")?.textContent ?? "");

function showFilterHelp(columns) {
  const text = columns.find(({ name, type }) => name !== "key" && type.includes("string"));
  const numbers = columns.filter(({ type }) => /int|float|double/.test(type));
  const plain = numbers.find(({ name }) => name !== "width" && name !== "height") ?? numbers[0];
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
