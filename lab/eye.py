"""The eyes: they read a picture of the lab back into the words of its scene.

A convolutional net marks object centres on a grid of four-pixel cells and says what each object is; pooled over the picture it
reads the background's lightness and the style, and judges validity: whether this could be a drawn scene at all, or is smeared, merged,
noisy or blank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .scenes import BACKGROUND_RANGES, BACKGROUNDS, CELLS, COLOURS, FILLS, KINDS, MAX_DIAMETER, MAX_OBJECTS, SIZE_RANGES, STYLES, Scenes

CELL = 4  # pixels per cell of the grid
HEADS = {"heat": 1, "kind": len(KINDS), "colour": len(COLOURS), "fill": len(FILLS), "diameter": 1, "offset": 2}
SCENE_HEADS = {"background": 1, "style": len(STYLES), "valid": 1}


@dataclass
class Seen:
    """One object as the eye reads it. x, y: centre in pixels; diameter in pixels; sure: 0..1. odds: what each word of KINDS, COLOURS and
    FILLS got, by attribute.
    """

    kind: str
    colour: str
    fill: str
    diameter: float
    x: float
    y: float
    sure: float
    odds: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Reading:
    """A picture as the eye reads it. background: lightness 0..1; valid: 0..1, above 0.5 is a scene that could have been drawn; styles:
    what each word of STYLES got.
    """

    background: float
    style: str
    valid: float
    objects: list[Seen] = field(default_factory=list)
    styles: torch.Tensor | None = None

    def background_word(self) -> str:
        return BACKGROUNDS[min(range(len(BACKGROUNDS)), key=lambda i: abs(sum(BACKGROUND_RANGES[i]) / 2 - self.background))]


def as_scenes(readings: Sequence[Reading], height: int, width: int) -> Scenes:
    """What the eye read in pictures of such a size as scenes that can be drawn, the surest object of each; every one needs an object."""
    n, seen = len(readings), [one.objects[0] for one in readings]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        slots = torch.zeros(n, MAX_OBJECTS, dtype=dtype)
        slots[:, 0] = torch.tensor(values)
        return slots

    words = ((KINDS, [one.kind for one in seen]), (COLOURS, [one.colour for one in seen]), (FILLS, [one.fill for one in seen]))
    return Scenes(
        height,
        width,
        torch.ones(n, dtype=torch.long),
        *(column([known.index(word) for word in said], torch.long) for known, said in words),
        *(column([getattr(one, name) for one in seen]) for name in ("diameter", "x", "y")),
        torch.tensor([one.background for one in readings]),
        torch.tensor([STYLES.index(one.style) for one in readings]),
    )


def cell_of(x: float, y: float) -> tuple[str, str]:
    """The named cell of a point given in shares of the canvas."""
    return CELLS[0][(x >= 0.4) + (x > 0.6)], CELLS[1][(y >= 0.4) + (y > 0.6)]


def size_word(diameter: float) -> int:
    """Index into SIZES of a diameter in pixels."""
    return min(range(len(SIZE_RANGES)), key=lambda i: abs(sum(SIZE_RANGES[i]) / 2 - diameter))


class _Block(nn.Module):
    def __init__(self, width: int, dilation: int = 1):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(8, width),
        )

    def forward(self, x):
        return F.relu(x + self.net(x))


class EyeNet(nn.Module):
    """Pictures (N, 3, H, W) in 0..1 -> grid heads (N, channels, H/4, W/4) and scene heads (N, channels)."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.GroupNorm(8, 48), nn.ReLU(),
            nn.Conv2d(48, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.ReLU(),
        )  # fmt: skip
        self.body = nn.Sequential(_Block(width), _Block(width, 2), _Block(width, 4), _Block(width), _Block(width, 2), _Block(width))
        self.grid = nn.Conv2d(width, sum(HEADS.values()), 1)
        self.scene = nn.Sequential(nn.Linear(3 * width, 128), nn.ReLU(), nn.Linear(128, sum(SCENE_HEADS.values())))

    def forward(self, pictures):
        x = self.body(self.stem(pictures * 2 - 1))
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3)), x.flatten(2).std(-1)], 1)
        grid = dict(zip(HEADS, self.grid(x).split(list(HEADS.values()), 1), strict=True))
        scene = dict(zip(SCENE_HEADS, self.scene(pooled).split(list(SCENE_HEADS.values()), 1), strict=True))
        return grid, scene


