"""Where a module's rows lie: on the picture at some halving of it, on the text, on both, or nowhere (one row for all of the picture)."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .families import Family, row_of

# Kinds of rows. MAP: positions of a convolution's output; IMAGE: tokens of the picture; TEXT: tokens of the prompt; JOINT: text, then
# picture; VECTOR: no tokens, the same for all of the picture.
MAP, IMAGE, TEXT, JOINT, VECTOR = "map", "image", "text", "joint", "vector"


class Site(NamedTuple):
    """What a module's output rows stand for. level: how often the latent was halved before them."""

    kind: str
    level: int = 0


# What was found out about a model's structure, for the runs to come.
_known: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Site]] = weakref.WeakKeyDictionary()
_attentions: weakref.WeakKeyDictionary[torch.nn.Module, tuple[list[str], list[str]]] = weakref.WeakKeyDictionary()


def sites(model, names: Iterable[str]) -> dict[str, Site]:
    """The site of each module of a host model, by its name from there ("diffusion_model....")."""
    names, known = list(names), _known.setdefault(model.diffusion_model, {})
    missing = [name for name in names if name not in known]
    if missing:
        family = row_of(model)
        levels = _unet_levels(model.diffusion_model) if _is_unet(model) else {}
        known |= {name: _site(model, family, levels, name) for name in missing}
    return {name: known[name] for name in names}


def attentions(model) -> tuple[list[str], list[str]]:
    """Every attention of a UNet's picture to itself and to the text, by name."""
    if not _is_unet(model):
        return [], []
    if model.diffusion_model not in _attentions:
        names = [name for name, _ in model.named_modules()]
        _attentions[model.diffusion_model] = tuple([name for name in names if name.endswith(end)] for end in (".attn1", ".attn2"))
    return _attentions[model.diffusion_model]


def patch_level(model) -> int:
    """How often the latent is halved into the tokens of a model that cuts it into patches."""
    return model.diffusion_model.patch_size.bit_length() - 1


def _is_unet(model) -> bool:
    return hasattr(model.diffusion_model, "input_blocks")


def _site(model, family: Family, levels: dict[str, int], name: str) -> Site:
    inner = name.removeprefix("diffusion_model.")
    kind = next((kind for kind, pattern in family.rows.items() if re.search(pattern, inner)), IMAGE)
    if kind in (TEXT, VECTOR):
        return Site(kind)
    level = next((level for prefix, level in levels.items() if inner.startswith(prefix)), 0) if levels else patch_level(model)
    return Site(MAP if isinstance(model.get_submodule(name), torch.nn.Conv2d) else kind, level)


def _unet_levels(unet) -> dict[str, int]:
    """Level of each part of a UNet by the beginning of its name, the longest first: resampling convolutions write to the next one's."""
    levels, level = {}, 0
    for part in ("input_blocks", "middle_block", "output_blocks"):
        blocks = enumerate(getattr(unet, part)) if part != "middle_block" else [(None, unet.middle_block)]
        for index, block in blocks:
            prefix = f"{part}." if index is None else f"{part}.{index}."
            levels[prefix] = level
            for at, module in enumerate(block):
                step = {"Downsample": 1, "Upsample": -1}.get(type(module).__name__, 0)
                if step:
                    level += step
                    levels[f"{prefix}{at}."] = level
    return dict(sorted(levels.items(), key=lambda item: -len(item[0])))


class Pyramid:
    """Masks (K, height, width) over a latent, at every halving of it. The sum over K at a place stays what it was, whatever the level."""

    def __init__(self, masks: torch.Tensor):
        self._levels = [masks]

    def at(self, level: int) -> torch.Tensor:
        """(K, h, w): cells of odd edges count only what lies inside, as strided convolutions and patches with padding have them."""
        while len(self._levels) <= level:
            self._levels.append(F.avg_pool2d(self._levels[-1][:, None], 2, ceil_mode=True, count_include_pad=False)[:, 0])
        return self._levels[level]

    def rows(self, site: Site, text: torch.Tensor) -> torch.Tensor:
        """The masks on a site's rows: (K, h, w) for maps, (K,) area shares for vectors, (K, rows) otherwise; `text` (tokens,) stands for
        those of the text.
        """
        if site.kind == MAP:
            return self.at(site.level)
        if site.kind == VECTOR:
            return self.at(0).mean((1, 2))
        words = text.expand(len(self.at(0)), -1)
        if site.kind == TEXT:
            return words
        picture = self.at(site.level).flatten(1)
        return torch.cat([words, picture], 1) if site.kind == JOINT else picture
