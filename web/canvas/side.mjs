// The panel's right side: the list of regions, and the fields of the selected one.

import { OVERLAPS } from "./document.mjs";
import { fill, make } from "./dom.mjs";
import { Loras } from "./loras.mjs";
import { icon } from "./style.mjs";
import { say } from "./strings.mjs";

export class Side {
  /** @param {import("./editor.mjs").Editor} editor @param {() => void} back gives the keyboard back to the stage */
  constructor(editor, { listFiles, back, tell }) {
    Object.assign(this, { editor, back, tell });
    const button = (key, act) => this.button(key, act);
    this.buttons = {
      new: button("new", () => editor.add() ?? tell("full")),
      rest: button("rest", () => editor.add({ name: "rest", rest: true }) ?? tell("full")),
      duplicate: button("duplicate", () => this.guard(() => editor.duplicate())),
      remove: button("remove", () => editor.remove()),
      up: button("up", () => editor.reorder(-1)),
      down: button("down", () => editor.reorder(1)),
    };
    this.list = make("div", { className: "concept-canvas-list", aria: { role: "listbox", label: say("regions") } });
    this.fields = this.makeFields(listFiles);
    this.report = make("div", { className: "concept-canvas-report", hidden: true, aria: { role: "status" } });
    this.overlap = make(
      "select",
      { tabIndex: -1, on: { change: ({ target }) => (editor.setOverlap(target.value), back()) } },
      ...OVERLAPS.map((value) => make("option", { value, textContent: say(value) })),
    );
    this.element = make(
      "div",
      { className: "concept-canvas-side" },
      make("span", { className: "concept-canvas-title", textContent: say("regions") }),
      make("div", { className: "concept-canvas-bar" }, ...Object.values(this.buttons)),
      this.list,
      this.fields,
      make("div", { className: "concept-canvas-fields concept-canvas-common" }, labelled("overlap", this.overlap), this.report),
    );
  }

  /** What the node's last run told. */
  setReport(text) {
    this.report.replaceChildren(make("b", { textContent: say("lastRun") }), `\n${text}`);
    this.report.hidden = !text;
  }

  button(key, act, name = key) {
    // No stop for Tab, and no focus by the mouse: the frontend takes Ctrl+Z for its own wherever no text field has the focus.
    return make("button", { type: "button", tabIndex: -1, title: say(key), innerHTML: icon(name), aria: { label: say(key) }, on: { click: act } });
  }

  /** Run what may refuse; tell why. */
  guard(act) {
    try {
      act();
    } catch (error) {
      this.tell(null, error.message);
    }
  }

  makeFields(listFiles) {
    const { editor } = this;
    const text = (key) =>
      make("textarea", {
        rows: 2,
        placeholder: say("emptyText"),
        dataset: { field: key },
        on: {
          input: ({ target }) => editor.update(editor.selected, { [key]: target.value }, key),
          keydown: (event) => key === "prompt" && event.key === "Tab" && event.shiftKey && (event.preventDefault(), this.editName()),
        },
      });
    const share = (key) =>
      make("input", {
        type: "number",
        min: 0,
        max: 1,
        step: 0.01,
        dataset: { field: key },
        on: {
          input: ({ target }) => {
            const value = target.valueAsNumber;
            target.toggleAttribute("data-wrong", !(value >= 0 && value <= 1));
            if (value >= 0 && value <= 1) editor.update(editor.selected, { [key]: value }, key);
          },
        },
      });
    this.prompt = text("prompt");
    this.negative = text("negative");
    this.weight = share("weight");
    this.feather = share("feather");
    this.loras = new Loras(editor, listFiles, this.back);
    return make(
      "div",
      { className: "concept-canvas-fields" },
      labelled("prompt", this.prompt),
      labelled("negative", this.negative),
      this.loras.element,
      make("div", { className: "concept-canvas-pair" }, labelled("weight", this.weight), labelled("feather", this.feather)),
    );
  }

