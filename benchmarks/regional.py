"""Six characters on one canvas, each in its own place, in one pass, against the other ways to do it; and what a step costs.

Quality, on both lab models at 128 pixels: K characters in K cells of a grid, a LoRA each. Pictures are read by both eyes; where
nothing else is said it is the first that counts.

    identity   share of regions in which the surest object is the region's character; second: as the second eye sees it; eyes_agree: share
               of regions in which both say the same
    leakage    share of all objects seen that are a character outside of its own region
    seam       gradient across the borders between regions, over the same of the model without regions
    valid      share of pictures that could be a drawn scene

Arms: base (no LoRA, one prompt that names all), global (all LoRAs everywhere by the stock loader), hook (the host's hook LoRA and mask, a
pass per region), couple (regional prompts without LoRA), switch (one LoRA a step, in turn; Zhong et al., arXiv 2402.16843), composite (a
pass per LoRA over the whole picture, averaged; same paper), naive (LoRAs masked on the picture, all of them on every word of one prompt),
apart (each region reads a prompt that names its character alone, through its own LoRA), common (each reads the one prompt), crowd (each
reads the one prompt with its own character's word for all of them), ours (in boxes .03 inside of their cells, at strength 1.2: on the UNet
crowd, with isolation 10 until .3 of sampling and own_scale 1; on the DiT apart, with isolation 10 all along), and alone (one region at a
time, its character named alone, strength 1).

Cost: the processor's seconds a step over the plain graph's, on interleaved runs of 20 steps (the wide one's of 1), what is made ready for a
run included, for K boxes of rank 16 on all attention and feed-forward layers.

    step_ratio_kK      UNet of one level at Stable Diffusion 1.5's width (320 channels, context 768), 64x64 latent, random weights
    step_ratio_lab_kK  the lab's UNet at 128 pixels
    hook_step_ratio_k8 the host's hook LoRA and masks, on the wide one
    calls_ratio_k8     model calls a step over the plain graph's, with a prompt of another length in every region

With --size sdxl or flux, on a GPU, only this, for a model of the published size with random weights, in bfloat16 and in fp8 computed in it:

    PRECISION_step_ratio_kK      K boxes of rank 16, a LoRA on the picture's rows of each (text none)
    PRECISION_flat               the last less the first of these
    PRECISION_step_ratio_own_k8  each box reading its own copy of the prompt as well (text own)
    PRECISION_memory_k8          peak memory over the plain graph's, in sizes of the eight adapters

`--again PART ...` measures some of PARTS anew and keeps the others' committed figures; where none are committed, it begins them. unet6 and
dit6 are what is claimed: base, global, ours and alone at K = 6. The others' pictures are fewer (`few`). unet6 took 4 to 6 core minutes,
at 1 s a picture of base to 2 or 3 s of ours; the DiT's regions take three times as long. Each row tells its arm's seconds a picture, by the
same clock.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ..host import adapters, lab
from ..host.dispatcher import attach
from ..host.norms import norms_of
from ..host.regions import Hung, Regions, apply
from ..lab.characters import WORDS
from ..lab.eye import Eye
from ..ops.regions import Region
from . import _report
from ._layouts import (
    BACKGROUND,
    CFG,
    GRIDS,
    SIZE,
    Layout,
    base,
    composite,
    couple,
    encode,
    hooked,
    identities,
    loras_of,
    sample,
    stacked,
    strays,
)
from ._report import Claim, Figure, mean, share

COUNTS = (1, 2, 3, 4, 6)
MOST = max(COUNTS)
SEEDS, FIRST_SEED = 24, 30_000
TIMED = {"repeats": 21, "steps": 20, "wide_steps": 1, "wide_repeats": 5, "hook_repeats": 1}
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time  # of the processor, whoever else has it meanwhile

CLAIMS = {
    "step_ratio_k8": Claim(high=1.25),
    "step_ratio_lab_k8": Claim(high=1.40),
    "calls_ratio_k8": Claim(1.0, 1.0),
} | {
    f"{kind}_{key}": claim
    for kind in lab.MODELS
    for key, claim in {
        "identity_k6": Claim(low=0.90),
        "identity_second_k6": Claim(low=0.90),
        "leakage_k6": Claim(high=0.25),
        "seam_k6": Claim(high=1.2),
    }.items()
}


class Switch(adapters.AdapterEffect):
    """A LoRA that acts in every K-th step."""

    def __init__(self, name, parts, turn: int, k: int):
        super().__init__(name, parts, 1.0)
        self.turn, self.k = turn, k

    def strengths(self, model_sampling):
        seen: list[float] = []

        def strength(call):
            if call.sigma not in seen:
                seen.append(call.sigma)
            return 1.0 if seen.index(call.sigma) % self.k == self.turn else 0.0

        return strength


# --- the arms: layout -> (model, positive, negative) ------------------------------------------------------------------------------


def switch(loaded, layout, loras):
    model = loaded.model.clone()
    for turn, name in enumerate(layout.names):
        attach(model, Switch(name, adapters.place(loaded.model, loras[name], name).parts, turn, layout.k))
    return model, [encode(loaded, layout.whole())], [encode(loaded, "")]


def naive(loaded, layout, loras):
    model, _ = apply(loaded.model, layout.regions(loras), loaded.clip, text="all")
    return model, [encode(loaded, layout.whole())], [encode(loaded, "")]


def alone(loaded, layout, loras, index: int):
    """A region names its character alone: a prompt that names all would draw them as ordinary things elsewhere."""
    model, _ = apply(loaded.model, layout.regions(loras, prompts=layout.prompt, only=[index]), loaded.clip)
    return model, [encode(loaded, BACKGROUND)], [encode(loaded, "")]


def apart(loaded, layout, loras):
    model, _ = apply(loaded.model, layout.regions(loras, prompts=layout.prompt), loaded.clip)
    return model, [encode(loaded, layout.whole())], [encode(loaded, "")]


def common(loaded, layout, loras):
    model, _ = apply(loaded.model, layout.regions(loras), loaded.clip)
    return model, [encode(loaded, layout.whole())], [encode(loaded, "")]


def crowd(loaded, layout, loras):
    model, _ = apply(loaded.model, layout.regions(loras, prompts=layout.crowd), loaded.clip)
    return model, [encode(loaded, layout.whole())], [encode(loaded, "")]


INSET, STRENGTH, ISOLATION, ISOLATION_END, OWN_SCALE = 0.03, 1.2, 10.0, 0.3, 1.0


def ours(loaded, layout, loras):
    """Between the regions only the background is asked for, so that nothing is drawn across their borders. Where attention is all that
    positions know of one another, isolation makes every region a picture of its own, which its own prompt suits.
    """
    coupled = norms_of(loaded.model.model)
    regions = layout.regions(loras, prompts=layout.crowd if coupled else layout.prompt, strength=STRENGTH, inset=INSET)
    how = {"isolation_end": ISOLATION_END, "own_scale": OWN_SCALE} if coupled else {"isolation_end": 1.0}
    model, _ = apply(loaded.model, regions, loaded.clip, isolation=ISOLATION, **how)
    return model, [encode(loaded, BACKGROUND)], [encode(loaded, "")]


ARMS: dict[str, Callable] = {
    "base": base,
    "global": stacked,
    "hook": hooked,
    "couple": couple,
    "switch": switch,
    "composite": composite,
    "naive": naive,
    "apart": apart,
    "common": common,
    "crowd": crowd,
    "ours": ours,
}


# --- quality ----------------------------------------------------------------------------------------------------------------------


def seams(layout: Layout, pictures: torch.Tensor) -> torch.Tensor:
    """(N,) mean step in brightness across the borders between regions."""
    grey = pictures.mean(-1)
    columns, rows = GRIDS[layout.k]
    steps = [(grey[:, :, x] - grey[:, :, x - 1]).abs() for x in (round(c * SIZE / columns) for c in range(1, columns))]
    steps += [(grey[:, y] - grey[:, y - 1]).abs() for y in (round(r * SIZE / rows) for r in range(1, rows))]
    return torch.cat(steps, 1).mean(1) if steps else torch.zeros(len(pictures))


def measure_quality(kind: str, k: int, arms: Sequence[str], seeds: Sequence[int]) -> tuple[dict[str, Figure], list[dict]]:
    """The arms' readings of one picture a seed; with "alone" among them the figures that are over it."""
    loaded, (eye, second), loras = lab.load(kind), (Eye.load(), Eye.load("eye2")), loras_of(kind)
    turns = [(turn, own) for turn in range(len(WORDS)) if (own := seeds[turn :: len(WORDS)])]
    told: dict[str, dict[str, list]] = {}
    rows = []
    for arm in arms:
        began, row, pictures = CLOCK(), {key: [] for key in ("identity", "second", "stray", "valid", "seam")}, 0
        for layout, only, drawn in _pictures(loaded, loras, k, arm, turns):
            readings, pictures = eye.read(drawn), pictures + len(drawn)
            row["identity"] += identities(layout, readings, only)
            row["second"] += identities(layout, second.read(drawn), only)
            row["valid"] += [reading.valid > 0.5 for reading in readings]
            if only is None:
                row["stray"] += strays(layout, readings)
                row["seam"] += seams(layout, drawn).tolist()
        told[arm] = row
        rows.append({"model": kind, "arm": arm, "k": k, "pictures": pictures, "seconds": round((CLOCK() - began) / pictures, 2)})
        rows[-1] |= {key: round(sum(values) / len(values), 4) for key, values in row.items() if values}
        print(rows[-1], flush=True)
    return (_figures(kind, k, told) if "alone" in told else {}), rows


