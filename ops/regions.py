"""The regions document: named places on a canvas, each with its words and its LoRA files, as JSON inside a workflow.

    {"version": 1, "overlap": "normalize", "regions": [
        {"name": "cat", "colour": "#4363d8", "prompt": "a cat", "negative": "", "weight": 1.0, "feather": 0.02,
         "shapes": [{"box": [500, 1000, 4000, 8000]}, {"stroke": [1000, 1000, 50, 0, 50, 20], "radius": 300, "erase": true}],
         "loras": [{"file": "cats/tom.safetensors", "model": 0.8, "clip": 1.0, "start": 0.0, "end": 1.0}]},
        {"name": "dog", "live": {"phrase": "a brown dog"}},
        {"name": "background", "rest": true, "prompt": "a garden"}]}

Lengths are whole numbers in ten-thousandths of the canvas: of its width across, of its height down, of its shorter side for radii. Boxes
and ellipses are [x, y, width, height] from the upper left corner; the points of polygons and strokes are [x, y, then steps dx, dy, ...].
The first region lies on top. What is left out has its neutral value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .masks import Box, Ellipse, Overlap, Polygon, Shape, Stroke, combine, pool, rasterize

VERSION = 1
UNIT = 10_000
MOST = 64
LONGEST = 2_000_000  # characters of JSON: it goes into every saved picture
THRESHOLDS = ("argmax", "otsu", "quantile", "median", "soft")
SCOPES = ("step", "block")
SMOOTHEST = 0.95
MOST_GROWN = 8
OVERLAPS = ("normalize", "priority", "max")
COLOURS = ("#e6194b", "#4363d8", "#3cb44b", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324")
REACH = 2 * UNIT  # how far outside of the canvas a coordinate may lie


class DocumentError(ValueError):
    """A regions document that cannot be used; the message names the field and says what it must be."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA of a region. file: with `/`, below the host's loras folders; model, clip: strengths; start, end: window in shares."""

    file: str
    model: float = 1.0
    clip: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Live:
    """A region found while the picture is sampled, where the model attends to a phrase of the common prompt.

    phrase: empty for the region's prompt, or its name; background: phrases, one in each line, that stand for what is no region; threshold:
    one of THRESHOLDS, with its level; scope: one of SCOPES, "block" where layers behind an attention follow it in the same call;
    smoothing: how much of the map before stays in each step; start, end: shares of sampling between which the region is there; until: that
    after which it stays where it is; largest: its largest part alone; grown: by how many cells of the map it reaches further.
    """

    phrase: str = ""
    background: str = ""
    threshold: str = "argmax"
    level: float = 0.5
    scope: str = "step"
    smoothing: float = 0.5
    start: float = 0.1
    end: float = 1.0
    until: float = 0.25
    largest: bool = False
    grown: int = 0


@dataclass(frozen=True)
class Region:
    """One region. `rest`: it has what the others leave, and no shapes. weight multiplies its mask; feather: a share of the shorter side;
    live: it is found while sampling, within its shapes where it has any.
    """

    name: str
    colour: str = COLOURS[0]
    shapes: tuple[Shape, ...] = ()
    rest: bool = False
    prompt: str = ""
    negative: str = ""
    loras: tuple[LoraFile, ...] = ()
    weight: float = 1.0
    feather: float = 0.0
    visible: bool = True
    locked: bool = False
    live: Live | None = None


