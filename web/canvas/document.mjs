// The regions document (docs/regions.md): read from JSON, checked as Python checks it, and written back as briefly as it can be.
//
// Read, a document is {overlap, regions}; a region has all of its fields; a shape is {kind, numbers, radius?, erase}, numbers being
// absolute: [x, y, width, height] of a box or ellipse, [x, y, x, y, ...] of a polygon or stroke. Nothing in it is ever changed in place:
// editing makes new objects of what changes, so that earlier states can be kept for undo as they are.

export const VERSION = 1;
export const UNIT = 10_000;
export const MOST = 64;
export const LONGEST = 2_000_000;
export const OVERLAPS = ["normalize", "priority", "max"];
export const COLOURS = ["#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324"];
export const KINDS = ["box", "ellipse", "polygon", "stroke"];
export const EMPTY = Object.freeze({ overlap: OVERLAPS[0], regions: [] });

const REACH = 2 * UNIT;
const LEAST_NUMBERS = { box: 4, ellipse: 4, polygon: 6, stroke: 2 };
const REGION_FIELDS = "name colour shapes rest prompt negative loras weight feather visible locked live".split(" ");
const LORA_FIELDS = ["file", "model", "clip", "start", "end"];
const THRESHOLDS = ["argmax", "otsu", "quantile", "median", "soft"];
const SCOPES = ["step", "block"];
const NEUTRAL_LIVE = {
  phrase: "", background: "", threshold: THRESHOLDS[0], level: 0.5, scope: SCOPES[0], smoothing: 0.5, start: 0.1, end: 1, until: 0.25,
  largest: false, grown: 0,
};

/** A document that cannot be used; the message names the field and says what it must be. */
export class DocumentError extends Error {}

/** A region with every field, neutral where `given` has none. */
export function newRegion(given) {
  return {
    name: "", colour: COLOURS[0], shapes: [], rest: false, prompt: "", negative: "", loras: [], weight: 1, feather: 0, visible: true,
    locked: false, live: null, ...given,
  };
}

/** @param {string} text JSON @returns {{overlap: string, regions: object[]}} @throws {DocumentError} */
export function parse(text) {
  const top = new Fields(readJson(text), "the document", ["version", "overlap", "regions"]);
  const version = top.number("version", VERSION, -Infinity, Infinity, true);
  if (version > VERSION) {
    throw new DocumentError(
      `These regions are of version ${version}, made by a newer Concept Nodes; this one reads up to ${VERSION}. Update the pack.`,
    );
  }
  if (version < 1) throw new DocumentError(`version is ${version}. It must be ${VERSION}.`);
  const listed = top.sequence("regions");
  if (listed.length > MOST) {
    throw new DocumentError(
      `regions holds ${listed.length} regions; at most ${MOST} are possible. Remove some, or join those with one prompt.`,
    );
  }
  const regions = listed.map((item, index) => readRegion(item, `regions[${index}]`, index));
  const seen = new Map();
  regions.forEach(({ name }, index) => {
    if (seen.has(name)) {
      throw new DocumentError(
        `regions[${seen.get(name)}] and regions[${index}] are both named '${name}'. Give every region a name of its own.`,
      );
    }
    seen.set(name, index);
  });
  return { overlap: top.choice("overlap", OVERLAPS), regions };
}

/** The JSON of a document, without what is neutral; "" for one that says nothing. */
export function serialise(document) {
  if (!document.regions.length && document.overlap === OVERLAPS[0]) return "";
  return JSON.stringify({ version: VERSION, overlap: document.overlap, regions: document.regions.map(plainRegion) });
}

function readJson(text) {
  if (text.length > LONGEST) {
    const [has, may] = [text.length, LONGEST].map((number) => number.toLocaleString("en"));
    throw new DocumentError(
      `The regions are ${has} characters long; at most ${may} are possible. Draw with fewer strokes, or connect a mask.`,
    );
  }
  if (!text.trim()) return { version: VERSION };
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new DocumentError(`The regions are no JSON: ${error.message}.`);
  }
}

