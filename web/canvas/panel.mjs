// The panel: toolbar and stage on the left, regions on the right. It owns the editor and reports each change as the text to save.

import { UNIT, DocumentError } from "./document.mjs";
import { make } from "./dom.mjs";
import { Editor } from "./editor.mjs";
import { actionFor } from "./keys.mjs";
import { Side } from "./side.mjs";
import { Stage } from "./stage.mjs";
import { STYLE } from "./style.mjs";
import { say } from "./strings.mjs";
import { makeTools } from "./tools.mjs";
import { View } from "./view.mjs";

const WHEEL_ZOOM = 1.1;
const FIRST_RADIUS = 500;
const TOLD_MS = 4000;

export class Panel {
  /** @param {{changed: (text: string) => void, pictureSize: () => [number, number], listFiles: () => Promise<string[]>,
   *    backgrounds: {choice: string, choose: (choice: string) => void}, passWheel: (event) => boolean}} host */
  constructor(host) {
    this.host = host;
    this.editor = new Editor(() => this.show());
    this.view = new View();
    this.brush = { radius: FIRST_RADIUS };
    this.addingOn = false;
    this.saved = "";
    this.canvas = make("canvas", { aria: { role: "img" } });
    this.keys = make("textarea", { className: "concept-canvas-keys", aria: { label: say("keysTitle") } });
    this.hint = make("div", { className: "concept-canvas-hint", aria: { role: "status" } });
    this.size = make("span", { className: "concept-canvas-size", title: say("size") });
    this.stageBox = make("div", { className: "concept-canvas-stage" }, this.keys, this.canvas);
    this.stage = new Stage(this.canvas, this.editor, this.view);
    this.side = new Side(this.editor, { listFiles: host.listFiles, back: () => this.focus(), tell: (key, text) => this.tell(key, text) });
    this.tools = makeTools({
      editor: this.editor,
      stage: this.stage,
      view: this.view,
      brush: this.brush,
      adding: (event) => this.addingOn !== Boolean(event.ctrlKey || event.metaKey),
      tell: (key) => this.tell(key),
    });
    this.sheet = make("div", { className: "concept-canvas-sheet", hidden: true });
    const foot = make("div", { className: "concept-canvas-foot" }, this.hint, this.size);
    this.element = make(
      "div",
      { className: "concept-canvas" },
      make("style", { textContent: STYLE }),
      make("div", { className: "concept-canvas-left" }, this.makeBar(), this.stageBox, foot),
      this.side.element,
      this.sheet,
    );
    this.element.dataset.captureWheel = "true"; // Nodes 2.0 leaves the wheel to what has the focus
    this.listen();
    this.choose("box");
    this.show();
  }

  makeBar() {
    const button = (key, act) => this.side.button(key, act);
    this.toolButtons = Object.fromEntries(
      ["select", "box", "ellipse", "polygon", "brush", "eraser"].map((name) => [name, button(name, () => this.choose(name))]),
    );
    this.radius = make("input", {
      type: "range",
      min: 1,
      max: 100,
      tabIndex: -1,
      title: say("radius"),
      style: { width: "64px" },
      aria: { label: say("radius") },
      on: { input: () => this.setRadius((this.radius.value / 100) ** 2 * (UNIT / 4)), change: () => this.focus() },
    });
    this.addingButton = button("adding", () => this.setAdding(!this.addingOn));
    this.undoButton = button("undo", () => this.editor.step(-1));
    this.redoButton = button("redo", () => this.editor.step(1));
    this.background = make(
      "select",
      {
        title: say("background"),
        tabIndex: -1,
        on: { change: ({ target }) => (this.host.backgrounds.choose(target.value), this.focus()) },
      },
      ...["Auto", "Last", "None"].map((name) =>
        make("option", { value: name.toLowerCase(), textContent: say(`background${name}`) }),
      ),
    );
    const gap = () => make("span", { className: "concept-canvas-gap" });
    return make(
      "div",
      { className: "concept-canvas-bar", aria: { role: "toolbar" } },
      ...Object.values(this.toolButtons),
      this.radius,
      this.addingButton,
      gap(),
      this.undoButton,
      this.redoButton,
      gap(),
      button("fit", () => this.fit()),
      make("button", { type: "button", tabIndex: -1, title: say("json"), textContent: "{ }", on: { click: () => this.editText() } }),
      make("button", { type: "button", tabIndex: -1, title: say("help"), textContent: "?", on: { click: () => this.showKeys() } }),
      this.background,
    );
  }

