"""Adapters trained on a host model: one loop for all that learns, and what it needs of the model.

The host runs nodes in inference mode, and what was loaded there can have no gradient: a `Trainee` works on a copy that can. Everything else
of the host's stays: its layers cast their weights as they do when they sample, patches of other LoRA files are in the weights, and the
model's own `apply_model` makes the predictions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import comfy.conds
import comfy.model_management
import comfy.utils
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from .families import NO_GRADIENT, family_of

LOST = 20.0  # times the loss that training began with: past that it diverges
GOOD_EVERY = 25  # steps between states that a diverging training goes back to
CHECKED = 20  # losses that are compared with those it began with
CLIP_NORM = 1.0
ALL_THERE_IS = 1e20  # bytes
SCALE = 4096.0  # of losses while they are differentiated: models that compute in float16 would lose their small gradients


class TrainingError(ValueError):
    """A training that cannot be begun or went wrong, and what to do about it."""


class Adapter(nn.Module):
    """A layer's low-rank pair while it trains, in float32, beside the layer's `plain` forward.

    alpha   None: the rank, so that nothing is scaled
    square  read no more of the layer's inputs than it has outputs, the first ones
    """

    def __init__(self, layer: nn.Module, rank: int, alpha: float | None, generator: torch.Generator, *, square: bool = False):
        super().__init__()
        convolution = isinstance(layer, nn.Conv2d)
        outputs, self.inputs = sizes(layer)
        inputs = min(self.inputs, outputs) if square else self.inputs
        kernel = tuple(layer.kernel_size) if convolution else ()
        rank = min(rank, inputs, outputs)
        alpha = float(rank) if alpha is None else alpha
        fan_in = inputs * math.prod(kernel)
        # Kaiming with a = sqrt(5), as published trainers draw it: uniform within 1 / sqrt(fan in).
        down = (2 * torch.rand(rank, inputs, *kernel, generator=generator) - 1) / math.sqrt(fan_in)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(outputs, rank, *(1 for _ in kernel)))
        self.alpha, self.scale = alpha, alpha / rank
        self.how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation} if convolution else None
        self.plain = layer.forward

    def forward(self, x, *args, strength: float | torch.Tensor = 0.0, **kwargs):
        y = self.plain(x, *args, **kwargs)
        if isinstance(strength, torch.Tensor):  # one for each of the batch
            strength = strength.to(y).view(-1, *[1] * (y.ndim - 1))
        elif not strength:
            return y
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        channels = -1 if self.how is None else 1
        if self.down.shape[1] < self.inputs:
            x = x.narrow(channels, 0, self.down.shape[1])
        if self.how is None:
            low = nn.functional.linear(nn.functional.linear(x, down), up)
        else:
            low = nn.functional.conv2d(nn.functional.conv2d(x, down, **self.how), up)
        return y + (strength * self.scale) * low

    def whole_down(self) -> torch.Tensor:
        """(rank, all of the layer's inputs, *kernel): what loaders take."""
        down = self.down.detach()
        return torch.cat([down, down.new_zeros(len(down), self.inputs - down.shape[1], *down.shape[2:])], 1)


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear or convolution layer."""
    return (layer.out_channels, layer.in_channels) if isinstance(layer, nn.Conv2d) else (layer.out_features, layer.in_features)


class Trainee:
    """A model with adapters on the layers that a pattern names (None: those of the family's published sliders), for as long as the context
    lasts.

    rank      of all adapters, or what it is for a layer
    alpha     see Adapter, as for `square`
    adapters  by module name (from the host's BaseModel)
    device    where it computes
    thrifty   keep no more of a prediction than what enters each of the model's blocks, and compute the blocks once more for the gradient:
              a third more time, a fraction of the memory
    """

    def __init__(
        self,
        patcher,
        layers: str | None = None,
        *,
        rank: int | Callable[[nn.Module], int],
        alpha: float | None,
        seed: int,
        square: bool = False,
    ):
        config = type(patcher.model.model_config).__name__
        if config in NO_GRADIENT:
            raise TrainingError(
                f"Nothing can be trained on a model of the family {config}: the host computes its attention with an operation that has no "
                "gradient. Train on a model of another family."
            )
        self.family = family_of(patcher.model)
        self.patcher = _trainable(patcher)
        self.layers = self.family.slider_layers if layers is None else layers
        self.rank, self.alpha, self.seed, self.square = rank, alpha, seed, square
        self.strength: float | torch.Tensor = 0.0
        self.thrifty = False
        self.adapters: dict[str, Adapter] = {}

    def __enter__(self) -> Trainee:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_in_training())
            self.load()
            self.model = self.patcher.model
            self.device = self.patcher.load_device
            self.model.requires_grad_(False)
            for name, module in self.model.named_modules():
                if name.rsplit(".", 1)[-1] in ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm"):
                    # The Flux blocks write in place into what these norms keep for the backward pass: gradients would be wrong.
                    stack.callback(module.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:])).remove)
            generator = torch.Generator().manual_seed(self.seed)
            layers = [(name, layer) for name, layer in self.model.named_modules() if _adaptable(layer) and self._is_chosen(name)]
            if not layers:
                raise TrainingError(f"None of this model's layers ({self.family.name}) can be trained with these settings.")
            for name, layer in layers:
                rank = self.rank(layer) if callable(self.rank) else self.rank
                adapter = self.adapters[name] = Adapter(layer, rank, self.alpha, generator, square=self.square).to(self.device)
                _replace_forward(layer, self._forward(adapter), stack)
            self.blocks = [module for module in self.model.modules() if type(module).__name__ in self.family.blocks]
            for block in self.blocks:
                _replace_forward(block, self._recomputed(block.forward), stack)
            self._stack = stack.pop_all()
        return self

    def load(self) -> None:
        """The whole model on its device, and as little else as the host can do with: what a step takes, it does not ask the host for."""
        comfy.model_management.load_models_gpu([self.patcher], memory_required=ALL_THERE_IS, force_full_load=True)

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _is_chosen(self, name: str) -> bool:
        return name.startswith("diffusion_model.") and re.search(self.layers, name.removeprefix("diffusion_model.")) is not None

    def _forward(self, adapter: Adapter):
        return lambda *args, **kwargs: adapter(*args, strength=self.strength, **kwargs)

    def _recomputed(self, plain: Callable) -> Callable:
        def forward(*args, **kwargs):
            if not self.thrifty:
                return plain(*args, **kwargs)
            strength = self.strength  # when the gradient asks for this block again, predict has long put it back

            def again(*args, **kwargs):
                with self._at(strength):
                    return plain(*map(_copied, args), **{name: _copied(value) for name, value in kwargs.items()})

            # The Flux blocks write into what they are given, and so do those after them: a copy is kept, and a copy of that worked on.
            kept = {name: _copied(value) for name, value in kwargs.items()}
            return checkpoint(again, *map(_copied, args), use_reentrant=False, preserve_rng_state=False, **kept)

        return forward

    @contextlib.contextmanager
    def _at(self, strength: float | torch.Tensor) -> Iterator[None]:
        before, self.strength = self.strength, strength
        try:
            yield
        finally:
            self.strength = before

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters.values() for parameter in (adapter.down, adapter.up)]

    def memory(self, x: torch.Tensor, sigma: torch.Tensor, condition: Mapping[str, Any], ahead: int, losses: int) -> Memory:
        """What a step takes that predicts `ahead` times as many pictures without a gradient, and then learns from `losses` predictions at
        x, one after the other (x, sigma and condition as `predict` takes them). The step is played through on shapes alone: nothing is
        computed, no memory is taken.
        """

        def many(value: Any) -> Any:
            return value.repeat(ahead, *[1] * (value.ndim - 1)) if isinstance(value, torch.Tensor) and len(value) == len(x) else value

        tensors = {name: value for name, value in condition.items() if isinstance(value, torch.Tensor)}
        rest = {name: value for name, value in condition.items() if name not in tensors}
        peak = None
        # A layer that shapes alone do not tell of (the host attends piece by piece where memory is short; quantised and custom operations)
        # leaves the estimate out, and must not keep anybody from training.
        with contextlib.suppress(Exception), FakeTensorMode(allow_non_fake_inputs=True) as shapes:
            # A weight's stand-in lives only as long as something holds it.
            alive = [shapes.from_tensor(parameter) for parameter in [*self.model.parameters(), *self.parameters()]]
            x, sigma = shapes.from_tensor(x), shapes.from_tensor(sigma)
            tensors = {name: shapes.from_tensor(value) for name, value in tensors.items()}
            with _Counted([*alive, x, sigma, *tensors.values()]) as counted:
                wanted = x
                if ahead:
                    with torch.no_grad():
                        given = {name: many(value) for name, value in tensors.items()} | rest
                        wanted = self.predict(many(x), many(sigma), given, 0.0)[: len(x)]
                for _ in range(min(losses, 2)):  # the second meets the gradients of the first; more are no fuller
                    nn.functional.mse_loss(self.predict(x, sigma, tensors | rest, 1.0), wanted).backward()
            peak = counted.peak
        for parameter in self.parameters():
            parameter.grad = None
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())
        return Memory(weights, 12 * sum(parameter.numel() for parameter in self.parameters()), peak)

    def fit(self, memory: Callable[[], Memory]) -> str:
        """Become thrifty where the memory that is free asks for it, and say what a training takes."""
        needs, free = memory(), comfy.model_management.get_free_memory(self.device)
        if needs.step is None or needs.adapters + needs.step > free:
            self.thrifty = True
            needs = memory()
        told = f"Takes about {_amount(needs.weights)} for the weights, {_amount(needs.adapters)} for the adapters and the optimiser"
        told += " and as much as is free for a step" if needs.step is None else f" and {_amount(needs.step)} for a step"
        if self.thrifty:
            told += f", with blocks computed twice because only {_amount(free)} are free"
        if needs.step is None or needs.adapters + needs.step > free:
            told += ". That may not suffice: if it runs out, make the batch or the pictures smaller"
        return told + "."

    @property
    def sampling(self):
        return self.model.model_sampling

    def noise(self, batch: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
        """(batch, channels, height, width) of unit variance; lengths are those of the latent."""
        return torch.randn(batch, self.model.latent_format.latent_channels, height, width, generator=generator).to(self.device)

    def condition(self, context: torch.Tensor, pooled: torch.Tensor | None, like: torch.Tensor) -> dict[str, Any]:
        """What `predict` takes for texts (batch, rows, width), as the family reads them. `like`: the latents to predict at."""
        given = {"cross_attn": context.clone().to(self.device), "noise": like, "device": self.device, "prompt_type": "positive"}
        given |= {"width": like.shape[-1] * 8, "height": like.shape[-2] * 8}
        if pooled is not None:
            given["pooled_output"] = pooled.clone().to(self.device)
        conds = self.model.extra_conds(**given)
        return {name: cond.process_cond(batch_size=len(like), device=self.device, area=None).cond for name, cond in conds.items()}

    def predict(self, x: torch.Tensor, sigma: torch.Tensor, condition: Mapping[str, Any], strength: float | torch.Tensor) -> torch.Tensor:
        """What the model predicts at x (batch, channels, height, width) with noise `sigma` (batch,): the noise, for a flow the velocity,
        both as (x - x0) / sigma. strength: of the adapters, one for all or (batch,).
        """
        with self._at(strength):
            clean = self.model.apply_model(x, sigma, **condition, transformer_options={})
        return (x - clean) / sigma[:, None, None, None]

    def state(self, name_of: Callable[[str], str]) -> dict[str, torch.Tensor]:
        """The adapters as a LORA_MODEL under published names."""
        state = {}
        for module, adapter in self.adapters.items():
            name = name_of(module)
            state[f"{name}.lora_down.weight"] = adapter.whole_down().cpu().clone()
            state[f"{name}.lora_up.weight"] = adapter.up.detach().cpu().clone()
            state[f"{name}.alpha"] = torch.tensor(float(adapter.alpha))
        return state


class Memory(NamedTuple):
    """Bytes that a training takes: the model's weights; the adapters and the optimiser's two copies of them; one step at its fullest, with
    the gradients that it makes (None: not known).
    """

    weights: int
    adapters: int
    step: int | None


class _Counted(TorchDispatchMode):
    """Bytes of the storages that operations made and that something still holds: now, and at the fullest. `given`: what was there."""

    def __init__(self, given: Sequence[torch.Tensor]):
        super().__init__()
        self.now, self.peak = 0, 0
        self._held = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held:
                    self._held[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, storage: int) -> None:
        self.now -= self._held.pop(storage, 0)


class Objective:
    """What a `Loop` trains: the losses of a step, and what is carried from step to step."""

    def losses(self, step: int) -> list[Callable[[], torch.Tensor]]:
        """Each is differentiated by itself, which holds one prediction in memory at a time. Every objective has its own."""
        raise NotImplementedError

    def done(self, step: int) -> None:
        """Called after each step."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of it."""
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from there."""

    def memory(self) -> Memory:
        """What training on it takes; every objective says its own."""
        raise NotImplementedError


class Outcome(NamedTuple):
    """How a training ended: its losses, and what to tell about it."""

    losses: list[float]
    told: list[str]


class Loop:
    """Steps of AdamW on parameters, with a checkpoint to resume from after a cancel, and a way back from a divergence.

    identity  what the training is of (`identity_of`): a checkpoint of another one is not resumed
    file      where the checkpoint lies; None: none is kept
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, steps: int, rate: float, identity: str, file: Path | None):
        self.parameters, self.steps, self.file = list(parameters), steps, file
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        self.identity = identity
        self.losses: list[float] = []
        # By the steps that were done: the last two, because what diverges is known for it only CHECKED steps later.
        self.good: list[tuple[int, list[torch.Tensor]]] = [(0, self._copies())]
        self.resumed = 0

    def run(self, objective: Objective, each: Callable[[int], None] = lambda step: None) -> Outcome:
        """Train to the last step. `each` is called after every step, may show a preview and may raise to cancel."""
        self._resume(objective)
        told = [f"Resumed at step {self.resumed}."] if self.resumed else []
        try:
            for step in range(len(self.losses), self.steps):
                comfy.model_management.throw_exception_if_processing_interrupted()
                self.optimizer.zero_grad(set_to_none=True)
                total = 0.0
                for part in objective.losses(step):
                    loss = part()
                    (SCALE * loss).backward()
                    total += float(loss.detach())
                for parameter in self.parameters:
                    if parameter.grad is not None:
                        parameter.grad.div_(SCALE)
                norm = torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
                sudden = not (math.isfinite(total) and bool(norm.isfinite()))
                if not sudden:
                    self.optimizer.step()
                self.losses.append(total)  # a step counts once it is done: memory may run out in it
                if sudden or self._diverged():
                    told.append(self._go_back(1 if sudden else CHECKED))
                    break
                if (step + 1) % GOOD_EVERY == 0:
                    self.good = [self.good[-1], (step + 1, self._copies())]
                objective.done(step)
                each(step)
        except BaseException:
            self._save(objective)
            raise
        if self.file is not None:
            self.file.unlink(missing_ok=True)
        return Outcome(self.losses, told)

    def _diverged(self) -> bool:
        first, last = self.losses[:CHECKED], self.losses[-CHECKED:]
        return len(self.losses) >= 2 * CHECKED and min(last) > LOST * max(max(first), 1e-8)

    def _go_back(self, steps: int) -> str:
        """To the last state kept that is at least so many steps old."""
        latest = len(self.losses) - steps
        step, copies = next((good for good in reversed(self.good) if good[0] <= latest), self.good[0])
        with torch.no_grad():
            for parameter, kept in zip(self.parameters, copies, strict=True):
                parameter.copy_(kept)
        return (
            f"Stopped at step {len(self.losses)} of {self.steps}: the loss went from {self.losses[0]:.3g} to {self.losses[-1]:.3g}. "
            f"What is kept is the state after step {step}. Train again with a lower learning rate."
        )

    def _copies(self) -> list[torch.Tensor]:
        return [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]

    def _save(self, objective: Objective) -> None:
        if self.file is None or not self.losses:
            return
        kept = {f"parameter.{number}": tensor for number, tensor in enumerate(self._copies())}
        for number, parameter in enumerate(self.parameters):
            kept |= {f"{key}.{number}": torch.as_tensor(value) for key, value in self.optimizer.state[parameter].items()}
        kept |= {f"carried.{name}": tensor for name, tensor in objective.state().items()}
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}
        part = self.file.with_suffix(".part")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file(kept, part, metadata={"identity": self.identity, "losses": json.dumps(self.losses)})
            part.replace(self.file)
        except (OSError, SafetensorError):
            part.unlink(missing_ok=True)  # a full disk loses the checkpoint, and must not hide why the training stopped

    def _resume(self, objective: Objective) -> None:
        if self.file is None or not self.file.exists():
            return
        try:
            with safe_open(self.file, framework="pt") as file:
                told = file.metadata() or {}
                kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        except (OSError, SafetensorError):  # cut short or not ours: begin anew
            return
        numbers = range(len(self.parameters))
        whole = all(f"{key}.{number}" in kept for key in ("parameter", "step", "exp_avg", "exp_avg_sq") for number in numbers)
        if told.get("identity") != self.identity or not whole:
            return
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters):
                parameter.copy_(kept[f"parameter.{number}"])
                self.optimizer.state[parameter] = {
                    "step": kept[f"step.{number}"],
                    **{key: kept[f"{key}.{number}"].to(parameter) for key in ("exp_avg", "exp_avg_sq")},
                }
        self.losses = json.loads(told["losses"])
        self.resumed = len(self.losses)
        self.good = [(self.resumed, self._copies())]
        objective.restore({name.removeprefix("carried."): tensor for name, tensor in kept.items() if name.startswith("carried.")})


