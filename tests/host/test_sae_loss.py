"""What an autoencoder's reconstruction costs the model: rows put in the place of a site's own, and the loss with them."""

import pytest
import torch

from concept_nodes.host import lab, sae_loss
from concept_nodes.host.directions import Runs, levels_of
from concept_nodes.host.sae_files import SAEFile
from concept_nodes.lab.measure import ask
from concept_nodes.lab.scenes import render
from concept_nodes.ops.sae import RELU, SAE

ASKED = ask(4, objects=1, size=64, seed=3, plain=True)
TEXTS = list(ASKED)
SITES = {"unet": ("output_blocks.2.1", 64), "dit": ("double_blocks.1", 160)}


@pytest.fixture(autouse=True)
def as_in_a_node():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", params=lab.MODELS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(kind):
    with torch.inference_mode():
        return lab.load(kind)


@pytest.fixture(scope="module")
def latents(loaded):
    """Of pictures that the texts tell of: without, no row would be missed."""
    with torch.inference_mode():
        return loaded.vae.encode(render(ASKED.scenes).movedim(1, -1))


@pytest.fixture(scope="module")
def levels(loaded):
    return levels_of(loaded.model, Runs(64, 64, 12, 4.0, 4, 1, 0))[1:3]


def identity(width: int, site: str, io: str, family=None) -> SAEFile:
    """Loses nothing: a latent for each number and one for its opposite."""
    eye = torch.eye(width)
    rows = torch.cat([eye, -eye])
    return SAEFile(SAE(rows, torch.zeros(2 * width), rows, torch.zeros(width), RELU), {"site": site, "io": io}, {})


def test_the_loss_is_that_of_what_the_model_predicts(kind, loaded, latents, levels):
    """Noise, or for the flow model the velocity, by the model's own call."""
    conditions, model = sae_loss.Conditions.of(loaded.clip, TEXTS), loaded.model.model
    found = sae_loss.losses(loaded.model, conditions, latents, levels[:1], 3)[0]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    x0, sigma = model.process_latent_in(latents), torch.full((4,), levels[0])
    noised = model.model_sampling.noise_scaling(sigma[:, None, None, None], noise, x0)
    extra = {"y": conditions.pooled["pooled_output"]} if kind == "dit" else {}
    clean = model.apply_model(noised, sigma, c_crossattn=conditions.contexts, **extra)
    wanted = (noised - clean) / levels[0] - (noised - x0) / levels[0]
    assert torch.allclose(found, wanted.square().flatten(1).mean(1).double(), rtol=1e-3)


def test_rows_that_stay_are_the_plain_model(kind, loaded, latents, levels):
    site, _ = SITES[kind]
    conditions = sae_loss.Conditions.of(loaded.clip, TEXTS)
    same = sae_loss.replaced(loaded.model, site, "out", lambda rows, sigma: rows)
    plain, found = (sae_loss.losses(model, conditions, latents, levels, 3) for model in (loaded.model, same))
    assert torch.equal(plain, found)
    seen = []
    sae_loss.losses(
        sae_loss.replaced(loaded.model, site, "out", lambda rows, sigma: seen.append(sigma) or rows), conditions, latents, levels, 3
    )
    assert seen == pytest.approx(levels)


def test_all_is_recovered_by_what_loses_nothing_and_nothing_by_the_mean(kind, loaded, latents, levels):
    site, width = SITES[kind]
    file = identity(width, site, "out")
    told = sae_loss.measure(loaded.model, loaded.clip, file, TEXTS, latents, levels)
    assert told.plain.shape == (2, 4)
    assert told.recovered == pytest.approx(1.0, abs=1e-3)
    blind = file._replace(sae=file.sae._replace(W_dec=torch.zeros_like(file.sae.W_dec)))
    lost = sae_loss.measure(loaded.model, loaded.clip, blind, TEXTS, latents, levels)
    assert torch.allclose(lost.plain, told.plain) and float(lost.rebuilt.mean()) > float(told.rebuilt.mean())


def test_of_a_text_encoder_all_rows_but_the_first(loaded, latents, levels):
    file = identity(128, "clip_l.3", "text")
    told = sae_loss.measure(loaded.model, loaded.clip, file, TEXTS, latents, levels)
    assert told.recovered == pytest.approx(1.0, abs=1e-3)
    (site,) = sae_loss.text_sites(loaded.clip, "clip_l.3")
    rows = torch.arange(10.0).reshape(1, 5, 2)
    replacing = sae_loss.Replacing(lambda rows, sigma: -rows, "text", kept=1)
    assert torch.equal(replacing(rows, False)[0, 1:], -rows[0, 1:]) and torch.equal(replacing(rows, False)[0, 0], rows[0, 0])
    plain, rebuilt, ablated = sae_loss._encoded(loaded.clip, file, TEXTS)
    assert torch.allclose(plain.contexts, rebuilt.contexts, atol=1e-4)
    # With one row for all, texts differ in what no row but the first tells: nothing.
    assert torch.allclose(ablated.contexts[0], ablated.contexts[1], atol=1e-5)
    assert not torch.allclose(plain.contexts[0], plain.contexts[1], atol=1e-2)


def test_a_site_that_does_not_matter_is_told():
    same = torch.ones(1, 2)
    with pytest.raises(ValueError, match="does not matter"):
        _ = sae_loss.Losses(same, same, same).recovered
    assert sae_loss.Losses(same, 1.5 * same, 3 * same).recovered == pytest.approx(0.75)