def _pictures(loaded, loras, k: int, arm: str, turns: Sequence[tuple[int, Sequence[int]]]):
    """Layouts, the regions in them (None: all) and the pictures of an arm. Alone, every region comes to two seeds of each layout."""
    for turn, own in turns:
        layout = Layout(k, turn)
        if arm != "alone":
            yield layout, None, sample(loaded, *ARMS[arm](loaded, layout, loras), own)
            continue
        for index in range(k):
            yield layout, [index], sample(loaded, *alone(loaded, layout, loras, index), own[:2])


def _figures(kind: str, k: int, told: dict[str, dict[str, list]]) -> dict[str, Figure]:
    """Ratios over the reference arms; their intervals are those of the numerator."""

    def over(figure: Figure, arm: str, key: str) -> Figure:
        values = told[arm][key]
        by = max(sum(values) / len(values), 1e-9)
        return Figure(figure.value / by, figure.low / by, figure.high / by, figure.n)

    mine = told["ours"]
    return {
        f"{kind}_identity_k{k}": over(share(mine["identity"]), "alone", "identity"),
        f"{kind}_identity_second_k{k}": over(share(mine["second"]), "alone", "second"),
        f"{kind}_eyes_agree_k{k}": share([one == other for one, other in zip(mine["identity"], mine["second"], strict=True)]),
        f"{kind}_leakage_k{k}": over(mean(mine["stray"]), "global", "stray"),
        f"{kind}_seam_k{k}": over(mean(mine["seam"]), "base", "seam"),
    }


