"""Several characters on one canvas, each in a cell of a grid: the layouts, the ways of drawing them that more than one benchmark compares,
and how their pictures are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..host.regions import Hung, Regions, apply
from ..lab.captions import PLACE_WORDS
from ..lab.characters import WORDS, path_of, surest
from ..lab.eye import Reading, cell_of
from ..ops.masks import Box
from ..ops.regions import Region

SIZE, STEPS, CFG = 128, 20, 4.0
GRIDS = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 5: (3, 2), 6: (3, 2), 8: (4, 2)}  # columns, rows
BACKGROUND = "on a grey background"


def loras_of(kind: str) -> dict[str, dict[str, torch.Tensor]]:
    """The characters' LoRAs for a lab model, by character."""
    import comfy.utils

    return {name: comfy.utils.load_torch_file(str(path_of(name, kind)), safe_load=True) for name in WORDS}


class Layout:
    """K characters in the cells of a grid. turn: by how many the characters are moved on, so that each comes to every cell."""

    def __init__(self, k: int, turn: int = 0):
        self.k = k
        columns, rows = GRIDS[k]
        names = list(WORDS)
        self.boxes = [Box(c / columns, r / rows, 1 / columns, 1 / rows) for r in range(rows) for c in range(columns)][:k]
        self.names = [names[(index + turn) % len(names)] for index in range(k)]

    def place(self, index: int) -> str:
        box = self.boxes[index]
        return PLACE_WORDS[cell_of(box.x + box.width / 2, box.y + box.height / 2)][0]

    def prompt(self, index: int) -> str:
        """What one region asks for."""
        return f"a large {WORDS[self.names[index]]} {self.place(index)} {BACKGROUND}"

    def whole(self) -> str:
        """One prompt that names all."""
        return self._listed(self.names)

    def crowd(self, index: int) -> str:
        """The same, all of them called by one region's word: how many things there are, and where, and which they are here."""
        return self._listed([self.names[index]] * self.k)

    def _listed(self, names: Sequence[str]) -> str:
        things = [f"a large {WORDS[name]} {self.place(index)}" for index, name in enumerate(names)]
        return f"{', '.join(things[:-1])} and {things[-1]} {BACKGROUND}" if self.k > 1 else f"{things[0]} {BACKGROUND}"

    def regions(
        self,
        loras: dict[str, dict],
        *,
        prompts: Callable[[int], str] | None = None,
        only: Sequence[int] | None = None,
        strength: float = 1.0,
        inset: float = 0.0,
    ) -> Regions:
        """prompts: what a region reads, by its number; None: the common prompt. inset: how far a region stays inside of its cell."""
        made = Regions()
        for index in range(self.k) if only is None else only:
            name, cell = self.names[index], self.boxes[index]
            box = Box(cell.x + inset, cell.y + inset, cell.width - 2 * inset, cell.height - 2 * inset)
            made = made.with_region(Region(name, shapes=(box,), prompt=prompts(index) if prompts else ""))
            if name in loras:
                made = made.with_lora(name, Hung(name, loras[name], strength))
        return made

    def mask(self, index: int, size: int = SIZE) -> torch.Tensor:
        return Regions().with_region(Region("one", shapes=(self.boxes[index],))).drawn(size, size)

    def of(self, x: float, y: float) -> int:
        """The region of a point in pixels."""
        columns, rows = GRIDS[self.k]
        return min(int(y * rows / SIZE), rows - 1) * columns + min(int(x * columns / SIZE), columns - 1)


# --- the arms: layout -> (model, positive, negative) ------------------------------------------------------------------------------


def encode(loaded, text: str, **options) -> list:
    context, pooled = loaded.clip.encode_from_tokens(loaded.clip.tokenize(text), return_pooled=True)
    return [context, {"pooled_output": pooled} | options]


def base(loaded, layout, loras):
    return loaded.model, [encode(loaded, layout.whole())], [encode(loaded, "")]


def stacked(loaded, layout, loras):
    import comfy.sd

    model = loaded.model
    for name in layout.names:
        model, _ = comfy.sd.load_lora_for_models(model, None, loras[name], 1.0, 0.0)
    return model, [encode(loaded, layout.whole())], [encode(loaded, "")]


def hooked(loaded, layout, loras, *, masks: bool = True):
    """A pass per LoRA: in its mask with its own prompt, or over the whole picture with the prompt that names all (composite)."""
    import comfy.hooks

    positive, negative = [], []
    for index, name in enumerate(layout.names):
        hooks = comfy.hooks.create_hook_lora(lora=loras[name], strength_model=1.0, strength_clip=0.0)
        options = {"hooks": hooks} | ({"mask": layout.mask(index), "mask_strength": 1.0, "set_area_to_bounds": False} if masks else {})
        positive.append(encode(loaded, layout.prompt(index) if masks else layout.whole(), **options))
        negative.append(encode(loaded, "", **options))
    return loaded.model, positive, negative


def composite(loaded, layout, loras):
    return hooked(loaded, layout, loras, masks=False)


def couple(loaded, layout, loras):
    model, _ = apply(loaded.model, layout.regions({}, prompts=layout.prompt), loaded.clip)
    return model, [encode(loaded, layout.whole())], [encode(loaded, "")]


def noise_of(loaded, seeds: Sequence[int], size: int) -> torch.Tensor:
    side = size // loaded.vae.spacial_compression_decode()
    return torch.cat([torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def sample(
    loaded, model, positive, negative, seeds: Sequence[int], steps: int = STEPS, *, size: int = SIZE, last_step: int | None = None
) -> torch.Tensor:
    """Pictures (N, H, W, 3) of the seeds; with last_step the latents (N, 4, h, w) after so many of the steps."""
    import comfy.sample

    noise = noise_of(loaded, seeds, size)
    latent = comfy.sample.sample(
        model,
        noise,
        steps,
        CFG,
        "euler",
        "normal",
        positive,
        negative,
        torch.zeros_like(noise),
        last_step=last_step,
        disable_pbar=True,
        seed=0,
    )
    return loaded.vae.decode(latent) if last_step is None else latent


def identities(layout: Layout, readings: Sequence[Reading], only: Sequence[int] | None = None) -> list[bool]:
    """For each picture and region: whether the surest object in it is the region's character."""
    found = []
    for reading in readings:
        for index in range(layout.k) if only is None else only:
            inside = [seen for seen in reading.objects if layout.of(seen.x, seen.y) == index]
            found.append(surest(Reading(0.0, "", 0.0, inside)) == layout.names[index])
    return found


def strays(layout: Layout, readings: Sequence[Reading]) -> list[float]:
    """For each picture: characters outside of their own region, as a share of the regions."""
    return [
        sum(seen.kind in layout.names and layout.names[layout.of(seen.x, seen.y)] != seen.kind for seen in reading.objects) / layout.k
        for reading in readings
    ]
