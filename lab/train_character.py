"""Teach a frozen lab model one of the six characters that it never saw: low-rank adapters trained with the model's own loss on drawn
scenes, in whose captions a word without a meaning stands for the character.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ..host import lab as host_lab
from .captions import IMAGE_TRAINING, Writer, write_captions
from .characters import WORDS, file_of, lessons, measure, show, with_lora
from .eye import Eye
from .lowrank import adapt, frozen, parameters, write
from .measure import draw, sheet
from .scenes import SHAPES, cat_scenes, render, sample_scenes
from .train_denoiser import KINDS, encode_scenes, load_vae, mend, sd_alphas
from .train_text import load_encoder, states
from .training import log, mixed

RUNS = Path(__file__).resolve().parent / "runs"
CANVASES = {64: (1024, 0.55), 96: (256, 0.15), 128: (256, 0.3)}  # pixels a side: (scenes, share of steps)
CAPTIONS = 2  # of each scene
EMPTY_CHANCE = 0.1  # captions dropped, of scenes without the character only: no words must not come to mean it
WARM_UP = 30  # steps


class Recipe(NamedTuple):
    """How a model is taught. ranks: part of a module's name -> rank, the first that fits; batch: pictures of 64 px a step; longer: steps
    for the characters that take more.
    """

    ranks: dict[str, int]
    steps: int
    batch: int
    lr: float
    longer: dict[str, int] = {}

    def rank(self, module: str) -> int:
        return next((rank for part, rank in self.ranks.items() if part in module), 0)


RECIPES = {
    "unet": Recipe({".attn": 4, ".ff.": 4, ".proj_": 4}, steps=700, batch=32, lr=4e-3, longer={"robot": 1300, "alien": 1300}),
    "dit": Recipe({"_attn.": 6, "_mlp.": 6, ".linear": 6}, steps=650, batch=16, lr=3e-3),
}


class Lesson(NamedTuple):
    """Scenes of one canvas, encoded: latents (N, 4, h, w); contexts (N, captions, 77, W) and pooled (N, captions, W) of their captions."""

    latents: torch.Tensor
    contexts: torch.Tensor
    pooled: torch.Tensor


@torch.no_grad()
def encode_texts(encoder, texts: list[str], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """States and pooled states of captions, in half precision."""
    tokens = host_lab.tokenizer()(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    parts = [states(encoder, torch.tensor(part, device=device)) for part in (tokens[at : at + 64] for at in range(0, len(tokens), 64))]
    return torch.cat([context.half() for context, _ in parts]), torch.cat([pooled.half() for _, pooled in parts])


def prepare(name: str, kind: str, folder: Path, *, device: str, seed: int) -> dict[int, Lesson]:
    """Scenes with the character, drawn, captioned and encoded once, by canvas."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    encoder, vae = load_encoder(folder, device), load_vae(folder, device, kind)
    writer = Writer(IMAGE_TRAINING._replace(misspelt=0.0), rng)
    prepared = {}
    for size, (n, _) in CANVASES.items():
        scenes = lessons(name, n, size=size, generator=generator)
        texts = [text for _ in range(CAPTIONS) for text in write_captions(scenes, writer, WORDS)[0]]
        holds = ((scenes.kind >= len(SHAPES)) & scenes.present()).any(1).tolist() * CAPTIONS
        spoken = [text if held or rng.random() >= EMPTY_CHANCE else "" for text, held in zip(texts, holds, strict=True)]
        encoded = encode_texts(encoder, spoken, device)
        contexts, pooled = (part.unflatten(0, (CAPTIONS, len(scenes))).transpose(0, 1) for part in encoded)
        prepared[size] = Lesson(encode_scenes(scenes, vae, device), contexts, pooled)
    return prepared


