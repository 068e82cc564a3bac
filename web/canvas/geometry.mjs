// Where shapes lie, and moving, sizing and thinning them. Whole numbers of a ten-thousandth of the canvas throughout.

import { UNIT } from "./document.mjs";

const isPath = (shape) => shape.kind === "polygon" || shape.kind === "stroke";
const within = (number) => Math.max(-UNIT, Math.min(2 * UNIT, Math.round(number)));

/** [left, top, right, bottom] of shapes, a stroke's brush not counted; null where there are none. */
export function bounds(shapes) {
  const box = [Infinity, Infinity, -Infinity, -Infinity];
  for (const shape of shapes) {
    if (shape.erase) continue;
    const { numbers } = shape;
    const points = isPath(shape) ? numbers : [numbers[0], numbers[1], numbers[0] + numbers[2], numbers[1] + numbers[3]];
    points.forEach((number, i) => {
      box[i % 2] = Math.min(box[i % 2], number);
      box[2 + (i % 2)] = Math.max(box[2 + (i % 2)], number);
    });
  }
  return box[0] > box[2] ? null : box;
}

/** Shapes carried from one rectangle [left, top, right, bottom] to another. Brushes keep their width. */
export function fitted(shapes, from, to) {
  const scale = [0, 1].map((axis) => (to[axis + 2] - to[axis]) / Math.max(1, from[axis + 2] - from[axis]));
  const put = (number, axis) => within(to[axis] + (number - from[axis]) * scale[axis]);
  return shapes.map((shape) => {
    if (isPath(shape)) return { ...shape, numbers: shape.numbers.map((number, i) => put(number, i % 2)) };
    const [x, y, width, height] = shape.numbers;
    const [left, top] = [put(x, 0), put(y, 1)];
    const size = [put(x + width, 0) - left, put(y + height, 1) - top];
    return { ...shape, numbers: [left, top, ...size.map((length) => Math.max(1, length))] };
  });
}

/** Shapes moved by (dx, dy), as far as they stay within reach of the canvas as a whole. */
export function moved(shapes, dx, dy) {
  const box = bounds(shapes);
  if (!box) return shapes;
  const clamp = (step, axis) => Math.max(-UNIT - box[axis], Math.min(2 * UNIT - box[axis + 2], Math.round(step)));
  const step = [clamp(dx, 0), clamp(dy, 1)];
  return shapes.map((shape) => ({
    ...shape,
    numbers: shape.numbers.map((number, i) => (isPath(shape) || i < 2 ? number + step[i % 2] : number)),
  }));
}

/** The rectangle [x, y, width, height] between two corners, at least 1 wide and high. `square`: [sx, sy] lengths that look equal. */
export function spanned(x0, y0, x1, y1, square = null) {
  if (square) {
    const side = Math.max(Math.abs(x1 - x0) / square[0], Math.abs(y1 - y0) / square[1]);
    x1 = x0 + Math.sign(x1 - x0 || 1) * side * square[0];
    y1 = y0 + Math.sign(y1 - y0 || 1) * side * square[1];
  }
  const [left, top, right, bottom] = [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)].map(within);
  return [left, top, Math.max(1, right - left), Math.max(1, bottom - top)];
}

/** A path without the points that lie within `tolerance` of the line through their neighbours (Ramer, Douglas and Peucker). */
export function thinned(numbers, tolerance) {
  const count = numbers.length / 2;
  const keep = new Uint8Array(count);
  keep[0] = keep[count - 1] = 1;
  const spans = [[0, count - 1]];
  while (spans.length) {
    const [first, last] = spans.pop();
    const [x0, y0, x1, y1] = [numbers[2 * first], numbers[2 * first + 1], numbers[2 * last], numbers[2 * last + 1]];
    const squared = (x1 - x0) ** 2 + (y1 - y0) ** 2;
    let [farthest, at] = [tolerance, -1];
    for (let i = first + 1; i < last; i++) {
      const [u, v] = [numbers[2 * i] - x0, numbers[2 * i + 1] - y0];
      const share = squared ? Math.min(1, Math.max(0, (u * (x1 - x0) + v * (y1 - y0)) / squared)) : 0;
      const distance = Math.hypot(u - share * (x1 - x0), v - share * (y1 - y0));
      if (distance > farthest) [farthest, at] = [distance, i];
    }
    if (at >= 0) {
      keep[at] = 1;
      spans.push([first, at], [at, last]);
    }
  }
  return numbers.filter((_, i) => keep[i >> 1]);
}
