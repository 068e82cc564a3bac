"""Train the lab's text encoder to understand captions, before any picture is drawn.

A throw-away head asks the encoder's states, through cross-attention as an image model would, what each named object is and where, and
what the background and style are. All wordings take part, the held-out ones included: the image models then meet states, not words.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..host import lab as host_lab
from .pools import read_pools
from .scenes import BACKGROUNDS, COLOURS, FILLS, MAX_OBJECTS, SHAPES, SIZES, STYLES
from .training import Leg, export, log, mixed

WIDTH = host_lab.TEXT_CONFIG["hidden_size"]
ITEM_TARGETS = {"shape": len(SHAPES), "colour": len(COLOURS), "fill": len(FILLS), "size": len(SIZES), "column": 3, "row": 3}
SCENE_TARGETS = {"background": len(BACKGROUNDS), "style": len(STYLES), "count": MAX_OBJECTS + 1}


class Reader(nn.Module):
    """The head: one query per object in the order of naming, and one for the scene; two rounds of cross-attention."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(MAX_OBJECTS + 1, WIDTH) * 0.5)
        self.rounds = nn.ModuleList(
            nn.TransformerDecoderLayer(WIDTH, 4, 256, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.item = nn.Linear(WIDTH, sum(ITEM_TARGETS.values()) + 2)
        self.scene = nn.Linear(WIDTH, sum(SCENE_TARGETS.values()))
        self.pooled = nn.Linear(WIDTH, sum(SCENE_TARGETS.values()) + len(SHAPES) + len(COLOURS))

    def forward(self, states):
        x = self.queries.expand(len(states), -1, -1)
        for block in self.rounds:
            x = block(x, states)
        return self.item(x[:, :MAX_OBJECTS]), self.scene(x[:, MAX_OBJECTS])


class TextTrainer(nn.Module):
    """The encoder and its head, trained together."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.reader = encoder, Reader()


def build_encoder() -> nn.Module:
    """transformers' CLIPTextModel at the lab's width: the same layers and key names as the host's class, which cannot be trained (its
    residual sums are done in place).
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    config = {key: value for key, value in host_lab.TEXT_CONFIG.items() if key != "max_position_embeddings"}
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=host_lab.VOCABULARY,
            max_position_embeddings=77,
            bos_token_id=49406,
            pad_token_id=49407,
            projection_dim=WIDTH,
            **config,
        )
    )
    embeddings(encoder).weight.data.copy_(host_lab.hashed_rows(np.arange(host_lab.VOCABULARY), WIDTH))
    return encoder


def _text_model(encoder):
    return getattr(encoder, "text_model", encoder)


def embeddings(encoder) -> nn.Embedding:
    return _text_model(encoder).embeddings.token_embedding


