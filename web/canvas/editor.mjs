// What the panel edits: a document, the selected region, and the way back. No DOM.

import { COLOURS, EMPTY, MOST, DocumentError, newRegion, parse, serialise } from "./document.mjs";
import { bounds, moved } from "./geometry.mjs";
import { History } from "./history.mjs";

const PASTE_OFFSET = 200;

export class Editor {
  /** @param {() => void} changed called after every change of the state, an undo included */
  constructor(changed = () => {}) {
    this.changed = changed;
    this.error = null;
    this.history = new History({ document: EMPTY, selected: -1, text: "" });
  }

  get document() {
    return this.history.state.document;
  }

  get regions() {
    return this.document.regions;
  }

  get selected() {
    return this.history.state.selected;
  }

  /** The selected region, or null. */
  get region() {
    return this.regions[this.selected] ?? null;
  }

  /** What a workflow saves: the text as it was read until something is changed, also where it cannot be read. */
  get text() {
    return this.error ? this.error.text : this.history.state.text;
  }

  /** Read what a workflow has saved. A text that cannot be read is kept as it is, and `error` says why. Where it is one of `known` states,
   * what came before and after it can still be undone and redone; whether it was. */
  load(text, known = []) {
    if (text === this.text) return false;
    const at = text ? known.findLastIndex((state) => state.text === text) : -1;
    if (at >= 0) {
      this.error = null;
      this.history.resume(known, at);
      this.changed();
      return true;
    }
    try {
      const document = parse(text);
      this.error = null;
      this.history.reset({ document, selected: document.regions.length ? 0 : -1, text });
    } catch (error) {
      if (!(error instanceof DocumentError)) throw error;
      this.error = { message: error.message, text };
    }
    this.changed();
    return false;
  }

  /** A new text as a step that can be undone. @throws {DocumentError} */
  replace(text) {
    const document = parse(text);
    this.error = null;
    this.commit(document, { selected: Math.min(Math.max(this.selected, 0), document.regions.length - 1) });
  }

  commit(document, { selected = this.selected, topic = null } = {}) {
    this.error = null;
    this.history.push({ document, selected, text: serialise(document) }, topic);
    this.changed();
  }

  step(by) {
    if (this.error || !this.history.step(by)) return;
    this.changed();
  }

  /** Selecting is no step of its own. */
  select(index) {
    const selected = Math.max(-1, Math.min(this.regions.length - 1, index));
    if (selected === this.selected) return;
    this.history.states[this.history.at] = { ...this.history.state, selected };
    this.history.topic = null;
    this.changed();
  }

  /** Other values for fields of a region; `topic` joins what is typed in one go into one step. */
  update(index, fields, topic = null) {
    const regions = this.regions.map((region, at) => (at === index ? { ...region, ...fields } : region));
    this.commit({ ...this.document, regions }, { topic: topic && `${topic} ${index}` });
  }

  canBeNamed(index, name) {
    return name.trim() !== "" && !this.regions.some((region, at) => at !== index && region.name === name.trim());
  }

  /** Another name, if it is one that no other region has; whether it was taken. */
  rename(index, name) {
    if (!this.regions[index] || !this.canBeNamed(index, name)) return false;
    if (name.trim() !== this.regions[index].name) this.update(index, { name: name.trim() });
    return true;
  }

  setOverlap(overlap) {
    this.commit({ ...this.document, overlap });
  }

  get full() {
    return this.regions.length >= MOST;
  }

  /** One more region on top of the others (the rest: below them), selected. Null where there are as many as there can be. */
  add(given = {}) {
    if (this.full) return null;
    const name = freeName(given.name ?? `region ${this.regions.filter((region) => !region.rest).length + 1}`, this.regions);
    const region = newRegion({ colour: this.freeColour(), ...given, name });
    const regions = region.rest ? [...this.regions, region] : [region, ...this.regions];
    this.commit({ ...this.document, regions }, { selected: regions.indexOf(region) });
    return region;
  }

  freeColour() {
    const uses = COLOURS.map((colour) => this.regions.filter((region) => region.colour === colour).length);
    return COLOURS[uses.indexOf(Math.min(...uses))];
  }

  /** Whether a shape drawn now goes to the selected region rather than to a new one. */
  goesToSelected(adding) {
    return this.region !== null && !this.region.rest && !this.region.locked && (adding || this.region.shapes.length === 0);
  }

  /** Put a drawn shape where it belongs; false where it had no place. */
  draw(shape, adding) {
    if (this.goesToSelected(adding)) {
      this.update(this.selected, { shapes: [...this.region.shapes, shape], visible: true });
      return true;
    }
    return !shape.erase && this.add({ shapes: [shape] }) !== null;
  }

  remove(index = this.selected) {
    const region = this.regions[index];
    if (!region || region.locked) return;
    const regions = this.regions.filter((_, at) => at !== index);
    this.commit({ ...this.document, regions }, { selected: Math.min(index, regions.length - 1) });
  }

  /** Move the selected region by `by` places in the list (negative: up, over others). */
  reorder(by, index = this.selected) {
    const to = Math.max(0, Math.min(this.regions.length - 1, index + by));
    if (index < 0 || to === index) return;
    const regions = [...this.regions];
    regions.splice(to, 0, ...regions.splice(index, 1));
    this.commit({ ...this.document, regions }, { selected: to });
  }

  duplicate() {
    if (this.region) this.insert([this.region]);
  }

  /** Move the selected region's shapes. */
  nudge(dx, dy) {
    if (!this.region || this.region.locked || !bounds(this.region.shapes)) return;
    this.update(this.selected, { shapes: moved(this.region.shapes, dx, dy) }, "nudge");
  }

  /** The selected region as a document of its own, for the clipboard. */
  copy() {
    return this.region ? serialise({ overlap: EMPTY.overlap, regions: [this.region] }) : "";
  }

  /** Put in the regions of a document's text. @throws {DocumentError} where it is none */
  paste(text) {
    const { regions } = parse(text);
    if (!regions.length) throw new DocumentError("The clipboard holds no regions. Copy a region first.");
    this.insert(regions);
  }

  insert(regions) {
    if (this.regions.length + regions.length > MOST) {
      throw new DocumentError(`There can be ${MOST} regions at most. Remove some first.`);
    }
    const taken = this.regions.map((region) => region.shapes);
    const put = [];
    for (const region of regions) {
      const name = freeName(region.name, [...this.regions, ...put]);
      const covers = taken.some((shapes) => JSON.stringify(shapes) === JSON.stringify(region.shapes));
      put.push({ ...region, name, locked: false, shapes: covers ? moved(region.shapes, PASTE_OFFSET, PASTE_OFFSET) : region.shapes });
    }
    const at = Math.max(0, this.selected);
    this.commit({ ...this.document, regions: [...this.regions.slice(0, at), ...put, ...this.regions.slice(at)] }, { selected: at });
  }
}

/** A name that none of the regions has. */
function freeName(name, regions) {
  const taken = new Set(regions.map((region) => region.name));
  if (!taken.has(name)) return name;
  const stem = name.replace(/ \d+$/, "");
  let number = 2;
  while (taken.has(`${stem} ${number}`)) number++;
  return `${stem} ${number}`;
}
