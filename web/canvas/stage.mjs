// Draws the canvas: background, each region as a tint of its colour, the selected one's outline, names, and what a tool is doing.
//
// A region is drawn by the raster of masks, not by the browser's paths: what is seen is what Python will make of it. Tints are kept until
// their shapes change; while one region changes, what lies below and above it is kept as two pictures, so that a frame costs four copies.

import { bounds } from "./geometry.mjs";
import { Layer, forRows } from "./raster.mjs";

const RASTER = 512; // pixels of a tint's longer side
const TINT = 0.5;
const HANDLE = 8;
const CHECKER = 8;
const LABEL = 18; // stage pixels from one label to the next below

export class Stage {
  /** @param {import("./editor.mjs").Editor} editor @param {import("./view.mjs").View} view */
  constructor(canvas, editor, view) {
    Object.assign(this, { canvas, editor, view });
    this.context = canvas.getContext("2d");
    this.background = null;
    this.tints = new WeakMap();
    this.kept = { of: [], below: document.createElement("canvas"), above: document.createElement("canvas") };
    this.live = null; // what a tool shows in place of the selected region: {region, draw(context)}
    this.overlay = null; // what a tool draws on top: (context) => void
    this.colours = { canvas: "#222", checker: "#2c2c2c", text: "#ddd" };
    this.waiting = 0;
  }

  /** Draw at the next frame, once. */
  invalidate() {
    this.waiting ||= requestAnimationFrame(() => {
      this.waiting = 0;
      this.draw();
    });
  }

  destroy() {
    cancelAnimationFrame(this.waiting);
  }

  resize(width, height) {
    const ratio = window.devicePixelRatio || 1;
    this.view.stage = [width, height];
    const size = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
    if (this.canvas.width !== size[0] || this.canvas.height !== size[1]) [this.canvas.width, this.canvas.height] = size;
    this.kept.of = [];
    this.invalidate();
  }

  /** [width, height] in pixels of the raster that tints are drawn in. */
  get raster() {
    const [width, height] = this.view.picture;
    const scale = RASTER / Math.max(width, height);
    return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  }

  /** A region's tint: {layer, canvas}, drawn when it is first asked for. */
  tint(region) {
    const [width, height] = this.raster;
    const of = [width, height, region.feather, region.colour].join();
    let tint = this.tints.get(region.shapes);
    if (tint?.of !== of) {
      tint = { of, ...newTint(width, height, region.colour) };
      tint.layer.draw(region.shapes, region.feather);
      tint.show([0, 0, width, height]);
      this.tints.set(region.shapes, tint);
    }
    return tint;
  }

  /** Whether a region covers a point in document units. */
  covers(region, x, y) {
    const { layer } = this.tint(region);
    const [column, row] = [Math.floor((x / 10_000) * layer.width), Math.floor((y / 10_000) * layer.height)];
    if (column < 0 || row < 0 || column >= layer.width || row >= layer.height) return false;
    return layer.mask[row * layer.width + column] >= 0.5;
  }

  draw() {
    const { context, canvas, editor, view } = this;
    const ratio = canvas.width / view.stage[0];
    const active = this.live ? editor.selected : -1;
    this.compose(active, ratio);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.globalAlpha = 1;
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(this.kept.below, 0, 0);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (this.live) {
      context.globalAlpha = TINT;
      this.live(context);
      context.globalAlpha = 1;
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.drawImage(this.kept.above, 0, 0);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
    } else {
      if (editor.region) this.outline(editor.region);
      this.labels(context, -1);
    }
    this.overlay?.(context);
  }

