"""Which words a position of the picture reads, where several things are asked for at once.

Every form is a bias on the logits of attention between positions and words, made of these logits themselves; nothing is trained and
nothing differentiated.

Suppression (Tunanyan et al., Multi-Concept T2I-Zero, arXiv 2310.07419, cross-token non-maximum suppression): of the words that compete at
a position only the one whose smoothed map is highest there is read. Published, every word is for itself and what the others would have got
goes to nobody; here the words of a group also win together, and shares add up to 1 again.

Dense (Kim et al., DenseDiffusion, arXiv 2308.12964, eq. 4-6): words are drawn to the places that they belong to. With R a place's share of
a position, S its share of the picture, t what is left of sampling and w a weight,

    bias = w (1 - S) t^5 (R (highest - logit) - (1 - R) (logit - lowest)),    highest, lowest: of the position's own logits,

which moves each logit towards R highest + (1 - R) lowest, and never beyond either where w <= 1.

Correction by similarity (T2I-Zero, too): a word's embedding moves towards the words near it that are like it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SHUT = -1e4  # exp() of it is exactly 0, and attentions that work in parts make no NaN of it, as they do of -inf
SIGMA = 0.5  # of the blur over maps, in positions
POWER = 5


def smoothed(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (B, n, T) over a grid (height, width), blurred by 3 x 3 positions; edges repeat."""
    side = torch.exp(-(torch.arange(-1.0, 2.0, device=maps.device) ** 2) / (2 * SIGMA**2))
    kernel = torch.outer(side, side).to(maps)
    planes = F.pad(maps.unflatten(-1, grid).flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    return F.conv2d(planes, (kernel / kernel.sum())[None, None]).reshape(maps.shape)


def group_maps(shares: Tensor, members: Tensor) -> Tensor:
    """(B, G, T): the mean over each group's words of shares (B, T, n). members (B or 1, G, n) 0 or 1."""
    return members.to(shares) @ shares.transpose(1, 2) / members.sum(-1, keepdim=True).clamp(min=1).to(shares)


def losing(maps: Tensor, members: Tensor) -> Tensor:
    """(B, T, n) bool: the words of groups at each position whose map (B, G, T) is not the highest there. A word of several groups loses
    where all of them do; where maps are equal the first wins; a group without words competes for nothing.
    """
    there = members.any(-1)
    won = F.one_hot(maps.masked_fill(~there[..., None], -torch.inf).argmax(1), maps.shape[1]).to(maps)
    member = members.to(maps)
    return ((won @ member) == 0) & members.any(1)[:, None]


def shut(lost: Tensor, share: float | Tensor) -> Tensor:
    """The bias that takes a share of what words are read by, where they lose: (B, T, n)."""
    share = torch.as_tensor(share, device=lost.device)
    return torch.where(lost, torch.log1p(-share).clamp(min=SHUT), 0.0)


def sink(logits: Tensor, lost: Tensor, share: float | Tensor) -> Tensor:
    """(B, heads, T, 1): the logit of a word of no value that takes what losing words no longer get, so that the others get no more than
    they did. logits (B, heads, T, n).
    """
    taken = torch.where(lost[:, None], logits.float(), -torch.inf).logsumexp(-1, keepdim=True)
    return (taken + torch.as_tensor(share, device=logits.device).log()).clamp(min=SHUT)


def dense(logits: Tensor, members: Tensor, inside: Tensor, weight: float | Tensor) -> Tensor:
    """(B, heads, T, n). inside (B or 1, G, T): each group's share of every position; weight: w t^5. A word of several groups belongs to
    the places of all of them, a word of none is left alone.
    """
    members, inside = members.to(logits), inside.to(logits)
    there = (inside.transpose(1, 2) @ members).clamp(max=1)[:, None]
    size = inside.mean(-1, keepdim=True)
    bound = members.amax(1)[:, None, None]
    least = torch.where(members > 0, size, torch.inf).amin(1)[:, None, None]
    high, low = logits.amax(-1, keepdim=True), logits.amin(-1, keepdim=True)
    amount = torch.where(bound > 0, 1 - least.clamp(max=1), 0.0) * weight
    return amount * (there * high + (1 - there) * low - logits)


def alike(rows: Tensor, words: Tensor, share: float, window: int, least: float) -> Tensor:
    """Rows (n, d) of a prompt of which those of `words` (n,) bool moved by a share towards the words up to `window` rows away that are
    like them: weights are cosines of at least `least`, the word's own among them, and add up to 1.
    """
    at = torch.arange(len(rows), device=rows.device)
    unit = F.normalize(rows.float(), dim=-1)
    near = (at[:, None] - at).abs() <= window
    weights = torch.where(near & words & words[:, None], unit @ unit.t(), 0.0)
    weights = torch.where(weights >= least, weights, 0.0)
    total = weights.sum(-1, keepdim=True)
    moved = weights / total.clamp(min=1e-12) @ rows.float()
    return torch.where(words[:, None] & (total > 0), rows + share * (moved - rows), rows).to(rows.dtype)