# --- cost -------------------------------------------------------------------------------------------------------------------------

WIDE = lab.UNET_CONFIG | {
    "model_channels": 320,
    "num_res_blocks": [2],
    "channel_mult": [1],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
}


def wide_model():
    """A UNet of one level at Stable Diffusion 1.5's width, with random weights."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(dict(WIDE))
    config.unet_config = dict(WIDE)
    config.set_inference_dtype(torch.float32, None)
    with torch.inference_mode(False):
        model = config.get_model({}, "", device="cpu")
        generator = torch.Generator().manual_seed(0)
        for parameter in model.diffusion_model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), torch.device("cpu"))


def random_lora(model, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA on all linear layers of the attention blocks, without modulation, and their 1x1 projections."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in model.model.named_modules():
        weight = getattr(module, "weight", None)
        inside = re.search(r"\.(transformer|double|single)_blocks\.(?!.*mod)|\.proj_(in|out)$", name)
        if not inside or weight is None or weight.ndim < 2:
            continue
        state[f"{name}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.02
        state[f"{name}.lora_up.weight"] = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator) * 0.02
    return state


class Graph:
    """One arm of the timing: a model with its conditions, and the clock that times it."""

    def __init__(self, model, positive, negative, side: int, cfg: float, clock: Callable[[], float] = CLOCK):
        self.model, self.positive, self.negative, self.side, self.cfg, self.clock = model, positive, negative, side, cfg, clock

    def run(self, steps: int) -> float:
        """Seconds a step."""
        import comfy.sample

        noise = torch.zeros(1, self.model.model.latent_format.latent_channels, self.side, self.side)
        began = self.clock()
        comfy.sample.sample(
            self.model, noise, steps, self.cfg, "euler", "normal", self.positive, self.negative, noise, disable_pbar=True, seed=0
        )
        return (self.clock() - began) / steps


def random_context(width: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(seed))


def boxes(model, k: int, rank: int = 16) -> Regions:
    layout = Layout(k)
    made = Regions()
    for index, box in enumerate(layout.boxes):
        made = made.with_region(Region(str(index), shapes=(box,))).with_lora(str(index), Hung("random", random_lora(model, rank, index)))
    return made


def hook_graph(model, k: int, width: int, side: int, cfg: float) -> Graph:
    import comfy.hooks

    positive, negative = [], []
    for index in range(k):
        hooks = comfy.hooks.create_hook_lora(lora=random_lora(model, 16, index), strength_model=1.0, strength_clip=0.0)
        mask = Regions().with_region(Region("one", shapes=(Layout(k).boxes[index],))).drawn(64, 64)
        options = {"hooks": hooks, "mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False}
        positive.append([random_context(width, 77, 1), options])
        negative.append([random_context(width, 77, 2), options])
    return Graph(model, positive, negative, side, cfg)


def ratios(arms: dict[str, Graph], repeats: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each arm over the first's in the same round; a first round warms up."""
    for graph in arms.values():
        graph.run(min(2, steps))
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, graph in arms.items():
            times[name].append(graph.run(steps))
    plain = times[next(iter(arms))]
    return {name: [own / first for own, first in zip(row, plain, strict=True)] for name, row in times.items()}


