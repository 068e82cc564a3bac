"""Where words are in a picture: a model's attention to them, and masks made of it.

Cross-attention of UNets (DAAM, arXiv 2210.04885): of softmax(q k^T / sqrt(d)) the columns of the words, averaged over heads, layers and
steps. Only the columns are kept, and rows are worked through in parts, so that no whole map exists at any time; the model's own attention
stays the fused kernel that it is.

Joint attention (ConceptAttention, arXiv 2502.04320): concepts travel beside the text through its own weights. They attend to the picture
and to one another, and nothing attends to them. A concept's map is the product of what the attention gave it and the picture's positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 2**25  # logits in one part of the rows
FLOOR = 1e-12
ROUNDS = 10
RIDGE = 2.0  # of colours in units of their own spread
ALIKE = 1e-3


def columns(q: Tensor, k: Tensor, first: int = 0, past: int | None = None, bias: Tensor | None = None) -> Tensor:
    """(B, T, past - first): columns first ... past - 1 of softmax(q k^T / sqrt(d) + bias), averaged over heads, in float32. The softmax is
    over all keys. q (B, heads, T, d), k (B, heads, n, d); bias broadcasts to (B, heads, T, n).
    """
    q = q * q.shape[-1] ** -0.5
    k = k.transpose(-1, -2)
    rows = max(1, AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[-1]))
    parts = []
    for at in range(0, q.shape[2], rows):
        logits = (q[:, :, at : at + rows] @ k).float()
        if bias is not None:
            logits = logits + (bias if bias.shape[-2] == 1 else bias[..., at : at + rows, :])
        parts.append(logits.softmax(-1)[..., first:past].mean(1))
    return torch.cat(parts, 1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d) -> (B, heads, T, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def concept_attention(q: Tensor, k: Tensor, v: Tensor, picture_k: Tensor, picture_v: Tensor) -> Tensor:
    """(B, C, heads * d): what C concepts get from attention to the picture and to one another. q, k, v are theirs, (B, heads, C, d);
    picture_k, picture_v (B, heads, T, d).
    """
    read = F.scaled_dot_product_attention(q, torch.cat([picture_k, k], 2), torch.cat([picture_v, v], 2))
    return read.transpose(1, 2).flatten(2)


def output_scores(picture: Tensor, concepts: Tensor) -> Tensor:
    """(B, T, C): products of attention outputs, all heads behind one another: picture (B, T, heads * d), concepts (B, C, heads * d)."""
    return picture.float() @ concepts.float().transpose(-1, -2)


def fold(maps: Tensor, length: int) -> Tensor:
    """(..., n) -> (..., length): a prompt that was repeated to n rows shares its attention among the repeats. Raises ValueError where n is
    no multiple of the prompt's rows.
    """
    if maps.shape[-1] % length:
        raise ValueError(f"{maps.shape[-1]} rows are no repeats of {length}")
    return maps.unflatten(-1, (-1, length)).sum(-2)


def relative(maps: Tensor) -> Tensor:
    """Maps (..., h, w) as multiples of their own mean: layers and words then weigh alike, however much attention they get in all."""
    return maps / maps.mean((-2, -1), keepdim=True).clamp(min=FLOOR)


def log_relative(maps: Tensor) -> Tensor:
    """Maps (..., h, w) as logarithms over their own geometric mean: what places differ by before the softmax. A sharp map and a flat one
    then compete by where they are higher than themselves, and not by how sharp they are.
    """
    logs = maps.clamp(min=FLOOR).log()
    return logs - logs.mean((-2, -1), keepdim=True)


def balanced(logs: Tensor) -> Tensor:
    """Logarithms of K maps (N, K, h, w), each raised or lowered throughout until all have the same share of the picture in a softmax over
    them (one side of Sinkhorn's iteration, 1967), by offsets whose mean is 0. FreeFuse (arXiv 2510.23515) balances its masks for the same
    reason: a map that falls off to both sides competes at a disadvantage.
    """
    offsets = torch.zeros_like(logs[..., :1, :1])
    for _ in range(ROUNDS):
        offsets = offsets - (logs + offsets).softmax(1).mean((-2, -1), keepdim=True).clamp(min=FLOOR).log()
    return logs + (offsets - offsets.mean(1, keepdim=True))


def led(maps: Tensor, pictures: Tensor) -> Tensor:
    """Maps (N, K, h, w) along the edges of pictures (N, h, w, channels), between their own median and peak.

    What is high in a map has a colour, what is low in all maps has the background's. How far a position's colour is on the way from the one
    to the other, across what the background varies by itself (Fisher's linear discriminant, 1936), is its share: 0 ... 1. A map becomes
    that share times the square root of its height; one whose colour is the background's stays as it is, and so does all that lies below a
    map's median.
    """
    high = heights(maps).flatten(2)
    colours = pictures.to(maps).flatten(1, 2)
    colours = (colours - colours.mean(1, keepdim=True)) / colours.std(1, keepdim=True).clamp(min=1e-6)
    behind = (1 - high.amax(1, keepdim=True)) ** 2
    behind = behind / behind.sum(-1, keepdim=True).clamp(min=FLOOR)
    apart = colours - behind @ colours
    spread = (behind.transpose(1, 2) * apart).transpose(1, 2) @ apart
    own = (high**4 @ apart) / (high**4).sum(-1, keepdim=True).clamp(min=FLOOR)
    across = torch.linalg.solve(spread + RIDGE * torch.eye(spread.shape[-1]).to(spread), own.transpose(1, 2))
    far = (own * across.transpose(1, 2)).sum(-1, keepdim=True)
    share = ((apart @ across).transpose(1, 2) / far.clamp(min=FLOOR)).clamp(0, 1)
    low, peak = maps.flatten(2).median(-1, keepdim=True).values, maps.flatten(2).amax(-1, keepdim=True)
    below = (maps.flatten(2) - low).clamp(max=0)
    return (low + below + (peak - low) * torch.where(far > ALIKE, share * high.sqrt(), high)).view_as(maps)


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """(N, K, h, w) -> (N, K, height, width): bicubic, as DAAM has it, and nowhere below a map's own lowest value."""
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps, size=(height, width), mode="bicubic", align_corners=False).clamp(min=maps.amin((-2, -1), keepdim=True))


def heights(maps: Tensor) -> Tensor:
    """Maps (..., h, w) as shares of the way from their median, which stands for the background, up to their peak: 0 ... 1. A map without a
    peak is 0 throughout.
    """
    flat = maps.flatten(-2)
    low = flat.median(-1).values[..., None, None]
    span = flat.amax(-1)[..., None, None] - low
    return torch.where(span > FLOOR, (maps - low) / span.clamp(min=FLOOR), torch.zeros_like(maps)).clamp(0, 1)


def over_quantile(maps: Tensor, quantile: float) -> Tensor:
    """bool: of each map (..., h, w) the highest values, the share 1 - quantile of all; nothing of one that is the same all over."""
    flat = maps.flatten(-2)
    ordered = flat.sort(-1).values
    at = math.ceil(quantile * flat.shape[-1]) - 1
    over = maps > ordered[..., at, None, None] if at >= 0 else torch.ones_like(maps, dtype=torch.bool)
    return over & (ordered[..., -1] > ordered[..., 0])[..., None, None]


def over_otsu(maps: Tensor) -> Tensor:
    """bool: each map (..., h, w) cut where the variance between the two parts is largest (Otsu 1979), over all of its values."""
    ordered = maps.flatten(-2).double().sort(-1).values
    count = ordered.shape[-1]
    below = torch.arange(1, count, device=maps.device)
    sums = ordered.cumsum(-1)
    low, high = sums[..., :-1] / below, (sums[..., -1:] - sums[..., :-1]) / (count - below)
    between = below * (count - below) * (high - low) ** 2
    cut = ordered.gather(-1, between.argmax(-1, keepdim=True))[..., None]
    return maps.double() > cut


def winners(maps: Tensor, others: Tensor | None = None) -> Tensor:
    """bool (N, K, h, w): where each of K maps is the highest; `others` (N, M, h, w) compete and win nothing. Ties go to the first."""
    everyone = maps if others is None else torch.cat([maps, others], 1)
    best = everyone.argmax(1, keepdim=True)
    return best == torch.arange(maps.shape[1], device=maps.device)[:, None, None]


def largest(masks: Tensor) -> Tensor:
    """bool (..., h, w): of each mask its largest part whose cells touch side by side; the first of equals."""
    flat = masks.flatten(0, -3).bool().cpu()
    return torch.stack([_largest(mask) for mask in flat]).view(masks.shape).to(masks.device) if len(flat) else masks.bool()


def _largest(mask: Tensor) -> Tensor:
    """Runs of each row are joined with the runs of the row above that they touch."""
    edges = F.pad(mask.to(torch.int8), (1, 1)).diff(dim=1)
    starts, stops = (torch.nonzero(edges == sign).tolist() for sign in (1, -1))
    runs = [(row, first, past) for (row, first), (_, past) in zip(starts, stops, strict=True)]
    parent = list(range(len(runs)))

    def root(at: int) -> int:
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return at

    above = 0
    for at, (row, first, past) in enumerate(runs):
        while above < at and (runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] <= first)):
            above += 1
        other = above
        while other < at and runs[other][0] == row - 1 and runs[other][1] < past:
            one, two = root(at), root(other)
            parent[max(one, two)] = min(one, two)
            other += 1
    sizes: dict[int, int] = {}
    for at, (_, first, past) in enumerate(runs):
        sizes[root(at)] = sizes.get(root(at), 0) + past - first
    kept = torch.zeros_like(mask)
    best = max(sizes, key=lambda part: (sizes[part], -part), default=None)
    for at, (row, first, past) in enumerate(runs):
        if root(at) == best:
            kept[row, first:past] = True
    return kept


def dilated(masks: Tensor, cells: int) -> Tensor:
    """Masks (N, K, h, w) grown by so many cells to each side, corners included."""
    if cells <= 0 or not masks.numel():
        return masks
    grown = F.max_pool2d(masks.float(), (2 * cells + 1, 1), 1, (cells, 0))
    return F.max_pool2d(grown, (1, 2 * cells + 1), 1, (0, cells)).to(masks.dtype)
