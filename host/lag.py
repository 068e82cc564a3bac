"""Localized attention-guided sampling (LAG), of Personalized Residuals (Ham et al., CVPR 2024, arXiv 2405.12978): a residual acts where the
model attends to its words.

In a UNet's attention block the cross-attention runs before the layer `proj_out` that the residual lies beside, so that the mask is there in
the same call. With a_i the attention of block i's positions to the subject's words,

    M_i = 1[a_i > median(a_i)],   y = W x + M_i s B_i A_i x

The median turns half of all positions on, however small the subject is; Otsu's cut goes by the map's own histogram. The masks are those of
`localize`, in the scope of a block: of words the last row, and what is not published, the positive prompt's for all conditions of a call.
Models without cross-attention take the maps of the steps before.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..ops.masks import pool
from ..ops.regions import Live
from . import capture
from .localize import BLOCK, MEDIAN, OTSU, LocalizeEffect, Sought, layers_of
from .maps import Bound
from .places import LivePlace

CUTS = MEDIAN, OTSU


def localized(model, modules: Iterable[str], bound: Bound, length: int, cut: str, mask: torch.Tensor | None) -> LocalizeEffect:
    """What finds the words of a prompt of so many rows for a residual on `modules`, to be attached beside it, whose place is `place` of it.
    mask (height, width): nothing outside of it.
    """
    names = capture.layers_of(model, capture.ALL)
    blocks = tuple(name.removesuffix("proj_out") for name in modules if name.endswith(".proj_out"))
    own = [name for name in names if name.startswith(blocks)] if blocks else []
    live = Live(phrase=bound.phrase, threshold=cut, scope=BLOCK if own else "step", smoothing=0.0 if own else 0.5, start=0.0, until=1.0)

    def share_out(height: int, width: int, found: torch.Tensor) -> torch.Tensor:
        return found if mask is None else found * pool(mask[None].float(), height, width).to(found.device)

    return LocalizeEffect(model, own or layers_of(model), [Sought(bound.phrase, 0, bound, (), live)], length, share_out)


def place(finder: LocalizeEffect) -> LivePlace:
    """Where the residual acts."""
    return LivePlace(finder.source, 0)