const kindOf = (value) =>
  Array.isArray(value) ? "a list" : value !== null && typeof value === "object" ? "an object" : JSON.stringify(value);

/** Fields of one JSON object, taken with checks that name them. */
class Fields {
  constructor(data, where, known) {
    if (data === null || typeof data !== "object" || Array.isArray(data)) {
      throw new DocumentError(`${where} must be an object {...}, not ${kindOf(data)}.`);
    }
    const unknown = Object.keys(data).find((key) => !known.includes(key));
    if (unknown !== undefined) throw new DocumentError(`${where} has an unknown field '${unknown}'. Known: ${known.join(", ")}.`);
    this.data = data;
    this.prefix = where === "the document" ? "" : `${where}.`;
  }

  has(key) {
    return Object.hasOwn(this.data, key);
  }

  take(key, fallback, fits, must) {
    if (!this.has(key)) return fallback;
    const value = this.data[key];
    if (!fits(value)) throw new DocumentError(`${this.prefix}${key} is ${kindOf(value)}. It must be ${must}.`);
    return value;
  }

  text(key, fallback = "") {
    return this.take(key, fallback, (value) => typeof value === "string", "text");
  }

  flag(key, fallback) {
    return this.take(key, fallback, (value) => typeof value === "boolean", "true or false");
  }

  number(key, fallback, low = -Infinity, high = Infinity, whole = false) {
    const fits = (value) => Number.isFinite(value) && value >= low && value <= high && (!whole || Number.isInteger(value));
    return this.take(key, fallback, fits, `a ${whole ? "whole " : ""}number${low === -Infinity ? "" : ` from ${low} to ${high}`}`);
  }

  choice(key, choices) {
    return this.take(key, choices[0], (value) => choices.includes(value), `one of ${choices.join(", ")}`);
  }

  sequence(key) {
    return this.take(key, [], Array.isArray, "a list [...]");
  }

  lengths(key, least) {
    const values = this.sequence(key);
    if (values.length < least || values.length % 2) {
      throw new DocumentError(
        `${this.prefix}${key} has ${values.length} numbers. It must have an even number of them, at least ${least}.`,
      );
    }
    values.forEach((value, index) => {
      if (!Number.isInteger(value) || Math.abs(value) > REACH) {
        throw new DocumentError(
          `${this.prefix}${key}[${index}] is ${kindOf(value)}. It must be a whole number from ${-REACH} to ${REACH}.`,
        );
      }
    });
    return values;
  }
}

