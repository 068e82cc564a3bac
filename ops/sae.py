"""Sparse autoencoders: a vector as a sum of few directions out of many.

    x' = (x - mean) / std                    where the file was trained on normalised vectors
    a  = W_enc (x' - b_dec) + b_enc          `center`: whether b_dec is taken from the vector first
    z  = act(a)                              the code: n numbers, few of them not 0, none below 0
    x^ = (W_dec^T z + b_dec) std + mean

Activations, as they are meant once training is over: `topk` keeps the k greatest of each vector (Gao et al., arXiv 2406.04093);
`batch_topk` keeps what exceeds the threshold that training found, and without one does as topk (Bussmann et al., arXiv 2412.06410);
`jumprelu` has a threshold for each latent (Rajamanoharan et al., arXiv 2407.14435); `relu` keeps what is positive.

To change a vector, add what a change of its code is worth (`delta`) and do not put x^ in its place: nothing changed is then x itself, and
what the autoencoder cannot say stays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import embedding_bag, linear

TOPK, BATCH_TOPK, JUMPRELU, RELU = "topk", "batch_topk", "jumprelu", "relu"
ACTIVATIONS = (TOPK, BATCH_TOPK, JUMPRELU, RELU)
HELD = 2**25  # numbers of pre-activations held at a time by `sparse`: 128 MB in float32


class SAE(NamedTuple):
    """A sparse autoencoder of vectors of d numbers with n latents. Nothing here writes to its tensors.

    W_enc (n, d), b_enc (n,), W_dec (n, d): row i is latent i's direction, of any length; b_dec (d,)
    k          how many latents of a vector are kept; 0 where that has no meaning
    threshold  (n,) or a single number that a pre-activation must exceed; None where the kind has none
    mean, std  (d,) of the vectors as they are; None: 0 and 1

    Vectors and codes may have any dimensions before the last. Matrices are multiplied in the weights' type with sums in float32; all else,
    and what comes out, is float32, or float64 for vectors that are.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    activation: str = TOPK
    k: int = 0
    threshold: torch.Tensor | None = None
    center: bool = True
    mean: torch.Tensor | None = None
    std: torch.Tensor | None = None

    @property
    def n(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d(self) -> int:
        return self.W_enc.shape[1]

    @property
    def counts(self) -> bool:
        """Whether it keeps a number of latents, rather than those beyond a threshold."""
        return self.activation == TOPK or (self.activation == BATCH_TOPK and self.threshold is None)

    def to(self, device=None, dtype: torch.dtype | None = None) -> SAE:
        """On a device, with the two matrices in a type of less or more digits. Biases, thresholds and norms keep theirs."""
        moved = {name: value.to(device) for name, value in self._asdict().items() if isinstance(value, torch.Tensor)}
        moved |= {name: moved[name].to(dtype) for name in ("W_enc", "W_dec")}
        return self._replace(**moved)

    def pre(self, x: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """(..., n) pre-activations of vectors (..., d); (..., m) of the latents `indices` (m,) alone, which costs m / n of it."""
        x = self.normalised(x)
        if self.center:
            x = x - self.b_dec.to(x)
        weight, bias = (self.W_enc, self.b_enc) if indices is None else (self.W_enc[indices], self.b_enc[indices])
        return _product(x, weight) + bias.to(x)

    def act(self, pre: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Codes of pre-activations, of the same shape. Of chosen latents alone (`indices`, as in `pre`) only where a threshold decides,
        because to be among the k greatest is to be compared with all of them: ValueError.
        """
        if self.counts:
            if indices is not None:
                raise ValueError(f"'{self.activation}' compares all latents of a vector: codes of some of them need the rest. Encode all.")
            values, chosen = pre.topk(self.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, chosen, values.clamp_min(0))
        positive = pre.clamp_min(0)
        if self.threshold is None:
            return positive
        threshold = self.threshold.to(pre)
        if indices is not None and threshold.ndim:
            threshold = threshold[indices]
        return torch.where(pre > threshold, positive, 0)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(..., n) codes of vectors (..., d)."""
        return self.act(self.pre(x))

    def sparse(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of vectors (..., d) as values (..., k) and the latents' numbers (..., k), in no order, without ever holding the codes of
        all vectors at once. Where no number of latents is kept, k is that of the vector with the most; the others are filled up with zeros.
        """
        shape, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
        parts = [self._sparse(part) for part in rows.split(max(1, HELD // self.n))]
        width = max(values.shape[1] for values, _ in parts)
        filled = [[torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in part] for part in parts]
        values, indices = (torch.cat(tensors).reshape(*shape, width) for tensors in zip(*filled, strict=True))
        return values, indices

    def _sparse(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.counts:
            values, indices = self.pre(rows).topk(self.k, dim=-1, sorted=False)
            return values.clamp_min(0), indices
        codes = self.encode(rows)
        most = int((codes > 0).sum(-1).max()) if len(codes) else 1
        return codes.topk(max(1, most), dim=-1, sorted=False)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(..., d) vectors of codes (..., n)."""
        return self.restored(_product(z, self.W_dec.T) + self.b_dec.to(_wide(z)))

    def decode_sparse(self, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """(..., d) vectors of codes as `sparse` gives them."""
        rows = values.reshape(values.shape[:-1].numel(), values.shape[-1])
        added = embedding_bag(indices.reshape(rows.shape), self.W_dec, mode="sum", per_sample_weights=rows.to(self.W_dec.dtype))
        added = added.to(_wide(values)).reshape(*values.shape[:-1], self.d)
        return self.restored(added + self.b_dec.to(added))

    def directions(self, indices: torch.Tensor) -> torch.Tensor:
        """(m, d) what one unit of each latent of `indices` (m,) adds to a vector as it is, float32."""
        rows = self.W_dec[indices].float()
        return rows if self.std is None else rows * self.std.to(rows)

    def readers(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """((m, d) rows, (m,) bias) that read latents `indices` (m,) off vectors as they are: <x, row> + bias is their pre-activation, with
        norms and centring made part of both. Folded in float64, given in float32.
        """
        rows, bias = self.W_enc[indices].double(), self.b_enc[indices].double()
        if self.center:
            bias = bias - rows @ self.b_dec.double()
        rows = rows if self.std is None else rows / self.std.double()
        bias = bias if self.mean is None else bias - rows @ self.mean.double()
        return rows.float(), bias.float()

    def delta(self, change: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """(..., d) what a change of the codes (..., n) adds to a vector as it is; with `indices` (m,) a change (..., m) of these alone."""
        weight = self.W_dec if indices is None else self.W_dec[indices]
        added = _product(change, weight.T)
        return added if self.std is None else added * self.std.to(added)

    def normalised(self, x: torch.Tensor) -> torch.Tensor:
        """x' (..., d) of vectors as they are."""
        x = x.to(_wide(x))
        x = x if self.mean is None else x - self.mean.to(x)
        return x if self.std is None else x / self.std.to(x)

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """Vectors as they are from x' (..., d)."""
        x = x if self.std is None else x * self.std.to(x)
        return x if self.mean is None else x + self.mean.to(x)


def kept_of_batch(pre: torch.Tensor, k: int) -> torch.Tensor:
    """Codes (B, n) that keep the k B greatest pre-activations (B, n) of all vectors together: BatchTopK as it trains."""
    flat = pre.reshape(-1)
    values, chosen = flat.topk(min(k * len(pre), flat.numel()), sorted=False)
    return torch.zeros_like(flat).scatter(0, chosen, values.clamp_min(0)).reshape(pre.shape)


def prefixes(z: torch.Tensor, W_dec: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """What the first sizes[0], sizes[0] + sizes[1], ... latents add up to, each (B, d) without a bias, from codes z (B, n): each is the one
    before and its own group (Matryoshka: Bussmann et al., arXiv 2503.17547). The last is what all of them do.
    """
    sums, total = [], None
    for codes, rows in zip(z.split(sizes, dim=-1), W_dec.split(sizes), strict=True):
        own = codes @ rows
        total = own if total is None else total + own
        sums.append(total)
    return sums


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x weight^T in the weight's type, in x's or in float32 where the weight has half of it; as float32 or float64."""
    kind = weight.dtype if weight.element_size() < 4 else torch.promote_types(_wide(x), weight.dtype)
    return linear(x.to(kind), weight.to(kind)).to(_wide(x))