  // --- what reaches the panel ----------------------------------------------------------------------------------------------------

  listen() {
    const { canvas, element, keys } = this;
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.stageBox);
    const timed = (handle) => (event) => this.timed(() => handle(event));
    canvas.addEventListener("pointerdown", timed((event) => this.pointerDown(event)));
    canvas.addEventListener("pointermove", timed((event) => this.pointerMove(event)));
    canvas.addEventListener("pointerup", timed((event) => this.pointerUp(event)));
    canvas.addEventListener("pointercancel", () => this.tool.cancel());
    canvas.addEventListener("pointerleave", () => {
      if (this.tool.busy) return;
      this.stage.overlay = null;
      this.stage.invalidate();
    });
    canvas.addEventListener("dblclick", (event) => this.tool.busy && this.tool.close?.(event));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    element.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    // What takes no text leaves the keyboard to the stage.
    element.addEventListener("pointerdown", (event) => {
      event.stopPropagation();
      if (event.target.closest("input, textarea, select")) return;
      event.preventDefault();
      this.focus();
    });
    for (const type of ["pointermove", "pointerup", "mousedown", "mousemove", "mouseup", "click", "dblclick"]) {
      element.addEventListener(type, (event) => event.stopPropagation());
    }
    element.addEventListener("keydown", (event) => this.key(event));
    element.addEventListener("keyup", (event) => {
      event.stopPropagation();
      if (event.key === " ") this.panning = false;
    });
    for (const type of ["copy", "cut", "paste"]) element.addEventListener(type, (event) => this.clipboard(event));
    keys.addEventListener("input", () => (keys.value = ""));
    keys.addEventListener("blur", () => (this.panning = false));
  }

  /** Run a handler, and note what it took for whoever measures. */
  timed(act) {
    const began = performance.now();
    act();
    this.spent = performance.now() - began;
  }

  focus() {
    this.keys.focus({ preventScroll: true });
  }

  /** A pointer event in stage pixels and document units; `all` gives what the pointer passed since the event before. */
  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const at = ({ clientX, clientY }) => {
      // The graph around scales the panel: lengths on the page are not lengths of the stage.
      const x = ((clientX - box.left) / box.width) * this.view.stage[0];
      const y = ((clientY - box.top) / box.height) * this.view.stage[1];
      const [u, v] = this.view.toDocument(x, y);
      return { x, y, u, v };
    };
    const all = () => {
      const passed = event.getCoalescedEvents?.() ?? [];
      return (passed.length ? passed : [event]).map(at);
    };
    return { ...at(event), event, all };
  }

  pointerDown(event) {
    this.focus();
    event.preventDefault();
    if (this.editor.error) return;
    this.canvas.setPointerCapture(event.pointerId);
    const point = this.point(event);
    if (event.button === 1 || this.panning) this.pan = point;
    else if (event.button === 0) this.tool.down(point);
    this.stage.invalidate();
  }

  pointerMove(event) {
    const point = this.point(event);
    if (this.pan) {
      this.view.pan(point.x - this.pan.x, point.y - this.pan.y);
      this.pan = point;
      this.stage.invalidate();
    } else if (this.tool.busy && event.buttons) {
      this.tool.move(point);
    } else {
      this.tool.hover(point);
    }
  }

  pointerUp(event) {
    if (this.pan) this.pan = null;
    else this.tool.up(this.point(event));
    this.stage.invalidate();
  }

  wheel(event) {
    const scrolls = (field) => field && field.scrollHeight > field.clientHeight;
    const field = event.target.closest("textarea:not(.concept-canvas-keys), .concept-canvas-report, .concept-canvas-side, .concept-canvas-sheet");
    const focused = this.element.contains(document.activeElement);
    if (!event.ctrlKey && (scrolls(field) || (focused && !this.stageBox.contains(event.target)))) {
      event.stopPropagation();
      return;
    }
    if (!focused) {
      if (this.host.passWheel(event)) event.preventDefault();
      return;
    }
    event.preventDefault();
    event.stopPropagation();
    const { x, y } = this.point(event);
    this.view.zoomAt(x, y, event.deltaY < 0 ? WHEEL_ZOOM : 1 / WHEEL_ZOOM);
    this.stage.invalidate();
  }

  key(event) {
    event.stopPropagation();
    if (event.target !== this.keys) {
      // Fields keep their keys; Esc leaves them, and so does Enter where there is one line.
      const oneLine = event.target.matches("input");
      if (event.key === "Escape" || (event.key === "Enter" && oneLine && !event.defaultPrevented)) this.focus();
      return;
    }
    if (!this.sheet.hidden && event.key === "Escape") {
      this.sheet.hidden = true;
      return;
    }
    if (event.key === " ") {
      this.panning = true;
      event.preventDefault();
      return;
    }
    const act = this.editor.error ? null : actionFor(event, this);
    if (!act) return;
    event.preventDefault();
    act();
  }

  clipboard(event) {
    event.stopPropagation();
    if (event.target !== this.keys || this.editor.error) return;
    event.preventDefault();
    if (event.type === "paste") {
      this.side.guard(() => this.editor.paste(event.clipboardData.getData("text/plain")));
      return;
    }
    if (!this.editor.region) return;
    event.clipboardData.setData("text/plain", this.editor.copy());
    if (event.type === "cut") this.editor.remove();
  }

  /** Read what a workflow has saved; `before` is what `leave` gave when a panel of the same node went. */
  load(text, before = null) {
    const known = this.editor.load(text, before?.states);
    if (!known) return;
    [this.brush.radius, this.addingOn] = [before.radius, before.adding];
    this.setAdding(before.adding);
    this.setRadius(before.radius);
    this.choose(before.tool);
  }

  /** What a workflow does not save, for a panel to come: the frontend makes nodes anew when tabs are changed and when it undoes. */
  leave() {
    return { states: this.editor.history.states, tool: this.toolName, radius: this.brush.radius, adding: this.addingOn };
  }

  // --- what it shows -------------------------------------------------------------------------------------------------------------

  show() {
    const { editor } = this;
    if (editor.text !== this.saved) {
      this.saved = editor.text;
      this.host.changed(this.saved);
    }
    this.side.show();
    this.undoButton.disabled = !editor.history.canUndo;
    this.redoButton.disabled = !editor.history.canRedo;
    this.canvas.setAttribute("aria-label", editor.regions.map((region, index) => `${index + 1} ${region.name}`).join(", ") || say("nothingYet"));
    if (editor.error) this.showError();
    else if (this.sheet.dataset.of === "error") this.sheet.hidden = true;
    this.showHint();
    this.stage.invalidate();
  }

  showHint() {
    const { editor } = this;
    const name = editor.region?.name;
    const keys = {
      select: editor.regions.length ? "hintSelect" : "nothingYet",
      polygon: "hintPolygon",
      brush: editor.goesToSelected(true) ? "hintBrush" : "hintBrushNew",
      eraser: editor.goesToSelected(true) ? "hintEraser" : "nothingToErase",
    };
    const drawing = editor.goesToSelected(this.addingOn) ? "hintAdd" : editor.regions.length ? "hintNew" : "nothingYet";
    clearTimeout(this.telling);
    this.hint.removeAttribute("data-loud");
    this.hint.textContent = say(keys[this.toolName] ?? drawing, { name });
  }

  /** Say something for a while, in place of the hint. */
  tell(key, text = say(key)) {
    this.hint.textContent = text;
    this.hint.title = text;
    this.hint.setAttribute("data-loud", "");
    clearTimeout(this.telling);
    this.telling = setTimeout(() => this.showHint(), TOLD_MS);
  }

  choose(name) {
    this.tool?.cancel();
    this.toolName = name;
    this.tool = this.tools[name];
    this.canvas.style.cursor = this.tool.cursor;
    this.stage.handles = name === "select";
    for (const [key, button] of Object.entries(this.toolButtons)) button.setAttribute("aria-pressed", key === name);
    this.showHint();
    this.stage.invalidate();
  }

  setAdding(on) {
    this.addingOn = on;
    this.addingButton.setAttribute("aria-pressed", on);
    this.showHint();
  }

  setRadius(radius) {
    this.brush.radius = Math.max(10, Math.min(UNIT / 4, radius));
    this.radius.value = Math.sqrt(this.brush.radius / (UNIT / 4)) * 100;
    this.stage.invalidate();
  }

  zoom(factor) {
    this.view.zoomAt(this.view.stage[0] / 2, this.view.stage[1] / 2, factor);
    this.stage.invalidate();
  }

  fit() {
    this.view.reset();
    this.stage.invalidate();
  }

  setBackground(image) {
    this.stage.background = image;
    this.resize();
  }

  /** Follow the size of the panel, and that of the picture. */
  resize() {
    const { clientWidth, clientHeight } = this.stageBox;
    if (!clientWidth || !clientHeight) return;
    this.view.picture = this.host.pictureSize();
    this.size.textContent = this.view.picture.join(" × ");
    const style = getComputedStyle(this.element);
    this.stage.colours.text = style.color;
    this.stage.resize(clientWidth, clientHeight);
  }

  destroy() {
    this.observer.disconnect();
    this.stage.destroy();
    clearTimeout(this.telling);
  }

  // --- sheets over the panel -----------------------------------------------------------------------------------------------------

  openSheet(of, ...children) {
    this.sheet.dataset.of = of;
    this.sheet.replaceChildren(...children);
    this.sheet.hidden = false;
  }

  sheetButton(key, act) {
    return make("button", { type: "button", tabIndex: -1, textContent: say(key), on: { click: act } });
  }

  showKeys() {
    const rows = say("keys").map(([keys, does]) =>
      make("tr", {}, make("td", {}, make("kbd", { textContent: keys })), make("td", { textContent: does })),
    );
    const close = this.sheetButton("close", () => (this.sheet.hidden = true));
    this.openSheet("keys", make("b", { textContent: say("keysTitle") }), make("table", {}, ...rows), close);
  }

  /** The document as text, to be edited; applied only where it can be read. */
  editText(problem = null) {
    const text = make("textarea", { value: this.editor.text, spellcheck: false, dataset: { field: "json" } });
    const wrong = make("strong", { textContent: problem ?? "", hidden: !problem });
    const apply = () => {
      try {
        this.editor.replace(text.value);
        this.sheet.hidden = true;
        this.focus();
      } catch (error) {
        if (!(error instanceof DocumentError)) throw error;
        [wrong.textContent, wrong.hidden] = [error.message, false];
      }
    };
    const buttons = [this.sheetButton("apply", apply)];
    if (problem) buttons.push(this.sheetButton("anew", () => this.editor.replace("")));
    else buttons.push(this.sheetButton("close", () => (this.sheet.hidden = true)));
    const heading = make("b", { textContent: problem ? say("broken") : say("json") });
    const help = make("span", { textContent: say("brokenHelp"), hidden: !problem });
    this.openSheet(problem ? "error" : "text", heading, wrong, help, text, make("div", { className: "concept-canvas-bar" }, ...buttons));
  }

  showError() {
    this.editText(this.editor.error.message);
  }
}
