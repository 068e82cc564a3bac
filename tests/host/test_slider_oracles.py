"""What sliders must do by calculation alone, on models whose right answers have a closed form.

The rest of what is known without trained weights stands elsewhere: nothing at strength 0 (test_laws.py, test_states.py), linear and odd in
the strength, composition, alpha over rank, convolutions (ops/test_lora.py), the gate and shares of sampling (test_dispatcher.py,
test_slider.py), equal and swapped poles (test_poles.py).
"""

import re

import models
import pytest
import torch
from torch import nn

import nodes
from concept_nodes.host import adapters
from concept_nodes.host.slider_training import Entry, RangeObjective, Text, TextObjective
from concept_nodes.host.training import Adapter, Loop, published_names
from concept_nodes.nodes.sliders import SliderPrompts

# Layers that the released trainer adapts, by its names for the choice: what a diffusers path must hold, what it must not.
PUBLISHED = {
    "noxattn": (r"attn1_to|resnets_\d_(conv|time)|samplers_0_conv", r"attn2|time_embed"),
    "innoxattn": (r"attn1_to|resnets_\d_(conv|time)|samplers_0_conv|time_embed", r"attn2"),
    "xattn": (r"attn2_to", "-"),
    "xattn-strict": (r"attn2_to_[qkv]", "-"),
    "selfattn": (r"attn1_to", "-"),
    "full": (r"attn\d_to|resnets_\d_(conv|time)|samplers_0_conv|time_embed", "-"),
    "noxattn-hspace": (r"mid_block.*(attn1_to|resnets_\d_(conv|time))", "attn2"),
}


@pytest.mark.parametrize("method", PUBLISHED)
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_every_key_of_every_published_method_lands_once(kind, method):
    model = models.build(kind)
    name_of = published_names(model.model)
    wanted, barred = PUBLISHED[method]
    state, modules = {}, {}
    for module, layer in model.model.named_modules():
        name = name_of(module)
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not re.search(wanted, name) or re.search(barred, name):
            continue
        modules[module] = name
        kernel = tuple(layer.kernel_size) if isinstance(layer, nn.Conv2d) else ()
        out, inputs = layer.weight.shape[:2]
        state[f"{name}.lora_down.weight"] = models.seeded((4, inputs, *kernel), len(state))
        state[f"{name}.lora_up.weight"] = models.seeded((out, 4, *(1 for _ in kernel)), len(state))
        state[f"{name}.alpha"] = torch.tensor(1.0)
    assert modules
    state["lora_unet_of_another_make.lora_down.weight"] = state["lora_unet_of_another_make.lora_up.weight"] = torch.ones(4, 4)
    placement = adapters.place(model, state, "test")
    assert placement.parts.keys() == modules.keys()
    assert all(len(part.factors) == 1 for part in placement.parts.values())
    assert "lora_unet_of_another_make" in placement.report


