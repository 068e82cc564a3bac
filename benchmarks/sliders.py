"""What the lab's sliders do to pictures, beside every other way of moving the same thing.

Each shipped slider of a lab model draws one prompt a seed at nine strengths from -2 to 2; the eye reads the pictures. Figures,
under `<model>_<slider>_`, each over seeds:

    spearman         mean rank correlation of strength and attribute
    span             attribute at +2 minus at -2, as a share of its range in the scenes
    seen             share of pictures in which there is anything to measure; the two above leave out seeds with one unseen
    valid_zero       share of valid pictures at strength 0
    validity_loss    share of valid pictures at strength 0, minus that at the worst strength
    position_shift   pixels that the object moves between strength 0 and the ends, from the family's default start on
    interference     change of all other attributes, as a share of their ranges, where the attribute has moved by a quarter of its range
    interference_ratio  that, over the best prompt-based arm's; interference_to_published  over the published loop's
    free_spearman    as spearman, for the training-free embedding form
    stock_difference largest difference of a latent from the stock loader's
    control_span     span of a random LoRA of the same layers and norms: small, or the measure has no power

and of five sliders at once, under `<model>_`: `compose5`, the least share of its solo effect that one of them keeps, and how many random
ones the model bears (`compose_10`, `_20`, `_50`: share of valid pictures); and what moving a strength costs between two pictures:
`repatch_count`, weights written (the stock loader's count is an arm), and `set_up_seconds`, from the new strength to the first model call.

Prompt-based arms: *weighting* (the pole's word weighted as the host does), *swap* (the pole's prompt for a part of the steps) and
*interpolation* (between the prompts' embeddings). Trained arms on the UNet: *published loop* (as the released trainer walks), *full rank*
and *image pairs*. Training-free: *embedding* and *guidance* of Slider from Prompts. With `--released CHECKOUT` (a clone of
github.com/rohitgandikota/sliders; needs the development extras) also the *released trainer* itself, for two sliders of the UNet:

    interference_to_released, train_time_to_released   ours over it

`--again PART ...` measures some parts alone: a slider (`unet-size`), its prompt-based arms (`unet-size-prompts`), its trained arms
(`unet-size-trained`), all sliders together (`unet-together`) and the costs (`unet-moving`); `--ours` all but the arms, in some 90
minutes. Parts that were measured of slider files which have changed since are left out of the results.

Pictures are drawn at guidance 2.5. At 4 the model spoils so many of its own (of prompts for a pole, without any slider, up to a fifth) that
what a slider spoils can hardly be told.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..host import adapters, lab
from ..host.families import family_of
from ..host.files import resolve
from ..lab import attributes, sliders
from ..lab.attributes import RANGES, attribute, others, shift
from ..lab.eye import Eye
from ..lab.measure import draw_latents
from ..lab.scenes import COLOURS, SHAPES, SIZES
from ..nodes.sliders import Slider, SliderPrompts
from . import _released, _report, _trainings
from ._report import Claim, Figure, mean, share

STRENGTHS = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
ENDS = [-2.0, 2.0]
SEEDS, ARM_SEEDS, SAMPLE = 200, 48, 24
FIRST_SEED = 20_000
CFG = 2.5  # at which this model draws best: of 40 prompts for each pole at 4, .80 to .98 are valid, at 2.5 .90 to 1
EFFECT = 0.25  # of the range, each way: where arms are compared
# Pictures that are drawn, so that a stopped run goes on. Delete it after changes to ops, host or nodes.
KEPT = Path(__file__).resolve().parents[1] / "lab" / "runs" / "bench_sliders"

CLAIMS = {
    "spearman": Claim(low=0.95),
    "span": Claim(low=0.7),
    "seen": Claim(low=0.97),
    "validity_loss": Claim(high=0.03),
    "position_shift": Claim(high=1.0),
    "interference_ratio": Claim(high=0.5),
    "stock_difference": Claim(high=1e-3),
    "control_span": Claim(high=0.1),
    "free_spearman": Claim(low=0.9),
}
TO_PUBLISHED = {"interference_to_published": Claim(high=1.0)}  # of the UNet's text sliders
TIMES = {"train_seconds": Claim(high=240), "train_time_ratio": Claim(high=0.5)}
TO_RELEASED = {"interference_to_released": Claim(high=1.0), "train_time_to_released": Claim(high=0.5)}
TRAINED = (0.2, 0.3, 0.4, 0.6, 1.0)  # shares of a workflow's steps
TIMED = ("size", "background")
PROMPT_ARMS = ("weighting", "swap", "interpolation")
PLACES = ("on the left", "on the right", "in the centre", "at the top", "at the bottom")
GROUNDS = ("black", "dark grey", "light grey", "white")
FIXED = {"size": "medium", "fill": "large"}  # a small star or crescent is all outline: there is nothing in it to fill


def prompt(slider: str, seed: int) -> str:
    """The prompt of a seed: it leaves the slider's attribute at its middle, or unsaid."""
    rng = random.Random(seed)
    size = FIXED.get(slider) or rng.choice(SIZES)
    colour = "cyan" if slider == "hue" else rng.choice(COLOURS)
    ground = "grey" if slider == "background" else rng.choice(GROUNDS)
    return f"a {size} {colour} {rng.choice(SHAPES)} {rng.choice(PLACES)} on a {ground} background"