  /** Draw what lies below and above region `active` into the two kept pictures, where anything of it has changed. */
  compose(active, ratio) {
    const { editor, view } = this;
    const of = [...editor.regions.filter((_, index) => index !== active), active, this.background, ...view.frame, ratio];
    if (of.length === this.kept.of.length && of.every((value, i) => value === this.kept.of[i])) return;
    this.kept.of = of;
    for (const [part, canvas] of [["below", this.kept.below], ["above", this.kept.above]]) {
      if (part === "above" && active < 0) continue;
      [canvas.width, canvas.height] = [this.canvas.width, this.canvas.height];
      const context = canvas.getContext("2d");
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      if (part === "below") this.ground(context);
      const order = editor.regions.map((_, index) => index).reverse();
      for (const index of order) {
        if (index === active || (active >= 0 && index < active) !== (part === "above" && active >= 0)) continue;
        this.paint(context, editor.regions[index]);
      }
      if (part === "above") this.labels(context, active);
    }
  }

  /** What lies under the regions: a checkerboard, the background picture, a border. */
  ground(context) {
    const [left, top, width, height] = this.view.frame;
    context.fillStyle = this.colours.canvas;
    context.fillRect(left, top, width, height);
    if (this.background) {
      context.drawImage(this.background, left, top, width, height);
    } else {
      context.save();
      context.beginPath();
      context.rect(left, top, width, height);
      context.clip();
      context.fillStyle = this.colours.checker;
      for (let y = 0; y * CHECKER < Math.min(height, 4000); y++) {
        for (let x = y % 2; x * CHECKER < Math.min(width, 4000); x += 2) context.fillRect(left + x * CHECKER, top + y * CHECKER, CHECKER, CHECKER);
      }
      context.restore();
    }
    context.strokeStyle = this.colours.text;
    context.globalAlpha = 0.4;
    context.strokeRect(left - 0.5, top - 0.5, width + 1, height + 1);
    context.globalAlpha = 1;
  }

  paint(context, region) {
    if (!region.visible) return;
    context.globalAlpha = TINT;
    const picture = region.rest ? this.restOf(region) : this.tint(region).canvas;
    context.drawImage(picture, ...this.view.frame);
    context.globalAlpha = 1;
  }

  /** The tint of the rest: everything that no other visible region covers. */
  restOf(region) {
    const [canvas, context] = newCanvas(...this.raster);
    context.fillStyle = region.colour;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "destination-out";
    for (const other of this.editor.regions) if (!other.rest && other.visible) context.drawImage(this.tint(other).canvas, 0, 0);
    return canvas;
  }

  /** The names of all regions but the one in hand: colours alone do not tell regions apart. */
  labels(context, active) {
    const taken = [];
    this.editor.regions.forEach((_, index) => index !== active && this.label(context, index, taken));
  }

  /** A region's name, at its upper left, below those in `taken`. */
  label(context, index, taken) {
    const region = this.editor.regions[index];
    if (!region.visible) return;
    const box = bounds(region.shapes) ?? (region.rest ? [0, 0, 10_000, 10_000] : null);
    if (!box) return;
    const [left, top] = this.frameOf(region.shapes, [Math.max(box[0], 0), Math.max(box[1], 0), box[2], box[3]]);
    this.tag(context, `${region.name}${region.locked ? " 🔒" : ""}`, region.colour, left, top, taken);
  }

  /** A name on a dark ground with a dot of its colour, in the stage and below those in `taken`. */
  tag(context, text, colour, left, top, taken = []) {
    context.font = "600 11px sans-serif";
    context.textBaseline = "middle";
    const width = context.measureText(text).width + 20;
    const x = Math.max(2, Math.min(left + 2, this.view.stage[0] - width - 2));
    let y = Math.max(2, top + 2);
    const hit = ([otherX, otherY, otherWidth]) => Math.abs(y - otherY) < LABEL && x < otherX + otherWidth && otherX < x + width;
    while (taken.some(hit)) y += LABEL;
    taken.push([x, y, width]);
    context.fillStyle = "rgba(0, 0, 0, 0.72)";
    context.beginPath();
    context.roundRect(x, y, width, 17, 4);
    context.fill();
    context.fillStyle = colour;
    context.fillRect(x + 5, y + 5, 7, 7);
    context.fillStyle = "#fff";
    context.fillText(text, x + 16, y + 9);
  }

