// Where the picture lies in the stage: fitted to it, or zoomed and moved. Lengths of the stage are CSS pixels before any scaling by the
// graph around it.

import { UNIT } from "./document.mjs";

const MARGIN = 10;
const MOST_ZOOM = 16;
const LEAST_ZOOM = 0.5;

export class View {
  constructor() {
    this.stage = [1, 1];
    this.picture = [512, 512];
    this.zoom = 1;
    this.centre = [0.5, 0.5];
  }

  reset() {
    this.zoom = 1;
    this.centre = [0.5, 0.5];
  }

  /** Stage pixels a picture's pixel takes. */
  get scale() {
    const [width, height] = this.picture;
    const room = this.stage.map((length) => Math.max(1, length - 2 * MARGIN));
    return Math.min(room[0] / width, room[1] / height) * this.zoom;
  }

  /** [left, top, width, height] of the picture in the stage. */
  get frame() {
    const size = this.picture.map((length) => length * this.scale);
    const at = [0, 1].map((axis) => this.stage[axis] / 2 - this.centre[axis] * size[axis]);
    return [...at, ...size];
  }

  /** Document units of a point of the stage. */
  toDocument(x, y) {
    const [left, top, width, height] = this.frame;
    return [((x - left) / width) * UNIT, ((y - top) / height) * UNIT];
  }

  /** A point of the stage for one in document units. */
  toStage(x, y) {
    const [left, top, width, height] = this.frame;
    return [left + (x / UNIT) * width, top + (y / UNIT) * height];
  }

  /** Stage pixels of a length in ten-thousandths of the picture's shorter side. */
  radius(units) {
    return (units / UNIT) * Math.min(...this.picture) * this.scale;
  }

  /** Zoom by a factor about a point of the stage, which stays where it is. */
  zoomAt(x, y, factor) {
    const fixed = this.toDocument(x, y);
    this.zoom = Math.max(LEAST_ZOOM, Math.min(MOST_ZOOM, this.zoom * factor));
    const now = this.toStage(...fixed);
    this.pan(x - now[0], y - now[1]);
  }

  pan(dx, dy) {
    const [, , width, height] = this.frame;
    const within = (share) => Math.max(0, Math.min(1, share));
    this.centre = [within(this.centre[0] - dx / width), within(this.centre[1] - dy / height)];
  }
}