# What stands for the attribute in a prompt, what for its two poles: pattern, more, less.
POLES = {
    "size": (r"medium", "large", "small"),
    "hue": (r"cyan", "blue", "green"),
    "background": (r"\bgrey background", "white background", "black background"),
    "fill": (r"^a (\w+)", r"a \1 solid", r"a \1 outlined"),
    "neon": (r"$", ", neon style", ", vintage style"),
}


def pole(slider: str, text: str, more: bool) -> str:
    """The prompt with more or less of the attribute."""
    pattern, *words = POLES[slider]
    return re.sub(pattern, words[not more], text, count=1)


class Sweep(NamedTuple):
    """(seeds, strengths) tensors: attribute (NaN where unseen), valid, changed (of others), moved (pixels)."""

    strengths: list[float]
    attribute: torch.Tensor
    valid: torch.Tensor
    changed: torch.Tensor
    moved: torch.Tensor


Drawer = Callable[[list[str], list[int], float], torch.Tensor]


class Bench:
    """One lab model, its eye, and ways of drawing a prompt at a strength."""

    def __init__(self, name: str, released: Path | None = None):
        self.name, self.lab, self.eye, self.released = name, lab.load(name), Eye.load(), released
        self.start = family_of(self.lab.model.model).slider_start
        own = [lab.WEIGHTS / f"{part}.safetensors" for part in (name, "text", "eye", lab.VAES[name])]
        own += [Path(module.__file__) for module in (_trainings, _released, attributes)] + [
            Path(__file__),
            *sorted(sliders.WORKFLOWS.iterdir()),
        ]
        self.about = hashlib.blake2b(b"".join(path.read_bytes() for path in own), digest_size=8).hexdigest()

    def pictures(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.lab.vae.decode(part).cpu() for part in latents.split(8)])

    def drawn(self, texts: list[str], seeds: list[int], model=None) -> torch.Tensor:
        return self.pictures(draw_latents(self.lab, texts, size=64, seeds=seeds, model=model, cfg=CFG))

    def encode(self, text: str):
        return self.lab.clip.encode_from_tokens(self.lab.clip.tokenize(text), return_pooled=True)

    def conditioned(self, conditions: list[list], seeds: list[int], model=None) -> torch.Tensor:
        """Pictures of one conditioning each, all of the same make."""
        import comfy.sample

        side = 64 // self.lab.vae.spacial_compression_decode()
        noise = torch.cat([torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        latents = comfy.sample.sample(
            model or self.lab.model, noise, 20, CFG, "euler", "normal", stacked(conditions), [[*self.conditioning("")]],
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
        return self.pictures(latents)

    def slider(self, file: str, *, lora=None, start: float = 0.0) -> Drawer:
        def drawer(texts, seeds, strength):
            return self.drawn(texts, seeds, Slider.execute(self.lab.model, "none" if lora else file, strength, start, 1.0, lora).result[0])

        return drawer

    def free(self, slider: str, form: str) -> Drawer:
        """Slider from Prompts, between each prompt's own poles."""

        def slid(text, strength):
            less, plain, more = ([[*self.conditioning(words)]] for words in (pole(slider, text, False), text, pole(slider, text, True)))
            return SliderPrompts.execute(self.lab.model, plain, more, less, form, strength, 0.0, 1.0).result[:2]

        def drawer(texts, seeds, strength):
            made = [slid(text, strength) for text in texts]
            if form == "embedding":
                return self.conditioned([positive for _, positive in made], seeds)
            return torch.cat([self.conditioned([positive], [seed], model) for (model, positive), seed in zip(made, seeds, strict=True)])

        return drawer

    def conditioning(self, text: str, **options):
        context, pooled = self.encode(text)
        return context, {"pooled_output": pooled, **options}

    def weighting(self, slider: str) -> Drawer:
        pattern, *words = POLES[slider]

        def drawer(texts, seeds, strength):
            if strength:
                word = words[strength < 0].replace(r"a \1 ", "").strip(", ")
                put = words[strength < 0].replace(word, f"({word}:{0.5 + abs(strength) / 2:.3f})")
                texts = [re.sub(pattern, put, text, count=1) for text in texts]
            return self.drawn(texts, seeds)

        return drawer

    def swap(self, slider: str) -> Drawer:
        """The plain prompt first, the pole's for the rest: of half of the steps at strength 1, all at 2."""

        def drawer(texts, seeds, strength):
            till = 1 - abs(strength) / 2
            conditions = [
                [
                    [*self.conditioning(text, start_percent=0.0, end_percent=till)],
                    [*self.conditioning(pole(slider, text, strength > 0), start_percent=till, end_percent=1.0)],
                ]
                if 0 < till < 1
                else [[*self.conditioning(text if till else pole(slider, text, strength > 0))]]
                for text in texts
            ]
            return self.conditioned(conditions, seeds)

        return drawer

    def interpolation(self, slider: str) -> Drawer:
        """Between the prompts' embeddings: half way at strength 1, the pole's at 2."""

        def drawer(texts, seeds, strength):
            conditions = []
            for text in texts:
                (plain, pooled), (end, end_pooled) = self.encode(text), self.encode(pole(slider, text, strength > 0))
                way = abs(strength) / 2
                conditions.append([[plain + way * (end - plain), {"pooled_output": pooled + way * (end_pooled - pooled)}]])
            return self.conditioned(conditions, seeds)

        return drawer

    def sweep(self, slider: str, arm: str, drawer: Drawer, seeds: list[int], strengths: list[float], of: str = "") -> Sweep:
        """Draw and read; what was done before with the same weights is taken from the last run, each strength by itself. `of`: what else
        it depends on.
        """
        began, texts, rows = time.monotonic(), [prompt(slider, seed) for seed in seeds], {}
        for strength in sorted({0.0, *strengths}, key=abs):
            drawn = self.kept([slider, arm, seeds, strength], of, lambda strength=strength: drawer(texts, seeds, strength).half())
            rows[strength] = drawn.float()  # finer than a PNG of it
        done = self._read(slider, rows, strengths)
        print(f"{self.name} {slider}, {arm}: {len(seeds)} seeds, {len(rows)} strengths, {time.monotonic() - began:.0f} s", flush=True)
        return done

    def kept(self, what: Any, of: str, make: Callable) -> Any:
        """What `make` gives, or gave in an earlier run with the same weights: long runs can be stopped and begun again."""
        key = json.dumps([self.name, self.about, what, of])
        file = KEPT / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.pt"
        if not file.exists():
            made = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(made, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        return torch.load(file, weights_only=True)

    def by_released_trainer(self, slider: str) -> tuple[dict[str, torch.Tensor], float]:
        return self.kept(f"{slider} released trainer", "", lambda: _released.train(self.released, slider))

    def _read(self, slider: str, rows: dict[float, torch.Tensor], strengths: list[float]) -> Sweep:
        readings = {strength: self.eye.read(pictures) for strength, pictures in rows.items()}
        plain, columns = readings[0.0], [[], [], [], []]
        for strength in strengths:
            read = readings[strength]
            columns[0].append([attribute(slider, *three) for three in zip(rows[strength], read, plain, strict=True)])
            columns[1].append([float(reading.valid > 0.5) for reading in read])
            columns[2].append([others(slider, *pair) for pair in zip(plain, read, strict=True)])
            columns[3].append([shift(*pair) for pair in zip(plain, read, strict=True)])
        return Sweep(strengths, *(torch.tensor(column).T for column in columns))


def stacked(conditions: list[list]) -> list[list]:
    """One conditioning for a batch of pictures from one each, which have the same number of entries with the same options."""
    made = []
    for entries in zip(*conditions, strict=True):
        pooled = torch.cat([options["pooled_output"] for _, options in entries])
        made.append([torch.cat([context for context, _ in entries]), {**entries[0][1], "pooled_output": pooled}])
    return made


def spearman(values: torch.Tensor) -> torch.Tensor:
    """(N, K) values at K rising strengths -> (N,) rank correlations, ties at their middle rank."""
    less = (values[:, :, None] > values[:, None, :]).sum(-1).double()
    equal = (values[:, :, None] == values[:, None, :]).sum(-1).double()
    ranks = less + (equal - 1) / 2
    steps = torch.arange(values.shape[1], dtype=torch.float64)
    ranks, steps = ranks - ranks.mean(1, keepdim=True), steps - steps.mean()
    spread = ranks.norm(dim=1) * steps.norm()
    return torch.where(spread > 0, (ranks * steps).sum(1) / spread.clamp(min=1e-12), torch.zeros_like(spread))


def span(slider: str, values: torch.Tensor) -> torch.Tensor:
    """(N, strengths) attribute -> (N,) share of the attribute's range that lies between the outermost strengths."""
    return (values[:, -1] - values[:, 0]) / RANGES[slider]


def whole(values: torch.Tensor) -> torch.Tensor:
    """Seeds that were seen at all strengths."""
    return values[~values.isnan().any(1)]


def at_effect(slider: str, sweep: Sweep, effect: float = EFFECT) -> dict[int, torch.Tensor]:
    """By the way that the mean attribute goes (1 up, -1 down): (seeds,) change of the other attributes where it has gone so much of its
    range, between the strengths that were drawn. A way that does not lead so far is left out.
    """
    zero = sweep.strengths.index(0.0)
    moved = (sweep.attribute.nanmean(0) - sweep.attribute[:, zero].nanmean()) / RANGES[slider]
    found = {}
    for way, at in ((1, range(zero, len(sweep.strengths))), (-1, range(zero, -1, -1))):
        for near, far in pairwise(at):
            if way * moved[far] >= effect > way * moved[near]:
                part = float((effect - way * moved[near]) / (way * (moved[far] - moved[near])))
                found[way] = sweep.changed[:, near] + part * (sweep.changed[:, far] - sweep.changed[:, near])
                break
    return found


def together(found: dict[int, torch.Tensor], ways: Iterable[int]) -> torch.Tensor:
    """(seeds,) mean over some ways."""
    return torch.stack([found[way] for way in ways]).mean(0)


def best_rival(mine: dict[int, torch.Tensor], rivals: list[dict[int, torch.Tensor]]) -> Figure | None:
    """Our change of others over that of the rival which changes least, over the ways that both lead; None where no rival leads anywhere."""
    compared = [(rival, ways) for rival in rivals if (ways := sorted(mine.keys() & rival.keys()))]
    if not compared:
        return None
    rival, ways = min(compared, key=lambda pair: float(together(*pair).mean()))
    return ratio(together(mine, ways), together(rival, ways))


def ratio(above: torch.Tensor, below: torch.Tensor, resamples: int = 2000) -> Figure:
    """Of two means, with a bootstrap interval over each one's seeds."""
    generator = torch.Generator().manual_seed(0)

    def means(values):
        return values[torch.randint(len(values), (resamples, len(values)), generator=generator)].mean(1)

    drawn = means(above.double()) / means(below.double()).clamp(min=1e-9)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Figure(float(above.double().mean() / below.double().mean()), low, high, len(above))


def random_twin(state: dict[str, torch.Tensor], seed: int = 7) -> dict[str, torch.Tensor]:
    """A LoRA of the same layers and norms pointing nowhere in particular."""
    generator = torch.Generator().manual_seed(seed)

    def like(tensor):
        drawn = torch.randn(tensor.shape, generator=generator)
        return drawn * tensor.float().norm() / drawn.norm()

    return {key: tensor if key.endswith("alpha") else like(tensor) for key, tensor in state.items()}


def stock_differences(lab_model, texts: list[str], file: str, seeds: list[int]) -> torch.Tensor:
    """(seeds,) largest absolute difference of a latent, Slider against the stock loader, over four strengths."""
    import comfy.sd
    import comfy.utils

    state = comfy.utils.load_torch_file(str(resolve("loras", file)), safe_load=True)
    differences = []
    for strength in (-2.0, -0.5, 1.0, 2.0):
        ours = Slider.execute(lab_model.model, file, strength, 0.0, 1.0).result[0]
        theirs, _ = comfy.sd.load_lora_for_models(lab_model.model, None, state, strength, 0.0)
        pair = [draw_latents(lab_model, texts, size=64, seeds=seeds, model=model, cfg=CFG) for model in (ours, theirs)]
        differences.append((pair[0] - pair[1]).abs().flatten(1).amax(1))
    return torch.stack(differences).amax(0)


def arm(model: str, slider: str, name: str, sweep: Sweep) -> dict:
    """One arm's course: mean attribute, where seen, validity and change of others at each strength; and the change at equal effect."""
    return {
        "model": model,
        "slider": slider,
        "arm": name,
        "n": len(sweep.valid),
        "strength": sweep.strengths,
        "attribute": [round(value, 4) for value in sweep.attribute.nanmean(0).tolist()],
        "valid": [round(value, 4) for value in sweep.valid.mean(0).tolist()],
        "changed": [round(value, 4) for value in sweep.changed.mean(0).tolist()],
        "interference": {way: round(float(changed.mean()), 4) for way, changed in at_effect(slider, sweep).items()},
        "spearman": round(float(spearman(whole(sweep.attribute)).mean()), 4) if len(whole(sweep.attribute)) else None,
    }


def measure_slider(bench: Bench, slider: str, seeds: list[int], *, full: bool) -> tuple[dict[str, Figure], list[dict]]:
    """The figures of one slider, and what it did."""
    file, few, of = sliders.file_of(bench.name, slider), seeds[:ARM_SEEDS], digest(bench.name, slider)
    state = adapters.read(resolve("loras", file))
    ours = bench.sweep(slider, "ours", bench.slider(file), seeds, STRENGTHS, of)
    figures = {
        "spearman": mean(spearman(whole(ours.attribute))),
        "span": mean(span(slider, whole(ours.attribute))),
        "seen": mean((~ours.attribute.isnan()).double().mean(1)),
        "valid_zero": share(ours.valid[:, STRENGTHS.index(0.0)] > 0),
    }
    arms = [arm(bench.name, slider, "ours", ours)]
    if full:
        lost = ours.valid[:, [STRENGTHS.index(0.0)]] - ours.valid
        figures["validity_loss"] = mean(lost[:, int(lost.mean(0).argmax())])
        late = bench.sweep(slider, "ours, late", bench.slider(file, start=bench.start), few, [-2.0, 0.0, 2.0], of)
        moved = late.moved[:, [0, 2]].flatten()
        figures["position_shift"] = mean(moved[~moved.isnan()])
        figures["stock_difference"] = mean(stock_differences(bench.lab, [prompt(slider, seed) for seed in few[:8]], file, few[:8]))
        twin = bench.sweep(slider, "random LoRA of equal norms", bench.slider("", lora=random_twin(state)), few, [-2.0, 0.0, 2.0], of)
        figures["control_span"] = mean(span(slider, whole(twin.attribute)).abs())
        arms.append(arm(bench.name, slider, "random LoRA of equal norms", twin))
        if mine := at_effect(slider, ours):
            figures["interference"] = mean(together(mine, mine))
    return named(bench, slider, figures), arms


def measure_prompts(bench: Bench, slider: str, seeds: list[int]) -> tuple[dict[str, Figure], list[dict]]:
    """One slider beside what prompts alone can do, and the training-free forms."""
    sweeps = {name: bench.sweep(slider, name, getattr(bench, name)(slider), seeds, STRENGTHS) for name in PROMPT_ARMS}
    rivals = [at_effect(slider, sweep) for sweep in sweeps.values()]
    sweeps |= {form: bench.sweep(slider, form, bench.free(slider, form), seeds, STRENGTHS) for form in ("embedding", "guidance")}
    figures = {"free_spearman": mean(spearman(whole(sweeps["embedding"].attribute)))}
    if compared := best_rival(shipped_effect(bench, slider, seeds), rivals):
        figures["interference_ratio"] = compared
    return named(bench, slider, figures), [arm(bench.name, slider, name, sweep) for name, sweep in sweeps.items()]


def measure_trained(bench: Bench, slider: str, seeds: list[int]) -> tuple[dict[str, Figure], list[dict]]:
    """One slider beside other trainings of it, and for some the time that they take."""
    of, mine, figures, arms = digest(bench.name, slider), shipped_effect(bench, slider, seeds), {}, []
    made = {name: bench.kept(f"{slider} {name}", of, lambda way=way: way(bench.name, slider)) for name, way in _trainings.WAYS.items()}
    if bench.released and slider in TIMED:
        made["released trainer"] = bench.by_released_trainer(slider)
    for name, (lora, seconds) in made.items():
        sweep = bench.sweep(slider, name, bench.slider("", lora=lora), seeds, STRENGTHS, of)
        arms.append({**arm(bench.name, slider, name, sweep), "seconds": round(seconds, 1)})
        key = {"published loop": "published", "released trainer": "released"}.get(name)
        if key and (compared := best_rival(mine, [at_effect(slider, sweep)])):
            figures[f"interference_to_{key}"] = compared
    if slider in TIMED:
        found, told = training_time(bench, slider, seeds)
        figures, arms = figures | found, arms + told
    return named(bench, slider, figures), arms


def shipped_effect(bench: Bench, slider: str, seeds: list[int]) -> dict[int, torch.Tensor]:
    """Of the shipped slider, as `at_effect`."""
    drawer = bench.slider(sliders.file_of(bench.name, slider))
    return at_effect(slider, bench.sweep(slider, "ours", drawer, seeds, STRENGTHS, digest(bench.name, slider)))


def named(bench: Bench, slider: str, figures: dict[str, Figure]) -> dict[str, Figure]:
    return {f"{bench.name}_{slider}_{key}": figure for key, figure in figures.items()}


def digest(model: str, *names: str) -> str:
    """Of sliders' files, shipped ones."""
    made = hashlib.blake2b(digest_size=8)
    for name in names:
        made.update(Path(resolve("loras", sliders.file_of(model, name))).read_bytes())
    return made.hexdigest()


def training_time(bench: Bench, slider: str, seeds: list[int]) -> tuple[dict[str, Figure], list[dict]]:
    """Seconds that the slider's workflow trains, and how long it trains until it has a rival's effect, over the rival's time: the first of
    TRAINED steps whose span between -1 and 1 is no smaller.
    """
    graph = sliders.workflow(bench.name, slider)
    of, steps = json.dumps(sliders.settings(graph)), sliders.settings(graph)["steps"]
    told, spans, took = [], {}, {}

    def time_of(name: str, way: Callable) -> None:
        lora, took[name] = bench.kept([f"time of {slider}", name], of, way)
        sweep = bench.sweep(slider, f"time, {name}", bench.slider("", lora=lora), seeds, [-1.0, 0.0, 1.0], of)
        spans[name] = float(span(slider, whole(sweep.attribute)).mean())
        told.append({"model": bench.name, "slider": slider, "arm": name, "seconds": round(took[name], 1), "span_1": round(spans[name], 4)})

    time_of("published loop", lambda: _trainings.released(bench.name, slider))
    if bench.released:
        time_of("released trainer", lambda: bench.by_released_trainer(slider))
    left, figures = {"published loop": "train_time_ratio", "released trainer": "train_time_to_released"}, {}
    left = {rival: key for rival, key in left.items() if rival in spans}
    for part in TRAINED:
        name = f"ours, {part:.0%}"
        time_of(name, lambda part=part: _trainings.trained(sliders.workflow(bench.name, slider), steps=round(steps * part)))
        for rival in [rival for rival in left if spans[name] >= spans[rival]]:
            figures[left.pop(rival)] = took[name] / took[rival]
        if not left:  # a rival that is never reached has no figure: not met
            break
    figures["train_seconds"] = took[name] / part
    return {key: Figure(value, value, value, 1) for key, value in figures.items()}, told


def composed(bench: Bench, names: list[str], seeds: list[int]) -> tuple[dict[str, Figure], list[dict]]:
    """What sliders keep of their effect where all the others are on, each at +1 or -1; and how many random ones the model bears."""
    signs = {name: 1.0 if at % 2 else -1.0 for at, name in enumerate(names)}
    texts = [prompt("size", seed).replace("grey background", "background") for seed in seeds]
    texts = [re.sub(r"on a .* background", "on a grey background", re.sub("|".join(COLOURS), "cyan", text)) for text in texts]

    def drawn(chosen: list[str]) -> tuple[torch.Tensor, list]:
        model = bench.lab.model
        for name in chosen:
            model = Slider.execute(model, sliders.file_of(bench.name, name), signs[name], 0.0, 1.0).result[0]
        pictures = bench.drawn(texts, seeds, model)
        return pictures, bench.eye.read(pictures)

    def effect(name: str, with_it: tuple, without: tuple) -> torch.Tensor:
        """(seeds,) how far it moves its attribute, its own way; the scene is the one without it."""
        before, after = ([attribute(name, *one) for one in zip(*pair, without[1], strict=True)] for pair in (without, with_it))
        return signs[name] * (torch.tensor(after) - torch.tensor(before))

    plain, everything, kept = drawn([]), drawn(names), {}
    for name in names:
        alone, beside = effect(name, drawn([name]), plain), effect(name, everything, drawn([one for one in names if one != name]))
        seen = ~(alone.isnan() | beside.isnan())
        kept[name] = ratio(beside[seen], alone[seen])
    figures = {"compose5": min(kept.values(), key=lambda figure: figure.value)}
    state = adapters.read(resolve("loras", sliders.file_of(bench.name, names[0])))
    for count in (10, 20, 50):
        model = bench.lab.model
        for number in range(count):
            model = Slider.execute(model, "none", 1.0, 0.0, 1.0, random_twin(state, 100 + number)).result[0]
        readings = bench.eye.read(bench.drawn(texts, seeds, model))
        figures[f"compose_{count}"] = share([reading.valid > 0.5 for reading in readings])
    told = [{"model": bench.name, "arm": "five at once", "slider": name, "kept": round(figure.value, 4)} for name, figure in kept.items()]
    return {f"{bench.name}_{key}": figure for key, figure in figures.items()}, told


def moving(bench: Bench, name: str) -> tuple[dict[str, Figure], list[dict]]:
    """What it costs to draw at another strength, by the Slider node and by the stock loader: weights written, and seconds until the model
    is first called. The model is loaded and has drawn at a first strength.
    """
    import comfy.sd
    from comfy.model_patcher import ModelPatcher

    file, text, written, called = sliders.file_of(bench.name, name), prompt(name, FIRST_SEED), [], []
    state, plain = adapters.read(resolve("loras", file)), ModelPatcher.patch_weight_to_device

    def counted(self, key, *args, **kwargs):
        written.append(key)
        return plain(self, key, *args, **kwargs)

    def first_call(apply_model, options):
        called.append(time.perf_counter())
        return apply_model(options["input"], options["timestep"], **options["c"])

    def cost(put) -> tuple[float, int]:
        bench.drawn([text], [FIRST_SEED], put(0.5))
        written.clear()
        called.clear()
        began = time.perf_counter()
        model = put(0.6).clone()
        model.set_model_unet_function_wrapper(first_call)
        bench.drawn([text], [FIRST_SEED], model)
        return called[0] - began, len(written)

    ways = {
        "ours": lambda strength: Slider.execute(bench.lab.model, file, strength, 0.0, 1.0).result[0],
        "stock loader": lambda strength: comfy.sd.load_lora_for_models(bench.lab.model, None, state, strength, 0.0)[0],
    }
    ModelPatcher.patch_weight_to_device = counted
    try:
        costs = {way: [cost(put) for _ in range(5)] for way, put in ways.items()}
    finally:
        ModelPatcher.patch_weight_to_device = plain
    seconds, counts = (mean([float(one[at]) for one in costs["ours"]]) for at in (0, 1))
    told = [
        {"model": bench.name, "arm": f"moving a strength, {way}", "seconds": [round(one[0], 4) for one in found], "written": found[0][1]}
        for way, found in costs.items()
    ]
    return {f"{bench.name}_repatch_count": counts, f"{bench.name}_set_up_seconds": seconds}, told


class Part(NamedTuple):
    """What can be measured by itself: of a model and one slider, or of all sliders together."""

    model: str
    slider: str
    kind: str

    @property
    def label(self) -> str:
        return "-".join(word for word in self if word)

    @property
    def sliders(self) -> list[str]:
        return [self.slider] if self.slider else sliders.shipped(self.model)

    def measure(self, bench: Bench, seeds: list[int], sample: bool) -> tuple[dict[str, Figure], list[dict]]:
        few, names = seeds[:ARM_SEEDS], self.sliders
        if self.kind == "moving":
            figures, told = moving(bench, names[0])
            return {key: figure for key, figure in figures.items() if not (sample and key.endswith("_seconds"))}, told  # another machine's
        if self.kind:
            return {PROMPTS: measure_prompts, TRAINING: measure_trained, TOGETHER: composed}[self.kind](bench, self.slider or names, few)
        return measure_slider(bench, self.slider, seeds, full=not sample)


PROMPTS, TRAINING, TOGETHER, MOVING = "prompts", "trained", "together", "moving"
# What is of a slider alone comes first.
PARTS = {
    part.label: part
    for part in (
        *(Part(model, name, "") for model in lab.MODELS for name in sliders.shipped(model)),
        *(Part(model, "", MOVING) for model in lab.MODELS if sliders.shipped(model)),
        *(Part(model, "", TOGETHER) for model in lab.MODELS if len(sliders.shipped(model)) > 1),
        *(Part(model, name, PROMPTS) for model in lab.MODELS for name in sliders.shipped(model)),
        *(Part("unet", name, TRAINING) for name in sliders.shipped("unet") if "target" in sliders.settings(sliders.workflow("unet", name))),
    )
}
OURS = [label for label, part in PARTS.items() if part.kind in ("", MOVING, TOGETHER)]


def about(label: str) -> dict:
    """What a part's results are of: of which slider files, or what costs hang on, of how many numbers in which layers."""
    if label not in PARTS:
        return {"of": None}
    part = PARTS[label]
    if part.kind != MOVING:
        return {"of": digest(part.model, *part.sliders)}
    layers = adapters.read(resolve("loras", sliders.file_of(part.model, part.sliders[0])))
    told = json.dumps([(key, list(tensor.shape)) for key, tensor in sorted(layers.items())])
    return {"of": hashlib.blake2b(told.encode(), digest_size=8).hexdigest()}


def _measure(sample: bool, labels: Sequence[str], released: Path | None = None) -> tuple[dict[str, Figure], list[dict]]:
    seeds = list(range(FIRST_SEED, FIRST_SEED + SEEDS))
    if sample:  # of two sliders, and what costs no more than seconds
        chosen = random.SystemRandom()
        own = [label for label in labels if not PARTS[label].kind]
        labels = [*chosen.sample(own, min(2, len(own))), *(label for label in labels if PARTS[label].kind == MOVING)]
        seeds = sorted(chosen.sample(seeds, SAMPLE))
    figures, arms = {}, []
    with torch.inference_mode():
        for part in map(PARTS.get, labels):
            found, told = part.measure(Bench(part.model, released), seeds, sample)
            figures, arms = figures | found, arms + told
    return figures, arms


def claims(released: bool = False) -> dict[str, Claim]:
    """What is claimed of every shipped slider, by the figure's name."""
    made = {f"{model}_{slider}_{key}": claim for model in lab.MODELS for slider in sliders.shipped(model) for key, claim in CLAIMS.items()}
    texts = [slider for slider in sliders.shipped("unet") if slider != "neon"]
    made |= {f"unet_{slider}_{key}": claim for slider in texts for key, claim in TO_PUBLISHED.items()}
    timed = TIMES | (TO_RELEASED if released else {})
    made |= {f"unet_{slider}_{key}": claim for slider in TIMED for key, claim in timed.items() if slider in sliders.shipped("unet")}
    for model in lab.MODELS:
        if sliders.shipped(model):
            made |= {f"{model}_repatch_count": Claim(high=0), f"{model}_set_up_seconds": Claim(high=0.1)}
    return made | {f"{model}_compose5": Claim(low=0.8) for model in lab.MODELS if len(sliders.shipped(model)) > 1}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--released", type=Path)
    parser.add_argument("--ours", action="store_true")
    own, argv = parser.parse_known_args(argv)
    lab.show_files()
    if own.ours:
        argv = [*argv, "--again", *OURS]
    measure = partial(_measure, released=own.released)
    return _report.run_parts("sliders", argv, list(PARTS), measure, claims(own.released is not None), about=about)
