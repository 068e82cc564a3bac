"""The released text-slider trainer, run as it is on the lab's UNet in diffusers' form.

It is github.com/rohitgandikota/sliders, trainscripts/textsliders, in a checkout that the user names; nothing of it is in this pack. What is
put in its place: the models that it loads, the number of pixels to a latent cell (its constant is 8, the lab's UNet has 4), float32 for
bfloat16, and the two packages that a processor has no use for (wandb, xformers). Its settings are those of its own data/config.yaml and
data/prompts.yaml, but for the words and the size of the picture.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import torch

from ..host import lab
from ..lab import export, sliders
from ..lab.train_text import load_encoder
from ..nodes.slider_training import prompts

MODULES = ("config_util", "debug_util", "lora", "model_util", "prompt_util", "train_lora", "train_util")
SETTINGS = {
    "network": {"type": "c3lier", "rank": 4, "alpha": 1.0, "training_method": "noxattn"},
    "train": {
        "precision": "float32",
        "noise_scheduler": "ddim",
        "iterations": 1000,
        "lr": 2e-4,
        "optimizer": "AdamW",
        "lr_scheduler": "constant",
        "max_denoising_steps": 50,
    },
}
GUIDANCE = 4.0


@contextlib.contextmanager
def _its_modules(folder: Path) -> Iterator[types.ModuleType]:
    """Its train_lora, with what it imports by bare names; gone afterwards."""
    if not (folder / "train_lora.py").is_file():
        raise SystemExit(f"There is no train_lora.py in {folder}: name a checkout of the released sliders repository.")
    import diffusers.utils  # noqa: F401 - looks for wandb when it is first imported, and must not find ours

    sys.path.insert(0, str(folder))
    stood_in = {"wandb": types.ModuleType("wandb")}
    before = {name: sys.modules.pop(name, None) for name in (*MODULES, *stood_in)}
    sys.modules.update(stood_in)
    try:
        yield importlib.import_module("train_lora")
    finally:
        sys.path.remove(str(folder))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def train(checkout: Path, slider: str, *, seed: int = 1, **changes) -> tuple[dict[str, torch.Tensor], float]:
    """A slider's LoRA by the released trainer from the words of its own workflow, and the seconds of its training loop alone."""
    rows = prompts(sliders.settings(sliders.workflow("unet", slider)))
    # It draws a bar for every walk of every step.
    quiet = contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO())
    with (
        torch.inference_mode(False),  # or the weights below could not be trained through
        torch.enable_grad(),
        _its_modules(checkout / "trainscripts" / "textsliders") as its,
        tempfile.TemporaryDirectory() as scratch,
        quiet[0],
        quiet[1],
    ):
        unet, tokenizer = export.export_unet(lab.WEIGHTS), lab.tokenizer()
        unet.enable_xformers_memory_efficient_attention = lambda: None
        tokenizer.model_max_length = lab.TEXT_CONFIG["max_position_embeddings"]
        scheduler = its.model_util.create_noise_scheduler("ddim", prediction_type="epsilon")
        its.model_util.load_models = lambda *args, **kwargs: (tokenizer, load_encoder(lab.WEIGHTS, "cpu"), unet, scheduler)
        its.train_util.VAE_SCALE_FACTOR = lab.downscale("unet")
        began, flush = [], its.flush

        def flushed():  # what it calls between the preparation and the loop, and after each step
            flush()
            began.append(time.monotonic())

        its.flush = flushed
        config = its.RootConfig(
            prompts_file="",
            pretrained_model={"name_or_path": "lab"},
            network=SETTINGS["network"],
            train=SETTINGS["train"] | changes,
            save={"name": slider, "path": scratch, "per_steps": 10**6, "precision": "float32"},
            logging={},
            other={},
        )
        asked = [
            its.PromptSettings(
                target=target, neutral=target, positive=more, unconditional=less, action="enhance", guidance_scale=GUIDANCE, resolution=64
            )
            for target, _, more, less in rows
        ]
        torch.manual_seed(seed)
        its.train(config, asked, torch.device("cpu"))
        return torch.load(Path(scratch) / f"{slider}_last.pt", weights_only=True), time.monotonic() - began[0]
