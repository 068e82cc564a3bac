"""Both lab models under the host's own nodes: each does on them what it does on any model."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from concept_nodes.host.lab import DIT_CONFIG, MODELS
from concept_nodes.lab.eye import Eye

from graphs import RED, Graph, Lab
from pictures import pixels

DIT_WIDTH = DIT_CONFIG["hidden_size"]


@pytest.fixture(scope="module")
def eye():
    return Eye.load()


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


def drawn(client, graph: Graph) -> np.ndarray:
    """(N, H, W, 3) uint8: every picture that the graph saves."""
    run = client.run(graph)
    assert run.end == "execution_success", run.error
    return np.stack([pixels(png) for png in client.pictures(run)])


def read(eye: Eye, pictures: np.ndarray):
    return eye.read(torch.from_numpy(pictures).float() / 255)


def holds(eye: Eye, pictures: np.ndarray, kind: str, colour: str) -> None:
    """Every picture holds exactly one object, of this shape and colour."""
    for reading in read(eye, pictures):
        assert [(seen.kind, seen.colour) for seen in reading.objects] == [(kind, colour)]


def lit(array: np.ndarray) -> np.ndarray:
    return array.astype(int)


def test_ksampler(client, eye, model):
    lab = Lab(model)
    pictures = drawn(client, lab.save(lab.sample()))
    assert pictures.shape == (1, 64, 64, 3)
    holds(eye, pictures, "circle", "red")
    assert read(eye, pictures)[0].background_word() == "white"


def test_sampler_custom_advanced_gives_the_same_picture(client, model):
    plain, lab = Lab(model), Lab(model)
    sampled = lab.add(
        "SamplerCustomAdvanced",
        noise=lab.add("RandomNoise", noise_seed=5),
        guider=lab.add("CFGGuider", model=lab.model, positive=lab.text(RED), negative=lab.empty, cfg=4.0),
        sampler=lab.add("KSamplerSelect", sampler_name="euler"),
        sigmas=lab.add("BasicScheduler", model=lab.model, scheduler="normal", steps=20, denoise=1.0),
        latent_image=lab.latent(),
    )
    assert np.array_equal(drawn(client, lab.save(sampled)), drawn(client, plain.save(plain.sample())))


def test_image_to_image_keeps_the_scene(client, eye, model):
    text = "a large red circle on a white background"
    alone, lab = Lab(model), Lab(model)
    first = lab.sample("a large red circle at the top left on a white background")
    before = lab.add("VAEDecode", samples=first, vae=lab.vae)
    again = lab.sample(text, latent=lab.add("VAEEncode", pixels=before, vae=lab.vae), denoise=0.5, seed=6)
    (kept,), (new,) = (read(eye, drawn(client, graph)) for graph in (lab.save(again), alone.save(alone.sample(text, seed=6))))
    assert [(seen.kind, seen.colour) for seen in kept.objects] == [("circle", "red")]
    assert kept.objects[0].x < 28 and kept.objects[0].y < 28
    assert new.objects[0].x > 28 or new.objects[0].y > 28, "without the picture, the same seed puts it elsewhere"


def test_inpainting_changes_what_is_masked(client, eye, model):
    lab = Lab(model)
    before = lab.add("VAEDecode", samples=lab.sample("a medium red circle on the left on a white background", seed=3), vae=lab.vae)
    lab.add("SaveImage", images=before, filename_prefix="stock_before")
    right = lab.add(
        "MaskComposite",
        destination=lab.add("SolidMask", value=0.0, width=64, height=64),
        source=lab.add("SolidMask", value=1.0, width=32, height=64),
        x=32,
        y=0,
        operation="add",
    )
    latent = lab.add("SetLatentNoiseMask", samples=lab.add("VAEEncode", pixels=before, vae=lab.vae), mask=right)
    text = "a medium red circle on the left and a medium blue square on the right on a white background"
    was, now = sorted(drawn(client, lab.save(lab.sample(text, latent=latent, seed=4))), key=lambda picture: lit(picture)[:, 36:].std())
    assert np.abs(lit(was) - lit(now))[:, 36:].mean() > 2 * np.abs(lit(was) - lit(now))[:, :24].mean()
    (old,), (new,) = read(eye, was[None]), read(eye, now[None])
    (circle,) = old.objects
    left = min(new.objects, key=lambda seen: seen.x)
    assert (circle.kind, circle.colour) == (left.kind, left.colour) == ("circle", "red")
    assert abs(circle.x - left.x) < 2 and abs(circle.y - left.y) < 2
    assert max(seen.x for seen in new.objects) > 32


def test_hires_second_pass(client, eye, model):
    """Objects keep their size in pixels in this world: the small one of the first pass is the large one of the second."""
    lab = Lab(model)
    first = lab.sample("a small red square in the centre on a white background")
    larger = lab.add("LatentUpscaleBy", samples=first, upscale_method="bilinear", scale_by=1.5)
    second = lab.sample("a large red square in the centre on a white background", latent=larger, denoise=0.6, seed=6)
    pictures = drawn(client, lab.save(second))
    assert pictures.shape == (1, 96, 96, 3)
    holds(eye, pictures, "square", "red")


def test_batch(client, eye, model):
    lab, alone = Lab(model), Lab(model)
    pictures = drawn(client, lab.save(lab.sample(latent=lab.latent(batch_size=3))))
    holds(eye, pictures, "circle", "red")
    assert len({picture.tobytes() for picture in pictures}) == 3
    single = drawn(client, alone.save(alone.sample()))
    assert np.abs(lit(pictures[0]) - lit(single[0])).max() <= 2, "the first of a batch is drawn from the same noise"


@pytest.mark.parametrize("width, height", [(96, 64), (64, 128), (120, 88)])
def test_non_square(client, eye, model, width, height):
    lab = Lab(model)
    pictures = drawn(client, lab.save(lab.sample(latent=lab.latent(width, height))))
    assert pictures.shape == (1, height, width, 3)
    holds(eye, pictures, "circle", "red")


class TestAddedParts:
    """What stock loaders and patches add to a lab model."""

    def lora(self, host, model) -> str:
        """A LoRA file for this model, in the host's own folder: the shipped slider for the UNet, random factors for the DiT."""
        if model == "unet":
            return "concept_lab/sliders/unet/background.safetensors"
        generator = torch.Generator().manual_seed(1)
        key, (out_features, in_features) = "diffusion_model.double_blocks.0.img_attn.proj", (DIT_WIDTH, DIT_WIDTH)
        state = {
            f"{key}.lora_A.weight": torch.randn(4, in_features, generator=generator),
            f"{key}.lora_B.weight": torch.randn(out_features, 4, generator=generator) * 0.3,
        }
        save_file(state, host.loras / "dit.safetensors")
        return "dit.safetensors"

    def test_lora_loader(self, client, host, model):  # noqa: F811
        plain, lab = Lab(model), Lab(model)
        loaded = lab.add(
            "LoraLoader", model=lab.model, clip=lab.clip, lora_name=self.lora(host, model), strength_model=1.0, strength_clip=1.0
        )
        lab.clip = [loaded[0], 1]
        first, second = drawn(client, plain.save(plain.sample())), drawn(client, lab.save(lab.sample(model=loaded)))
        assert np.abs(lit(first) - lit(second)).mean() > 1

    def test_controlnet_puts_the_object_where_the_edges_are(self, client, eye):
        """The prompt names no place; a stock Canny of another picture does."""
        lab = Lab("unet")
        guide = lab.add("VAEDecode", samples=lab.sample("a large red circle at the top left on a white background"), vae=lab.vae)
        edges = lab.add("Canny", image=guide, low_threshold=0.2, high_threshold=0.5)
        loaded = lab.add("ControlNetLoader", control_net_name="concept_lab/unet_edges.safetensors")
        applied = lab.add(
            "ControlNetApplyAdvanced",
            positive=lab.text("a large blue circle on a white background"),
            negative=lab.empty,
            control_net=loaded,
            image=edges,
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
            vae=lab.vae,
        )
        pictures = drawn(client, lab.save(lab.sample(positive=applied, negative=[applied[0], 1], latent=lab.latent(batch_size=4), seed=9)))
        found = [[(seen.kind, seen.colour, seen.x < 32 and seen.y < 32) for seen in reading.objects] for reading in read(eye, pictures)]
        assert found.count([("circle", "blue", True)]) >= 3, found


@pytest.mark.parametrize(
    "patch, settings",
    [
        ("PerturbedAttentionGuidance", {"scale": 3.0}),
        ("FreeU_V2", {"b1": 1.1, "b2": 1.2, "s1": 0.9, "s2": 0.4}),
    ],
)
def test_unet_patches(client, eye, patch, settings):
    plain, lab = Lab("unet"), Lab("unet")
    first = drawn(client, plain.save(plain.sample()))
    second = drawn(client, lab.save(lab.sample(model=lab.add(patch, model=lab.model, **settings))))
    holds(eye, second, "circle", "red")
    assert not np.array_equal(first, second)