def train(name: str, kind: str, folder: Path, output: Path, material: dict[int, Lesson], *, recipe: Recipe, device: str, seed: int) -> None:
    """Train the character's LoRA for a model in `folder` and write it to `output`."""
    torch.manual_seed(seed)
    module = frozen(kind, folder, device)
    if kind == "dit":
        mend(module)
    adapters = adapt(module, recipe.rank)
    for adapter in adapters.values():
        adapter.strength = 1.0
    weights = parameters(adapters)
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
    alphas, loss_of, losses, began = sd_alphas(device), KINDS[kind][1], [], time.monotonic()
    sizes, shares = list(material), torch.tensor([CANVASES[size][1] for size in material])
    for step in range(1, recipe.steps + 1):
        size = sizes[int(torch.multinomial(shares, 1))]
        lesson = material[size]
        rows = torch.randint(len(lesson.latents), (max(1, recipe.batch * 64 * 64 // size**2),), device=device)
        said = torch.randint(CAPTIONS, rows.shape, device=device)
        with mixed(device):
            context, pooled = lesson.contexts[rows, said].float(), lesson.pooled[rows, said].float()
            loss = loss_of(module, lesson.latents[rows].float(), context, pooled, alphas)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 100 == 0 or step == 1:
            recent = losses[-100:]
            log.info("%s, %s: step %d loss %.5f, %.1f s", kind, name, step, sum(recent) / len(recent), time.monotonic() - began)
    about = {
        "concept": name,
        "word": WORDS[name],
        "objective": f"the model's own loss on drawn scenes, {recipe.steps} steps of {recipe.batch}, lr {recipe.lr:g}, seed {seed}",
        "base": f"lab {kind}",
    }
    write(adapters, kind, output, about)


def report(names: list[str], kinds: list[str], loras: Path, n: int) -> None:
    """Tell how often the files below a folder make the shipped models draw their characters: n pictures a canvas."""
    eye = Eye.load()
    for kind in kinds:
        lab = host_lab.load(kind)
        for name in names:
            model = with_lora(lab.model, loras / file_of(name, kind))
            for size in (64, 128):
                told = measure(name, lab, model, eye, n=n, size=size)
                log.info("%s, %s, %d px: %s", kind, name, size, {key: round(value, 3) for key, value in told.items()})


def draw_sheet(names: list[str], kinds: list[str], loras: Path) -> None:
    """A column for each character: the truth, then what each model draws with the files below a folder; twice as large as they are."""
    any_of_them = sample_scenes(1, characters=1.0, plain=True, generator=torch.Generator().manual_seed(0))
    truth = cat_scenes([show(name, any_of_them) for name in names])
    for value, wanted in ((truth.x, 32.0), (truth.y, 32.0), (truth.diameter, 27.0), (truth.background, 0.5)):
        value.fill_(wanted)
    rows = [render(truth).movedim(1, -1)]
    for kind in kinds:
        lab = host_lab.load(kind)
        for name in names:
            model = with_lora(lab.model, loras / file_of(name, kind))
            rows.append(draw(lab, [f"a large {WORDS[name]} in the centre on a grey background"], size=64, seed=1, model=model))
    sheet(torch.cat(rows).repeat_interleave(2, 1).repeat_interleave(2, 2), loras / "characters.png", columns=len(names))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py lab character", description="Train LoRAs that teach the lab's models its characters.")
    parser.add_argument("name", choices=[*WORDS, "all"])
    parser.add_argument("--model", choices=[*RECIPES, "all"], default="all")
    parser.add_argument("--folder", type=Path, default=host_lab.WEIGHTS, help="where the models lie (default: the shipped ones)")
    parser.add_argument("--output", type=Path, default=RUNS / "loras", help="the files go to concept_lab/characters/ below it")
    parser.add_argument(
        "--measure",
        type=int,
        metavar="N",
        help="train nothing: read N pictures a canvas that the files below --output draw, and put some on a sheet",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=31)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    names, kinds = list(WORDS) if options.name == "all" else [options.name], list(RECIPES) if options.model == "all" else [options.model]
    if options.measure:
        report(names, kinds, options.output, options.measure)
        draw_sheet(names, kinds, options.output)
        return 0
    for name in names:
        prepared = {}
        for kind in kinds:
            vae = host_lab.VAES[kind]
            if vae not in prepared:
                prepared[vae] = prepare(name, kind, options.folder, device=options.device, seed=options.seed)
            given = {key: getattr(options, key) for key in ("steps", "batch", "lr") if getattr(options, key)}
            recipe = RECIPES[kind]
            recipe = recipe._replace(**{"steps": recipe.longer.get(name, recipe.steps)} | given)
            train(
                name,
                kind,
                options.folder,
                options.output / file_of(name, kind),
                prepared[vae],
                recipe=recipe,
                device=options.device,
                seed=options.seed,
            )
    return 0