@dataclass(frozen=True)
class Document:
    """Regions in order, the first on top, and what happens where they overlap."""

    regions: tuple[Region, ...] = ()
    overlap: Overlap = "normalize"

    def masks(self, height: int, width: int, given: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """(K, height, width) float32, in region order: sums of at most 1, whatever the weights. Invisible regions have none of it. `given`
        masks (of any size) stand for the shapes of the regions of their names.
        """
        return self.shared_out(self.drawn(height, width, given))

    def drawn(self, height: int, width: int, given: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """(K, height, width): each region's own mask, whatever the others have; nothing for the rest."""
        if not self.regions:
            return torch.zeros(0, height, width)
        return torch.stack([self._drawn(region, height, width, given or {}) for region in self.regions])

    def _drawn(self, region: Region, height: int, width: int, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if region.name in given and not region.rest:
            return pool(given[region.name][None].float(), height, width)[0] * region.visible
        return rasterize(region.shapes if region.visible else (), height, width, region.feather)

    def shared_out(self, drawn: torch.Tensor) -> torch.Tensor:
        """Masks (K, height, width) by weights, the overlap rule and what is left to the rest."""
        if not self.regions:
            return drawn
        at = [index for index, region in enumerate(self.regions) if not region.rest]
        weights = torch.tensor([self.regions[index].weight for index in at], device=drawn.device)
        shared = combine(drawn[at], weights, self.overlap) if at else drawn[:0]
        left, own = (1 - shared.sum(0)).clamp(min=0), iter(shared)
        rests = sum(region.rest for region in self.regions)
        return torch.stack([left * (region.weight * region.visible / rests) if region.rest else next(own) for region in self.regions])


def parse(text: str | Mapping[str, Any]) -> Document:
    """A document from its JSON. Raises DocumentError."""
    data = _read(text) if isinstance(text, str) else text
    top = _Fields(data, "the document", ("version", "overlap", "regions"))
    version = top.number("version", VERSION, whole=True)
    if version > VERSION:
        raise DocumentError(
            f"These regions are of version {version}, made by a newer Concept Nodes; this one reads up to {VERSION}. Update the pack."
        )
    if version < 1:
        raise DocumentError(f"version is {version}. It must be {VERSION}.")
    listed = top.sequence("regions")
    if len(listed) > MOST:
        raise DocumentError(
            f"regions holds {len(listed)} regions; at most {MOST} are possible. Remove some, or join those with one prompt."
        )
    regions = tuple(_region(item, f"regions[{index}]", index) for index, item in enumerate(listed))
    seen: dict[str, int] = {}
    for index, region in enumerate(regions):
        if region.name in seen:
            raise DocumentError(
                f"regions[{seen[region.name]}] and regions[{index}] are both named '{region.name}'. Give every region a name of its own."
            )
        seen[region.name] = index
    return Document(regions, top.choice("overlap", OVERLAPS))


def _read(text: str) -> Any:
    if len(text) > LONGEST:
        raise DocumentError(
            f"The regions are {len(text):,} characters long; at most {LONGEST:,} are possible. Draw with fewer strokes, or connect a mask."
        )

    def refuse(constant: str):
        raise DocumentError(f"The regions hold {constant}, which is no number of JSON. Replace it by a finite one.")

    try:
        return json.loads(text, parse_constant=refuse) if text.strip() else {"version": VERSION}
    except json.JSONDecodeError as error:
        raise DocumentError(f"The regions are no JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from error
    except RecursionError:
        raise DocumentError("The regions are nested too deeply to be read. Restore an earlier version of them.") from None


def dump(document: Document) -> str:
    """The JSON of a document: `parse(dump(d)) == d`, up to a ten-thousandth of the canvas."""
    return json.dumps(
        {"version": VERSION, "overlap": document.overlap, "regions": [_plain_region(region) for region in document.regions]},
        ensure_ascii=False,
    )


class _Fields:
    """Fields of one JSON object, taken with checks that name them."""

    def __init__(self, data: Any, where: str, known: Sequence[str]):
        if not isinstance(data, Mapping):
            raise DocumentError(f"{where} must be an object {{...}}, not {_kind(data)}.")
        unknown = [key for key in data if key not in known]
        if unknown:
            raise DocumentError(f"{where} has an unknown field '{unknown[0]}'. Known: {', '.join(known)}.")
        self.data, self.prefix = data, "" if where == "the document" else f"{where}."

    def _wrong(self, key: str, must: str) -> DocumentError:
        return DocumentError(f"{self.prefix}{key} is {_kind(self.data[key])}. It must be {must}.")

    def text(self, key: str, default: str = "") -> str:
        value = self.data.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def number(self, key: str, default: float, low: float = -math.inf, high: float = math.inf, whole: bool = False):
        value = self.data.get(key, default)
        right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
        if not right or (whole and value != int(value)):
            span = "" if low == -math.inf else f" from {low:g} to {high:g}"
            raise self._wrong(key, f"a {'whole ' if whole else ''}number{span}")
        return int(value) if whole else float(value)

    def choice(self, key: str, choices: Sequence[str]) -> str:
        value = self.data.get(key, choices[0])
        if value not in choices:
            raise self._wrong(key, f"one of {', '.join(choices)}")
        return value

    def sequence(self, key: str) -> Sequence:
        value = self.data.get(key, ())
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self._wrong(key, "a list [...]")
        return value

    def lengths(self, key: str, least: int) -> list[int]:
        values = self.sequence(key)
        if len(values) < least or len(values) % 2:
            raise DocumentError(f"{self.prefix}{key} has {len(values)} numbers. It must have an even number of them, at least {least}.")
        for index, value in enumerate(values):
            # 5.0 is a whole number, too: JavaScript does not tell the two apart.
            whole = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= REACH and value == int(value)
            if not whole:
                raise DocumentError(f"{self.prefix}{key}[{index}] is {_kind(value)}. It must be a whole number from {-REACH} to {REACH}.")
        return [int(value) for value in values]


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "a list"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | int | float | bool | None) else type(value).__name__


def _region(data: Any, where: str, index: int) -> Region:
    known = ("name", "colour", "shapes", "rest", "prompt", "negative", "loras", "weight", "feather", "visible", "locked", "live")
    fields = _Fields(data, where, known)
    name = fields.text("name", f"region {index + 1}").strip()
    if not name:
        raise DocumentError(f"{where}.name is empty. Give the region a name.")
    rest, shapes, live = fields.flag("rest", False), fields.sequence("shapes"), fields.data.get("live")
    if rest and shapes:
        raise DocumentError(f"{where} is the rest of the canvas and has shapes. Remove the shapes, or set rest to false.")
    if rest and live is not None:
        raise DocumentError(f"{where} is the rest of the canvas and has a field live. Remove that, or set rest to false.")
    colour = fields.text("colour", COLOURS[index % len(COLOURS)])
    if len(colour) != 7 or colour[0] != "#" or any(digit not in "0123456789abcdefABCDEF" for digit in colour[1:]):
        raise DocumentError(f"{where}.colour is {_kind(colour)}. It must be #rrggbb.")
    return Region(
        name=name,
        colour=colour,
        shapes=tuple(_shape(item, f"{where}.shapes[{at}]") for at, item in enumerate(shapes)),
        rest=rest,
        prompt=fields.text("prompt"),
        negative=fields.text("negative"),
        loras=tuple(_lora(item, f"{where}.loras[{at}]") for at, item in enumerate(fields.sequence("loras"))),
        weight=fields.number("weight", 1.0, 0.0, 1.0),
        feather=fields.number("feather", 0.0, 0.0, 1.0),
        visible=fields.flag("visible", True),
        locked=fields.flag("locked", False),
        live=None if live is None else _live(live, f"{where}.live"),
    )


def _live(data: Any, where: str) -> Live:
    fields = _Fields(data, where, tuple(vars(_NEUTRAL_LIVE)))
    start, end = (fields.number(key, getattr(_NEUTRAL_LIVE, key), 0.0, 1.0) for key in ("start", "end"))
    if start > end:
        raise DocumentError(f"{where}.start {start:g} lies after its end {end:g}. Swap the two.")
    return Live(
        phrase=fields.text("phrase"),
        background=fields.text("background"),
        threshold=fields.choice("threshold", THRESHOLDS),
        level=fields.number("level", _NEUTRAL_LIVE.level, 0.0, 1.0),
        scope=fields.choice("scope", SCOPES),
        smoothing=fields.number("smoothing", _NEUTRAL_LIVE.smoothing, 0.0, SMOOTHEST),
        start=start,
        end=end,
        until=fields.number("until", _NEUTRAL_LIVE.until, 0.0, 1.0),
        largest=fields.flag("largest", False),
        grown=fields.number("grown", 0, 0, MOST_GROWN, whole=True),
    )


def _shape(data: Any, where: str) -> Shape:
    fields = _Fields(data, where, ("box", "ellipse", "polygon", "stroke", "radius", "erase"))
    kinds = [kind for kind in ("box", "ellipse", "polygon", "stroke") if kind in fields.data]
    if len(kinds) != 1:
        raise DocumentError(f"{where} must have exactly one of box, ellipse, polygon and stroke; it has {len(kinds)}.")
    (kind,) = kinds
    erase = fields.flag("erase", False)
    numbers = fields.lengths(kind, {"box": 4, "ellipse": 4, "polygon": 6, "stroke": 2}[kind])
    if kind in ("box", "ellipse"):
        if len(numbers) != 4:
            raise DocumentError(f"{where}.{kind} has {len(numbers)} numbers. It must be [x, y, width, height].")
        if numbers[2] <= 0 or numbers[3] <= 0:
            raise DocumentError(f"{where}.{kind} has a width or height of 0 or less. Both must be at least 1.")
        make = Box if kind == "box" else Ellipse
        return make(*(number / UNIT for number in numbers), erase)
    x = y = 0
    points = []
    for dx, dy in zip(numbers[::2], numbers[1::2], strict=True):
        x, y = x + dx, y + dy
        points.append((x / UNIT, y / UNIT))
    if kind == "polygon":
        return Polygon(tuple(points), erase)
    return Stroke(tuple(points), fields.number("radius", UNIT / 50, 1, UNIT) / UNIT, erase)


def _lora(data: Any, where: str) -> LoraFile:
    fields = _Fields(data, where, ("file", "model", "clip", "start", "end"))
    file = fields.text("file").replace("\\", "/").strip()
    if not file:
        raise DocumentError(f"{where}.file is empty. Name a LoRA file, or remove the entry.")
    start, end = fields.number("start", 0.0, 0.0, 1.0), fields.number("end", 1.0, 0.0, 1.0)
    if start > end:
        raise DocumentError(f"{where}.start {start:g} lies after its end {end:g}. Swap the two.")
    return LoraFile(file, fields.number("model", 1.0, -100, 100), fields.number("clip", 1.0, -100, 100), start, end)


_NEUTRAL = Region("")
_NEUTRAL_LIVE = Live()


def _plain_region(region: Region) -> dict[str, Any]:
    plain: dict[str, Any] = {"name": region.name, "colour": region.colour}
    if region.shapes:
        plain["shapes"] = [_plain_shape(shape) for shape in region.shapes]
    for key in ("rest", "prompt", "negative", "weight", "feather", "visible", "locked"):
        if getattr(region, key) != getattr(_NEUTRAL, key):
            plain[key] = getattr(region, key)
    if region.live is not None:
        plain["live"] = {key: value for key, value in vars(region.live).items() if value != getattr(_NEUTRAL_LIVE, key)}
    if region.loras:
        plain["loras"] = [vars(lora) for lora in region.loras]
    return plain


def _plain_shape(shape: Shape) -> dict[str, Any]:
    def whole(value: float) -> int:
        return round(value * UNIT)

    plain: dict[str, Any] = {}
    if isinstance(shape, Box | Ellipse):
        plain[type(shape).__name__.lower()] = [whole(value) for value in shape[:4]]
    else:
        numbers, before = [], (0, 0)
        for point in shape.points:
            now = whole(point[0]), whole(point[1])
            numbers += [now[0] - before[0], now[1] - before[1]]
            before = now
        plain[type(shape).__name__.lower()] = numbers
        if isinstance(shape, Stroke):
            plain["radius"] = whole(shape.radius)
    return plain | ({"erase": True} if shape.erase else {})
