// What the pointer does on the stage. A tool has down, move and up, given {x, y} in stage pixels, the same in document units, and the
// event; cancel; hover; and says what it would do. Nothing is committed before the hand lifts.

import { UNIT } from "./document.mjs";
import { bounds, fitted, moved, spanned, thinned } from "./geometry.mjs";
import { coverSegment, pixels, radiusIn, rampOf } from "./raster.mjs";
import { handlesOf, newTint, twice } from "./stage.mjs";
import { say } from "./strings.mjs";

const NEAR = 9; // stage pixels around a handle or a polygon's first point
const LEAST = 3; // stage pixels that a drawn shape must measure
const THIN = 5; // ten-thousandths by which a thinned stroke may differ

/** @param {{editor, stage, view, brush: {radius: number}, adding: (event) => boolean, tell: (key: string) => void}} desk */
export function makeTools(desk) {
  return {
    select: new Select(desk),
    box: new Rectangle(desk, "box"),
    ellipse: new Rectangle(desk, "ellipse"),
    polygon: new Outline(desk),
    brush: new Brush(desk, false),
    eraser: new Brush(desk, true),
  };
}

class Tool {
  cursor = "crosshair";

  constructor(desk) {
    Object.assign(this, desk);
    this.desk = desk;
  }

  get busy() {
    return false;
  }

  hover() {}

  cancel() {
    this.stage.live = this.stage.overlay = null;
    this.stage.invalidate();
  }

  /** Give a finished shape to the document, and say so where it has no place. */
  finish(shape, event) {
    this.cancel();
    const { editor } = this;
    if (editor.draw(shape, this.desk.adding(event))) return;
    this.desk.tell(shape.erase ? "nothingToErase" : "full");
  }
}

/** Choose regions; move the chosen one, or size it by its handles. */
class Select extends Tool {
  cursor = "default";
  drag = null;

  get busy() {
    return this.drag !== null;
  }

  handleAt({ x, y }) {
    const { region } = this.editor;
    const box = region && !region.locked && bounds(region.shapes);
    if (!box) return null;
    return handlesOf(...this.stage.frameOf(region.shapes, box)).find(([hx, hy]) => Math.abs(hx - x) <= NEAR && Math.abs(hy - y) <= NEAR) ?? null;
  }

  down(point) {
    const handle = this.handleAt(point);
    if (!handle) {
      const { regions } = this.editor;
      const hit = (region) => region.visible && !region.rest && this.stage.covers(region, point.u, point.v);
      // The chosen region first: what lies under another can still be moved.
      const index = this.editor.region && hit(this.editor.region) ? this.editor.selected : regions.findIndex(hit);
      this.editor.select(index);
      if (index < 0 || regions[index].locked) return;
    }
    const from = bounds(this.editor.region.shapes);
    if (from) this.drag = { from, to: from, handle, start: point };
  }

  move(point) {
    if (!this.drag) return;
    const { from, handle, start } = this.drag;
    const by = [point.u - start.u, point.v - start.v];
    const to = [...from];
    if (handle) {
      for (const axis of [0, 1]) {
        const side = handle[2 + axis];
        if (side === 0) to[axis] = Math.min(from[axis] + by[axis], from[axis + 2] - 1);
        if (side === 2) to[axis + 2] = Math.max(from[axis + 2] + by[axis], from[axis] + 1);
      }
    } else {
      for (const side of [0, 1, 2, 3]) to[side] += by[side % 2];
    }
    this.drag.to = to;
    this.stage.live = (context) => this.show(context);
    this.stage.invalidate();
  }

  /** The region's tint as it will lie: carried along as a picture, which costs nothing. */
  show(context) {
    const { from, to } = this.drag;
    const { region } = this.editor;
    const [left, top, width, height] = this.view.frame;
    const scale = [0, 1].map((axis) => (to[axis + 2] - to[axis]) / Math.max(1, from[axis + 2] - from[axis]));
    const shift = [0, 1].map((axis) => (to[axis] - from[axis] * scale[axis]) / UNIT);
    if (region.visible) {
      const { canvas } = this.stage.tint(region);
      context.drawImage(canvas, left + shift[0] * width, top + shift[1] * height, width * scale[0], height * scale[1]);
    }
    context.globalAlpha = 1;
    const frame = this.stage.frameOf(region.shapes, to);
    context.beginPath();
    context.rect(frame[0], frame[1], frame[2] - frame[0], frame[3] - frame[1]);
    twice(context, [3, 3]);
  }