def identity_of(patcher, settings: Mapping[str, Any], texts: Sequence[torch.Tensor]) -> str:
    """What a training is of, as a digest: its settings, the texts as they were encoded, the model's file and what patches it."""
    told = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    told.update(repr((patcher.cached_patcher_init or (None, ""))[1]).encode())
    told.update(repr(sorted(patcher.object_patches)).encode())
    for key, patches in sorted(patcher.patches.items(), key=lambda item: str(item[0])):
        for strength, adapter, *_ in patches:
            tensors = [part for part in getattr(adapter, "weights", ()) if isinstance(part, torch.Tensor)]
            told.update(repr((key, strength, [float(tensor.double().sum()) for tensor in tensors])).encode())
    for text in texts:
        told.update(text.detach().float().cpu().numpy().tobytes())
    return told.hexdigest()


def published_names(model) -> Callable[[str], str]:
    """Module name (from the host's BaseModel) -> its name in published LoRA files: `lora_unet_<diffusers path>` for a UNet, and
    `lora_unet_<module>` for any other model; the host reads both.
    """
    config = getattr(model.model_config, "unet_config", {})
    paths = comfy.utils.unet_to_diffusers(config) if "num_res_blocks" in config else {}
    names = {ours.removesuffix(".weight"): theirs.removesuffix(".weight") for theirs, ours in paths.items()}

    def name_of(module: str) -> str:
        own = module.removeprefix("diffusion_model.")
        return "lora_unet_" + names.get(own, own).replace(".", "_")

    return name_of


@contextlib.contextmanager
def _in_training() -> Iterator[None]:
    """The host's switch for code that keeps gradients."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def _trainable(patcher):
    """A patcher whose weights can be in a graph of gradients: a clone, or a copy from its file where they were made in inference mode or
    are loaded layer by layer in each forward, which keeps what one forward made for the next.
    """
    with torch.inference_mode(False):
        if not patcher.is_dynamic() and not any(parameter.is_inference() for parameter in patcher.model.parameters()):
            return patcher.clone()
        if patcher.cached_patcher_init is None:
            raise TrainingError(
                "This model was loaded by a node that does not say how to load it again, which training needs. Load it with one of the "
                "host's own loaders."
            )
        return patcher.clone(disable_dynamic=True, force_deepcopy=True)


def _amount(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _replace_forward(module: nn.Module, forward: Callable, stack: contextlib.ExitStack) -> None:
    """Until the stack is left; what another extension put there comes back."""
    own = vars(module).get("forward")
    module.forward = forward
    stack.callback(vars(module).pop, "forward") if own is None else stack.callback(setattr, module, "forward", own)


def _adaptable(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)