function readRegion(data, where, index) {
  const fields = new Fields(data, where, REGION_FIELDS);
  const name = fields.text("name", `region ${index + 1}`).trim();
  if (!name) throw new DocumentError(`${where}.name is empty. Give the region a name.`);
  const rest = fields.flag("rest", false);
  const shapes = fields.sequence("shapes");
  if (rest && shapes.length) {
    throw new DocumentError(`${where} is the rest of the canvas and has shapes. Remove the shapes, or set rest to false.`);
  }
  const live = data.live ?? null;
  if (rest && live !== null) {
    throw new DocumentError(`${where} is the rest of the canvas and has a field live. Remove that, or set rest to false.`);
  }
  const colour = fields.text("colour", COLOURS[index % COLOURS.length]);
  if (!/^#[0-9a-fA-F]{6}$/.test(colour)) throw new DocumentError(`${where}.colour is ${kindOf(colour)}. It must be #rrggbb.`);
  return {
    name,
    colour,
    shapes: shapes.map((item, at) => readShape(item, `${where}.shapes[${at}]`)),
    rest,
    prompt: fields.text("prompt"),
    negative: fields.text("negative"),
    loras: fields.sequence("loras").map((item, at) => readLora(item, `${where}.loras[${at}]`)),
    weight: fields.number("weight", 1, 0, 1),
    feather: fields.number("feather", 0, 0, 1),
    visible: fields.flag("visible", true),
    locked: fields.flag("locked", false),
    live: live === null ? null : readLive(live, `${where}.live`),
  };
}

/** A region that is found while sampling: the panel keeps what it says, and draws what bounds it. */
function readLive(data, where) {
  const fields = new Fields(data, where, Object.keys(NEUTRAL_LIVE));
  const share = (key, most = 1) => fields.number(key, NEUTRAL_LIVE[key], 0, most);
  const [start, end] = [share("start"), share("end")];
  if (start > end) throw new DocumentError(`${where}.start ${start} lies after its end ${end}. Swap the two.`);
  return {
    phrase: fields.text("phrase"),
    background: fields.text("background"),
    threshold: fields.choice("threshold", THRESHOLDS),
    level: share("level"),
    scope: fields.choice("scope", SCOPES),
    smoothing: share("smoothing", 0.95),
    start,
    end,
    until: share("until"),
    largest: fields.flag("largest", false),
    grown: fields.number("grown", 0, 0, 8, true),
  };
}

function readShape(data, where) {
  const fields = new Fields(data, where, [...KINDS, "radius", "erase"]);
  const kinds = KINDS.filter((kind) => fields.has(kind));
  if (kinds.length !== 1) {
    throw new DocumentError(`${where} must have exactly one of box, ellipse, polygon and stroke; it has ${kinds.length}.`);
  }
  const [kind] = kinds;
  const erase = fields.flag("erase", false);
  const numbers = fields.lengths(kind, LEAST_NUMBERS[kind]);
  if (kind === "box" || kind === "ellipse") {
    if (numbers.length !== 4) {
      throw new DocumentError(`${where}.${kind} has ${numbers.length} numbers. It must be [x, y, width, height].`);
    }
    if (numbers[2] <= 0 || numbers[3] <= 0) {
      throw new DocumentError(`${where}.${kind} has a width or height of 0 or less. Both must be at least 1.`);
    }
    return { kind, numbers: [...numbers], erase };
  }
  const absolute = [...numbers];
  for (let i = 2; i < absolute.length; i++) absolute[i] += absolute[i - 2];
  if (kind === "polygon") return { kind, numbers: absolute, erase };
  return { kind, numbers: absolute, radius: fields.number("radius", UNIT / 50, 1, UNIT), erase };
}

function readLora(data, where) {
  const fields = new Fields(data, where, LORA_FIELDS);
  const file = fields.text("file").replaceAll("\\", "/").trim();
  if (!file) throw new DocumentError(`${where}.file is empty. Name a LoRA file, or remove the entry.`);
  const [start, end] = [fields.number("start", 0, 0, 1), fields.number("end", 1, 0, 1)];
  if (start > end) throw new DocumentError(`${where}.start ${start} lies after its end ${end}. Swap the two.`);
  return { file, model: fields.number("model", 1, -100, 100), clip: fields.number("clip", 1, -100, 100), start, end };
}

const NEUTRAL = newRegion({});
const NEUTRAL_LORA = { model: 1, clip: 1, start: 0, end: 1 };

/** The fields of `whole` among `keys` that are not what `neutral` has. */
const telling = (whole, neutral, keys) =>
  Object.fromEntries(keys.filter((key) => whole[key] !== neutral[key]).map((key) => [key, whole[key]]));

function plainRegion(region) {
  return {
    name: region.name,
    colour: region.colour,
    ...(region.shapes.length && { shapes: region.shapes.map(plainShape) }),
    ...telling(region, NEUTRAL, ["rest", "prompt", "negative", "weight", "feather", "visible", "locked"]),
    ...(region.live && { live: telling(region.live, NEUTRAL_LIVE, Object.keys(NEUTRAL_LIVE)) }),
    ...(region.loras.length && {
      loras: region.loras.map((lora) => ({ file: lora.file, ...telling(lora, NEUTRAL_LORA, Object.keys(NEUTRAL_LORA)) })),
    }),
  };
}

function plainShape({ kind, numbers, radius, erase }) {
  const path = kind === "polygon" || kind === "stroke";
  const listed = path ? numbers.map((number, i) => (i < 2 ? number : number - numbers[i - 2])) : numbers;
  return { [kind]: listed, ...(kind === "stroke" && { radius }), ...(erase && { erase }) };
}