  up() {
    const { drag } = this;
    this.cancel();
    if (!drag || drag.to === drag.from) return;
    const { shapes } = this.editor.region;
    const changed = drag.handle ? fitted(shapes, drag.from, drag.to) : moved(shapes, drag.to[0] - drag.from[0], drag.to[1] - drag.from[1]);
    if (JSON.stringify(changed) !== JSON.stringify(shapes)) this.editor.update(this.editor.selected, { shapes: changed });
  }

  cancel() {
    this.drag = null;
    super.cancel();
  }

  hover(point) {
    const handle = this.handleAt(point);
    const names = ["nwse", "ns", "nesw", "ew", "", "ew", "nesw", "ns", "nwse"];
    this.stage.canvas.style.cursor = handle ? `${names[handle[3] * 3 + handle[2]]}-resize` : this.cursor;
  }
}

/** Drag a box, or the ellipse in it; Shift keeps it square. */
class Rectangle extends Tool {
  start = null;

  constructor(desk, kind) {
    super(desk);
    this.kind = kind;
  }

  get busy() {
    return this.start !== null;
  }

  down(point) {
    this.start = this.end = point;
  }

  move(point) {
    if (!this.start) return;
    this.end = point;
    const shape = this.shape(point.event.shiftKey);
    this.stage.overlay = (context) => {
      this.stage.path(context, shape);
      context.fillStyle = "rgba(255, 255, 255, 0.25)";
      context.fill();
      twice(context, []);
    };
    this.stage.invalidate();
  }

  shape(square) {
    const [width, height] = this.view.picture;
    const lengths = [Math.min(width, height) / width, Math.min(width, height) / height];
    const numbers = spanned(this.start.u, this.start.v, this.end.u, this.end.v, square ? lengths : null);
    return { kind: this.kind, numbers, erase: false };
  }

  up(point) {
    const { start } = this;
    if (!start) return;
    this.end = point;
    const shape = this.shape(point.event.shiftKey);
    const large = Math.abs(point.x - start.x) >= LEAST && Math.abs(point.y - start.y) >= LEAST;
    if (large) this.finish(shape, point.event);
    else this.cancel();
    this.start = null;
  }

  cancel() {
    this.start = null;
    super.cancel();
  }
}

/** Click corner after corner of a polygon, or drag a lasso; a click on the first corner, a double click or Enter closes it. */
class Outline extends Tool {
  points = []; // document units
  dragging = false;

  get busy() {
    return this.points.length > 0;
  }

  down(point) {
    const first = this.points.length >= 6 && this.view.toStage(this.points[0], this.points[1]);
    if (first && Math.hypot(point.x - first[0], point.y - first[1]) <= NEAR) {
      this.close(point.event);
      return;
    }
    this.start = point;
    this.dragging = true;
    this.lasso = false;
    this.points.push(Math.round(point.u), Math.round(point.v));
    this.show(point);
  }

  move(point) {
    if (!this.dragging) return;
    if (!this.lasso && Math.hypot(point.x - this.start.x, point.y - this.start.y) < 2 * LEAST) return;
    this.lasso = true;
    for (const { u, v } of point.all()) this.points.push(Math.round(u), Math.round(v));
    this.show(point);
  }

  up(point) {
    this.dragging = false;
    if (this.lasso) {
      this.points = thinned(this.points, THIN);
      this.lasso = false;
      // A lasso that begins a shape is the shape; one that goes on from corners is a part of its edge.
      const [x, y] = this.points;
      if (Math.round(this.start.u) === x && Math.round(this.start.v) === y) this.close(point.event);
    }
  }

  hover(point) {
    if (this.points.length) this.show(point);
  }

  show(point) {
    this.stage.overlay = (context) => {
      context.beginPath();
      for (let i = 0; i < this.points.length; i += 2) context.lineTo(...this.view.toStage(this.points[i], this.points[i + 1]));
      if (!this.lasso) context.lineTo(point.x, point.y);
      context.fillStyle = "rgba(255, 255, 255, 0.25)";
      context.fill("evenodd");
      twice(context, []);
      const [x, y] = this.view.toStage(this.points[0], this.points[1]);
      context.fillStyle = "#fff";
      context.fillRect(x - 3, y - 3, 6, 6);
    };
    this.stage.invalidate();
  }

