"""Features on Stable Diffusion 3: the picture's stream and the prompt's, found, steered with and trained on; all else is refused there."""

import cases
import folder_paths
import models
import pytest
import sampling
import state
import torch
from comfy.patcher_extension import WrappersMP
from text_encoders import Letters

import nodes
from concept_nodes.host import adapters, sae_files
from concept_nodes.host.directions import Runs, in_model
from concept_nodes.host.families import FEATURES, UnsupportedFamily, family_of, family_of_file
from concept_nodes.host.feature_sites import AUTO, blocks, checked_site, layers, model_sites, width_at, word_layers
from concept_nodes.host.features import FeaturesError
from concept_nodes.host.regions import Regions
from concept_nodes.host.sae_sources import model_rows
from concept_nodes.nodes.feature_training import SAETrain
from concept_nodes.nodes.features import SAEFind
from concept_nodes.nodes.regions import RegionsApply
from concept_nodes.nodes.steering import DirectionFind, SteerModel
from concept_nodes.ops.regions import Region
from concept_nodes.ops.steering import MODES

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
BLOCK, WORDS = "joint_blocks.1", "joint_blocks.0.context_block.attn.proj"
RUNS = Runs(64, 64, 2, 3.0, 2, 1, 5)


@pytest.fixture(scope="module")
def model():
    return models.build("sd3")


def watched(model, site, run=models.sample, **options):
    """What a site is given and gives in each call of a sampling."""
    seen, module = [], model.model.diffusion_model.get_submodule(site)

    def watch(executor, *args, **kwargs):
        handle = module.register_forward_hook(lambda _, given, output: seen.append((given, output)))
        try:
            return executor(*args, **kwargs)
        finally:
            handle.remove()

    run(sampling.wrapped(model, WrappersMP.APPLY_MODEL, watch), **options)
    return seen


def test_sites_of_the_published_size():
    model = models.full_size("sd3").model
    assert family_of(model, FEATURES).name == "Stable Diffusion 3"
    assert blocks(model) == [f"joint_blocks.{i}" for i in range(24)] and len(layers(model)) == 24
    # The last block gives the prompt's rows to nobody.
    assert len(word_layers(model)) == 23 and model_sites(model, AUTO) == ["joint_blocks.12"]
    assert {width_at(model, site) for site in (*blocks(model), *layers(model), *word_layers(model))} == {1536}
    assert model_sites(model, "all layers") == layers(model)
    with pytest.raises(FeaturesError, match=r"has no site 'joint_blocks.99'.*the prompt's rows are at joint_blocks.0.context_block"):
        checked_site(model, "joint_blocks.99", "out")


@pytest.mark.parametrize("side", ["cond", "both"])
def test_a_block_steers_the_picture_and_leaves_the_prompt(model, side):
    found = models.features(model)
    acting = cases.put_steer(model, 0.7, found=found, keep_norm="off", side=side)
    (_, before), (_, after) = (watched(one, BLOCK)[0] for one in (model, acting))
    assert torch.equal(before[0], after[0])
    expected = 0.7 * (found.scale(1.0).unit * found.weights) @ found.directions
    halves = (after[1] - before[1]).chunk(2)
    loud = [half for half in halves if bool(half.any())]
    assert len(loud) == (1 if side == "cond" else 2)
    for half in loud:
        torch.testing.assert_close(half, expected.expand_as(half), **CLOSE)


def test_a_layer_of_the_prompts_steers_its_rows_alone(model):
    found = models.features(model, WORDS)
    acting = cases.put_steer(model, 0.7, found=found, keep_norm="off", side="both")
    (_, before), (_, after) = (watched(one, WORDS)[0] for one in (model, acting))
    assert before.shape[1] == 7
    expected = 0.7 * (found.scale(1.0).unit * found.weights) @ found.directions
    torch.testing.assert_close(after - before, expected.expand_as(after), **CLOSE)
    assert not torch.equal(models.sample(acting), models.sample(model))
    with pytest.raises(FeaturesError, match="a mask has no meaning there"):
        cases.put_steer(model, found=found, mask=cases.LEFT)


