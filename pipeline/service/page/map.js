// A map of points on a canvas: as many thumbnails as fit, dots for the rest.
//
// Dots are squares, drawn one colour at a time on a plain canvas: a browser without WebGL shows the map
// as well, nothing is compiled at run time, and 20,000 dots need no library.

const CELL_PX = 76;
const THUMB_PX = 60;
const PICK_PX = 34;
const MAX_THUMB_PX = 132;
const MAX_THUMBS = 800;
const MAX_LOADING = 6;
const MAX_ZOOM = 400;

export class MapView {
  // load(key, size) gives a promise of something drawable; pick(key) and describe(key) are called with
  // the point under the pointer or in the middle, enclose(keys) with what the lasso was drawn around.
  constructor(canvas, { load, pick, describe, enclose }) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.load = load;
    this.pick = pick;
    this.describe = describe;
    this.enclose = enclose;
    this.points = { keys: [], x: [], y: [] };
    this.colours = { palette: null, of: null };
    this.selected = new Set();
    this.guest = null;
    this.lasso = null; // corners of it while it is drawn; an empty list waits for the first
    this.thumbs = new Map();
    this.shown = [];
    this.loading = 0;
    this.marked = new Set();
    this.origin = null;
    this.pointers = new Map();
    this.fit();
    this.listen();
  }

  // The part of the map that is looked at stays where the points are another selection of its own.
  setPoints(points, colours) {
    const isFirst = !this.points.keys.length;
    if (points === this.points) return;
    this.points = points;
    this.colours = colours;
    this.places = new Map(points.keys.map((key, i) => [key, i]));
    if (isFirst) this.fit();
    else this.draw();
  }

  setMarks(origin, keys) {
    this.origin = origin;
    this.marked = new Set(keys);
    this.draw();
  }

  setSelected(keys) {
    this.selected = new Set(keys);
    this.draw();
  }

  // A picture that is no point: it is shown in the middle of the points it is near to.
  setGuest(guest) {
    this.guest = guest;
    this.draw();
  }

  setLasso(on) {
    this.lasso = on ? [] : null;
    this.canvas.style.cursor = on ? "crosshair" : "";
    this.draw();
  }

  fit() {
    this.zoom = 1;
    this.centre = { x: 0.5, y: 0.5 };
    this.draw();
  }

  get side() {
    return 0.88 * Math.min(this.canvas.clientWidth, this.canvas.clientHeight);
  }

  get stretch() {
    // Wide canvases spread the map sideways rather than leave the sides empty.
    return Math.min(1.9, Math.max(0.6, this.canvas.clientWidth / this.canvas.clientHeight || 1));
  }

  toScreen(i) {
    const scale = this.side * this.zoom;
    const { x, y } = this.points;
    return [
      (x[i] - this.centre.x) * scale * this.stretch + this.canvas.clientWidth / 2,
      (this.centre.y - y[i]) * scale + this.canvas.clientHeight / 2,
    ];
  }

  zoomBy(factor, px = this.canvas.clientWidth / 2, py = this.canvas.clientHeight / 2) {
    const zoom = Math.min(MAX_ZOOM, Math.max(0.5, this.zoom * factor));
    const change = 1 / (this.side * this.zoom) - 1 / (this.side * zoom);
    this.centre.x += ((px - this.canvas.clientWidth / 2) * change) / this.stretch;
    this.centre.y -= (py - this.canvas.clientHeight / 2) * change;
    this.zoom = zoom;
    this.draw();
  }

  panBy(dx, dy) {
    const scale = this.side * this.zoom;
    this.centre.x -= dx / scale / this.stretch;
    this.centre.y += dy / scale;
    this.draw();
  }

  // The image under a place: the topmost thumbnail there, else the nearest point.
  nearest(px, py, within = PICK_PX) {
    const shown = this.shown.findLast(
      ({ x, y, w, h }) => Math.abs(px - x) <= w / 2 && Math.abs(py - y) <= h / 2,
    );
    if (shown) return shown.key;
    let best = null;
    let bestDistance = within;
    for (let i = 0; i < this.points.keys.length; i++) {
      const [sx, sy] = this.toScreen(i);
      const distance = Math.hypot(sx - px, sy - py);
      if (distance < bestDistance) [best, bestDistance] = [i, distance];
    }
    return best === null ? null : this.points.keys[best];
  }

  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.paint();
    });
  }

  paint() {
    const { canvas, context } = this;
    const ratio = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width || !height) return;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    const [accent, faint, card] = ["--accent", "--faint", "--card"].map((name) =>
      resolveColour(style, name),
    );
    const visible = this.findVisible(width, height);
    this.paintDots(visible, faint);
    if (!this.colours.palette || this.marked.size || this.zoom > 4) this.paintThumbs(visible, card, accent);
    else this.shown = [];
    this.paintSelected(visible, accent);
    this.paintGuest(card, accent);
    this.paintLasso(accent);
    if (document.activeElement === canvas && canvas.matches(":focus-visible")) {
      context.strokeStyle = accent;
      context.lineWidth = 1.5;
      context.strokeRect(width / 2 - 36, height / 2 - 36, 72, 72);
    }
  }

  findVisible(width, height) {
    // The same as toScreen, with what it reads of the page read once and not for every point.
    const { x: xs, y: ys } = this.points;
    const scaleY = this.side * this.zoom;
    const scaleX = scaleY * this.stretch;
    const visible = [];
    for (let i = 0; i < xs.length; i++) {
      const x = (xs[i] - this.centre.x) * scaleX + width / 2;
      const y = (this.centre.y - ys[i]) * scaleY + height / 2;
      if (x > -THUMB_PX && y > -THUMB_PX && x < width + THUMB_PX && y < height + THUMB_PX) {
        visible.push([i, x, y]);
      }
    }
    return visible;
  }

  paintDots(visible, colour) {
    const { palette, of } = this.colours;
    const { context } = this;
    const side = palette ? 6 : 5;
    context.globalAlpha = palette ? 0.85 : 0.55;
    const groups = (palette ?? [colour]).map(() => []);
    for (const point of visible) groups[palette ? of[point[0]] : 0].push(point);
    groups.forEach((points, group) => {
      context.fillStyle = (palette ?? [colour])[group];
      for (const [, x, y] of points) context.fillRect(x - side / 2, y - side / 2, side, side);
    });
    context.globalAlpha = 1;
  }

  paintSelected(visible, accent) {
    this.context.strokeStyle = accent;
    this.context.lineWidth = 2;
    for (const [i, x, y] of visible) {
      if (this.selected.has(this.points.keys[i])) this.context.strokeRect(x - 6, y - 6, 12, 12);
    }
  }

  paintGuest(card, accent) {
    const near = (this.guest?.near ?? []).map((key) => this.places.get(key)).filter((i) => i !== undefined);
    if (!near.length) return;
    const [xs, ys] = [0, 1].map((axis) => near.map((i) => this.toScreen(i)[axis]));
    const middle = (all) => all.reduce((sum, one) => sum + one, 0) / all.length;
    const place = { x: middle(xs), y: middle(ys), px: 72, ring: 4, card, accent };
    this.paintThumb(null, this.guest.image, place);
  }

  paintLasso(accent) {
    if (!this.lasso?.length) return;
    const { context } = this;
    context.beginPath();
    for (const { x, y } of this.lasso) context.lineTo(x, y);
    context.closePath();
    context.strokeStyle = context.fillStyle = accent;
    context.lineWidth = 2;
    context.stroke();
    context.globalAlpha = 0.12;
    context.fill();
    context.globalAlpha = 1;
  }

  endLasso() {
    const area = new Path2D();
    for (const { x, y } of this.lasso) area.lineTo(x, y);
    area.closePath();
    const plain = new DOMMatrix(); // isPointInPath goes by the canvas' own transform otherwise
    this.context.setTransform(plain);
    const inside = this.points.keys.filter((_, i) => this.context.isPointInPath(area, ...this.toScreen(i)));
    this.lasso = [];
    this.draw();
    this.enclose(inside);
  }

  paintThumbs(visible, card, accent) {
    // One thumbnail a cell; cells belong to the map, not to the screen, so panning keeps them.
    const cell = CELL_PX / (this.side * 2 ** Math.floor(Math.log2(this.zoom)));
    const taken = new Set();
    this.shown = [];
    const special = ([i]) => this.points.keys[i] === this.origin || this.marked.has(this.points.keys[i]);
    const ordered = [...visible.filter(special), ...visible.filter((entry) => !special(entry))];
    const chosen = ordered.filter((entry) => {
      const [i] = entry;
      const place = `${Math.floor((this.points.x[i] * this.stretch) / cell)},${Math.floor(this.points.y[i] / cell)}`;
      if (taken.has(place) && this.points.keys[i] !== this.origin) return false;
      taken.add(place);
      return true;
    });
    const room = Math.sqrt((this.canvas.clientWidth * this.canvas.clientHeight) / (chosen.length || 1));
    const px = Math.min(MAX_THUMB_PX, Math.max(THUMB_PX, 0.55 * room));
    for (const [i, x, y] of chosen.reverse()) {
      const key = this.points.keys[i];
      const image = this.findThumb(key, px);
      const ring = key === this.origin ? 4 : this.marked.has(key) ? 2.5 : 0;
      this.paintThumb(key, image, { x, y, px, ring, card, accent });
    }
  }

  paintThumb(key, image, { x, y, px, ring, card, accent }) {
    const { context } = this;
    if (!image) {
      if (ring) {
        context.fillStyle = accent;
        context.beginPath();
        context.arc(x, y, 3 + ring, 0, 7);
        context.fill();
      }
      return;
    }
    const size = px / Math.max(image.width, image.height);
    const [w, h] = [image.width * size, image.height * size];
    const border = ring || 1.5;
    if (key !== null) this.shown.push({ key, x, y, w, h });
    context.fillStyle = ring ? accent : card;
    context.beginPath();
    context.roundRect(x - w / 2 - border, y - h / 2 - border, w + 2 * border, h + 2 * border, 5);
    context.fill();
    context.drawImage(image, x - w / 2, y - h / 2, w, h);
  }

  findThumb(key, px) {
    const size = px * (devicePixelRatio || 1) > 90 ? 256 : 64;
    return this.loadThumb(key, size) ?? this.thumbs.get(`64 ${key}`) ?? null;
  }

  loadThumb(key, size) {
    const name = `${size} ${key}`;
    const known = this.thumbs.get(name);
    if (known !== undefined) {
      this.thumbs.delete(name); // to the end: the first in the map are the longest unused
      this.thumbs.set(name, known);
      return known;
    }
    if (this.loading >= MAX_LOADING) return null;
    this.loading += 1;
    this.thumbs.set(name, null);
    this.load(key, size)
      .then((image) => this.thumbs.set(name, image))
      .catch(() => {})
      .finally(() => {
        this.loading -= 1;
        while (this.thumbs.size > MAX_THUMBS) this.thumbs.delete(this.thumbs.keys().next().value);
        this.draw();
      });
    return null;
  }

  listen() {
    const { canvas } = this;
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY * 0.0016), event.offsetX, event.offsetY);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, { x: event.offsetX, y: event.offsetY });
      this.moved = this.pointers.size > 1 ? Infinity : 0;
      if (this.lasso) this.lasso = [{ x: event.offsetX, y: event.offsetY }];
    });
    canvas.addEventListener("pointermove", (event) => this.onMove(event));
    canvas.addEventListener("pointerup", (event) => {
      const known = this.pointers.delete(event.pointerId);
      if (this.lasso?.length) return this.endLasso();
      if (!known || this.moved > 6) return;
      const key = this.nearest(event.offsetX, event.offsetY);
      if (key !== null) this.pick(key);
    });
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => this.describe(null));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.draw());
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  onMove(event) {
    const known = this.pointers.get(event.pointerId);
    const here = { x: event.offsetX, y: event.offsetY };
    if (!known) {
      this.describe(this.nearest(here.x, here.y));
      return;
    }
    if (this.lasso) {
      this.lasso.push(here);
      this.draw();
      return;
    }
    if (this.pointers.size === 2) {
      const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, p]) => p);
      const before = Math.hypot(known.x - other.x, known.y - other.y);
      const after = Math.hypot(here.x - other.x, here.y - other.y);
      if (before > 0) this.zoomBy(after / before, (here.x + other.x) / 2, (here.y + other.y) / 2);
      this.panBy((here.x - known.x) / 2, (here.y - known.y) / 2);
    } else {
      this.moved += Math.hypot(here.x - known.x, here.y - known.y);
      this.panBy(here.x - known.x, here.y - known.y);
    }
    this.pointers.set(event.pointerId, here);
  }

  onKey(event) {
    const step = 60;
    const actions = {
      ArrowLeft: () => this.panBy(step, 0),
      ArrowRight: () => this.panBy(-step, 0),
      ArrowUp: () => this.panBy(0, step),
      ArrowDown: () => this.panBy(0, -step),
      "+": () => this.zoomBy(1.4),
      "=": () => this.zoomBy(1.4),
      "-": () => this.zoomBy(1 / 1.4),
      0: () => this.fit(),
    };
    const middle = () =>
      this.nearest(this.canvas.clientWidth / 2, this.canvas.clientHeight / 2, Infinity);
    if (event.key === "Enter" && middle() !== null) {
      this.pick(middle());
    } else if (actions[event.key]) {
      actions[event.key]();
      this.describe(middle());
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }
}

const probe = document.createElement("span");

function resolveColour(style, name) {
  // A canvas does not understand light-dark(); an element of the page does.
  if (!probe.isConnected) {
    probe.hidden = true;
    document.body.append(probe);
  }
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color || style.color;
}
