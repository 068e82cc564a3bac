"""What every training of the lab shares: seeding, the optimiser's schedule, averaged weights, legs that stop and resume, and a log."""

from __future__ import annotations

import copy
import json
import logging
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

log = logging.getLogger("concept_nodes.lab")


class Leg:
    """One leg of a training: counts steps towards `steps`, stops after `minutes`, keeps averaged weights, saves and resumes.

    The learning rate warms up over 200 steps, then falls on a cosine to zero at `steps`. With `finish` the fall also ends when the leg's
    minutes do, so that a leg on a lent machine closes with annealed weights whatever its speed turns out to be.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        *,
        folder: Path,
        steps: int,
        minutes: float,
        lr: float,
        finish: bool,
        average: float = 0.999,
        decay: float = 0.01,
        log_every: int = 100,
    ):
        self.name, self.module, self.folder = name, module, folder
        self.steps, self.minutes, self.lr, self.finish, self.rate, self.log_every = steps, minutes, lr, finish, average, log_every
        self.optimizer = torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad],
            lr=lr,
            betas=(0.9, 0.99),
            weight_decay=decay,
            fused=next(module.parameters()).is_cuda,
        )
        self.averaged = copy.deepcopy(module).requires_grad_(False)
        self.step, self.began, self.losses, self.history = 0, time.monotonic(), [], []
        folder.mkdir(parents=True, exist_ok=True)
        self.state_file = folder / f"{name}.state.pt"
        if self.state_file.exists():
            self._resume()

    def _resume(self):
        state = torch.load(self.state_file, map_location=next(self.module.parameters()).device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history = state["step"], state["history"]
        # Without these a resumed leg would draw the same batches and noise again.
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"].cpu())
        log.info("%s: resumed at step %d", self.name, self.step)

    def running(self) -> bool:
        return self.step < self.steps and self._minutes() < self.minutes

    def _minutes(self) -> float:
        return (time.monotonic() - self.began) / 60

    def update(self, loss: torch.Tensor) -> None:
        """One optimiser step on a loss, and the averaged weights after it."""
        self.step += 1
        done = self.step / self.steps
        if self.finish:
            done = max(done, self._minutes() / self.minutes)
        fall = 0.5 * (1 + float(torch.cos(torch.tensor(min(done, 1.0) * torch.pi))))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.step / 200) * fall
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        rate = min(self.rate, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.module.parameters()), 1 - rate)
            for kept, new in zip(self.averaged.buffers(), self.module.buffers(), strict=True):
                kept.copy_(new)
        self.losses.append(loss.detach())
        if self.step % self.log_every == 0 or self.step == 1:
            mean = float(torch.stack(self.losses).mean())
            self.losses.clear()
            self.history.append([self.step, round(mean, 6), round(self._minutes(), 3)])
            log.info("%s: step %d loss %.5f, %.2f min", self.name, self.step, mean, self._minutes())
            draw_curve(self.history, self.folder / f"{self.name}.loss.png")

    def close(self, state: bool = True) -> None:
        """Write the state to resume from, and the loss history."""
        if state:
            torch.save(
                {
                    "module": self.module.state_dict(),
                    "averaged": self.averaged.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "step": self.step,
                    "random": torch.get_rng_state(),
                    "random_cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
                    "history": self.history,
                },
                self.state_file,
            )
        (self.folder / f"{self.name}.log.json").write_text(
            json.dumps({"steps": self.step, "minutes": self._minutes(), "history": self.history})
        )


def mixed(device: str):
    """Autocast to bfloat16 where the device computes faster in it."""
    fast = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, dtype=torch.bfloat16, enabled=fast)


def take_over(module: torch.nn.Module, folder: Path | None, name: str) -> None:
    """Begin from the weights `name` in a folder wherever names and shapes fit, so that a changed model need not learn everything again."""
    if folder is None:
        return
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        old = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    own = module.state_dict()
    fitting = {key: value.float() for key, value in old.items() if key in own and own[key].shape == value.shape}
    module.load_state_dict(fitting, strict=False)
    log.info("%s: begins from %d of %d tensors of %s", name, len(fitting), len(own), folder)


def draw_curve(history: list[list[float]], path: Path) -> None:
    """Draw [step, loss, ...] rows as a curve, the loss on a logarithmic scale, its first and last values written beside it."""
    import math

    from PIL import Image, ImageDraw

    width, height, edge = 640, 240, 8
    points = [(step, math.log(max(loss, 1e-9))) for step, loss, *_ in history]
    low, high = min(y for _, y in points), max(y for _, y in points)
    last = points[-1][0]

    def at(step, y):
        return edge + (width - 2 * edge) * step / last, height - edge - (height - 2 * edge) * (y - low) / ((high - low) or 1)

    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    if len(points) > 1:
        draw.line([at(*point) for point in points], fill=(30, 90, 200), width=2)
    text = f"{path.name.split('.')[0]}: {last} steps, loss {history[0][1]:.4f} to {history[-1][1]:.4f}"
    draw.text((width - edge, edge), text, fill="black", anchor="ra")
    canvas.save(path)


def initialise(module: torch.nn.Module) -> None:
    """Give every layer torch's usual first weights: the host's classes leave them unset."""
    for part in module.modules():
        for kind in (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.Embedding):
            if isinstance(part, kind):
                kind.reset_parameters(part)


def zero(*layers: torch.nn.Module) -> None:
    """Start a residual branch's last layer at nothing."""
    for layer in layers:
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)


def export(tensors: dict[str, torch.Tensor], path: Path, config: dict | None = None, dtype: torch.dtype = torch.float16) -> None:
    """Write a lab weight file: half precision, configuration in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {key: (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu() for key, value in tensors.items()}
    save_file(kept, path, metadata={"format": "pt", "config": json.dumps(config or {})})
    log.info("wrote %s (%.2f MB)", path, path.stat().st_size / 1e6)