def states(encoder, tokens: torch.Tensor, *, layer: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """(states (B, 77, W), pooled (B, W)) as the host gives them: the final norm on the chosen layer, pooled at the end token."""
    text = _text_model(encoder)
    out = text(input_ids=tokens, output_hidden_states=layer != -1)
    last = out.last_hidden_state
    ends = (tokens == 49407).int().argmax(1)
    pooled = last[torch.arange(len(tokens), device=tokens.device), ends]
    return (last if layer == -1 else text.final_layer_norm(out.hidden_states[layer])), pooled


def _item_truth(scenes, order):
    """Targets of each named object, (B, 6) per attribute; -100 where there is none or the place has no word."""
    slot, named = order.long().clamp(min=0), order >= 0

    def take(value):
        return torch.where(named, value.gather(1, slot), -100)

    truth = {
        "shape": scenes.kind,
        "colour": scenes.colour,
        "fill": scenes.fill,
        "size": scenes.size_word(),
        "column": scenes.column(),
        "row": scenes.row(),
    }
    truth = {key: take(value) for key, value in truth.items()}
    for key in ("column", "row"):
        truth[key] = torch.where(truth[key] < 0, -100, truth[key])
    place = torch.stack([scenes.x / scenes.width, scenes.y / scenes.height], -1)
    place = place.gather(1, slot[..., None].expand(-1, -1, 2))
    return truth, place, named


def _loss(head, scenes, order, pooled, reader):
    items, scene = head
    truth, place, named = _item_truth(scenes, order)
    total, at = 0.0, 0
    for key, size in ITEM_TARGETS.items():
        total = total + F.cross_entropy(items[..., at : at + size].flatten(0, 1).float(), truth[key].flatten(), ignore_index=-100)
        at += size
    total = total + 4 * ((items[..., at:].float() - place) ** 2).sum(-1)[named].mean()
    wanted = {"background": scenes.background_word(), "style": scenes.style, "count": scenes.count}
    summary, at = reader.pooled(pooled), 0
    for key, size in SCENE_TARGETS.items():
        total = (
            total
            + F.cross_entropy(scene[:, at : at + size].float(), wanted[key])
            + 0.5 * F.cross_entropy(summary[:, at : at + size].float(), wanted[key])
        )
        at += size
    present = scenes.present().float()[..., None]
    for value, size in ((scenes.kind, len(SHAPES)), (scenes.colour, len(COLOURS))):
        bag = (F.one_hot(value, size) * present).amax(1)
        total = total + 2 * F.binary_cross_entropy_with_logits(summary[:, at : at + size].float(), bag)
        at += size
    return total, truth, items


def train(folder: Path, *, device: str, steps: int, minutes: float, finish: bool, batch: int, lr: float = 1e-3, seed: int = 12) -> None:
    torch.manual_seed(seed)
    pools = [pool.to(device) for pool in read_pools(folder).values()]
    encoder = build_encoder()
    seen = torch.zeros(host_lab.VOCABULARY, dtype=torch.long, device=device)
    for pool in pools:
        seen += torch.bincount(pool.tokens.flatten(), minlength=host_lab.VOCABULARY)
    trained = seen >= 24
    log.info("text: %d token rows are met often enough to train", int(trained.sum()))
    frozen = ~trained[:, None]
    module = TextTrainer(encoder).to(device).train()
    table = embeddings(module.encoder).weight
    table.register_hook(lambda grad: grad.masked_fill(frozen, 0))
    leg = Leg("text", module, folder=folder, steps=steps, minutes=minutes, lr=lr, finish=finish, decay=0.0)
    sizes = torch.tensor([float(len(pool)) for pool in pools])
    while leg.running():
        pool = pools[int(torch.multinomial(sizes, 1))]
        rows = torch.randint(len(pool), (batch,), device=device)
        columns = torch.tensor([0, 1, 2, 2, 2], device=device)[torch.randint(5, (batch,), device=device)]
        scenes = pool.scenes[rows]
        layer = -2 if leg.step % 4 == 3 else -1
        with mixed(device):
            context, pooled = states(module.encoder, pool.tokens[rows, columns].long(), layer=layer)
            loss, *_ = _loss(module.reader(context), scenes, pool.orders[rows, columns], pooled, module.reader)
        leg.update(loss)
    leg.close(state=not finish)
    _report(leg.averaged.eval(), pools, device)
    weights = {
        f"text_model.{key.removeprefix('text_model.')}": value
        for key, value in leg.averaged.encoder.state_dict().items()
        if "position_ids" not in key
    }
    whole = weights.pop("text_model.embeddings.token_embedding.weight")
    ids = torch.nonzero(trained).flatten()
    weights["text_model.embeddings.token_embedding.ids"] = ids.to(torch.int32)
    weights["text_model.embeddings.token_embedding.rows"] = whole[ids]
    export(weights, folder / "text.safetensors", host_lab.TEXT_CONFIG)


@torch.no_grad()
def _report(module, pools, device):
    """Share of named objects read rightly from plain captions and from all wordings."""
    for column, name in ((1, "plain"), (2, "all wordings")):
        right, total = {key: 0 for key in ITEM_TARGETS}, {key: 0 for key in ITEM_TARGETS}
        for pool in pools:
            rows = torch.arange(min(1024, len(pool)), device=device)
            context, pooled = states(module.encoder, pool.tokens[rows, column].long())
            _, truth, items = _loss(module.reader(context), pool.scenes[rows], pool.orders[rows, column], pooled, module.reader)
            at = 0
            for key, size in ITEM_TARGETS.items():
                known = truth[key] >= 0
                right[key] += int((items[..., at : at + size].argmax(-1) == truth[key])[known].sum())
                total[key] += int(known.sum())
                at += size
        log.info("text, %s: %s", name, {key: round(right[key] / total[key], 4) for key in right})


def load_encoder(folder: Path, device: str) -> nn.Module:
    """The trained encoder in transformers' class, frozen."""
    tensors, _ = host_lab.read_weights(folder / "text.safetensors")
    encoder = build_encoder()
    tensors = {key: value.float() for key, value in host_lab.full_embedding(tensors).items()}
    if not hasattr(encoder, "text_model"):
        tensors = {key.removeprefix("text_model."): value for key, value in tensors.items()}
    encoder.load_state_dict(tensors, strict=False)
    return encoder.to(device).eval().requires_grad_(False)