  /** How far brushes reach beyond their paths, in stage pixels. */
  reach(shapes) {
    const radii = shapes.filter((shape) => shape.kind === "stroke" && !shape.erase).map((shape) => shape.radius);
    return radii.length ? this.view.radius(Math.max(...radii)) : 0;
  }

  /** [left, top, right, bottom] in the stage of the rectangle around shapes whose `bounds` are given. */
  frameOf(shapes, box) {
    const reach = this.reach(shapes);
    const [left, top] = this.view.toStage(box[0], box[1]);
    const [right, bottom] = this.view.toStage(box[2], box[3]);
    return [left - reach, top - reach, right + reach, bottom + reach];
  }

  /** The selected region's edges, and the handles of the rectangle around it. */
  outline(region) {
    const { context } = this;
    context.setLineDash([]);
    for (const shape of region.shapes) {
      if (shape.kind === "stroke") continue;
      this.path(context, shape);
      twice(context, shape.erase ? [4, 4] : []);
    }
    const box = bounds(region.shapes);
    if (!box || region.locked) return;
    const [left, top, right, bottom] = this.frameOf(region.shapes, box);
    context.beginPath();
    context.rect(left, top, right - left, bottom - top);
    twice(context, [3, 3]);
    if (!this.handles) return;
    for (const [x, y] of handlesOf(left, top, right, bottom)) {
      context.fillStyle = "#fff";
      context.strokeStyle = "#000";
      context.fillRect(x - HANDLE / 2, y - HANDLE / 2, HANDLE, HANDLE);
      context.strokeRect(x - HANDLE / 2, y - HANDLE / 2, HANDLE, HANDLE);
    }
  }

  /** Begin the path of a box, an ellipse or a polygon in the stage. */
  path(context, { kind, numbers }) {
    context.beginPath();
    if (kind === "polygon") {
      for (let i = 0; i < numbers.length; i += 2) context.lineTo(...this.view.toStage(numbers[i], numbers[i + 1]));
      context.closePath();
      return;
    }
    const [left, top] = this.view.toStage(numbers[0], numbers[1]);
    const [right, bottom] = this.view.toStage(numbers[0] + numbers[2], numbers[1] + numbers[3]);
    if (kind === "box") context.rect(left, top, right - left, bottom - top);
    else context.ellipse((left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2, 0, 0, 2 * Math.PI);
  }
}

/** Handles of a rectangle: [x, y, column, row], column and row being 0, 1 or 2 from its upper left corner. */
export function handlesOf(left, top, right, bottom) {
  const made = [];
  for (const row of [0, 1, 2]) {
    for (const column of [0, 1, 2]) {
      if (row !== 1 || column !== 1) made.push([left + ((right - left) * column) / 2, top + ((bottom - top) * row) / 2, column, row]);
    }
  }
  return made;
}

/** A line that is seen on any ground. */
export function twice(context, dash) {
  context.setLineDash(dash);
  for (const [colour, width] of [["rgba(0, 0, 0, 0.8)", 3], ["#fff", 1.25]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.stroke();
  }
  context.setLineDash([]);
  context.lineWidth = 1;
}

function newCanvas(width, height) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  return [canvas, canvas.getContext("2d")];
}

/** An empty layer, and a canvas that shows it in a colour. */
export function newTint(width, height, colour) {
  const layer = new Layer(width, height);
  const [canvas, context] = newCanvas(width, height);
  const rgb = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  const show = ([left, top, right, bottom]) => {
    if (left >= right || top >= bottom) return;
    const image = context.createImageData(right - left, bottom - top);
    let at = 0;
    forRows([left, top, right, bottom], width, (from, to) => {
      for (let i = from; i < to; i++, at += 4) {
        [image.data[at], image.data[at + 1], image.data[at + 2]] = rgb;
        image.data[at + 3] = layer.mask[i] * 255;
      }
    });
    context.putImageData(image, left, top);
  };
  return { layer, canvas, show };
}
