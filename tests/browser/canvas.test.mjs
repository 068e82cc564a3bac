// The canvas's modules that need no page: editing, undo, geometry, serialisation.

import assert from "node:assert/strict";
import { test } from "node:test";

import { DocumentError, MOST, parse, serialise } from "../../web/canvas/document.mjs";
import { Editor } from "../../web/canvas/editor.mjs";
import { bounds, fitted, moved, spanned, thinned } from "../../web/canvas/geometry.mjs";
import { History } from "../../web/canvas/history.mjs";
import { View } from "../../web/canvas/view.mjs";

const box = (...numbers) => ({ kind: "box", numbers, erase: false });
const stroke = (...numbers) => ({ kind: "stroke", numbers, radius: 100, erase: false });
const names = (editor) => editor.regions.map((region) => region.name);

test("a new region lies on top, the rest at the bottom", () => {
  const editor = new Editor();
  editor.draw(box(0, 0, 10, 10), false);
  editor.draw(box(5, 5, 10, 10), false);
  editor.add({ name: "rest", rest: true });
  assert.deepEqual(names(editor), ["region 2", "region 1", "rest"]);
  assert.equal(editor.region.name, "rest");
});

test("a shape fills an empty region, joins when asked, and is refused by locked ones", () => {
  const editor = new Editor();
  editor.add({ name: "a" });
  editor.draw(box(0, 0, 10, 10), false);
  assert.deepEqual(names(editor), ["a"]);
  editor.draw(box(5, 5, 10, 10), true);
  assert.equal(editor.region.shapes.length, 2);
  editor.update(0, { locked: true });
  editor.draw(box(5, 5, 10, 10), true);
  assert.deepEqual(names(editor), ["region 2", "a"]);
});

test("undo to empty and redo give the same texts, 100 steps and more", () => {
  const editor = new Editor();
  const texts = [editor.text];
  for (let i = 0; i < 150; i++) {
    if (i % 3 || !editor.region) editor.draw(stroke(i, i, i + 50, i + 9), i % 2 === 0);
    else editor.update(editor.selected, { prompt: `a cat ${i}` });
    texts.push(editor.text);
  }
  for (const text of texts.toReversed()) {
    assert.equal(editor.text, text);
    editor.step(-1);
  }
  assert.equal(editor.text, "");
  for (const text of texts) {
    assert.equal(editor.text, text);
    editor.step(1);
  }
});

test("what is typed in one go is one step", () => {
  const editor = new Editor();
  editor.add({ name: "a" });
  for (const text of ["c", "ca", "cat"]) editor.update(0, { prompt: text }, "prompt");
  editor.update(0, { negative: "d" }, "negative");
  editor.step(-1);
  assert.equal(editor.region.prompt, "cat");
  editor.step(-1);
  assert.equal(editor.region.prompt, "");
});

test("a text is kept as it was read until something changes, and when it cannot be read", () => {
  const editor = new Editor();
  const spaced = '{ "version": 1,\n "regions": [ {"name": "a"} ] }';
  editor.load(spaced);
  assert.equal(editor.text, spaced);
  editor.update(0, { prompt: "x" });
  editor.step(-1);
  assert.equal(editor.text, spaced);
  editor.load('{"regions": 5}');
  assert.match(editor.error.message, /regions is 5/);
  assert.equal(editor.text, '{"regions": 5}');
  editor.replace('{"regions": [{"name": "b"}]}');
  assert.equal(editor.error, null);
  assert.deepEqual(names(editor), ["b"]);
  assert.throws(() => editor.replace("{"), DocumentError);
  assert.deepEqual(names(editor), ["b"]);
});

test("a text that an earlier panel had goes on with its history", () => {
  const before = new Editor();
  before.add();
  before.add();
  const [, one, two] = before.history.states.map((state) => state.text);
  const after = new Editor();
  assert.equal(after.load(one, before.history.states), true);
  assert.equal(after.text, one);
  after.step(1);
  assert.equal(after.text, two);
  after.step(-2);
  assert.equal(after.text, "");
  assert.equal(new Editor().load(serialise({ ...after.document, overlap: "max" }), before.history.states), false);
});

test("an empty canvas takes over nothing", () => {
  const before = new Editor();
  before.add();
  const after = new Editor();
  assert.equal(after.load("", before.history.states), false);
  assert.equal(after.history.canRedo, false);
});

test("names stay unlike", () => {
  const editor = new Editor();
  editor.add({ name: "cat" });
  editor.add({ name: "dog" });
  assert.equal(editor.rename(0, " cat "), false);
  assert.equal(editor.rename(0, "  "), false);
  assert.equal(editor.rename(0, "cow "), true);
  editor.duplicate();
  editor.duplicate();
  assert.deepEqual(new Set(names(editor)), new Set(["cat", "cow", "cow 2", "cow 3"]));
});

