"""The diffusers export is the same model: same text states, same pictures, same latents after twenty steps."""

import models  # noqa: F401  (puts the tier's folder first)
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from concept_nodes.host import lab
from concept_nodes.lab import export

TEXTS = ("a large red circle in the centre on a white background", "two blue stars, neon")
STEPS, CFG = 20, 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    export.export(folder)
    return folder


@pytest.fixture(scope="module")
def loaded():
    return {name: lab.load(name) for name in lab.MODELS}


@pytest.fixture
def noise():
    return torch.randn(len(TEXTS), 4, 16, 24, generator=torch.Generator().manual_seed(1))


def encoded(folder, texts):
    """(states, pooled) as the exported text encoder gives them."""
    tokenizer, encoder = CLIPTokenizer.from_pretrained(folder / "tokenizer"), CLIPTextModel.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        out = encoder(tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt").input_ids)
    return out.last_hidden_state, out.pooler_output


def from_host(lab_model, noise, sigmas):
    """Latents of the host's Euler sampler on given sigmas, unscaled as the model sees them."""
    import comfy.sample

    encoded = [lab_model.clip.encode_from_tokens(lab_model.clip.tokenize(text), return_pooled=True) for text in (*TEXTS, "")]
    rows = [[cond, {"pooled_output": pooled}] for cond, pooled in encoded]
    positive = [[torch.cat([row[0] for row in rows[:-1]]), {"pooled_output": torch.cat([row[1]["pooled_output"] for row in rows[:-1]])}]]
    sampler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        drawn = comfy.sample.sample_custom(
            lab_model.model, noise, CFG, sampler, sigmas, positive, rows[-1:], torch.zeros_like(noise), disable_pbar=True
        )
    return lab_model.model.model.process_latent_in(drawn)


@torch.no_grad()
def test_unet_gives_the_hosts_latents(folder, loaded, noise):
    where = folder / "unet"
    unet = UNet2DConditionModel.from_pretrained(where / "unet")
    scheduler = EulerDiscreteScheduler.from_pretrained(where / "scheduler")
    scheduler.set_timesteps(STEPS)
    (asked, _), (empty, _) = encoded(where, TEXTS), encoded(where, [""])
    context = torch.cat([asked, empty.expand_as(asked)])
    # The host starts from the exact noise of the first level; diffusers' init_noise_sigma leaves out the picture's own unit of spread.
    x = noise * (scheduler.sigmas[0] ** 2 + 1).sqrt()
    for step in scheduler.timesteps:
        inside = scheduler.scale_model_input(x.repeat(2, 1, 1, 1), step)
        positive, negative = unet(inside, step, encoder_hidden_states=context).sample.chunk(2)
        x = scheduler.step(negative + CFG * (positive - negative), step, x).prev_sample
    host = from_host(loaded["unet"], noise, scheduler.sigmas)
    assert float(host.abs().max()) > 0.5
    assert float((x - host).abs().max()) < 1e-3


@torch.no_grad()
def test_dit_gives_the_hosts_latents(folder, loaded, noise):
    where = folder / "dit"
    dit = FluxTransformer2DModel.from_pretrained(where / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(where / "scheduler")
    scheduler.set_timesteps(STEPS)
    (asked, pooled), (empty, empty_pooled) = encoded(where, TEXTS), encoded(where, [""])
    context = torch.cat([asked, empty.expand_as(asked)])
    pooled = torch.cat([pooled, empty_pooled.expand_as(pooled)])
    height, width = noise.shape[-2:]
    patch = lab.DIT_CONFIG["patch_size"]
    grid = torch.cartesian_prod(torch.arange(height // patch), torch.arange(width // patch)).float()
    image_ids = torch.cat([torch.zeros(len(grid), 1), grid], 1)
    x = noise
    for step, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        tokens = export.pack(x.repeat(2, 1, 1, 1))
        drawn = dit(
            hidden_states=tokens,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            timestep=sigma.expand(len(tokens)),
            img_ids=image_ids,
            txt_ids=torch.zeros(context.shape[1], 3),
        ).sample
        positive, negative = export.unpack(drawn, height, width).chunk(2)
        x = scheduler.step(negative + CFG * (positive - negative), step, x).prev_sample
    host = from_host(loaded["dit"], noise, scheduler.sigmas)
    assert float(host.abs().max()) > 0.5
    assert float((x - host).abs().max()) < 1e-3


@pytest.mark.parametrize("name", lab.MODELS)
@torch.no_grad()
def test_autoencoder_gives_the_hosts_pictures(folder, loaded, noise, name):
    vae = AutoencoderKL.from_pretrained(folder / name / "vae")
    assert vae.config.scaling_factor == pytest.approx(0.18215)
    host = loaded[name].vae.decode(noise / 0.18215)
    ours = (vae.decode(noise / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert float((ours - host).abs().max()) < 1e-3
    pictures = torch.rand(2, 64, 96, 3, generator=torch.Generator().manual_seed(2))
    encoded = vae.encode(pictures.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert float((encoded - loaded[name].vae.encode(pictures)).abs().max()) < 1e-2


@pytest.mark.parametrize("name", lab.MODELS)
def test_text_encoder_gives_the_hosts_states(folder, loaded, name):
    states, pooled = encoded(folder / name, TEXTS)
    for text, state, whole in zip(TEXTS, states, pooled, strict=True):
        cond, host_pooled = loaded[name].clip.encode_from_tokens(loaded[name].clip.tokenize(text), return_pooled=True)
        assert float((cond[0] - state).abs().max()) < 1e-3
        assert float((host_pooled[0] - whole).abs().max()) < 1e-3


def test_whole_pipeline_draws(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "unet")
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(TEXTS[0], height=64, width=64, num_inference_steps=4, output_type="np").images
    assert pictures.shape == (1, 64, 64, 3)
    assert pictures.std() > 0.02
