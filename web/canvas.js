// Puts the concept canvas on its node, in the classic canvas and in Nodes 2.0, and tells it of the graph around: the picture's size, the
// background, the host's LoRA files. The panel's value is the regions document as text; it is what the workflow saves and the queue sends.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Panel } from "./canvas/panel.mjs";
import { speak } from "./canvas/strings.mjs";

const WIDGET_TYPE = "CONCEPT_CANVAS";
const NODE = "ConceptNodes_Canvas";
const WIDGET = "canvas";
const BACKGROUND_INPUT = "background";
const BACKGROUND_OUTPUT = "concept_background";
const CHOICE = "concept_background"; // the node property that keeps which background is shown
const MIN_HEIGHT_PX = 340;
const FIRST_SIZE = [720, 700];
const DEFAULT_SIDE = 512;
const MOST_LEFT = 20;
const SETTLED_MS = 250; // after the last change of many, as in typing

const panels = new Map(); // node -> what shows its background
const left = new Map(); // node id -> what its last panel left, for the one that takes its place
let lastPicture = null;

const viewUrl = ({ filename, subfolder = "", type = "output" }) =>
  api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type, rand: Math.random() })}`);

/** The background of one node: chosen, found and loaded. */
class Backgrounds {
  constructor(node) {
    this.node = node;
    this.own = null; // what the node itself sent with its last run
    this.image = null;
    this.url = null;
  }

  get choice() {
    return this.node.properties?.[CHOICE] ?? "auto";
  }

  choose(choice) {
    this.node.properties[CHOICE] = choice;
    this.refresh();
  }

  /** The picture to show, as the host's {filename, subfolder, type}, or null. */
  wanted() {
    if (this.choice === "none") return null;
    if (this.choice === "last") return lastPicture;
    const slot = this.node.inputs?.findIndex((input) => input.name === BACKGROUND_INPUT) ?? -1;
    const source = slot >= 0 ? this.node.getInputNode(slot) : null;
    if (!source) return null;
    if (this.own) return this.own;
    const shown = app.nodeOutputs?.[source.id]?.images?.[0];
    if (shown) return shown;
    const file = source.comfyClass === "LoadImage" && source.widgets?.find((widget) => widget.name === "image")?.value;
    if (!file) return null;
    const parts = String(file).split("/");
    return { filename: parts.pop(), subfolder: parts.join("/"), type: "input" };
  }

  refresh() {
    const wanted = this.wanted();
    const key = JSON.stringify(wanted);
    if (key === this.key) return;
    this.key = key;
    if (!wanted) {
      this.show(null);
      return;
    }
    const image = new Image();
    image.onload = () => key === this.key && this.show(image);
    image.onerror = () => key === this.key && this.show(null);
    image.src = viewUrl(wanted);
  }

  show(image) {
    this.image = image;
    this.panel.setBackground(image);
  }
}

/** The picture's size as the node will draw it: its own width and height, those of the connected background where they are 0. */
function pictureSize(node, { choice, image }) {
  const given = ["width", "height"].map((name) => Number(node.widgets?.find((widget) => widget.name === name)?.value) || 0);
  const natural = image && choice === "auto" ? [image.naturalWidth, image.naturalHeight] : [DEFAULT_SIDE, DEFAULT_SIDE];
  return given.map((length, axis) => length || natural[axis]);
}

async function listLoras() {
  const response = await api.fetchApi("/models/loras");
  if (!response.ok) throw new Error(`the list of LoRA files could not be had: ${response.status}`);
  return (await response.json()).map((file) => file.replaceAll("\\", "/"));
}

/** Let the frontend see what has changed: it keeps drafts and its own undo by what it is told. */
function noteChange() {
  app.canvas.emitBeforeChange();
  app.canvas.emitAfterChange();
}

function addPanel(node, name) {
  const backgrounds = new Backgrounds(node);
  let noting = 0;
  const panel = new Panel({
    changed: (text) => {
      widget?.callback?.(text);
      clearTimeout(noting);
      noting = setTimeout(noteChange, SETTLED_MS);
    },
    pictureSize: () => pictureSize(node, backgrounds),
    listFiles: listLoras,
    backgrounds,
    passWheel: (event) => {
      // In the classic canvas the wheel is ours to hand on; Nodes 2.0 takes it by itself.
      if (!panel.element.closest(".dom-widget")) return false;
      app.canvas.processMouseWheel(event);
      return true;
    },
  });
  backgrounds.panel = panel;
  const widget = node.addDOMWidget(name, "concept_canvas", panel.element, {
    getValue: () => panel.editor.text,
    setValue: (value) => panel.load(String(value ?? ""), left.get(String(node.id))),
    getMinHeight: () => MIN_HEIGHT_PX,
    hideOnZoom: false,
  });
  widget.showReport = (report) => panel.side.setReport(report);
  panels.set(node, backgrounds);
  const onRemove = widget.onRemove;
  widget.onRemove = function () {
    onRemove?.apply(this, arguments);
    clearTimeout(noting);
    panels.delete(node);
    left.delete(String(node.id)); // so that it goes last
    left.set(String(node.id), panel.leave());
    if (left.size > MOST_LEFT) left.delete(left.keys().next().value);
    panel.destroy();
    requestAnimationFrame(() => replaceLeftOver(node, panel));
  };
  return { widget, panel };
}

/** Where a graph is loaded over another at once, Nodes 2.0 goes on showing the removed node's element for the new node of its number. */
function replaceLeftOver(node, panel) {
  if (!panel.element.isConnected) return;
  const [, heir] = [...panels].find(([other]) => String(other.id) === String(node.id)) ?? [];
  if (heir && !heir.panel.element.isConnected) panel.element.replaceWith(heir.panel.element);
}

app.registerExtension({
  name: "ConceptNodes.Canvas",
  async setup() {
    api.addEventListener("executed", ({ detail }) => {
      const picture = detail?.output?.images?.[0];
      if (!picture) return;
      lastPicture = picture;
      for (const backgrounds of panels.values()) backgrounds.refresh();
    });
    try {
      const translations = await (await api.fetchApi("/i18n")).json();
      speak(translations[app.extensionManager.setting.get("Comfy.Locale")]?.conceptCanvas);
    } catch (error) {
      console.warn("ConceptNodes: no translations, the canvas speaks English.", error);
    }
  },
  beforeRegisterNodeDef(_, definition) {
    // The frontend would show it beside the panel for as long as the pointer is over it.
    if (definition.name === NODE) delete definition.input.required[WIDGET][1].tooltip;
  },
  getCustomWidgets() {
    return { [WIDGET_TYPE]: (node, name) => ({ widget: addPanel(node, name).widget }) };
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const backgrounds = panels.get(node);
    if (!backgrounds) return;
    const { panel } = backgrounds;
    node.setSize([Math.max(node.size[0], FIRST_SIZE[0]), Math.max(node.size[1], FIRST_SIZE[1])]);
    for (const name of ["width", "height"]) {
      const widget = node.widgets.find((candidate) => candidate.name === name);
      const callback = widget?.callback;
      if (widget) {
        widget.callback = function () {
          const result = callback?.apply(this, arguments);
          panel.resize();
          return result;
        };
      }
    }
    const { onExecuted, onConnectionsChange, onConfigure } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      backgrounds.own = output?.[BACKGROUND_OUTPUT]?.[0] ?? null;
      backgrounds.refresh();
    };
    node.onConnectionsChange = function () {
      onConnectionsChange?.apply(this, arguments);
      backgrounds.own = null;
      backgrounds.refresh();
    };
    node.onConfigure = function () {
      onConfigure?.apply(this, arguments);
      panel.background.value = backgrounds.choice;
      panel.resize();
      backgrounds.refresh();
    };
  },
});
