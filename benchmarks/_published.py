"""Published ways to keep several LoRAs in their places without drawing masks, or with them, built short from their descriptions, so that
`bench localize` can set them beside ours. They act by forward hooks for as long as one picture is sampled, on the lab's models, whose
canvases are square.

    Lag        Personalized Residuals (arXiv 2405.12978): in every block, where the block's own attention to the concept is above its median
    freefuse   FreeFuse (arXiv 2510.23515): masks from the first steps without LoRA, the highest of the concepts at every place, then frozen
    Conductor  Concept Conductor (arXiv 2408.03632): a path of the whole model for each concept, their attention outputs mixed by masks

What is left out is said where each of them is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from ..host import adapters, capture, maps
from ..host.families import family_of
from ..host.words import find
from ..nodes.maps import Capture
from ..ops.maps import columns, relative, split_heads, winners
from ..ops.masks import pool

ATTENTION = (".attn1", ".attn2")


def rows_of(loaded, text: str, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Each word's rows in a prompt."""
    return [find(loaded.clip, family_of(loaded.model.model), text, word) for word in words]


class Adapted:
    """Several LoRAs beside a model's layers while its context lasts. gate(index, name, module, output): what each one's part is
    multiplied by, on every layer.
    """

    def __init__(self, model, loras: Sequence[Mapping[str, torch.Tensor]], gate: Callable):
        self.network, self.gate = model.model, gate
        self.parts = [adapters.place(model, lora, str(index)).parts for index, lora in enumerate(loras)]

    @contextmanager
    def on(self, more: Mapping[str, Callable] | None = None, before: Mapping[str, Callable] | None = None):
        """more, before: further hooks, behind and before modules."""
        handles = []
        try:
            for name, hook in (before or {}).items():
                handles.append(self.network.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
            for name in dict.fromkeys(name for parts in self.parts for name in parts):
                handles.append(self.network.get_submodule(name).register_forward_hook(self._beside(name)))
            for name, hook in (more or {}).items():
                handles.append(self.network.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _beside(self, name: str) -> Callable:
        def hook(module, args, output):
            for index, parts in enumerate(self.parts):
                share = self.gate(index, name, output)
                if name not in parts or share is None:
                    continue
                for one in parts[name].factors:
                    down, up = one.down.to(output), one.up.to(output)
                    output = output + one.scale * self._through(module, args[0], down, up) * share
            return output

        return hook

    @staticmethod
    def _through(module, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if down.ndim == 2:
            return F.linear(F.linear(x, down), up)
        return F.conv2d(F.conv2d(x, down, None, module.stride, module.padding), up[..., None, None])


def spread_out(mask: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A mask (rows, positions of a square) in the shape that multiplies an output: tokens, a map, or a vector, which gets its area."""
    if output.ndim == 2:
        return mask.mean(1, keepdim=True)
    side = round(mask.shape[1] ** 0.5)
    size = output.shape[-2:] if output.ndim == 4 else (round(output.shape[1] ** 0.5),) * 2
    whole = F.interpolate(mask.view(len(mask), 1, side, side), size)
    return whole if output.ndim == 4 else whole.flatten(2).transpose(1, 2)


class Lag:
    """Residuals where the block's attention to them is above its median, on UNets.

    The published residual is on each block's last projection alone, which comes behind the attention; the lab's characters are on all of a
    block's layers. Those that come before the attention take its mask of the step before, and none in the first step; layers between
    blocks, the last one that was read. Keys and values of words have no place and get all of it.
    """

    def __init__(self, loaded, loras: Sequence[Mapping[str, torch.Tensor]], text: str, words: Sequence[str]):
        self.rows, self.masks, self.last = rows_of(loaded, text, words), {}, None
        self.adapted = Adapted(loaded.model, loras, self._gate)
        self.attentions = [name for name, _ in loaded.model.model.named_modules() if name.endswith(".attn2")]

    def on(self):
        return self.adapted.on(before={name: self._reading(name) for name in self.attentions})

    def _gate(self, index: int, name: str, output: torch.Tensor):
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            return 1.0
        block, inside, _ = name.removesuffix(".proj_in").removesuffix(".proj_out").partition(".transformer_blocks")
        mask = self.masks.get(block) if inside or name.endswith((".proj_in", ".proj_out")) else self.last
        return None if mask is None else spread_out(mask[index], output)

    def _reading(self, name: str) -> Callable:
        def hook(module, args, kwargs):
            options = kwargs["transformer_options"]
            chunks = options["cond_or_uncond"]
            context = args[1] if len(args) > 1 else kwargs["context"]
            each = len(args[0]) // len(chunks)
            rows = slice(chunks.index(0) * each, (chunks.index(0) + 1) * each)
            q, k = (split_heads(part, module.heads) for part in (module.to_q(args[0])[rows], module.to_k(context)[rows]))
            seen = columns(q, k)
            masks = []
            for own in self.rows:
                concept = seen[..., list(own)].sum(-1)
                masks.append((concept > concept.median(-1, keepdim=True).values).to(q).repeat(len(chunks), 1))
            self.last = self.masks[name.partition(".transformer_blocks")[0]] = torch.stack(masks)

        return hook


FUSED_STEPS, FUSED_OF = 5, 28
ANCHORS = 0.1


def freefuse(loaded, draw: Callable, text: str, words: Sequence[str], steps: int) -> torch.Tensor:
    """(pictures, concepts, height, width) bool: where each concept wins after the first steps. draw(model, steps) samples so many
    first steps and gives the latent.

    A concept's map against the others is K S_c - (the sum of theirs), of maps that are each 1 on average; a tenth of the positions are its
    anchors, and every position goes to the concept whose anchors its features, behind the attention, are most like (cosine). Left out: the
    published temperature, which does not change who wins, opening and closing, the balancing between concepts, and the attention bias.
    """
    model, kept = Capture.execute(loaded.model, capture.DEFAULT, 0.0, 1.0).result[0], []
    # The last layer that is read; of a UNet, the last one is on the finest grid.
    last = capture.layers_of(loaded.model.model)[-1]

    def look(module, args, kwargs, output):
        chunks = kwargs["transformer_options"]["cond_or_uncond"]
        rows = output[0] if isinstance(output, tuple) else output
        kept.append(rows.chunk(len(chunks))[chunks.index(0)].clone())

    taken = max(1, round(steps * FUSED_STEPS / FUSED_OF))
    handle = loaded.model.model.get_submodule(last).register_forward_hook(look, with_kwargs=True)
    try:
        captured = maps.captured_with(draw(model, taken))
    finally:
        handle.remove()
    features = F.normalize(kept[-1], dim=-1)
    finest = max(captured.groups, key=lambda group: group.grid[0] * group.grid[1])
    bound = [maps.Bound(word, rows, "") for word, rows in zip(words, rows_of(loaded, text, words), strict=True)]
    seen = relative(maps.of_group(finest, range(capture.STAGES), bound, None)).flatten(2)
    apart = len(words) * seen - (seen.sum(1, keepdim=True) - seen)
    anchors = apart.topk(max(1, round(ANCHORS * apart.shape[-1])), -1).indices
    near = features @ features.transpose(1, 2)  # positions by positions
    like = torch.stack([near.gather(2, own[:, None].expand(-1, near.shape[1], -1)).mean(-1) for own in anchors.unbind(1)], 1)
    return winners(like.unflatten(-1, finest.grid))


class Conductor:
    """A path of the whole model for each concept, with its LoRA everywhere, and one without: in the decoder's attentions, where a concept's
    mask is, its path's output stands in the last one's place. UNets; K + 1 model calls a step.

    Left out: the reference picture, whose layout the published paths are drawn to by gradients, and the masks that are found in it and
    refined by clustering. The masks that are given stand for both, and all paths start each step from the same latent, instead of from
    latents of their own.
    """

    def __init__(self, loaded, loras: Sequence[Mapping[str, torch.Tensor]], masks: torch.Tensor):
        """masks (K, height, width)"""
        self.masks, self.path, self.seen = masks, -1, {}
        self.adapted = Adapted(loaded.model, loras, lambda index, name, output: 1.0 if index == self.path else None)
        names = [name for name, _ in loaded.model.model.named_modules()]
        self.mixed = [name for name in names if ".output_blocks." in name and name.endswith(ATTENTION)]
        self.count = len(loras)

    def on(self):
        return self.adapted.on({name: self._mix(name) for name in self.mixed})

    def model(self, model):
        """MODEL that takes a step by all paths."""
        model = model.clone()
        model.set_model_unet_function_wrapper(self._step)
        return model

    def _step(self, apply_model, given):
        self.seen.clear()
        for path in (*range(self.count), -1):
            self.path = path
            out = apply_model(given["input"], given["timestep"], **given["c"])
        return out

    def _mix(self, name: str) -> Callable:
        def hook(module, args, kwargs, output):
            if self.path >= 0:
                self.seen[name, self.path] = output
                return None
            side = round(output.shape[1] ** 0.5)
            shares = pool(self.masks, side, side).flatten(1).to(output)[..., None]
            return output + sum(shares[k] * (self.seen[name, k] - output) for k in range(self.count))

        return hook
