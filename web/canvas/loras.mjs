// The LoRA files of a region: those it has with their strengths, and a field that finds more among the host's.

import { fill, make } from "./dom.mjs";
import { icon } from "./style.mjs";
import { say } from "./strings.mjs";

const MOST_MATCHES = 50;

export class Loras {
  /** @param {import("./editor.mjs").Editor} editor @param {() => Promise<string[]>} listFiles the host's own list
   *  @param {() => void} back gives the keyboard back to the stage */
  constructor(editor, listFiles, back) {
    Object.assign(this, { editor, listFiles, back });
    this.files = null;
    this.loras = [];
    this.rows = make("div");
    this.matches = make("div", { className: "concept-canvas-matches", hidden: true, tabIndex: -1, aria: { role: "listbox" } });
    this.find = make("input", {
      type: "text",
      placeholder: say("findLora"),
      dataset: { field: "lora" },
      on: {
        focus: () => this.load(),
        input: () => this.match(),
        blur: () => this.leave(),
        keydown: (event) => this.key(event),
      },
    });
    this.columns = make("span", { className: "concept-canvas-title", textContent: say("loraColumns") });
    const title = make("span", { className: "concept-canvas-title", textContent: say("loras") });
    this.element = make("div", {}, make("div", { className: "concept-canvas-heads" }, title, this.columns), this.rows, this.find, this.matches);
  }

  change(loras, topic) {
    this.editor.update(this.editor.selected, { loras }, topic);
  }

  /** Folders that LoRAs of the document lie in: its other files most likely do, too. */
  get folders() {
    return new Set(this.editor.regions.flatMap((region) => region.loras.map((lora) => folderOf(lora.file))));
  }

  async load() {
    try {
      this.files = await this.listFiles();
    } catch {
      this.files = null; // nothing is called missing where the list itself is
    }
    this.match();
    this.show(this.loras, this.read);
  }

  match() {
    const words = this.find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const { folders } = this;
    const found = (this.files ?? [])
      .filter((file) => words.every((word) => file.toLowerCase().includes(word)))
      .sort((one, other) => folders.has(folderOf(other)) - folders.has(folderOf(one)));
    this.at = 0;
    this.matches.replaceChildren(
      ...found.slice(0, MOST_MATCHES).map((file, index) =>
        make(
          "div",
          { title: file, aria: { role: "option", selected: index === 0 }, on: { pointerdown: (event) => this.choose(file, event) } },
          shown(file),
        ),
      ),
    );
    if (!found.length) this.matches.replaceChildren(make("div", { textContent: say("noLora") }));
    this.found = found.slice(0, MOST_MATCHES);
    this.matches.hidden = document.activeElement !== this.find;
  }

  key(event) {
    if (event.key === "Enter" && this.found?.[this.at]) this.choose(this.found[this.at], event);
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by || !this.found?.length) return;
    event.preventDefault();
    this.at = Math.max(0, Math.min(this.found.length - 1, this.at + by));
    [...this.matches.children].forEach((row, index) => row.setAttribute("aria-selected", index === this.at));
    this.matches.children[this.at].scrollIntoView({ block: "nearest" });
  }

  /** What was looked for in one region is nothing to the next. */
  leave() {
    this.find.value = "";
    this.matches.hidden = true;
  }

  choose(file, event) {
    event.preventDefault();
    this.leave();
    this.back();
    if (!this.loras.some((lora) => lora.file === file)) {
      this.change([...this.loras, { file, model: 1, clip: 1, start: 0, end: 1 }], null);
    }
  }

  /** @param {object[]} loras @param {boolean} read whether the region has a prompt of its own, for their text parts to act on */
  show(loras, read) {
    Object.assign(this, { loras, read });
    this.columns.hidden = !loras.length;
    const same = this.rows.children.length === loras.length && loras.every((lora, i) => this.rows.children[i].dataset.file === lora.file);
    if (!same) this.rows.replaceChildren(...loras.map((lora, index) => this.row(lora, index)));
    loras.forEach((lora, index) => {
      const row = this.rows.children[index];
      const [model, clip] = row.querySelectorAll("input");
      if (document.activeElement !== model) fill(model, lora.model);
      if (document.activeElement !== clip) fill(clip, lora.clip);
      clip.disabled = !read;
      const missing = this.files !== null && !this.files.includes(lora.file);
      row.toggleAttribute("data-missing", missing);
      row.firstChild.title = missing ? `${lora.file}: ${say("missingLora")}` : lora.file;
    });
  }

  row({ file }, index) {
    const strength = (key, title) =>
      make("input", {
        type: "number",
        step: 0.05,
        min: -100,
        max: 100,
        title: say(title),
        dataset: { field: key },
        on: {
          input: ({ target }) => {
            const value = target.valueAsNumber;
            if (!(value >= -100 && value <= 100)) return;
            this.change(this.loras.map((lora, at) => (at === index ? { ...lora, [key]: value } : lora)), `${key} ${index}`);
          },
        },
      });
    return make(
      "div",
      { className: "concept-canvas-lora", dataset: { file } },
      make("span", {}, shown(file)),
      strength("model", "strengthModel"),
      strength("clip", "strengthClip"),
      make("button", {
        type: "button",
        tabIndex: -1,
        title: say("removeLora"),
        innerHTML: icon("remove"),
        on: { click: () => this.change(this.loras.filter((_, at) => at !== index), null) },
      }),
    );
  }
}

function folderOf(file) {
  return file.slice(0, file.lastIndexOf("/") + 1);
}

/** A file's path, cut at its beginning where room is short: its end is what tells files apart. */
function shown(file) {
  return make("bdi", { textContent: file.replace(/\.[^./]+$/, "") });
}