  show() {
    const { editor } = this;
    const { regions, selected, region } = editor;
    while (this.list.children.length > regions.length) this.list.lastChild.remove();
    while (this.list.children.length < regions.length) this.list.append(this.row(this.list.children.length));
    regions.forEach((each, index) => this.showRow(this.list.children[index], each, index === selected));
    if (selected !== this.shown) this.list.children[selected]?.scrollIntoView({ block: "nearest" });
    this.shown = selected;
    this.buttons.duplicate.disabled = !region;
    this.buttons.remove.disabled = !region || region.locked;
    this.buttons.up.disabled = selected <= 0;
    this.buttons.down.disabled = !region || selected === regions.length - 1;
    this.fields.hidden = !region;
    this.overlap.parentElement.hidden = regions.length < 2;
    fill(this.overlap, editor.document.overlap);
    if (!region) return;
    fill(this.prompt, region.prompt);
    fill(this.negative, region.negative);
    for (const [field, value] of [[this.weight, region.weight], [this.feather, region.feather]]) {
      if (field.valueAsNumber !== value) field.value = value;
      field.removeAttribute("data-wrong");
    }
    this.feather.disabled = region.rest;
    this.loras.show(region.loras, region.prompt.trim() !== "");
  }

  row(index) {
    const { editor } = this;
    const toggle = (key) => this.button(key, (event) => (event.stopPropagation(), editor.update(index, { [key]: !editor.regions[index][key] })));
    return make(
      "div",
      { className: "concept-canvas-row", aria: { role: "option" }, on: { pointerdown: () => editor.select(index) } },
      make("span", {
        className: "concept-canvas-number",
        textContent: index + 1,
        title: say("drag"),
        on: {
          pointerdown: ({ target, pointerId }) => target.setPointerCapture(pointerId),
          pointerup: ({ target, clientY }) => this.drop(index, target, clientY),
        },
      }),
      make("input", {
        type: "color",
        tabIndex: -1,
        title: say("colour"),
        on: { input: ({ target }) => editor.update(index, { colour: target.value }, "colour"), change: this.back },
      }),
      make("input", {
        type: "text",
        tabIndex: -1,
        title: say("name"),
        dataset: { field: "name" },
        on: {
          // A click on another region's name selects the region; a click on the selected one's, its text.
          pointerdown: () => (this.picking = index !== editor.selected),
          mousedown: (event) => this.picking && (event.preventDefault(), this.back()),
          focus: ({ target }) => (editor.select(index), target.select()),
          // Taken over when it is finished: on the way to "region 12" lies "region 1".
          input: ({ target }) => target.toggleAttribute("data-wrong", !editor.canBeNamed(index, target.value)),
          change: ({ target }) => this.rename(index, target),
          keydown: (event) => this.leaveName(event, index),
        },
      }),
      toggle("visible"),
      toggle("locked"),
    );
  }

  /** Move a region to where its number was dragged. */
  drop(index, number, y) {
    const { top, bottom, height } = number.parentElement.getBoundingClientRect();
    const by = y < top ? Math.floor((y - top) / height) : y > bottom ? Math.ceil((y - bottom) / height) : 0;
    this.editor.reorder(by, index);
  }

  showRow(row, region, selected) {
    const [, colour, name, visible, locked] = row.children;
    row.setAttribute("aria-selected", selected);
    row.toggleAttribute("data-hidden", !region.visible);
    fill(colour, region.colour);
    // A name that is being typed may be one that cannot be had yet.
    if (document.activeElement !== name) fill(name, region.name);
    for (const [button, on, icons] of [[visible, region.visible, ["visible", "hidden"]], [locked, region.locked, ["locked", "unlocked"]]]) {
      const wanted = icons[on ? 0 : 1];
      if (button.dataset.shows !== wanted) button.innerHTML = icon(wanted);
      button.dataset.shows = wanted;
      button.setAttribute("aria-pressed", on);
      if (button === locked) button.style.opacity = on ? 1 : 0.45;
    }
  }

  rename(index, field) {
    const name = field.value.trim();
    if (!this.editor.rename(index, name)) this.tell(name ? "nameTaken" : "nameEmpty");
    field.removeAttribute("data-wrong");
    fill(field, this.editor.regions[index]?.name ?? "");
  }

  /** Enter takes the name over; Tab goes on to the region's own prompt, not to the next region's name. */
  leaveName(event, index) {
    if (event.key !== "Enter" && event.key !== "Tab") return;
    this.rename(index, event.target);
    if (event.key === "Enter") return;
    event.preventDefault();
    if (event.shiftKey) this.back();
    else this.prompt.focus();
  }

  /** Put the caret into the selected region's name. */
  editName() {
    const field = this.list.children[this.editor.selected]?.querySelector("input[type=text]");
    field?.focus();
    field?.select();
  }
}

function labelled(key, field) {
  return make("label", {}, make("span", { textContent: say(key) }), field);
}
