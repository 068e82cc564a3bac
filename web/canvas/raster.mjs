// Shapes to masks, as ops/masks.py draws them: signed distance to the edge in pixels, through a ramp of one pixel or the feather's width.
// One shape, and one segment of a stroke, touches only the rectangle that it reaches, so that drawing on goes with the hand.

import { UNIT } from "./document.mjs";

/** The ramp's width in pixels for a region's feather. */
export const rampOf = (feather, width, height) => Math.max(1, feather * Math.min(width, height));

/** A mask in the making: (height, width) shares in 0..1. */
export class Layer {
  constructor(width, height) {
    this.width = width;
    this.height = height;
    this.mask = new Float32Array(width * height);
  }

  /** Lay a region's shapes over one another, those that erase taking away. */
  draw(shapes, feather) {
    this.mask.fill(0);
    const cover = new Float32Array(this.mask.length);
    for (const shape of shapes) {
      const touched = coverShape(shape, this.width, this.height, rampOf(feather, this.width, this.height), cover);
      this.lay(cover, touched, shape.erase);
      clear(cover, this.width, touched);
    }
    return this;
  }

  /** Lay one shape's cover over the mask where it is touched. */
  lay(cover, touched, erase, before = this.mask) {
    forRows(touched, this.width, (from, to) => {
      for (let i = from; i < to; i++) this.mask[i] = erase ? before[i] * (1 - cover[i]) : Math.max(before[i], cover[i]);
    });
  }
}

/** Visit the pixels of a rectangle [left, top, right, bottom] row by row, as ranges of indices. */
export function forRows([left, top, right, bottom], width, visit) {
  for (let y = top; y < bottom; y++) visit(y * width + left, y * width + right, y);
}

function clear(values, width, touched) {
  forRows(touched, width, (from, to) => values.fill(0, from, to));
}

/** Write a shape's cover, (height, width) in 0..1, into `cover`, which holds zeros; returns the rectangle that it touched. */
export function coverShape(shape, width, height, ramp, cover) {
  if (shape.kind === "box") return coverBox(shape.numbers, width, height, ramp, cover);
  if (shape.kind === "ellipse") return coverEllipse(shape.numbers, width, height, ramp, cover);
  const points = pixels(shape.numbers, width, height);
  if (shape.kind === "stroke") {
    let touched = NOTHING;
    for (let i = 0; i < points.length; i += 2) {
      const [x, y] = i + 3 < points.length ? [points[i + 2], points[i + 3]] : [points[i], points[i + 1]];
      if (i > 0 && i + 3 >= points.length) break; // the last point ended a segment already
      const segment = coverSegment(points[i], points[i + 1], x, y, radiusIn(shape, width, height), width, height, ramp, cover);
      touched = union(touched, segment);
    }
    return touched;
  }
  return coverPolygon(points, width, height, ramp, cover);
}

export const NOTHING = Object.freeze([Infinity, Infinity, -Infinity, -Infinity]);

export const union = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.max(a[2], b[2]), Math.max(a[3], b[3])];

/** A stroke's radius in pixels. */
export const radiusIn = (shape, width, height) => (shape.radius / UNIT) * Math.min(width, height);

/** Points of a path in pixels. */
export function pixels(numbers, width, height) {
  return numbers.map((number, i) => (number / UNIT) * (i % 2 ? height : width));
}

/** The pixels whose centres lie within `reach` of a rectangle, inside of the picture. */
function reached(x0, y0, x1, y1, reach, width, height) {
  const left = Math.max(0, Math.floor(x0 - reach - 0.5));
  const top = Math.max(0, Math.floor(y0 - reach - 0.5));
  const right = Math.min(width, Math.ceil(x1 + reach + 0.5));
  const bottom = Math.min(height, Math.ceil(y1 + reach + 0.5));
  return left < right && top < bottom ? [left, top, right, bottom] : NOTHING;
}

const ramped = (distance, ramp) => Math.min(1, Math.max(0, 0.5 - distance / ramp));

/** One segment of a brush: the most of it and what is there already. */
export function coverSegment(x0, y0, x1, y1, radius, width, height, ramp, cover) {
  const touched = reached(Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1), radius + ramp / 2, width, height);
  const [dx, dy] = [x1 - x0, y1 - y0];
  const squared = Math.max(dx * dx + dy * dy, 1e-12);
  forRows(touched, width, (from, to, y) => {
    const v = y + 0.5 - y0;
    let u = touched[0] + 0.5 - x0;
    for (let i = from; i < to; i++, u++) {
      const share = Math.min(1, Math.max(0, (u * dx + v * dy) / squared));
      const [a, b] = [u - share * dx, v - share * dy];
      cover[i] = Math.max(cover[i], ramped(Math.sqrt(a * a + b * b) - radius, ramp));
    }
  });
  return touched;
}

function coverBox([x, y, boxWidth, boxHeight], width, height, ramp, cover) {
  // An edge on the canvas's own, or past it, is none: nothing softens there.
  const [left, right] = edges(x, boxWidth, width);
  const [top, bottom] = edges(y, boxHeight, height);
  const touched = reached(left, top, right, bottom, ramp / 2, width, height);
  forRows(touched, width, (from, to, row) => {
    const dy = Math.max(top - row - 0.5, row + 0.5 - bottom);
    for (let i = from; i < to; i++) {
      const at = i - from + touched[0] + 0.5;
      const dx = Math.max(left - at, at - right);
      cover[i] = ramped(Math.hypot(Math.max(dx, 0), Math.max(dy, 0)) + Math.min(Math.max(dx, dy), 0), ramp);
    }
  });
  return touched;
}

