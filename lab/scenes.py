"""The lab's world: procedurally drawn scenes whose truth is known.

A scene is a canvas with a plain background on a dark-to-light axis and one to six objects. An object has a shape, a colour, a fill, a
diameter in pixels and a place; one of six compound characters may stand instead of a shape. A global style changes how all of it is
drawn. Objects keep their size in pixels (16 to 28); the canvas is what grows, from 64 to 128 pixels a side.

Everything here is vectorised torch and runs on any device: `sample_scenes` draws attributes, `render` draws pictures, and the `Scenes`
value itself is the truth that captions, training and measurement read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "crescent", "diamond")
CHARACTERS = ("robot", "cat", "snowman", "alien", "mushroom", "penguin")
KINDS = SHAPES + CHARACTERS
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
COLOUR_RGB = (
    (0.86, 0.12, 0.12),
    (0.98, 0.55, 0.08),
    (0.95, 0.90, 0.15),
    (0.12, 0.62, 0.18),
    (0.15, 0.82, 0.86),
    (0.14, 0.24, 0.86),
    (0.52, 0.16, 0.68),
    (1.00, 0.52, 0.76),
)
FILLS = ("solid", "outline", "striped", "dotted")
STYLES = ("flat", "neon", "shaded", "vintage")
SIZES = ("small", "medium", "large")
SIZE_RANGES = ((16.0, 18.5), (20.5, 23.5), (25.5, 28.0))  # diameter, pixels
BACKGROUNDS = ("black", "dark grey", "grey", "light grey", "white")
BACKGROUND_RANGES = ((0.02, 0.12), (0.20, 0.34), (0.42, 0.58), (0.66, 0.80), (0.88, 0.98))  # lightness
CELLS = ("left", "centre", "right"), ("top", "middle", "bottom")
MAX_OBJECTS = 6
MIN_DIAMETER, MAX_DIAMETER = SIZE_RANGES[0][0], SIZE_RANGES[-1][1]


@dataclass
class Scenes:
    """N scenes on one canvas size. Object tensors are (N, 6); slots at or past `count` are empty.

    kind: index into KINDS; colour, fill: indices; diameter, x, y: pixels; background: lightness 0..1; style: index; count: objects.
    Characters keep their own colours: their `colour` and `fill` are ignored when drawn.
    """

    height: int
    width: int
    count: torch.Tensor
    kind: torch.Tensor
    colour: torch.Tensor
    fill: torch.Tensor
    diameter: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    background: torch.Tensor
    style: torch.Tensor

    def __len__(self) -> int:
        return self.count.shape[0]

    def _map(self, change) -> Scenes:
        return Scenes(self.height, self.width, *(change(getattr(self, field.name)) for field in fields(self)[2:]))

    def __getitem__(self, index) -> Scenes:
        return self._map(lambda value: value[index])

    def to(self, device) -> Scenes:
        return self._map(lambda value: value.to(device))

    def present(self) -> torch.Tensor:
        """(N, 6) bool: which slots hold an object."""
        return torch.arange(MAX_OBJECTS, device=self.count.device) < self.count[:, None]

    def size_word(self) -> torch.Tensor:
        """(N, 6) index into SIZES, by the nearest range."""
        middles = torch.tensor([sum(pair) / 2 for pair in SIZE_RANGES], device=self.diameter.device)
        return (self.diameter[..., None] - middles).abs().argmin(-1)

    def background_word(self) -> torch.Tensor:
        """(N,) index into BACKGROUNDS, by the nearest range."""
        middles = torch.tensor([sum(pair) / 2 for pair in BACKGROUND_RANGES], device=self.background.device)
        return (self.background[:, None] - middles).abs().argmin(-1)

    def column(self) -> torch.Tensor:
        """(N, 6) 0 left, 1 centre, 2 right; -1 where the place is between two words."""
        return _third(self.x / self.width)

    def row(self) -> torch.Tensor:
        """(N, 6) 0 top, 1 middle, 2 bottom; -1 where the place is between two words."""
        return _third(self.y / self.height)


def _third(position: torch.Tensor) -> torch.Tensor:
    word = torch.ones_like(position, dtype=torch.long)
    word = torch.where(position < 0.40, 0, word)
    word = torch.where(position > 0.60, 2, word)
    between = ((position - 0.40).abs() < 0.02) | ((position - 0.60).abs() < 0.02)
    return torch.where(between, -1, word)


def cat_scenes(parts: list[Scenes]) -> Scenes:
    """Join scenes of one canvas size along N."""
    first = parts[0]
    return Scenes(first.height, first.width, *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(first)[2:]))


def _pick(ranges, index: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    bounds = torch.tensor(ranges, device=index.device)[index]
    return bounds[..., 0] + (bounds[..., 1] - bounds[..., 0]) * uniform


def _weighted(weights, shape, generator) -> torch.Tensor:
    flat = torch.multinomial(torch.tensor(weights, dtype=torch.float), math.prod(shape), replacement=True, generator=generator)
    return flat.view(shape)


def sample_scenes(
    n: int,
    *,
    height: int = 64,
    width: int = 64,
    counts: dict[int, float] | None = None,
    generator: torch.Generator,
    characters: float = 0.0,
    plain: bool = False,
    any_background: bool = False,
) -> Scenes:
    """Draw N scenes (on the CPU). counts: {number of objects: weight}; characters: share of objects that are characters; plain: solid
    fills and flat style only; any_background: every lightness, those between two words included.

    Objects keep apart and inside the canvas (by their circles: an aerial or a tip may reach past). Places are drawn slot by slot, the
    first of 64 candidates that fits; a scene in which none fits loses the object.
    """
    counts = counts or {1: 1.0}
    count = torch.tensor(list(counts))[_weighted(list(counts.values()), (n,), generator)]
    slots = (n, MAX_OBJECTS)

    def uniform(*shape):
        return torch.rand(shape, generator=generator)

    kind = torch.randint(len(SHAPES), slots, generator=generator)
    if characters:
        is_character = uniform(*slots) < characters
        kind = torch.where(is_character, len(SHAPES) + torch.randint(len(CHARACTERS), slots, generator=generator), kind)
    colour = torch.randint(len(COLOURS), slots, generator=generator)
    fill = _weighted([1.0, 0.0, 0.0, 0.0] if plain else [0.58, 0.18, 0.12, 0.12], slots, generator)
    size = torch.randint(len(SIZES), slots, generator=generator)
    # Outlines, stripes and dots need room to be told apart after the autoencoder; a character's face does too.
    size = torch.where(((fill >= 1) & (size == 0)) | (kind >= len(SHAPES)), 2 - torch.randint(2, slots, generator=generator), size)
    diameter = _pick(SIZE_RANGES, size, uniform(*slots))
    diameter = torch.where(kind >= len(SHAPES), 26.0 + 2.0 * uniform(*slots), diameter)
    background = _pick(BACKGROUND_RANGES, torch.randint(len(BACKGROUNDS), (n,), generator=generator), uniform(n))
    if any_background:
        background = 0.02 + 0.96 * uniform(n)
    style = _weighted([1.0, 0.0, 0.0, 0.0] if plain else [0.64, 0.12, 0.12, 0.12], (n,), generator)

    x, y = torch.zeros(slots), torch.zeros(slots)
    placed = torch.zeros(slots, dtype=torch.bool)
    tries = 64
    for slot in range(int(count.max())):
        margin = (diameter[:, slot] / 2 + 1.5)[:, None]
        # Half of the candidates spread evenly, half gather in the nine named cells, so that the words for places are met often.
        even_x = margin + (width - 2 * margin) * uniform(n, tries)
        even_y = margin + (height - 2 * margin) * uniform(n, tries)
        third = torch.randint(3, (2, n, tries), generator=generator)
        cell_x = _in_cell(third[0], margin, width, uniform(n, tries))
        cell_y = _in_cell(third[1], margin, height, uniform(n, tries))
        use_cell = uniform(n, 1) < 0.5
        candidate_x, candidate_y = torch.where(use_cell, cell_x, even_x), torch.where(use_cell, cell_y, even_y)
        gap = torch.hypot(candidate_x[..., None] - x[:, None, :], candidate_y[..., None] - y[:, None, :])
        clear = (gap > ((diameter[:, slot, None] + diameter) / 2 + 3.0)[:, None, :]) | ~placed[:, None, :]
        fits = clear.all(-1)
        best = fits.float().argmax(1)
        rows = torch.arange(n)
        ok = fits[rows, best] & (slot < count)
        x[:, slot], y[:, slot] = candidate_x[rows, best], candidate_y[rows, best]
        placed[:, slot] = ok
    # Compact the placed objects to the front, so that `count` tells all.
    order = torch.argsort((~placed).to(torch.uint8), dim=1, stable=True)
    values = [value.gather(1, order) for value in (kind, colour, fill, diameter, x, y)]
    return Scenes(height, width, placed.sum(1), *values, background, style)


def _in_cell(third: torch.Tensor, margin: torch.Tensor, length: int, uniform: torch.Tensor) -> torch.Tensor:
    low = torch.where(third == 0, margin, torch.where(third == 1, 0.44 * length, 0.64 * length))
    high = torch.where(third == 0, 0.36 * length, torch.where(third == 1, 0.56 * length, length - margin))
    return low + (high - low).clamp(min=0) * uniform


# Drawing. Distances are signed, in pixels, negative inside; u grows to the right and v downwards from the object's centre; r is its radius.


def _circle(u, v, r):
    return torch.hypot(u, v) - r


def _box(u, v, half_width, half_height):
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def _square(u, v, r):
    return _box(u, v, 0.84 * r, 0.84 * r)


def _triangle(u, v, r):
    v = v - 0.22 * r
    inner = 0.56 * r
    side = 0.8660254 * u.abs() - 0.5 * v
    return torch.maximum(v, side) - inner


def _star(u, v, r):
    outer, inner = 1.12 * r, 0.47 * r
    sector = math.pi / 5
    angle = torch.remainder(torch.atan2(u, -v), 2 * sector)
    angle = torch.minimum(angle, 2 * sector - angle)
    length = torch.hypot(u, v)
    px, py = length * torch.cos(angle), length * torch.sin(angle)
    ix, iy = inner * math.cos(sector), inner * math.sin(sector)
    edge_x, edge_y = ix - outer, iy
    norm = torch.hypot(edge_x, edge_y)
    return ((px - outer) * -edge_y + py * edge_x) / norm * -1.0


def _cross(u, v, r):
    return torch.minimum(_box(u, v, r, 0.32 * r), _box(u, v, 0.32 * r, r))


def _heart(u, v, r):
    a = r / 1.62
    v = v - 0.10 * r
    p, q = (u + v) / math.sqrt(2), (v - u) / math.sqrt(2)
    square = _box(p, q, a, a)
    left, right = torch.hypot(p + a, q) - a, torch.hypot(p, q + a) - a
    return torch.minimum(square, torch.minimum(left, right))


def _crescent(u, v, r):
    return torch.maximum(torch.hypot(u, v) - r, 0.82 * r - torch.hypot(u - 0.52 * r, v + 0.08 * r))


def _diamond(u, v, r):
    return (u.abs() / 0.62 + v.abs() - 1.08 * r) / math.hypot(1 / 0.62, 1)


_DISTANCES = (_circle, _square, _triangle, _star, _cross, _heart, _crescent, _diamond)


def _robot(u, v, r):
    head = _box(u, v, 0.86 * r, 0.72 * r)
    aerial = torch.minimum(_box(u, v + 0.86 * r, 0.08 * r, 0.2 * r), _circle(u, v + 1.02 * r, 0.16 * r))
    eyes = _box(u.abs() - 0.4 * r, v + 0.18 * r, 0.17 * r, 0.17 * r)
    mouth = _box(u, v - 0.36 * r, 0.5 * r, 0.11 * r)
    return [(aerial, (0.9, 0.2, 0.2)), (head, (0.55, 0.62, 0.7)), (eyes, (0.1, 0.95, 0.95)), (mouth, (0.15, 0.15, 0.2))]


def _cat(u, v, r):
    head = _circle(u, v - 0.12 * r, 0.8 * r)
    ear = _triangle(u.abs() - 0.52 * r, v + 0.62 * r, 0.5 * r)
    eyes = _circle((u.abs() - 0.33 * r) * 1.5, v + 0.02 * r, 0.2 * r)
    nose = _triangle(u, -(v - 0.36 * r), 0.2 * r)
    return [(torch.minimum(head, ear), (0.95, 0.6, 0.2)), (eyes, (0.1, 0.45, 0.15)), (nose, (0.35, 0.1, 0.1))]


def _snowman(u, v, r):
    body = torch.minimum(_circle(u, v - 0.42 * r, 0.62 * r), _circle(u, v + 0.36 * r, 0.42 * r))
    hat = torch.minimum(_box(u, v + 0.7 * r, 0.5 * r, 0.09 * r), _box(u, v + 0.9 * r, 0.3 * r, 0.22 * r))
    eyes = _circle(u.abs() - 0.16 * r, v + 0.4 * r, 0.09 * r)
    nose = _box(u - 0.14 * r, v + 0.24 * r, 0.2 * r, 0.08 * r)
    return [(body, (0.88, 0.94, 1.0)), (hat, (0.25, 0.1, 0.35)), (eyes, (0.05, 0.05, 0.05)), (nose, (1.0, 0.45, 0.0))]


def _alien(u, v, r):
    head = _circle(u * (1.15 + 0.25 * v / r), v, 0.95 * r)
    tilt_u, tilt_v = u.abs() - 0.38 * r, v + 0.08 * r
    eyes = _circle(tilt_u * 0.9 + tilt_v * 0.5, (tilt_v - tilt_u * 0.5) * 1.7, 0.3 * r)
    mouth = _box(u, v - 0.6 * r, 0.2 * r, 0.06 * r)
    return [(head, (0.45, 0.85, 0.3)), (eyes, (0.05, 0.05, 0.1)), (mouth, (0.1, 0.3, 0.1))]


def _mushroom(u, v, r):
    cap = torch.maximum(_circle(u, v - 0.05 * r, 0.98 * r), v - 0.1 * r)
    stem = _box(u, v - 0.5 * r, 0.46 * r, 0.46 * r)
    spots = torch.minimum(_circle(u.abs() - 0.5 * r, v + 0.28 * r, 0.18 * r), _circle(u, v + 0.56 * r, 0.2 * r))
    eyes = _circle(u.abs() - 0.2 * r, v - 0.4 * r, 0.11 * r)
    return [(stem, (0.95, 0.87, 0.7)), (cap, (0.8, 0.08, 0.2)), (spots, (1.0, 1.0, 1.0)), (eyes, (0.05, 0.05, 0.05))]


def _penguin(u, v, r):
    body = _circle(u * 1.25, v, r)
    belly = _circle(u * 1.3, v - 0.28 * r, 0.62 * r)
    eyes = _circle(u.abs() - 0.26 * r, v + 0.46 * r, 0.15 * r)
    beak = _triangle(u, -(v + 0.16 * r), 0.28 * r)
    return [(body, (0.08, 0.12, 0.35)), (belly, (0.96, 0.96, 0.96)), (eyes, (1.0, 1.0, 1.0)), (beak, (1.0, 0.65, 0.05))]


_CHARACTER_PARTS = (_robot, _cat, _snowman, _alien, _mushroom, _penguin)


def _coverage(distance: torch.Tensor) -> torch.Tensor:
    """Share of a pixel inside an edge at this signed distance: a one-pixel ramp."""
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Scenes, *, masks: bool = False):
    """Draw scenes -> pictures (N, 3, H, W) in 0..1, on the device of the scenes; with masks also (N, 6, H, W) silhouettes."""
    n, height, width = len(scenes), scenes.height, scenes.width
    device = scenes.count.device
    row = torch.arange(height, device=device, dtype=torch.float32)[:, None] + 0.5
    column = torch.arange(width, device=device, dtype=torch.float32)[None, :] + 0.5
    picture = scenes.background[:, None, None, None].expand(n, 3, height, width).clone()
    palette = torch.tensor(COLOUR_RGB, device=device)
    silhouettes = torch.zeros(n, MAX_OBJECTS, height, width, device=device) if masks else None
    neon, shaded, vintage = ((scenes.style == index)[:, None, None] for index in (1, 2, 3))
    present = scenes.present()

    for slot in range(int(scenes.count.max()) if n else 0):
        for kind in range(len(KINDS)):
            which = torch.nonzero(present[:, slot] & (scenes.kind[:, slot] == kind)).flatten()
            if not len(which):
                continue
            u = column - scenes.x[which, slot, None, None]
            v = row - scenes.y[which, slot, None, None]
            r = scenes.diameter[which, slot, None, None] / 2
            if kind < len(SHAPES):
                distance = _DISTANCES[kind](u, v, r)
                rgb = palette[scenes.colour[which, slot]][:, :, None, None]
                cover, paint = _filled(distance, u, v, rgb, scenes.fill[which, slot, None, None])
            else:
                distance, cover, paint = _assembled(_CHARACTER_PARTS[kind - len(SHAPES)](u, v, r))
                rgb = paint.flatten(2).mean(-1)[..., None, None]
            under = picture[which]
            # Shaded: a soft shadow under the object, and light from the upper left on it.
            shadow = torch.sigmoid(-(torch.hypot(u - 0.25 * r, v - 0.35 * r) - r) / 1.5)
            under = torch.where(shaded[which][:, None], under * (1 - 0.45 * shadow[:, None]), under)
            light = (1.0 - 0.38 * (u + v) / r).clamp(0.45, 1.5)
            paint = torch.where(shaded[which][:, None], (paint * light[:, None]).clamp(0, 1), paint)
            # Neon: the object's colour glows around it.
            reach = torch.maximum(distance, torch.hypot(u, v) - 1.15 * r).clamp(min=0)
            glow = 0.85 * torch.exp(-reach / 4.5)[:, None]
            under = torch.where(neon[which][:, None], under * (1 - glow) + rgb * glow, under)
            cover = cover[:, None]
            picture[which] = under * (1 - cover) + paint * cover
            if masks:
                silhouettes[which, slot] = _coverage(distance)

    # Vintage: warm, with darkened corners.
    radius = ((column / width - 0.5) ** 2 + (row / height - 0.5) ** 2) * 2
    warm = torch.tensor([1.0, 0.88, 0.66], device=device)[:, None, None]
    picture = torch.where(vintage[:, None], picture * warm * (1 - 0.6 * radius**1.5), picture)
    picture = picture.clamp(0, 1)
    return (picture, silhouettes) if masks else picture


def _filled(distance, u, v, rgb, fill):
    """Coverage (M, H, W) and paint (M, 3, H, W) of shapes with their fills."""
    ring = (distance + 1.6).abs() - 1.6
    cover = _coverage(torch.where(fill == FILLS.index("outline"), ring, distance))
    pale = 0.2 * rgb + 0.8
    stripes = torch.sigmoid(4 * (torch.remainder(v, 6.0) - 3.0).abs() - 6.0)
    dots = _coverage(torch.hypot(torch.remainder(u, 7.0) - 3.5, torch.remainder(v, 7.0) - 3.5) - 2.0)
    lighter = torch.where(fill == FILLS.index("striped"), stripes, torch.where(fill == FILLS.index("dotted"), dots, torch.zeros_like(dots)))
    lighter = lighter[:, None]
    return cover, rgb * (1 - lighter) + pale * lighter


def _assembled(parts):
    """Silhouette distance, coverage and paint of a character from its parts, back to front."""
    distance = parts[0][0]
    paint = torch.zeros(distance.shape[0], 3, *distance.shape[1:], device=distance.device)
    cover = torch.zeros_like(distance)
    for part, rgb in parts:
        colour = torch.tensor(rgb, device=part.device)[:, None, None]
        share = _coverage(part)
        paint = torch.where(cover[:, None] > 0, paint * (1 - share[:, None]) + colour * share[:, None], colour.expand_as(paint))
        cover = torch.maximum(cover, share)
        distance = torch.minimum(distance, part)
    return distance, cover, paint