class Linear:
    """A denoiser e(c) = M c, with an adapter on M: the objective's answer is known. Rank `rank`, in double precision's place float32."""

    def __init__(self, size: int, rank: int):
        self.layer = nn.Linear(size, size, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(models.seeded((size, size), 1, size**-0.5))
        self.layer.requires_grad_(False)
        self.adapter = Adapter(self.layer, rank, rank, torch.Generator().manual_seed(2))

    def condition(self, context, pooled, like):
        return {"context": context[:, 0]}

    def predict(self, x, sigma, condition, strength):
        return self.adapter(condition["context"], strength=strength)[:, :, None, None]

    def delta(self):
        return (self.adapter.up @ self.adapter.down).detach()


class Still:
    """A way that stays where it is."""

    def __init__(self, batch: int):
        self.x, self.sigma, self.entry = torch.zeros(batch, 1, 1, 1), torch.ones(batch), torch.zeros(batch, dtype=torch.long)

    def walk(self, prediction, step):
        """Stay."""


@pytest.mark.parametrize("strengths", [(1.0,), (1.0, -1.0)])
@pytest.mark.parametrize("eta", [1.0, 2.5, -1.0])
def test_training_on_a_linear_denoiser_reaches_the_closed_form(eta, strengths):
    """D e_t = eta M (e_more - e_less); a slider of rank one is then b a^T with nothing else in it, and strength s gives s times it."""
    trainee = Linear(12, 1)
    target, more, less = (Text(models.seeded((1, 1, 12), seed), None) for seed in (3, 4, 5))
    objective = TextObjective(trainee, [Entry(target, target, more, less)], target, Still(2), eta=eta, strengths=strengths)
    loop = Loop([trainee.adapter.down, trainee.adapter.up], steps=3000, rate=5e-3, identity="", file=None)
    losses = loop.run(objective).losses
    way = eta * (more.context - less.context)[0, 0] @ trainee.layer.weight.T
    torch.testing.assert_close(trainee.delta() @ target.context[0, 0], way, rtol=1e-2, atol=1e-2)
    assert losses[-1] < 1e-5 * losses[0]
    assert int(torch.linalg.matrix_rank(trainee.delta())) == 1
    with torch.no_grad():
        given = trainee.condition(target.context, None, None)
        base, half, back = (trainee.predict(None, None, given, strength)[0, :, 0, 0] for strength in (0.0, 0.5, -2.0))
    torch.testing.assert_close(half - base, way / 2, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(back - base, -2 * way, rtol=1e-2, atol=1e-2)


def test_a_range_trained_on_a_linear_denoiser_leads_to_the_poles_themselves():
    """At eta 1/2 and strengths 2 and -2, what is drawn at guidance 3 from the target is what is drawn there from the pole; with the target
    midway between them one slider can do both.
    """
    trainee = Linear(12, 2)
    more, less, empty = (Text(models.seeded((1, 1, 12), seed), None) for seed in (4, 5, 6))
    target = Text((more.context + less.context) / 2, None)
    ways = Still(6)
    ways.seed, ways.at = 3, torch.zeros(6, dtype=torch.long)
    objective = RangeObjective(trainee, [Entry(target, target, more, less)], empty, ways, eta=0.5)
    losses = Loop([trainee.adapter.down, trainee.adapter.up], steps=3000, rate=5e-3, identity="", file=None).run(objective).losses
    assert losses[-1] < 1e-4 * losses[0]

    def drawn(text, strength=0.0):
        told, plain = (trainee.predict(None, None, trainee.condition(one.context, None, None), strength) for one in (text, empty))
        return plain + 3 * (told - plain)

    with torch.no_grad():
        for strength, pole in ((2.0, more), (-2.0, less)):
            torch.testing.assert_close(drawn(target, strength), drawn(pole), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(drawn(target, 1.0), (drawn(target) + drawn(more)) / 2, rtol=2e-2, atol=2e-2)


class Gaussian(nn.Module):
    """The exact denoiser of pictures that are normal about their prompt's mean (its first row's first numbers, one a channel)."""

    SPREAD = 0.5

    def __init__(self, sampling, flow: bool, channels: int):
        super().__init__()
        self.sampling, self.flow, self.channels = sampling, flow, channels
        self.dtype = torch.float32

    def forward(self, x, t, context=None, **_):
        mean = context[:, 0, : self.channels, None, None]
        if self.flow:
            sigma = (t / self.sampling.multiplier)[:, None, None, None].to(x)
            share = (1 - sigma) * self.SPREAD**2 / ((1 - sigma) ** 2 * self.SPREAD**2 + sigma**2)
            return (x - mean - share * (x - (1 - sigma) * mean)) / sigma
        sigma = self.sampling.sigma(t)[:, None, None, None].to(x)
        x = x * (sigma**2 + 1).sqrt()
        return (x - mean) * sigma / (self.SPREAD**2 + sigma**2)


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_guidance_on_normal_pictures_draws_the_moved_normal(kind):
    """Sliding by eta draws N(m_t + eta (m_more - m_less), spread^2), and by -eta its mirror image about m_t. Along the way that has no
    randomness, each noise lands where the moved normal's own way leads it.
    """
    model = models.build(kind)
    flow = kind == "flux"
    channels = model.model.latent_format.latent_channels
    model.model.diffusion_model = Gaussian(model.model.model_sampling, flow, channels)
    prompts = [models.conditioning(model, seed) for seed in (10, 30, 40)]
    means = [prompt[0][0][0, 0, :channels] for prompt in prompts]

    def drawn(positive, slid):
        with torch.inference_mode():
            latent = models.latent(model)
            out = nodes.common_ksampler(slid, 3, 200, 1.0, "euler", "normal", positive, models.conditioning(model, 20), latent)
            return model.model.process_latent_in(out[0]["samples"])

    plain = drawn(prompts[0], model)
    # The host begins with noise about 0, not about the mean: what the mean's way still has of that is left at the end.
    first = float(model.model.model_sampling.sigma_max)
    reached = 1.0 if flow else 1 - Gaussian.SPREAD / (Gaussian.SPREAD**2 + first**2) ** 0.5
    for eta in (0.7, 2.0):
        way = (eta * (means[1] - means[2]))[:, None, None]
        there, back = (
            drawn(prompts[0], SliderPrompts.execute(model, *prompts, "guidance", sign * eta, 0.0, 1.0).result[0]) for sign in (1, -1)
        )
        for way_of, picture in ((1, there), (-1, back)):
            assert float(((picture - plain) / (way_of * way)).mean()) == pytest.approx(reached, abs=0.01)
        torch.testing.assert_close(there - plain, plain - back, rtol=1e-3, atol=1e-3)
        assert float((there - reached * way).std()) == pytest.approx(float(plain.std()), rel=1e-2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(there, plain, rtol=1e-2, atol=1e-2)