  /** Close the polygon, if it has three corners. */
  close(event) {
    const numbers = withoutRepeats(this.points);
    this.points = [];
    if (numbers.length >= 6) this.finish({ kind: "polygon", numbers, erase: false }, event);
    else this.cancel();
  }

  /** Take the last corner back. */
  back() {
    this.points.length = Math.max(0, this.points.length - 2);
    if (!this.points.length) this.cancel();
    this.stage.invalidate();
  }

  cancel() {
    this.points = [];
    this.dragging = this.lasso = false;
    super.cancel();
  }
}

/** Paint on the selected region, or take away from it. */
class Brush extends Tool {
  stroke = null;
  cursor = "none";

  constructor(desk, erase) {
    super(desk);
    this.erase = erase;
  }

  get busy() {
    return this.stroke !== null;
  }

  down(point) {
    const { editor, stage } = this;
    const mine = editor.goesToSelected(true);
    if (this.erase && !mine) {
      this.desk.tell("nothingToErase");
      return;
    }
    const region = mine ? editor.region : { colour: editor.freeColour(), feather: 0, shapes: [] };
    const [width, height] = stage.raster;
    const tint = newTint(width, height, region.colour);
    const before = mine ? stage.tint(region).layer.mask : new Float32Array(tint.layer.mask.length);
    tint.layer.mask.set(before);
    tint.show([0, 0, width, height]);
    const shape = { kind: "stroke", numbers: [], radius: Math.max(1, Math.round(this.desk.brush.radius)), erase: this.erase };
    this.stroke = { shape, tint, before, cover: new Float32Array(before.length), ramp: rampOf(region.feather, width, height), mine };
    this.extend(point);
  }

  move(point) {
    if (this.stroke) for (const sample of point.all()) this.extend(sample);
    this.hover(point);
  }

  /** Draw on to a point: only the rectangle that the new segment reaches is touched. */
  extend({ u, v }) {
    const { shape, tint, before, cover, ramp, mine } = this.stroke;
    const { numbers } = shape;
    const [x, y] = [u, v].map((number) => Math.max(-UNIT, Math.min(2 * UNIT, Math.round(number))));
    if (numbers.length && numbers.at(-2) === x && numbers.at(-1) === y) return;
    numbers.push(x, y);
    const { width, height } = tint.layer;
    const last = pixels(numbers.slice(-4), width, height);
    const touched = coverSegment(...last.slice(0, 2), ...last.slice(-2), radiusIn(shape, width, height), width, height, ramp, cover);
    tint.layer.lay(cover, touched, shape.erase, before);
    tint.show(touched);
    const show = (context) => context.drawImage(tint.canvas, ...this.view.frame);
    if (mine) this.stage.live = show;
    else this.begun = show;
  }

  hover(point) {
    this.stage.overlay = (context) => {
      const radius = this.view.radius(this.desk.brush.radius);
      if (this.stroke && !this.stroke.mine) {
        context.globalAlpha = 0.5;
        this.begun(context);
        context.globalAlpha = 1;
      }
      context.beginPath();
      context.ellipse(point.x, point.y, radius, radius, 0, 0, 2 * Math.PI);
      twice(context, this.erase ? [3, 3] : []);
      if (!this.stroke) this.showTarget(context, point.x + radius + 4, point.y);
    };
    this.stage.invalidate();
  }

  /** What the brush would paint on, beside it: other tools begin a region of their own. */
  showTarget(context, x, y) {
    const { editor } = this;
    if (editor.goesToSelected(true)) this.stage.tag(context, editor.region.name, editor.region.colour, x, y);
    else if (!this.erase) this.stage.tag(context, say("brushNew"), editor.freeColour(), x, y);
  }

  up(point) {
    const { stroke } = this;
    if (!stroke) return;
    this.stroke = null;
    this.stage.live = null;
    const shape = { ...stroke.shape, numbers: thinned(stroke.shape.numbers, THIN) };
    if (stroke.mine) this.editor.update(this.editor.selected, { shapes: [...this.editor.region.shapes, shape], visible: true });
    else if (!this.editor.add({ shapes: [shape] })) this.desk.tell("full");
    this.hover(point);
  }

  cancel() {
    this.stroke = null;
    super.cancel();
  }
}

/** A path without points that repeat the one before. */
function withoutRepeats(numbers) {
  return numbers.filter((_, i) => {
    const at = i - (i % 2);
    return at === 0 || numbers[at] !== numbers[at - 2] || numbers[at + 1] !== numbers[at - 1];
  });
}