class _Residual(nn.Module):
    """Two convolutions, each behind its norm (He et al. 2016, identity mappings)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1),
            nn.GroupNorm(8, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1),
        )  # fmt: skip
        self.pass_by = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x):
        return self.pass_by(x) + self.net(x)


class Hourglass(nn.Module):
    """The second eye: down to a sixteenth and up again with what each level saw (Newell et al. 2016), where the first eye looks on one
    level through dilated kernels. Heads as in `EyeNet`.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 56, 88, 120)):
        super().__init__()
        half, quarter, eighth, sixteenth = widths
        self.stem = nn.Conv2d(3, half, 5, stride=2, padding=2)
        self.down = nn.ModuleList(_Residual(*pair) for pair in ((half, half), (half, quarter), (quarter, eighth), (eighth, sixteenth)))
        self.up = nn.ModuleList([_Residual(sixteenth, eighth), _Residual(eighth, quarter)])
        self.across = nn.ModuleList([nn.Conv2d(eighth, eighth, 1), _Residual(quarter, quarter)])
        self.grid = nn.Conv2d(quarter, sum(HEADS.values()), 1)
        self.scene = nn.Sequential(nn.Linear(2 * sixteenth + 2 * quarter, 96), nn.SiLU(), nn.Linear(96, sum(SCENE_HEADS.values())))

    def forward(self, pictures):
        half = self.down[0](self.stem(pictures * 2 - 1))
        quarter = self.down[1](F.max_pool2d(half, 2))
        eighth = self.down[2](F.max_pool2d(quarter, 2))
        sixteenth = self.down[3](F.avg_pool2d(eighth, 2))
        wide = self.across[0](eighth) + F.interpolate(self.up[0](sixteenth), size=eighth.shape[2:])
        fine = self.across[1](quarter) + F.interpolate(self.up[1](wide), size=quarter.shape[2:])
        pooled = torch.cat([part for level in (sixteenth, fine) for part in (level.mean((2, 3)), level.amax((2, 3)))], 1)
        grid = dict(zip(HEADS, self.grid(fine).split(list(HEADS.values()), 1), strict=True))
        scene = dict(zip(SCENE_HEADS, self.scene(pooled).split(list(SCENE_HEADS.values()), 1), strict=True))
        return grid, scene


NETS = {"eye": EyeNet, "eye2": Hourglass}


class Eye:
    """A trained eye. `read` takes pictures as the host has them, (N, H, W, 3) in 0..1, of any multiple of eight pixels a side."""

    def __init__(self, net: nn.Module):
        self.net = net.eval()

    @classmethod
    def load(cls, name: str = "eye", folder: Path | None = None, device: str = "cpu") -> Eye:
        """The eye of this name ("eye", or "eye2" of the other architecture), from a folder of weights (default: the shipped ones)."""
        from ..host.lab import WEIGHTS, read_weights

        tensors, _ = read_weights((folder or WEIGHTS) / f"{name}.safetensors")
        net = NETS[name]()
        net.load_state_dict({key: value.float() for key, value in tensors.items()})
        return cls(net.to(device))

    @torch.no_grad()
    def read(self, images: torch.Tensor, *, threshold: float = 0.35, batch: int = 256) -> list[Reading]:
        """One Reading per picture, objects surest first."""
        readings = []
        device = next(self.net.parameters()).device
        for part in images.float().split(batch):
            grid, scene = self.net(part.movedim(-1, 1).to(device))
            readings += _decode(grid, scene, threshold)
        return readings


def _decode(grid, scene, threshold) -> list[Reading]:
    heat = torch.sigmoid(grid["heat"][:, 0])
    peak = (heat == F.max_pool2d(heat[:, None], 5, 1, 2)[:, 0]) & (heat > threshold)
    background, styles = torch.sigmoid(scene["background"][:, 0]).tolist(), scene["style"].softmax(1).cpu()
    valid = torch.sigmoid(scene["valid"][:, 0]).tolist()
    readings = [Reading(background[i], STYLES[int(styles[i].argmax())], valid[i], styles=styles[i]) for i in range(len(heat))]
    picture, row, column = (part.tolist() for part in torch.nonzero(peak, as_tuple=True))
    odds = {key: grid[key].softmax(1).movedim(1, -1).cpu() for key in ("kind", "colour", "fill")}
    named = {key: value.argmax(-1) for key, value in odds.items()}
    diameter, offset, heat = torch.sigmoid(grid["diameter"][:, 0]).cpu(), torch.tanh(grid["offset"]).cpu(), heat.cpu()
    for n, i, j in zip(picture, row, column, strict=True):
        readings[n].objects.append(
            Seen(
                KINDS[named["kind"][n, i, j]],
                COLOURS[named["colour"][n, i, j]],
                FILLS[named["fill"][n, i, j]],
                float(diameter[n, i, j]) * 1.5 * MAX_DIAMETER,
                (j + 0.5 + float(offset[n, 0, i, j])) * CELL,
                (i + 0.5 + float(offset[n, 1, i, j])) * CELL,
                float(heat[n, i, j]),
                {key: value[n, i, j] for key, value in odds.items()},
            )
        )
    for reading in readings:
        reading.objects.sort(key=lambda seen: -seen.sure)
    return readings
