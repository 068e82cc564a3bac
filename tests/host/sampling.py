"""Ways to sample with the host's own nodes, and situations that must leave a model as it was."""

import contextlib
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.sd
import models
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_custom_sampler import (
    BasicGuider,
    CFGGuider,
    DualCFGGuider,
    DualModelGuider,
    KSamplerSelect,
    RandomNoise,
    SamplerCustom,
    SamplerCustomAdvanced,
)
from comfy_extras.nodes_perpneg import PerpNegGuider

import nodes
from concept_nodes.host import capture, dispatcher


def wrapped(model, kind: str, wrapper):
    """A clone with one wrapper of the test's own."""
    model = model.clone()
    model.add_wrapper_with_key(kind, "test", wrapper)
    return model


def count_calls(model, **options) -> int:
    """How often the network is evaluated in one KSampler run."""
    calls = []

    def count(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    models.sample(wrapped(model, WrappersMP.APPLY_MODEL, count), **options)
    return len(calls)


def by_guider(guider, model, *, sampler="euler", steps=4, denoised=False) -> torch.Tensor:
    """What SamplerCustomAdvanced returns with a guider that `guider(model)` makes."""
    with torch.inference_mode():
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)
        noise, picker = RandomNoise.execute(3).result[0], KSamplerSelect.execute(sampler).result[0]
        outputs = SamplerCustomAdvanced.execute(noise, guider(model), picker, sigmas, models.latent(model)).result
    return outputs[1 if denoised else 0]["samples"]


def prompts(model, count: int):
    return [models.conditioning(model, 10 * (index + 1)) for index in range(count)]


def basic(model):
    return BasicGuider.execute(model, *prompts(model, 1)).result[0]


def cfg(model):
    return CFGGuider.execute(model, *prompts(model, 2), 3.0).result[0]


def dual_cfg(style, model):
    return DualCFGGuider.execute(model, *prompts(model, 3), 3.0, 2.0, style).result[0]


def perp_neg(model):
    return PerpNegGuider.execute(model, *prompts(model, 3), 3.0, 0.5).result[0]


def dual_model(negative, model):
    positive, other = prompts(model, 2)
    return DualModelGuider.execute(model, positive, 3.0, model_negative=negative(model), negative=other).result[0]


def other_model(_):
    return models.build(seed=1)


def custom(model) -> torch.Tensor:
    with torch.inference_mode():
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 4)
        picker = KSamplerSelect.execute("dpmpp_2m").result[0]
        return SamplerCustom.execute(model, True, 3, 3.0, *prompts(model, 2), picker, sigmas, models.latent(model)).result[0]["samples"]