test("copies lie beside what they are copied from, not on it", () => {
  const editor = new Editor();
  editor.draw(box(100, 100, 500, 500), false);
  const text = editor.copy();
  editor.paste(text);
  assert.deepEqual(editor.region.shapes[0].numbers, [300, 300, 500, 500]);
  const other = new Editor();
  other.paste(text);
  assert.deepEqual(other.region.shapes[0].numbers, [100, 100, 500, 500]);
  assert.throws(() => other.paste("a cat"), DocumentError);
  assert.throws(() => other.paste(""), DocumentError);
});

test("there are never more regions than can be", () => {
  const editor = new Editor();
  for (let i = 0; i < MOST; i++) editor.add();
  assert.equal(editor.add(), null);
  assert.equal(editor.draw(box(0, 0, 9, 9), false), true); // into the empty selected one
  assert.equal(editor.draw(box(0, 0, 9, 9), false), false);
  assert.throws(() => editor.duplicate(), DocumentError);
  assert.equal(parse(editor.text).regions.length, MOST);
});

test("locked regions stay, and removal selects the next", () => {
  const editor = new Editor();
  for (const name of ["c", "b", "a"]) editor.add({ name });
  editor.select(1);
  editor.remove();
  assert.deepEqual([names(editor), editor.region.name], [["a", "c"], "c"]);
  editor.update(1, { locked: true });
  editor.remove();
  editor.nudge(10, 10);
  assert.deepEqual(names(editor), ["a", "c"]);
  editor.reorder(-1);
  assert.deepEqual(names(editor), ["c", "a"]);
});

test("an undo history forgets the oldest, not the newest", () => {
  const history = new History(0);
  for (let i = 1; i <= 600; i++) history.push(i);
  assert.equal(history.state, 600);
  for (let i = 0; i < 100; i++) assert.equal(history.step(-1), true);
  assert.equal(history.state, 500);
  history.push(1000);
  assert.equal(history.canRedo, false);
});

test("shapes move and are fitted as they look", () => {
  const shapes = [box(0, 0, 100, 100), stroke(200, 200, 300, 250)];
  assert.deepEqual(bounds(shapes), [0, 0, 300, 250]);
  assert.deepEqual(bounds(moved(shapes, 50, -20)), [50, -20, 350, 230]);
  assert.deepEqual(bounds(moved(shapes, 99_999, 0)), [19_700, 0, 20_000, 250]);
  assert.deepEqual(bounds(fitted(shapes, [0, 0, 300, 250], [100, 100, 700, 600])), [100, 100, 700, 600]);
  assert.equal(bounds([]), null);
});

test("squares look square on any canvas", () => {
  const [, , width, height] = spanned(1000, 1000, 4000, 1500, [0.5, 1]); // twice as wide as high
  assert.equal(width * 2, height);
  assert.deepEqual(spanned(5, 5, 5, 5), [5, 5, 1, 1]);
});

test("thinning keeps ends and stays within its tolerance", () => {
  const numbers = [];
  for (let i = 0; i <= 400; i++) numbers.push(i * 10, Math.round(800 * Math.sin(i / 40)));
  const thin = thinned(numbers, 5);
  assert.ok(thin.length < numbers.length / 4);
  assert.deepEqual([...thin.slice(0, 2), ...thin.slice(-2)], [...numbers.slice(0, 2), ...numbers.slice(-2)]);
  for (let i = 0; i < numbers.length; i += 2) {
    let nearest = Infinity;
    for (let j = 0; j + 3 < thin.length; j += 2) {
      const [x0, y0, x1, y1] = thin.slice(j, j + 4);
      const share = Math.min(1, Math.max(0, ((numbers[i] - x0) * (x1 - x0) + (numbers[i + 1] - y0) * (y1 - y0)) / ((x1 - x0) ** 2 + (y1 - y0) ** 2)));
      nearest = Math.min(nearest, Math.hypot(numbers[i] - x0 - share * (x1 - x0), numbers[i + 1] - y0 - share * (y1 - y0)));
    }
    assert.ok(nearest <= 5);
  }
});

test("zooming keeps the point under the pointer, and the picture in sight", () => {
  const view = new View();
  view.stage = [400, 300];
  view.picture = [1024, 512];
  const fixed = view.toDocument(120, 90);
  view.zoomAt(120, 90, 3);
  const [x, y] = view.toStage(...fixed);
  assert.ok(Math.hypot(x - 120, y - 90) < 1e-6);
  view.pan(1e6, 1e6);
  const [left, top] = view.frame;
  assert.ok(left <= 400 && top <= 300);
});

test("a typical document of three regions is under a kilobyte", () => {
  const editor = new Editor();
  for (const name of ["a knight", "a dragon"]) editor.add({ name, prompt: `${name} in a wide green valley, oil painting`, shapes: [box(500, 500, 3000, 8000)] });
  editor.add({ name: "rest", rest: true, prompt: "a castle on a hill" });
  assert.ok(editor.text.length < 1000, String(editor.text.length));
  assert.equal(serialise(parse(editor.text)), editor.text);
});
