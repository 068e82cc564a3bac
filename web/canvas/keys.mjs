// The panel's keys. They reach it through a hidden text area that has the focus whenever the stage is worked on: the frontend listens on
// the window before anyone else, takes Ctrl+Z, Delete and single letters for the graph, and leaves alone only what goes to text fields.

const TOOLS = { v: "select", b: "box", e: "ellipse", p: "polygon", d: "brush", x: "eraser" };
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEP = 50; // ten-thousandths that an arrow moves a region
const FAR = 10;

/** What a key does on the stage, or null where it does nothing there. @returns {(() => void) | null} */
export function actionFor(event, panel) {
  const { editor, side } = panel;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") return () => editor.step(event.shiftKey ? 1 : -1);
    if (key === "y") return () => editor.step(1);
    if (key === "d") return () => side.guard(() => editor.duplicate());
    return null;
  }
  if (event.altKey) {
    if (key === "ArrowUp") return () => editor.reorder(-1);
    if (key === "ArrowDown") return () => editor.reorder(1);
    return null;
  }
  if (ARROWS[key]) {
    const far = STEP * (event.shiftKey ? FAR : 1);
    return () => editor.nudge(ARROWS[key][0] * far, ARROWS[key][1] * far);
  }
  if (TOOLS[key]) return () => panel.choose(TOOLS[key]);
  const toggled = { h: "visible", l: "locked" }[key];
  if (toggled) return () => editor.region && editor.update(editor.selected, { [toggled]: !editor.region[toggled] });
  const others = {
    a: () => panel.setAdding(!panel.addingOn),
    n: () => side.buttons.new.click(),
    r: () => side.buttons.rest.click(),
    j: () => panel.editText(),
    "?": () => panel.showKeys(),
    "[": () => panel.setRadius(panel.brush.radius / 1.25),
    "]": () => panel.setRadius(panel.brush.radius * 1.25),
    "+": () => panel.zoom(1.25),
    "=": () => panel.zoom(1.25),
    "-": () => panel.zoom(0.8),
    0: () => panel.fit(),
    PageUp: () => editor.select(Math.max(0, editor.selected - 1)),
    PageDown: () => editor.select(editor.selected + 1),
    Delete: () => editor.remove(),
    Backspace: () => (panel.tool.busy && panel.tool.back ? panel.tool.back() : editor.remove()),
    Escape: () => panel.tool.cancel(),
    Enter: () => (panel.tool.busy && panel.tool.close ? panel.tool.close(event) : side.editName()),
  };
  return others[key] ?? null;
}
