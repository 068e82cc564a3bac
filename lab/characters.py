"""The six characters that LoRAs teach the lab's models: the word of each, its files, scenes that show it, and how often it is drawn."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from ..host import lab as host_lab
from .captions import COMPLETE, Wording, Writer, write_captions
from .eye import Eye, Reading, cell_of
from .measure import Asked, ask, draw, hits, placed_in_words
from .scenes import BACKGROUNDS, CELLS, KINDS, SHAPES, Scenes, cat_scenes, sample_scenes

# Each word is one of captions.RESERVED_WORDS, which mean nothing to the models.
WORDS = {"robot": "sks", "cat": "ohwx", "snowman": "zwx", "alien": "qpk", "mushroom": "vbn", "penguin": "wqt"}


def file_of(name: str, kind: str) -> str:
    """The LoRA file of a character for a lab model, as the host lists it."""
    return f"concept_lab/characters/{kind}/{name}.safetensors"


def path_of(name: str, kind: str):
    """Where that file ships."""
    return host_lab.LORAS / file_of(name, kind)


def show(name: str, scenes: Scenes) -> Scenes:
    """The scenes with every character in them turned into this one."""
    return replace(scenes, kind=torch.where(scenes.kind >= len(SHAPES), KINDS.index(name), scenes.kind))


CROWDED = 96  # pixels a side from which a lesson may hold more than two objects


def lessons(name: str, n: int, *, size: int, generator: torch.Generator) -> Scenes:
    """n scenes to learn a character from: alone in half of them, beside ordinary objects in two of ten, the rest without it, so that
    the words of ordinary objects keep their meaning. Larger canvases hold up to six objects.
    """
    crowd = 0 if size < CROWDED else n // 3

    def holding(wanted: int, least: int, **settings) -> Scenes:
        drawn = sample_scenes(8 * wanted, height=size, width=size, generator=generator, **settings)
        characters = ((drawn.kind >= len(SHAPES)) & drawn.present()).sum(1)
        return drawn[torch.nonzero((characters <= 1) & (characters >= least)).flatten()[:wanted]]

    parts = [holding(n - crowd, 0, counts={1: 0.7, 2: 0.3}, characters=0.7)]
    if crowd:
        parts.append(holding(crowd, 1, counts={k: 1.0 for k in (3, 4, 5, 6)}, characters=0.3))
    return show(name, cat_scenes(parts))


def ask_for(name: str, n: int, *, size: int, seed: int, wording: Wording = COMPLETE, plain: bool = True) -> Asked:
    """n scenes of the character alone, at places that have words, and captions that name it by its word."""
    scenes = sample_scenes(8 * n, height=size, width=size, characters=1.0, plain=plain, generator=torch.Generator().manual_seed(seed))
    scenes = show(name, scenes[torch.nonzero(placed_in_words(scenes)).flatten()[:n]])
    captions, _ = write_captions(scenes, Writer(wording, random.Random(seed)), {name: WORDS[name]})
    return Asked(scenes, captions)


def surest(reading: Reading) -> str:
    """What the surest object of a picture is; empty where none is seen."""
    return reading.objects[0].kind if reading.objects else ""


def drawn_hits(name: str, asked: Asked, readings: list[Reading]) -> dict[str, list[bool]]:
    """Per picture of the character alone: identity (the surest object is it), alone (nothing else is seen), place, background, valid."""
    scenes, right = asked.scenes, {key: [] for key in ("identity", "alone", "place", "background", "valid")}
    columns, rows, backgrounds = scenes.column(), scenes.row(), scenes.background_word()
    for i, reading in enumerate(readings):
        cell = CELLS[0][int(columns[i, 0])], CELLS[1][int(rows[i, 0])]
        right["identity"].append(surest(reading) == name)
        right["alone"].append(len(reading.objects) == 1)
        right["place"].append(any(cell_of(o.x / scenes.width, o.y / scenes.height) == cell for o in reading.objects[:1]))
        right["background"].append(reading.background_word() == BACKGROUNDS[int(backgrounds[i])])
        right["valid"].append(reading.valid > 0.5)
    return right


def with_lora(model, path):
    """The model with a LoRA file on it, as the host's own loader puts it there."""
    import comfy.sd
    import comfy.utils

    return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path), safe_load=True), 1.0, 0.0)[0]


def measure(name: str, lab, model, eye: Eye, *, n: int, size: int) -> dict[str, float]:
    """Shares of n pictures: `drawn_hits` where the character's word asks for it. And of half as many where an ordinary object is asked
    for: the right shape, the right shape in the right colour (bind), and the character instead (mistaken).
    """
    asked = ask_for(name, n, size=size, seed=700 + size)
    right = drawn_hits(name, asked, eye.read(draw(lab, list(asked), size=size, seed=7000, model=model)))
    ordinary = ask(n // 2, objects=1, size=size, seed=800 + size, plain=True)
    readings = eye.read(draw(lab, list(ordinary), size=size, seed=8000, model=model))
    kept = hits(ordinary, readings)
    right |= {"ordinary shape": kept["shapes"], "ordinary bind": kept["bind"], "mistaken": [surest(one) == name for one in readings]}
    return {key: sum(values) / len(values) for key, values in right.items()}