function edges(start, length, size) {
  return [start > 0 ? (start / UNIT) * size : -2 * size, start + length < UNIT ? ((start + length) / UNIT) * size : 3 * size];
}

function coverEllipse([x, y, boxWidth, boxHeight], width, height, ramp, cover) {
  const a = Math.max((boxWidth / UNIT) * width * 0.5, 1e-6);
  const b = Math.max((boxHeight / UNIT) * height * 0.5, 1e-6);
  const [centreX, centreY] = [(x / UNIT) * width + a, (y / UNIT) * height + b];
  // Where the ellipse is much longer than wide, its first-order distance reaches farther along than across.
  const touched = reached(centreX - a, centreY - b, centreX + a, centreY + b, (ramp / 2) * (Math.max(a, b) / Math.min(a, b)), width, height);
  forRows(touched, width, (from, to, row) => {
    const v = row + 0.5 - centreY;
    for (let i = from; i < to; i++) {
      const u = i - from + touched[0] + 0.5 - centreX;
      const k = Math.max(Math.hypot(u / a, v / b), 1e-6);
      cover[i] = ramped(((k - 1) * k) / Math.max(Math.hypot(u / (a * a), v / (b * b)), 1e-6), ramp);
    }
  });
  return touched;
}

function coverPolygon(points, width, height, ramp, cover) {
  const corners = points.length / 2;
  const xs = points.filter((_, i) => i % 2 === 0);
  const ys = points.filter((_, i) => i % 2 === 1);
  const box = [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
  const touched = reached(...box, ramp / 2, width, height);
  if (touched === NOTHING) return NOTHING;
  // Signed distance: far inside or outside first, by the even-odd rule; then what lies near an edge.
  const [left, top, right, bottom] = touched;
  const columns = right - left;
  const inside = new Uint8Array(columns * (bottom - top));
  const nearest = new Float32Array(inside.length).fill(ramp / 2);
  for (let n = 0; n < corners; n++) {
    const m = (n + 1) % corners;
    const [x0, y0, x1, y1] = [xs[n], ys[n], xs[m], ys[m]];
    // Rows whose centre lies in [lower, upper): a corner that two edges share counts once.
    const last = Math.min(bottom, Math.ceil(Math.max(y0, y1) - 0.5));
    for (let y = Math.max(top, Math.ceil(Math.min(y0, y1) - 0.5)); y < last; y++) {
      const at = Math.ceil(x0 + ((y + 0.5 - y0) / (y1 - y0)) * (x1 - x0) - 0.5);
      const first = Math.max(at, left) - left;
      if (first < columns) inside[(y - top) * columns + first] ^= 1;
    }
    const near = reached(Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1), ramp / 2, width, height);
    const [dx, dy] = [x1 - x0, y1 - y0];
    const squared = Math.max(dx * dx + dy * dy, 1e-12);
    forRows(near, width, (from, to, y) => {
      const v = y + 0.5 - y0;
      let u = near[0] + 0.5 - x0;
      let i = (y - top) * columns + near[0] - left;
      for (const end = i + to - from; i < end; i++, u++) {
        const share = Math.min(1, Math.max(0, (u * dx + v * dy) / squared));
        const [a, b] = [u - share * dx, v - share * dy];
        nearest[i] = Math.min(nearest[i], Math.sqrt(a * a + b * b));
      }
    });
  }
  forRows(touched, width, (from, to, y) => {
    let odd = 0;
    for (let i = from, j = (y - top) * columns; i < to; i++, j++) {
      odd ^= inside[j];
      cover[i] = ramped(odd ? -nearest[j] : nearest[j], ramp);
    }
  });
  return touched;
}

/** What each region has of the canvas after the overlap rule, in their order: Float32Arrays that sum to at most 1. */
export function masks(document, width, height) {
  const drawn = document.regions.filter((region) => !region.rest);
  const layers = drawn.map((region) => {
    const { mask } = new Layer(width, height).draw(region.visible ? region.shapes : [], region.feather);
    return mask.map((share) => share * region.weight);
  });
  const left = new Float32Array(width * height);
  for (let i = 0; i < left.length; i++) left[i] = shareOut(layers, i, document.overlap);
  const rests = document.regions.filter((region) => region.rest).length;
  const own = layers[Symbol.iterator]();
  return document.regions.map((region) =>
    region.rest ? left.map((share) => (share * region.weight * region.visible) / rests) : own.next().value,
  );
}

/** Make the layers share pixel i by a rule; returns what they leave. */
function shareOut(layers, i, rule) {
  let sum = 0;
  if (rule === "priority") {
    for (const layer of layers) {
      layer[i] = Math.min(layer[i], 1 - sum);
      sum += layer[i];
    }
  } else if (rule === "max") {
    let best = null;
    for (const layer of layers) if (best === null || layer[i] > best[i]) best = layer;
    for (const layer of layers) if (layer !== best) layer[i] = 0;
    sum = best === null ? 0 : best[i];
  } else {
    for (const layer of layers) sum += layer[i];
    if (sum > 1) for (const layer of layers) layer[i] /= sum;
    sum = Math.min(sum, 1);
  }
  return Math.max(0, 1 - sum);
}