def one_by_one(model, order=1):
    """A clone whose conditions are evaluated in calls of their own, as packs for small cards have it; in reverse with an order of -1."""
    model = model.clone()

    def cut(value, row, rows):
        return value[row : row + 1] if isinstance(value, torch.Tensor) and len(value) == rows else value

    def split(apply, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        options, rows = c["transformer_options"], len(x)
        entries = len(options["cond_or_uncond"])
        assert rows == entries, "one picture only"
        outputs = [None] * rows
        for row in range(rows)[::order]:
            own = options | {key: options[key][row : row + 1] for key in ("cond_or_uncond", "uuids")}
            arguments = {key: cut(value, row, rows) for key, value in c.items()} | {"transformer_options": own}
            outputs[row] = apply(x[row : row + 1], t[row : row + 1], **arguments)
        return torch.cat(outputs)

    model.set_model_unet_function_wrapper(split)
    return model


def turned_around(model):
    """A clone that is shown the conditions of a call in the reverse order."""
    model = model.clone()

    def turn(apply, args):
        x, t, c = args["input"], args["timestep"], args["c"]
        options = c["transformer_options"]
        turned = {key: value.flip(0) if isinstance(value, torch.Tensor) and len(value) == len(x) else value for key, value in c.items()}
        turned["transformer_options"] = options | {key: options[key][::-1] for key in ("cond_or_uncond", "uuids")}
        return apply(x.flip(0), t.flip(0), **turned).flip(0)

    model.set_model_unet_function_wrapper(turn)
    return model


def from_picture(model, noise_mask=None, denoise=0.5) -> torch.Tensor:
    latent = {"samples": models.seeded((1, 4, 8, 8), 30)}
    if noise_mask is not None:
        latent["noise_mask"] = noise_mask
    with torch.inference_mode():
        return nodes.common_ksampler(model, 3, 4, 3.0, "euler", "normal", *prompts(model, 2), latent, denoise=denoise)[0]["samples"]


def in_two_stages(model) -> torch.Tensor:
    """Half of the steps, then twice the size for the rest."""
    with torch.inference_mode():
        positive, negative = prompts(model, 2)
        (half,) = nodes.common_ksampler(model, 3, 4, 3.0, "euler", "normal", positive, negative, models.latent(model), last_step=2)
        (large,) = nodes.LatentUpscale().upscale(half, "nearest-exact", 128, 96, "disabled")
        return nodes.common_ksampler(model, 4, 4, 3.0, "euler", "normal", positive, negative, large, start_step=2)[0]["samples"]


def in_areas(model) -> torch.Tensor:
    """Conditions of unequal length, one of them on a part of the picture: several calls of different sizes per step."""
    with torch.inference_mode():
        (part,) = nodes.ConditioningSetArea().append(models.conditioning(model, 11, 9), 32, 64, 0, 0, 1.0)
        positive, negative = models.conditioning(model, 10) + part, models.conditioning(model, 20, 5)
        return nodes.common_ksampler(model, 3, 4, 3.0, "euler", "normal", positive, negative, models.latent(model))[0]["samples"]


WAYS: dict[str, Callable] = {
    **{f"KSampler {name}": partial(models.sample, sampler=name, steps=3) for name in comfy.samplers.SAMPLER_NAMES},
    **{f"scheduler {name}": partial(models.sample, scheduler=name, steps=3) for name in comfy.samplers.SCHEDULER_NAMES},
    "batch of three": partial(models.sample, batch=3),
    "without uncond": partial(models.sample, cfg=1.0),
    "img2img": from_picture,
    "inpaint": partial(from_picture, noise_mask=torch.ones(1, 64, 64).tril(), denoise=1.0),
    "hires fix": in_two_stages,
    "areas": in_areas,
    "SamplerCustom": custom,
    "SamplerCustomAdvanced, BasicGuider": partial(by_guider, basic),
    "SamplerCustomAdvanced, CFGGuider": partial(by_guider, cfg),
    "DualCFGGuider regular": partial(by_guider, partial(dual_cfg, "regular")),
    "DualCFGGuider nested": partial(by_guider, partial(dual_cfg, "nested")),
    "PerpNegGuider": partial(by_guider, perp_neg),
    "DualModelGuider, positive model": partial(by_guider, partial(dual_model, other_model)),
}


class Situation(NamedTuple):
    """`model()` a loaded model, `plain(model)` a graph without our node on it, `run(acting, model)` what happens with it, `nodes` how many
    of our node are chained."""

    model: Callable
    plain: Callable
    run: Callable
    nodes: int = 1


class Failure(Exception):
    """Raised on purpose in the middle of a step."""


def loaded(build=models.build):
    """A model that has sampled before, so that what the host itself does at the first load is over."""
    model = build()
    models.sample(model)
    return model


def compiled(kind="flux"):
    model = models.build(kind).clone()
    set_torch_compile_wrapper(model, backend="eager")
    return model


def half_offloaded(kind="sd15"):
    """A model of which every run finds half the weights offloaded, as on a card that is too small."""
    model = models.build(kind)

    def offload(executor, patcher, *args, **kwargs):
        prepared = executor(patcher, *args, **kwargs)
        patcher.unpatch_model(patcher.offload_device)
        patcher.partially_load(patcher.load_device, patcher.model_size() // 2)
        assert patcher.model.model_lowvram
        return prepared

    return wrapped(model, WrappersMP.PREPARE_SAMPLING, offload)


def samples(acting, model, way=models.sample):
    out = way(acting)
    watching = any(isinstance(effect, capture.CaptureEffect) for effect in dispatcher.attached(acting))
    seen = watching and capture.find(out).groups
    assert seen or not torch.equal(out, way(model)), "the node had no effect here"


def interrupted(acting, model):
    """The stop button in the second step: the host raises inside the next layer."""
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        models.sample(wrapped(acting, WrappersMP.APPLY_MODEL, at_call(2, comfy.model_management.interrupt_current_processing)))
    assert not comfy.model_management.processing_interrupted()


def failing(acting, model):
    """An error deep inside the network, in the second step."""
    acting = acting.clone()
    seen = []

    def attn2_patch(n, context, value, extra_options):
        seen.append(1)
        if len(seen) == 7:
            raise Failure
        return n, context, value

    acting.set_model_attn2_patch(attn2_patch)
    with pytest.raises(Failure):
        models.sample(acting)


def fail(patcher):
    raise Failure


def failing_in(callback_type, first, acting, model):
    """Another pack's callback fails before or after sampling, ahead of ours or behind it."""
    acting = acting.clone()
    ours = acting.callbacks.get(callback_type, {})
    acting.callbacks[callback_type] = {"test": [fail]} | ours if first else ours | {"test": [fail]}
    with pytest.raises(Failure):
        models.sample(acting)


def failing_in_second_model(acting, model):
    """The host begins a guider's second model outside of the block that ends it."""
    negative = acting.clone()
    negative.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "test", fail)
    with pytest.raises(Failure):
        by_guider(partial(dual_model, lambda _: negative), acting)
    # The host leaves this behind itself.
    model.model.current_patcher = None


def at_call(number: int, action):
    """An APPLY_MODEL wrapper that does something in one call."""
    calls = []

    def wrapper(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action()
        return executor(*args, **kwargs)

    return wrapper


def clone_of_clone(acting, model):
    samples(acting.clone().clone(), model)


def deep_copy(acting, model):
    copy = acting.clone(force_deepcopy=True)
    assert copy.model is not acting.model
    assert torch.equal(models.sample(copy), models.sample(acting))


def another_clone_between(acting, model):
    other = model.clone()
    expected, plain = models.sample(acting), models.sample(other)
    assert torch.equal(models.sample(acting), expected)
    assert torch.equal(models.sample(other), plain)


SITUATIONS: dict[str, Situation] = {
    "a run": Situation(loaded, models.sample, samples),
    "two in a chain": Situation(loaded, models.sample, samples, nodes=2),
    "quantised weights": Situation(partial(loaded, models.build_quantised), models.sample, samples),
    "interrupt": Situation(loaded, models.sample, interrupted),
    "error in a step": Situation(loaded, models.sample, failing),
    **{
        f"error in another's {name}, {'first' if first else 'last'}": Situation(loaded, models.sample, partial(failing_in, kind, first))
        for name, kind in {"pre_run": CallbacksMP.ON_PRE_RUN, "cleanup": CallbacksMP.ON_CLEANUP}.items()
        for first in (True, False)
    },
    "error in the second model's pre_run": Situation(loaded, models.sample, failing_in_second_model),
    "clone of a clone": Situation(loaded, models.sample, clone_of_clone),
    "deep copy": Situation(loaded, models.sample, deep_copy),
    "another clone in between": Situation(loaded, models.sample, another_clone_between),
    "compiled": Situation(compiled, partial(models.sample, steps=2), partial(samples, way=partial(models.sample, steps=2))),
    "half offloaded": Situation(half_offloaded, models.sample, samples),
    **{
        name: Situation(loaded, models.sample, partial(samples, way=way))
        for name, way in {
            "SamplerCustomAdvanced": partial(by_guider, cfg),
            "DualCFGGuider": partial(by_guider, partial(dual_cfg, "regular")),
            "PerpNegGuider": partial(by_guider, perp_neg),
            "DualModelGuider": partial(by_guider, partial(dual_model, other_model)),
            "DualModelGuider on one model": partial(by_guider, partial(dual_model, lambda model: model.clone())),
            "DualModelGuider on one patcher": partial(by_guider, partial(dual_model, lambda model: model)),
        }.items()
    },
}


def situation(name: str, refused: Collection[str]) -> Situation:
    """A situation by name, on a model of a kind that is not refused."""
    found = SITUATIONS[name]
    return found._replace(model=partial(compiled, "sd15")) if found.model is compiled and "flux" in refused else found


class Others:
    """What other packs do to a model: an attention override, a wrapper, a cfg function, an injection that replaces a forward."""

    def __init__(self):
        self.seen: set[str] = set()

    def patch(self, model) -> None:
        previous = model.model_options["transformer_options"].get("optimized_attention_override")
        assert previous is None

        def override(attention, *args, **kwargs):
            self.seen.add("override")
            return attention(*args, **kwargs)

        def wrapper(executor, *args, **kwargs):
            self.seen.add("wrapper")
            return executor(*args, **kwargs)

        def post_cfg(args):
            self.seen.add("post_cfg")
            return args["denoised"] * 0.99

        model.model_options["transformer_options"]["optimized_attention_override"] = override
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "others", wrapper)
        model.set_model_sampler_post_cfg_function(post_cfg)
        module = model.model.diffusion_model.input_blocks[1][0].in_layers[2]

        def inject(patcher):
            self.original = module.forward

            def forward(x):
                self.seen.add("forward")
                return self.original(x) * 1.01

            module.forward = forward

        def eject(patcher):
            module.forward = self.original
            del module.forward

        model.set_injections("others", [comfy.model_patcher.PatcherInjection(inject, eject)])

    def complete(self) -> bool:
        return self.seen == {"override", "wrapper", "post_cfg", "forward"}

    def unpatch(self, model) -> None:
        model.detach(unpatch_all=False)


@contextlib.contextmanager
def replaced_forward(module, factory):
    """Someone's forward in the place of a module's, put back at the end as careful code does."""
    before = vars(module).get("forward")
    module.forward = factory(module.forward)
    yield
    if before is None:
        del module.forward
    else:
        module.forward = before