def measure_cost() -> tuple[dict[str, Figure], list[dict]]:
    figures: dict[str, Figure] = {}
    rows = []
    for name, model, width, side, cfg, hooks in (
        ("step_ratio_lab", lab.load_model("unet"), lab.UNET_CONFIG["context_dim"], SIZE // lab.downscale("unet"), CFG, False),
        ("step_ratio", wide_model(), 768, 64, 1.0, True),
    ):
        conditions = [[random_context(width, 77, 1), {}]], [[random_context(width, 77, 2), {}]]
        arms = {"plain": Graph(model, *conditions, side, cfg)}
        for k in (1, 2, 4, 8):
            arms[f"{name}_k{k}"] = Graph(apply(model, boxes(model, k))[0], *conditions, side, cfg)
        wide = "wide_" if hooks else ""
        measured = ratios(arms, TIMED[f"{wide}repeats"], TIMED[f"{wide}steps"])
        if hooks:  # several times as long as all the others together, and no claim reads it
            slow = {"plain": arms["plain"], "hook_step_ratio_k8": hook_graph(model, 8, width, side, cfg)}
            measured |= {"hook_step_ratio_k8": ratios(slow, TIMED["hook_repeats"], TIMED["wide_steps"])["hook_step_ratio_k8"]}
        for arm, values in measured.items():
            if arm != "plain":
                figures[arm] = mean([statistics.median(values)]) if len(values) < 3 else _middle(values)
            rows.append({"arm": f"{name}: {arm}", "ratios": [round(value, 4) for value in values]})
            print(rows[-1], flush=True)
    figures["calls_ratio_k8"] = mean([calls_ratio()])
    return figures, rows


def _middle(values: Sequence[float]) -> Figure:
    """The median with its bootstrap interval."""
    data = torch.tensor(values, dtype=torch.float64)
    draws = data[torch.randint(len(data), (2000, len(data)), generator=torch.Generator().manual_seed(0))].median(1).values
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(float(data.median()), low, high, len(data))


def calls_ratio() -> float:
    """Model calls with eight regional prompts of unequal length, over those of the plain graph."""
    from comfy.patcher_extension import WrappersMP

    loaded = lab.load("unet")
    regions = Regions()
    for index, box in enumerate(Layout(8).boxes):
        words = " ".join(["red star"] * (1 + 6 * index))
        regions = regions.with_region(Region(str(index), shapes=(box,), prompt=words))
    counts = []
    for model in (apply(loaded.model, regions, loaded.clip)[0], loaded.model):
        calls: list[int] = []

        def count(executor, *args, _calls=calls, **kwargs):
            _calls.append(1)
            return executor(*args, **kwargs)

        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "bench", count)
        Graph(model, [encode(loaded, "a red star")], [encode(loaded, "")], SIZE // lab.downscale("unet"), CFG).run(4)
        counts.append(len(calls))
    return counts[0] / counts[1]


# --- the whole --------------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A part of the quality run: which arms draw K regions, one picture a seed."""

    kind: str
    k: int
    arms: tuple[str, ...]
    seeds: int


CLAIMED = ("base", "global", "ours", "alone")


def few(k: int) -> int:
    """Pictures of what no claim reads: 24 to 48 regions."""
    return max(8, SEEDS // k)


def cells() -> dict[str, Cell]:
    found = {}
    for kind in lab.MODELS:
        for k in COUNTS:
            arms = tuple(ARMS) if k > 1 else ("base", "global", "couple", "ours")
            if k == MOST:
                found[f"{kind}{k}"] = Cell(kind, k, CLAIMED, SEEDS)
                found[f"{kind}{k}_others"] = Cell(kind, k, tuple(arm for arm in arms if arm not in CLAIMED), few(k))
            else:
                found[f"{kind}{k}"] = Cell(kind, k, arms, few(k))
    return found


CELLS = cells()
PARTS = ("cost", *CELLS)
CHECKED = {"cost", *(part for part, cell in CELLS.items() if "alone" in cell.arms)}  # whose figures are claimed


def _measure(sample: bool, parts: Sequence[str] = PARTS) -> tuple[dict[str, Figure], list[dict]]:
    lab.show_files()
    figures: dict[str, Figure] = {}
    rows: list[dict] = []
    with torch.inference_mode():
        for part in [part for part in parts if not sample or part in CHECKED]:
            if part == "cost":
                found, told = measure_cost()
            else:
                cell = CELLS[part]
                count = len(WORDS) if sample else cell.seeds
                found, told = measure_quality(cell.kind, cell.k, cell.arms, range(FIRST_SEED, FIRST_SEED + count))
            figures |= found
            rows += [{"part": part} | row for row in told]
    return figures, rows


def table(rows: Sequence[dict]) -> str:
    """Identity of each arm, of both models at every K, as lines of Markdown; of strays what there is of them, behind it."""
    cells = {(row["arm"], row["model"], row["k"]): row for row in rows if "identity" in row}
    columns = [(kind, k) for kind in lab.MODELS for k in COUNTS if any((kind, k) == key[1:] for key in cells)]
    lines = [
        "| | " + " | ".join(f"{'UNet' if kind == 'unet' else 'DiT'}, {k}" for kind, k in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for arm in (*ARMS, "alone"):
        told = []
        for column in columns:
            row = cells.get((arm, *column))
            stray = row.get("stray") if row else None
            told.append("" if row is None else f"{row['identity']:.2f}" + (f" ({stray:.2f})" if stray else ""))
        if any(told):
            lines.append(f"| {arm} | " + " | ".join(told) + " |")
    return "\n".join(lines)


# --- cost at real sizes ------------------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """A model of a published size.

    kind     class of the host's table (comfy.supported_models)
    config   what the host's detection reads from such a checkpoint
    width    of the text's states, `tokens` of them; pooled: of the pooled ones
    side     of the latent
    """

    kind: str
    config: dict
    width: int
    tokens: int
    pooled: int
    side: int
    cfg: float


SIZES = {
    "sdxl": Size(
        "SDXL",
        lab.UNET_CONFIG
        | {
            "model_channels": 320,
            "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4],
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
            "transformer_depth_middle": 10,
            "context_dim": 2048,
            "num_heads": -1,
            "num_head_channels": 64,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2816,
        },
        width=2048,
        tokens=77,
        pooled=1280,
        side=128,
        cfg=4.0,
    ),
    "flux": Size(
        "Flux",
        lab.DIT_CONFIG
        | {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 768,
            "context_in_dim": 4096,
            "hidden_size": 3072,
            "num_heads": 24,
            "depth": 19,
            "depth_single_blocks": 38,
            "axes_dim": [16, 56, 56],
            "guidance_embed": True,
        },
        width=4096,
        tokens=256,
        pooled=768,
        side=128,
        cfg=1.0,
    ),
}
PRECISIONS = {"bf16": (torch.bfloat16, None), "fp8": (torch.float8_e4m3fn, torch.bfloat16)}
SIZED = {"repeats": 9, "steps": 4}


def claims_of_size() -> dict[str, Claim]:
    of_one = {"step_ratio_k8": Claim(high=1.05), "flat": Claim(-0.02, 0.02), "memory_k8": Claim(high=1.05)}
    return {f"{precision}_{key}": claim for precision in PRECISIONS for key, claim in of_one.items()}


def sized_model(size: Size, dtype: torch.dtype, compute: torch.dtype | None):
    """MODEL of a size with random weights kept in `dtype`, on the device that it works on."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    config = getattr(comfy.supported_models, size.kind)(dict(size.config))
    config.unet_config = dict(size.config)
    config.set_inference_dtype(dtype, compute)
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode(False):
        model = config.get_model({}, "", device=device)
        generator = torch.Generator(device).manual_seed(0)
        for parameter in model.diffusion_model.parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
            # In bfloat16: a copy in float32 of everything would not fit beside it.
            noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.bfloat16)
            parameter.data = (noise * spread).to(parameter.dtype)
    return comfy.model_patcher.ModelPatcher(model, device, device)


def measure_size(size: Size, sample: bool, counts: Sequence[int] = (1, 2, 4, 8)) -> tuple[dict[str, Figure], list[dict]]:
    figures: dict[str, Figure] = {}
    rows = []
    repeats = 3 if sample else SIZED["repeats"]
    for precision, types in PRECISIONS.items():
        model = sized_model(size, *types)
        pooled = {"pooled_output": random_context(size.pooled, 1, 3)[0]}
        conditions = [[[random_context(size.width, size.tokens, seed), pooled]] for seed in (1, 2)]
        graphs = {"plain": Graph(model, *conditions, size.side, size.cfg)}
        most, adapters_size = max(counts), 0
        for k in counts:
            regions = boxes(model, k)
            graphs[f"step_ratio_k{k}"] = Graph(apply(model, regions, text="none")[0], *conditions, size.side, size.cfg)
            if k == most:
                graphs[f"step_ratio_own_k{k}"] = Graph(apply(model, regions)[0], *conditions, size.side, size.cfg)
                adapters_size = sum(2 * tensor.numel() for hung in regions.hung.values() for one in hung for tensor in one.state.values())
        measured = ratios(graphs, repeats, SIZED["steps"])
        for arm, values in measured.items():
            if arm != "plain":
                figures[f"{precision}_{arm}"] = _middle(values)
            rows.append({"arm": f"{precision}: {arm}", "ratios": [round(value, 4) for value in values]})
            print(rows[-1], flush=True)
        first, last = measured[f"step_ratio_k{min(counts)}"], measured[f"step_ratio_k{most}"]
        figures[f"{precision}_flat"] = _middle([b - a for a, b in zip(first, last, strict=True)])
        if torch.cuda.is_available():
            plain, placed = (_peak(graphs[arm]) for arm in ("plain", f"step_ratio_k{most}"))
            figures[f"{precision}_memory_k{most}"] = mean([(placed - plain) / adapters_size])
            rows.append({"arm": f"{precision}: memory", "plain": plain, "placed": placed, "adapters": adapters_size})
    return figures, rows


def _peak(graph: Graph) -> int:
    """Bytes at the peak of one run."""
    torch.cuda.reset_peak_memory_stats()
    graph.run(1)
    return torch.cuda.max_memory_allocated()


def _measure_size(name: str, sample: bool):
    with torch.inference_mode():
        return measure_size(SIZES[name], sample)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py bench regional", add_help=False)
    parser.add_argument("--size", choices=SIZES)
    options, others = parser.parse_known_args(argv)
    if options.size is None:
        return _report.run_parts("regional", others, PARTS, _measure, CLAIMS)
    if not torch.cuda.is_available():
        print(f"bench regional --size {options.size} times a model of the published size, which needs a GPU, and torch finds none here.")
        return 1
    return _report.run(f"regional_{options.size}", others, partial(_measure_size, options.size), claims_of_size())