def test_both_streams_at_once(model):
    """And the prompt's does not stand in the way of a mask on the picture's."""
    words, picture = models.features(model, WORDS), models.features(model)
    both = cases.put_steer(cases.put_steer(model, 0.7, found=words), 0.7, found=picture, mask=cases.LEFT)
    lone = watched(cases.put_steer(model, 0.7, found=words), WORDS)[0][1]
    assert torch.equal(watched(both, WORDS)[0][1], lone)
    pictures = [models.sample(one) for one in (both, cases.put_steer(model, 0.7, found=words), model)]
    assert not any(torch.equal(one, other) for one, other in zip(pictures, pictures[1:] + pictures[:1], strict=True))


@pytest.mark.parametrize("io", ["out", "diff"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_on_a_block_are_the_equations(model, mode, io):
    found = models.features(model, io=io, latents=True)
    acting = cases.put_steer(model, 0.8, mode=mode, found=found, side="both", level=0.5, keep_norm="off")
    ((given, before), _), ((_, after), _) = (watched(one, BLOCK, steps=2) for one in (model, acting))
    x = before[1] - given[1] if io == "diff" else before[1]
    scale = found.scale(1.0)
    z = (x @ found.readers.rows.T + found.readers.bias).clamp(min=0)
    z = torch.where(z > found.readers.thresholds, z, 0.0)
    moved = {"add": 0.8 * scale.unit + 0 * z, "scale": 0.8 * z, "clamp": 0.8 * (0.5 * scale.unit - z), "ablate": -0.8 * z}[mode]
    torch.testing.assert_close(after[1] - before[1], (moved * found.weights) @ found.directions, rtol=1e-3, atol=1e-3)


def test_a_mask_keeps_rows_outside_as_they_were(model):
    """Width and height differ, and the latent is odd: rows are told by the latent's own grid."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    start = {"samples": torch.zeros(3, 16, 11, 6)}

    def run(one):
        with torch.inference_mode():
            nodes.common_ksampler(one, 3, 1, 3.0, "euler", "normal", *sampling.prompts(one, 2), start)

    acting = cases.put_steer(model, 1.0, mask=mask, side="both")
    moved = [watched(one, BLOCK, run)[0][1][1] for one in (model, acting)]
    rows = (moved[1] - moved[0]).abs().amax(-1).unflatten(-1, (6, 3))
    assert len(rows) == 6 and bool((rows[:, :2] > 0).all()) and not rows[:, 3:].any()


@pytest.mark.parametrize("order", [1, -1])
def test_it_does_not_matter_how_the_host_batches(model, order):
    acting = cases.put_steer(model, 0.7, mode="scale", side="cond + uncond -")
    expected = models.sample(acting)
    assert not torch.equal(expected, models.sample(model))
    torch.testing.assert_close(models.sample(sampling.one_by_one(acting, order)), expected, **CLOSE)
    torch.testing.assert_close(models.sample(sampling.turned_around(acting)), expected, **CLOSE)


def test_nothing_is_nothing_and_nothing_is_left_behind(model):
    before, plain = state.of_model(model.model), models.sample(model)
    for setting, apply in cases.EFFECTS["ConceptNodes_SteerModel"].neutral.items():
        assert torch.equal(models.sample(apply(model)), plain), setting
    models.sample(cases.put_steer(model))
    assert state.differences(before, state.of_model(model.model)) == [] and torch.equal(models.sample(model), plain)


@pytest.mark.parametrize("site", [BLOCK, WORDS, "joint_blocks.2.x_block.attn.proj"])
def test_directions_are_differences_of_the_sites_own_rows(model, site):
    found = in_model(model, Letters(model), site, "out", ("p",), ("q",), RUNS._replace(levels=1, steps=1, cfg=1.0), "x").features
    means = []
    for letter in "pq":
        context, pooled = Letters(model).encode_from_tokens(letter)

        def run(one, context=context, pooled=pooled):
            from comfy.sample import prepare_noise, sample

            blank, positive = torch.zeros(1, 16, 8, 8), [[context, {"pooled_output": pooled}]]
            with torch.inference_mode():
                sample(one, prepare_noise(blank, 5), 1, 1.0, "euler", "normal", positive, positive, blank, disable_pbar=True, seed=5)

        output = watched(model, site, run)[0][1]
        means.append((output[1] if isinstance(output, tuple) else output).mean((0, 1)))
    way = means[0] - means[1]
    torch.testing.assert_close(found.directions[0] * found.unit, way, rtol=1e-3, atol=1e-4)
    steered = SteerModel.execute(model, "none", 1.0, "add", 0.0, 1.0, "cond", features=found).result[0]
    assert not torch.equal(models.sample(steered), models.sample(model))


def test_find_direction_takes_its_own_site(model):
    found, report = DirectionFind.execute(
        Letters(model), "p\nr", "q\ns", "model", AUTO, "", model, width=64, height=64, steps=2, cfg=1.0, levels=2, pictures=1
    ).result
    assert found.site == "joint_blocks.1" and found.family == "Stable Diffusion 3" and "2 noise levels" in report


@pytest.mark.parametrize("site", [BLOCK, WORDS])
def test_rows_to_train_on_are_the_sites_own(model, site):
    source = model_rows(model, Letters(model), "diffusion_model." + site, "out", "pqr", RUNS._replace(levels=1, cfg=1.0), 5)
    seen, module = [], model.model.diffusion_model.get_submodule(site)
    handle = module.register_forward_hook(lambda _, given, output: seen.append(output))
    rows = next(source)
    handle.remove()
    first = seen[0][1] if isinstance(seen[0], tuple) else seen[0]
    assert rows.shape == (15, 64)
    assert bool(((rows[:, None] - first.flatten(0, 1)[None]).abs().amax(-1).amin(1) < 1e-6).all())


def test_an_autoencoder_is_trained_found_and_steered_with(model, tmp_path, monkeypatch):
    sae_files.show_folder()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "sae", ([str(tmp_path / "sae")], set(sae_files.ENDINGS)))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    sizes = {"width": 64, "height": 64, "cfg": 1.0, "levels": 2}
    with torch.inference_mode():
        sae = SAETrain.execute(
            Letters(model), "p\nq", "model", AUTO, "topk", 1, 4, 10, 64, 0, "m", model=model, sampling_steps=2, rows=32, **sizes
        ).result[0]
    assert sae.config["site"] == BLOCK and sae.config["family"] == "Stable Diffusion 3" and sae.sae.std is not None
    found, _ = SAEFind.execute(sae, Letters(model), "p", "q", "effect size", 2, "", model=model, steps=2, **sizes).result
    steered = SteerModel.execute(model, "none", 1.0, "add", 0.0, 1.0, "cond", features=found).result[0]
    assert found.site == BLOCK and not torch.equal(models.sample(steered), models.sample(model))


@pytest.mark.parametrize("node_id", [one for one in cases.EFFECT_IDS if one != "ConceptNodes_SteerModel"])
def test_nodes_for_anything_else_refuse_it_by_name(model, node_id):
    with pytest.raises(
        UnsupportedFamily, match=r"Stable Diffusion 3, on which only nodes for features work so far.*Stable Diffusion 1\.5, SDXL, Flux\.1"
    ):
        cases.EFFECTS[node_id].acts(model)


def test_regions_refuse_it_even_with_features(model):
    from test_region_features import leaning

    regions = leaning(Regions().with_region(Region("right", rest=True)), models.features(model))
    with pytest.raises(UnsupportedFamily, match="only nodes for features work so far"):
        RegionsApply.execute(model, [], [], regions)


def test_a_file_of_its_is_told_where_it_does_not_fit():
    shapes = {"diffusion_model.joint_blocks.3.x_block.attn.qkv.lora_down.weight": (4, 1536)}
    assert family_of_file(shapes).name == "Stable Diffusion 3"
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    with pytest.raises(adapters.AdapterError, match="Stable Diffusion 3"):
        adapters.place(models.build(), state | {next(iter(state)).replace("down", "up"): torch.zeros(4608, 4)}, "x")
