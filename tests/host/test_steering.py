"""Steering on the host's own models and text encoders: exactness on random weights, behaviour on the lab's."""

import types

import cases
import folder_paths
import models
import pytest
import sampling
import state
import text_encoders
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

import nodes
from concept_nodes.host import features as host_features
from concept_nodes.host import lab, run_record
from concept_nodes.host.directions import POSITIONS, ROWS, WORDS, Runs, TapEffect, Tapped, in_model, in_text
from concept_nodes.host.dispatcher import attach
from concept_nodes.host.encoders import seats
from concept_nodes.host.feature_sites import (
    AUTO,
    blocks,
    checked_site,
    default_text_site,
    layers,
    model_sites,
    read_last,
    text_sites,
    width_at,
)
from concept_nodes.host.features import Features, FeaturesError
from concept_nodes.host.places import Place
from concept_nodes.host.regions import Hung, Regions, TextEffect
from concept_nodes.host.steering import Steers
from concept_nodes.host.text_steering import ALL_ROWS, BUT_FIRST, CONTENT, TextSteer, captured, scope_of, steered
from concept_nodes.lab.eye import Eye
from concept_nodes.lab.measure import draw
from concept_nodes.nodes.regions import RegionsApply
from concept_nodes.nodes.steering import DirectionFind, SteerText, name_of
from concept_nodes.ops.regions import Region
from concept_nodes.ops.steering import ABLATE, ADD, CLAMP, MODES, SCALE, Steer

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
CLIPS = [kind for kind in text_encoders.KINDS if kind != "sd3"]
each_kind = pytest.mark.parametrize("kind", list(models.KINDS))


@pytest.fixture(scope="module")
def plain():
    return models.build()


def steps(steered_model, site, **options):
    """What a site gives in each call of a sampling: [(names of the rows' conditions, output, sigma)]."""
    found = []
    module = steered_model.model.diffusion_model.get_submodule(site)
    seen = steered_model.clone()

    def watch(executor, x, t, *args, **kwargs):
        handle = module.register_forward_hook(lambda _, given, output: found.append((output, float(t[0]))))
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            handle.remove()

    seen.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", watch)
    models.sample(seen, **options)
    return found


# --- on the model -----------------------------------------------------------------------------------------------------------------


@each_kind
def test_adds_its_vector_to_the_prompts_rows_alone(kind):
    """The first call of a sampling, in which the block's input is still the plain model's."""
    model = models.build(kind)
    found = models.features(model)
    steered_model = cases.put_steer(model, 0.7, found=found, keep_norm="off")
    before, sigma = steps(model, found.site)[0]
    after, _ = steps(steered_model, found.site)[0]
    if kind == "flux":
        before, after = before[0], after[0]
    moved = (after - before).flatten(2).mT if after.ndim == 4 else after - before
    expected = 0.7 * (found.scale(sigma).unit * found.weights) @ found.directions
    # The host puts the negative prompt's rows first or last as it likes; exactly one of the two halves is steered.
    halves = moved.chunk(2)
    quiet = [bool((half == 0).all()) for half in halves]
    assert sorted(quiet) == [False, True]
    loud = halves[quiet.index(False)]
    torch.testing.assert_close(loud, expected.expand_as(loud), **CLOSE)


def test_single_blocks_steer_the_picture_and_not_the_prompt():
    model = models.build("flux")
    found = models.features(model, "single_blocks.0")
    before, after = (steps(one, found.site)[0][0] for one in (model, cases.put_steer(model, 1.0, found=found, keep_norm="off")))
    moved = (after - before).abs().sum(-1)
    tokens = models.conditioning(model, 10)[0][0].shape[1]
    assert not moved[:, :tokens].any()
    quiet, loud = sorted(moved[:, tokens:].chunk(2), key=lambda half: float(half.sum()))
    assert not quiet.any() and bool((loud > 0).all())


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("side", ["cond", "both", "cond + uncond -"])
@each_kind
def test_it_does_not_matter_how_the_host_batches(kind, side, order):
    model = models.build(kind)
    acting = cases.put_steer(model, 0.7, side=side, mode="scale")
    expected = models.sample(acting)
    assert not torch.equal(expected, models.sample(model))
    torch.testing.assert_close(models.sample(sampling.one_by_one(acting, order)), expected, **CLOSE)
    torch.testing.assert_close(models.sample(sampling.turned_around(acting)), expected, **CLOSE)


def test_sides_are_what_they_say(plain):
    """At CFG 1 only the prompt is evaluated; against the negative, it takes what the prompt is given."""
    one = {side: models.sample(cases.put_steer(plain, 0.7, side=side), cfg=1.0) for side in ("cond", "both", "cond + uncond -")}
    assert torch.equal(one["cond"], one["both"]) and torch.equal(one["cond"], one["cond + uncond -"])
    found = models.features(plain)
    outputs = {side: steps(cases.put_steer(plain, 0.7, side=side, keep_norm="off"), found.site)[0][0] for side in one}
    base = steps(plain, found.site)[0][0]
    moved = {side: output - base for side, output in outputs.items()}
    at = [bool(half.any()) for half in moved["cond"].chunk(2)].index(False)
    assert torch.equal(moved["both"].chunk(2)[1 - at], moved["cond"].chunk(2)[1 - at])
    torch.testing.assert_close(moved["cond + uncond -"].chunk(2)[at], -moved["both"].chunk(2)[at], **CLOSE)


@pytest.mark.parametrize("latents", [False, True])
@pytest.mark.parametrize("io", ["out", "diff"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_on_a_block_are_the_equations(mode, io, latents, plain):
    """A spatial transformer's rows, as it gives them or less those it was given, against decoding by hand."""
    found = models.features(plain, io=io, latents=latents)
    steer = Steer(found.operand(), mode, 0.5)
    act = Steers([cases_part(found, steer)], torch.device("cpu"))
    act.use(act.setting([(0.9, 2.0)]))
    width = found.width
    given, output = models.seeded((3, width, 5, 7), 60), models.seeded((3, width, 5, 7), 61)
    kept = output.clone()
    after = act(output, True, given)
    x = (output - given if io == "diff" else output).permute(0, 2, 3, 1)
    z, scale = found.operand().activations(x), found.scale(2.0)
    z_new = {
        ADD: z + 0.9 * scale.unit,
        SCALE: scale.zero + 1.9 * (z - scale.zero),
        CLAMP: z + 0.9 * (scale.zero + 0.5 * scale.unit - z),
        ABLATE: z - 0.9 * (z - scale.zero).clamp(min=0),
    }[mode]
    expected = output + (((z_new - z) * found.weights) @ found.directions).permute(0, 3, 1, 2)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(output, kept)


def cases_part(found, steer):
    return types.SimpleNamespace(features=found, steer=steer)


def test_several_add_up(plain):
    found = models.features(plain)
    options = {"found": found, "keep_norm": "off"}
    twice = cases.put_steer(cases.put_steer(plain, 0.5, **options), 0.3, **options)
    torch.testing.assert_close(models.sample(twice), models.sample(cases.put_steer(plain, 0.8, **options)), **CLOSE)


def test_two_sites_act_at_once(plain):
    one, two = models.features(plain), models.features(plain, "middle_block.1", seed=80)
    both = models.sample(cases.put_steer(cases.put_steer(plain, found=one), found=two))
    for single in (one, two):
        assert not torch.equal(both, models.sample(cases.put_steer(plain, found=single)))


@each_kind
def test_a_mask_keeps_rows_outside_as_they_were(kind):
    """Width and height differ, and the latent is odd: rows are told by the latent's own grid."""
    model = models.build(kind)
    found = models.features(model)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    with torch.inference_mode():
        start = {"samples": torch.zeros(3, models.channels(model), 12, 6)}

        def first(one):
            seen = []
            module = one.model.diffusion_model.get_submodule(found.site)
            watched = sampling.wrapped(one, WrappersMP.APPLY_MODEL, hooked(module, seen))
            nodes.common_ksampler(watched, 3, 1, 3.0, "euler", "normal", *sampling.prompts(one, 2), start)
            output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            return output if output.ndim == 4 else output.mT.unflatten(-1, (6, 3))

        before, after = first(model), first(cases.put_steer(model, 1.0, mask=mask, found=found, side="both"))
    moved = (after - before).abs().amax(1)
    half = moved.shape[1] // 2
    assert len(moved) == 6 and bool((moved[:, :half] > 0).all()) and not moved[:, half:].any()


def hooked(module, seen):
    def wrapper(executor, *args, **kwargs):
        handle = module.register_forward_hook(lambda _, given, output: seen.append(output))
        try:
            return executor(*args, **kwargs)
        finally:
            handle.remove()

    return wrapper


def test_other_step_counts_find_the_same_numbers(plain):
    """Statistics go by noise level: a sampling of other steps adds at a level what any other adds there."""
    found = models.features(plain)._replace(positive=torch.tensor([[1.0, 1.0], [4.0, 2.0], [2.0, 9.0]]))

    def added(count):
        plain_steps, steered_steps = (
            steps(one, found.site, steps=count, cfg=1.0) for one in (plain, cases.put_steer(plain, 1.0, found=found, keep_norm="off"))
        )
        return {round(sigma, 4): after - before for (before, sigma), (after, _) in zip(plain_steps, steered_steps, strict=True)}, [
            sigma for _, sigma in plain_steps
        ]

    for count in (3, 5):
        moved, sigmas = added(count)
        first = moved[round(sigmas[0], 4)]
        expected = (found.scale(sigmas[0]).unit * found.weights) @ found.directions
        torch.testing.assert_close(first, expected[None, :, None, None].expand_as(first), **CLOSE)
    units = [found.scale(sigma).unit for sigma in (14.0, 3.7, 1.0, 0.2, 0.05)]
    assert bool((units[0] < units[2]).all()) and torch.equal(found.scale(1e-6).unit, units[-1])


def test_windows_and_schedules(plain):
    whole = models.sample(cases.put_steer(plain, 0.8))
    assert torch.equal(models.sample(cases.put_steer(plain, 1.6, schedule="0:.5")), whole)
    late = models.sample(cases.put_steer(plain, start=0.5))
    assert "acted in 2 of 4 steps" in run_record.find(late).describe()


def test_beside_regions_with_prompts_of_their_own():
    """A masked steer divides no text: the sequence that Flux reads is as long as without it."""
    model = models.build("flux")
    listed = Regions()
    for name, part in (("left", {"rest": False}), ("others", {"rest": True})):
        shapes = {} if part["rest"] else {"shapes": (cases.Box(0, 0, 0.5, 1),)}
        listed = listed.with_region(Region(name, rest=part["rest"], **shapes))
        listed = listed.with_lora(name, Hung("random", models.lora(model, seed=len(name)), 0.8, 1.0, 0.0, 1.0))
    regional = RegionsApply.execute(model, [], [], listed).result[0]
    lengths = {}
    for name, one in (("regions", regional), ("both", cases.put_steer(regional, mask=torch.eye(64)[None].tril(8)))):
        shapes = lengths[name] = []

        def watch(executor, *args, shapes=shapes, **kwargs):
            shapes += [arg.shape for arg in args if isinstance(arg, torch.Tensor)]
            return executor(*args, **kwargs)

        models.sample(sampling.wrapped(one, WrappersMP.DIFFUSION_MODEL, watch))
    assert lengths["regions"] == lengths["both"]
    assert not torch.equal(models.sample(regional), models.sample(cases.put_steer(regional)))


def test_a_steer_at_half_precision_stays_in_it():
    for dtype in ("float16", "bfloat16"):
        model = models.build("sd15", dtype)
        found = models.features(model)
        for mode in MODES:
            out = steps(cases.put_steer(model, 0.8, mode=mode, found=found), found.site, steps=1)[0][0]
            assert out.dtype == getattr(torch, dtype) and bool(out.isfinite().all())


@pytest.mark.parametrize("mode", [ADD, ABLATE])
def test_a_compiled_model_compiles_once(mode):
    """One variant with the steer for all strengths, levels and runs."""
    model = models.build("flux").clone()
    counter = CompileCounter()

    torch._dynamo.reset()
    set_torch_compile_wrapper(model, backend=counter)
    expected = [models.sample(cases.put_steer(models.build("flux"), s, mode=mode), steps=2) for s in (0.8, -0.3)]
    first = models.sample(cases.put_steer(model, 0.8, mode=mode), steps=2)
    compiled = counter.frame_count
    second = models.sample(cases.put_steer(model, -0.3, mode=mode), steps=2)
    torch.testing.assert_close(first, expected[0], **CLOSE)
    torch.testing.assert_close(second, expected[1], **CLOSE)
    assert counter.frame_count == compiled


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_all_layers_at_once(kind, tmp_path):
    """Features of one concept at many sites are one thing: found in the same samplings, one effect, one file."""
    model = models.build(kind)
    runs = Runs(64, 64, 2, 3.0, 2, 1, 5)
    whole = in_model(model, texts_of(kind), "all layers", "out", ("p",), ("q",), runs, "x").features
    assert [one.site for one in whole.each()] == layers(model.model)
    for number in (0, -1):
        alone = in_model(model, texts_of(kind), layers(model.model)[number], "out", ("p",), ("q",), runs, "x").features
        assert same(alone, whole.each()[number])
    chained = model
    for one in whole.each():
        chained = cases.put_steer(chained, 0.7, found=one)
    together = models.sample(cases.put_steer(model, 0.7, found=whole))
    assert torch.equal(together, models.sample(chained)) and not torch.equal(together, models.sample(model))
    host_features.write(whole, tmp_path / "x.safetensors")
    assert same(host_features.read(tmp_path / "x.safetensors"), whole)
    with pytest.raises(FeaturesError, match="one site twice"):
        cases.put_steer(model, found=whole._replace(more=(*whole.more, whole.more[0])))


def test_cross_attention_that_reads_a_text_of_its_own_is_steered(plain):
    """A region's text is read by another way of computing the very layer that is steered: the steer comes behind it."""
    regional = plain.clone()
    left = torch.zeros(64, 64)
    left[:, :32] = 1
    attach(regional, TextEffect("left", Place(left, {"positive": models.conditioning(plain, 60)[0][0]})))
    site = layers(plain.model)[2]
    found = models.features(plain, site)

    def first(one):
        seen = []
        module = one.model.diffusion_model.get_submodule(site)
        models.sample(sampling.wrapped(one, WrappersMP.APPLY_MODEL, hooked(module, seen)), steps=1)
        return seen[0]

    read = first(regional)
    assert not torch.equal(read, first(plain))
    moved = first(cases.put_steer(regional, 1.0, found=found, keep_norm="off", side="both")) - read
    expected = (found.scale(14.6146).unit * found.weights) @ found.directions
    torch.testing.assert_close(moved, expected.expand_as(moved), rtol=1e-3, atol=1e-3)


class TestReplacedCrossAttention:
    """Extensions may compute a cross-attention themselves: of its modules only the projections run then."""

    @staticmethod
    def replaced(model):
        """At every layer, with the host's own computation twice over."""
        acting = model.clone()

        def replace(q, k, v, extra_options):
            return 2 * optimized_attention(q, k, v, extra_options["n_heads"])

        for name, block in [("input", 1), ("input", 2), ("input", 3), ("input", 4), ("middle", 0), *(("output", at) for at in range(12))]:
            acting.set_model_attn2_replace(replace, name, block)
        return acting

    def test_is_steered(self, plain):
        acting, site = self.replaced(plain), layers(plain.model)[2]
        called = []
        handle = plain.model.diffusion_model.get_submodule(site).register_forward_hook(lambda *_: called.append(1))
        assert not torch.equal(models.sample(acting), models.sample(plain)) and len(called) == 4
        handle.remove()
        found = models.features(plain, site)
        read, moved = (
            steps(one, f"{site}.to_out", steps=1)[0][0]
            for one in (acting, cases.put_steer(acting, 1.0, found=found, keep_norm="off", side="both"))
        )
        expected = (found.scale(14.6146).unit * found.weights) @ found.directions
        torch.testing.assert_close(moved - read, expected.expand_as(read), rtol=1e-3, atol=1e-3)

    def test_a_direction_is_found(self, plain):
        runs = Runs(64, 64, 2, 3.0, 2, 1, 5)
        found = in_model(self.replaced(plain), texts_of("sd15"), AUTO, "out", ("p",), ("q",), runs, "x").features
        plainly = in_model(plain, texts_of("sd15"), AUTO, "out", ("p",), ("q",), runs, "x").features
        assert [one.site for one in found.each()] == layers(plain.model)
        assert [one.fingerprint for one in found.each()] == [one.fingerprint for one in plainly.each()]
        assert plainly.fingerprint == host_features.fingerprint(plain.model.diffusion_model.get_submodule(plainly.site))
        assert not torch.equal(found.directions, plainly.directions)
        report = cases.steer(plain, found=plainly).result[1]
        assert f"at {plainly.site}" in report and "Note" not in report
        assert "Note: the weights" in cases.steer(plain, found=found.each()[-1]._replace(fingerprint="0")).result[1]

    def test_a_block_that_never_ran_is_named(self):
        """One that another extension computes without it."""
        model = models.build("flux").clone()
        model.set_model_patch_replace(lambda args, extra: {"img": args["img"], "txt": args["txt"]}, "dit", "double_block", 0)
        with pytest.raises(FeaturesError, match=r"Nothing passed through double_blocks\.0"):
            in_model(model, texts_of("flux"), "double_blocks.0", "out", ("p",), ("q",), Runs(64, 64, 2, 1.0, 2, 1, 5), "x")


def test_cross_attention_compiles_once(plain):
    model = plain.clone()
    counter = CompileCounter()
    torch._dynamo.reset()
    set_torch_compile_wrapper(model, backend=counter)
    found = models.features(plain, layers(plain.model)[2])
    first = models.sample(cases.put_steer(model, 0.8, found=found), steps=2)
    compiled = counter.frame_count
    second = models.sample(cases.put_steer(model, -0.3, found=found), steps=2)
    for got, strength in ((first, 0.8), (second, -0.3)):
        torch.testing.assert_close(got, models.sample(cases.put_steer(plain, strength, found=found), steps=2), **CLOSE)
    assert counter.frame_count == compiled


class TestOrder:
    """On one module, what adapts it acts first, then steers, then what only reads: whatever the order of the nodes."""

    @pytest.mark.parametrize("mode", [SCALE, CLAMP, ABLATE])
    def test_steers_see_what_adapters_made(self, mode):
        model = models.build("flux")
        options = {"mode": mode, "found": models.features(model, "double_blocks.0.img_attn.proj")}
        before, behind = cases.put_masked(cases.put_steer(model, 1.0, **options)), cases.put_steer(cases.put_masked(model), 1.0, **options)
        assert torch.equal(models.sample(before), models.sample(behind))
        assert not torch.equal(models.sample(behind), models.sample(cases.put_masked(model)))

    def test_readings_come_last(self):
        """Whatever the order of the nodes, what is kept of a layer is what it gives with everything on it."""
        model = models.build("flux")
        found = models.features(model, "double_blocks.0.img_attn.proj")

        def kept(before, behind):
            seen, listening = [], before(model).clone()
            tapped = Tapped(lambda sigma, means: seen.append(means), "out")
            attach(listening, TapEffect({f"diffusion_model.{found.site}": tapped}, [1.0]))
            models.sample(behind(listening), steps=1)
            return seen[0]

        def same(one):
            return one

        for put in (lambda one: cases.put_steer(one, 1.0, found=found), cases.put_masked):
            assert torch.equal(kept(same, put), kept(put, same)) and not torch.equal(kept(same, put), kept(same, same))


class TestRefusals:
    def test_another_family(self, plain):
        found = models.features(models.build("sdxl"))
        with pytest.raises(FeaturesError, match=r"found on SDXL, and this model is of Stable Diffusion 1\.5"):
            cases.put_steer(plain, found=found)

    def test_another_width(self, plain):
        found = models.features(plain)._replace(site="input_blocks.1.1")
        with pytest.raises(FeaturesError, match=r"64 numbers in a row, and input_blocks\.1\.1 of this model has 32"):
            cases.put_steer(plain, found=found)

    def test_no_such_site(self, plain):
        with pytest.raises(
            FeaturesError,
            match=r"no site 'output_blocks\.9\.1'.*input_blocks\.1\.1, .*'cross-attention' stands for 7 layers",
        ):
            cases.put_steer(plain, found=models.features(plain)._replace(site="output_blocks.9.1"))

    def test_what_flux_adds_cannot_be_told(self):
        model = models.build("flux")
        with pytest.raises(FeaturesError, match="write their output over their input"):
            cases.put_steer(model, found=models.features(model, io="diff"))

    def test_text_features_on_a_model(self, plain):
        with pytest.raises(FeaturesError, match="connect it to Steer Text"):
            cases.put_steer(plain, found=models.features(plain)._replace(io="text", site="clip_l.1"))

    def test_nan(self, plain):
        found = models.features(plain)
        for part in ("directions", "unit", "positive"):
            spoilt = getattr(found, part).clone()
            spoilt.view(-1)[0] = torch.nan
            with pytest.raises(FeaturesError, match=f"NaN or infinity in {part}"):
                cases.put_steer(plain, found=found._replace(**{part: spoilt}))
        with pytest.raises(ValueError, match="strength is nan"):
            cases.put_steer(plain, float("nan"))
        with pytest.raises(ValueError, match="level is inf"):
            cases.put_steer(plain, level=float("inf"))

    def test_shapes_that_do_not_fit(self, plain):
        found = models.features(plain)
        with pytest.raises(FeaturesError, match=r"weights is \(3,\) and should be \(2,\)"):
            cases.put_steer(plain, found=found._replace(weights=torch.ones(3)))


def test_layers_shown_another_grid_are_told_of():
    """A block that works on a shrunk picture gets nothing, and the shares know."""
    from concept_nodes.ops.shares import Shares

    found = models.features(models.build())
    act = Steers([cases_part(found, Steer(found.operand()))], torch.device("cpu"))
    shares = Shares(torch.ones(1, 1, 64))
    act.use(act.setting([(1.0, 1.0)], [0], shares))
    output = models.seeded((2, found.width, 4, 4), 3)
    assert act(output, True) is output and shares.missed


def test_sites_of_the_published_sizes():
    for kind, (site, width, count) in {
        "sd15": ("output_blocks.4.1", 1280, (16, 16)),
        "sdxl": ("output_blocks.1.1", 1280, (11, 70)),
        "flux": ("double_blocks.18", 3072, (57, 57)),
    }.items():
        model = models.full_size(kind).model
        assert width_at(model, site) == width and (len(blocks(model)), len(layers(model))) == count
        assert model_sites(model, AUTO) == ([site] if kind == "flux" else layers(model)) and model_sites(model, "all layers") == layers(
            model
        )
        assert all(width_at(model, name) in (320, 640, 1280, 3072) for name in layers(model))
        for name in layers(model):
            checked_site(model, name, "out")
    model = models.full_size("sdxl").model
    for site in ("input_blocks.8.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"):
        assert width_at(model, site) == 1280 and checked_site(model, site, "diff")


# --- files ------------------------------------------------------------------------------------------------------------------------


def same(one: Features, other: Features) -> bool:
    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, tuple) and isinstance(b, tuple) else a == b

    return all(equal(getattr(one, name), getattr(other, name)) for name in Features._fields)


class TestFiles:
    @pytest.mark.parametrize("latents", [False, True])
    def test_are_what_was_written_and_small(self, tmp_path, plain, latents):
        found = models.features(plain, latents=latents)._replace(positions=torch.tensor([3, -1]), gate=0.4, fingerprint="abc")
        path = tmp_path / "deeper" / "bundle.safetensors"
        host_features.write(found, path)
        assert same(host_features.read(path), found)
        assert path.stat().st_size < 8192 and [one.name for one in path.parent.iterdir()] == ["bundle.safetensors"]

    def test_one_that_is_there_is_replaced_whole_or_not_at_all(self, tmp_path, plain, monkeypatch):
        path = tmp_path / "bundle.safetensors"
        host_features.write(models.features(plain), path)
        before = path.read_bytes()

        def full(*args, **kwargs):
            raise host_features.SafetensorError("No space left on device")

        monkeypatch.setattr(host_features, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            host_features.write(models.features(plain, seed=9), path)
        assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

    def test_damage_is_named(self, tmp_path, plain):
        path = tmp_path / "bundle.safetensors"
        host_features.write(models.features(plain), path)
        whole = path.read_bytes()
        for content in (b"", whole[:40], whole[:-8], b"\x80\x04K\x01."):
            path.write_bytes(content)
            with pytest.raises(FeaturesError, match=r"'bundle\.safetensors' cannot be read .*It lies at"):
                host_features.read(path)
        with pytest.raises(FeaturesError, match=r"'none\.safetensors' cannot be opened"):
            host_features.read(tmp_path / "none.safetensors")
        save_file({"a": torch.zeros(1)}, path)
        with pytest.raises(FeaturesError, match="holds tensors, but no concept features"):
            host_features.read(path)

    def test_a_spoilt_number_is_seen_at_reading(self, tmp_path, plain):
        path = tmp_path / "bundle.safetensors"
        host_features.write(models.features(plain)._replace(unit=torch.tensor([1.0, torch.inf])), path)
        with pytest.raises(FeaturesError, match="NaN or infinity in unit"):
            host_features.read(path)

    def test_a_file_steers_as_the_socket_does(self, plain):
        from concept_nodes.nodes.steering import SteerModel

        found = models.features(plain)
        host_features.write(found, host_features.output_folder() / "case.safetensors")
        assert "case.safetensors" in host_features.names()
        model = SteerModel.execute(plain, "case.safetensors", 0.8, "add", 0.0, 1.0, "cond").result[0]
        assert torch.equal(models.sample(model), models.sample(cases.put_steer(plain, found=found)))
        assert SteerModel.validate_inputs("case.safetensors") is True
        assert "Did you mean 'case.safetensors'" in SteerModel.validate_inputs("kase.safetensors")
        with pytest.raises(ValueError, match="Both a file"):
            SteerModel.execute(plain, "case.safetensors", 0.8, "add", 0.0, 1.0, "cond", features=found)


# --- text encoders ----------------------------------------------------------------------------------------------------------------

TEXT = "a large red circle on the left of a (blue:1.2) star"


def text_features(clip, site="", m=2, seed=70, latents=False, **options) -> Features:
    from concept_nodes.host.features import Readers

    site = site or default_text_site(clip)
    width = sum(one.width for one in text_sites(clip, site))
    readers = Readers(models.seeded((m, width), seed + 3, width**-0.5), torch.zeros(m), torch.zeros(m)) if latents else None
    base = dict(
        name="random",
        family="text",
        site=site,
        io="text",
        directions=torch.nn.functional.normalize(models.seeded((m, width), seed), dim=1),
        weights=torch.ones(m),
        unit=torch.full((m,), 2.0),
        mean=models.seeded((width,), seed + 1, 0.1),
        sigmas=torch.zeros(1),
        positive=torch.ones(1, m),
        negative=torch.zeros(1, m),
        readers=readers,
        gate=0.5,
    )
    return Features(**base | options)


def put(clip, strength=0.9, mode=ADD, scope=ALL_ROWS, gate=0.0, found=None, **options):
    found = text_features(clip) if found is None else found
    return steered(clip, TextSteer(found, Steer(found.operand(), mode, **options), strength, scope, gate))


def bits(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) and p.keys() == q.keys() and all(p[k] is None and q[k] is None or torch.equal(p[k], q[k]) for k in p)
        for (a, p), (b, q) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("kind", CLIPS)
class TestEncoders:
    def test_nothing_is_left_behind(self, kind):
        clip = text_encoders.build(kind)
        plain = text_encoders.encode(clip, TEXT)
        before = state.of_model(clip.cond_stage_model)
        acting = put(clip)
        assert not bits(text_encoders.encode(acting, TEXT), plain)
        assert bits(text_encoders.encode(clip, TEXT), plain)
        text_encoders.encode(clip, TEXT)
        assert state.differences(before, state.of_model(clip.cond_stage_model)) == []

    def test_strength_0_is_the_hosts_own_encoding(self, kind):
        clip = text_encoders.build(kind)
        positive, negative, report = SteerText.execute(clip, "none", 0.0, "add", "all", 0.0, "opposite", text_features(clip)).result
        assert positive is clip and negative is clip and "strength is 0" in report
        for mode in MODES:
            assert bits(text_encoders.encode(put(clip, 0.0, mode), TEXT), text_encoders.encode(clip, TEXT))

    def test_after_an_error_the_modules_are_plain(self, kind):
        clip = text_encoders.build(kind)
        before = state.of_model(clip.cond_stage_model)
        acting = put(clip)
        site = text_sites(clip, default_text_site(clip))[0]
        last = list(site.module.modules())[-1]
        forward = type(last).forward

        def fail(*_):
            raise sampling.Failure

        handle = site.module.register_forward_hook(fail)
        try:
            with pytest.raises(sampling.Failure):
                text_encoders.encode(acting, TEXT)
        finally:
            handle.remove()
        assert type(last).forward is forward and not acting.busy
        assert state.differences(before, state.of_model(clip.cond_stage_model)) == []
        assert not bits(text_encoders.encode(acting, TEXT), text_encoders.encode(clip, TEXT))

    def test_clones_keep_it_and_steers_add_up(self, kind):
        clip = text_encoders.build(kind)
        once = text_encoders.encode(put(clip, 0.9), TEXT)
        assert bits(text_encoders.encode(put(clip, 0.9).clone(), TEXT), once)
        twice = text_encoders.encode(put(put(clip, 0.5), 0.4), TEXT)
        torch.testing.assert_close(twice[0][0], once[0][0], **CLOSE)

    def test_every_window_gets_it(self, kind):
        """What the last block adds is what comes out, up to the last norm; so rows of all windows differ from the plain ones."""
        clip = text_encoders.build(kind)
        text = "word " * 150
        plain, moved = (text_encoders.encode(one, text)[0][0] for one in (clip, put(clip)))
        assert plain.shape == moved.shape and plain.shape[1] > 77
        assert bool((moved != plain).any(-1).all())

    def test_words_alone(self, kind):
        clip = text_encoders.build(kind)
        seat = next(seat for seat in seats(clip) if seat.columns)
        tokens = clip.tokenize(TEXT, return_word_ids=True)
        expected = [[bool(item[2]) for item in window] for window in tokens[seat.key]]
        scope = scope_of(clip, seat, tokens[seat.key], CONTENT)
        assert scope[:-1].bool().tolist() == expected and not scope[-1].any()
        assert bool(scope_of(clip, seat, tokens[seat.key], ALL_ROWS)[:-1].all())
        skipping = scope_of(clip, seat, tokens[seat.key], BUT_FIRST)[:-1]
        assert not skipping[:, 0].any() and bool(skipping[:, 1:].all())


@pytest.mark.parametrize("scope", [ALL_ROWS, BUT_FIRST, CONTENT])
@pytest.mark.parametrize("text", ["a red circle", "a (red:1.3) circle", "word " * 150])
def test_a_block_gives_its_rows_and_the_difference(text, scope):
    """At the site itself, whatever the batch: weights append an empty prompt, which stays as it is."""
    clip = text_encoders.build("sd15")
    found = text_features(clip, "clip_l.1")
    site = text_sites(clip, "clip_l.1")[0]
    seen = {}
    for name, one in (("plain", clip), ("steered", put(clip, 0.9, scope=scope, found=found))):
        handle = site.module.register_forward_hook(lambda _, given, output, name=name: seen.update({name: output.clone()}))
        text_encoders.encode(one, text)
        handle.remove()
    moved = seen["steered"] - seen["plain"]
    windows = clip.tokenize(text)["l"]
    expected = 0.9 * 2.0 * found.directions.sum(0)
    where = scope_of(clip, site.seat, windows, scope)[: len(moved)]
    assert len(moved) == len(windows) + (":" in text)
    torch.testing.assert_close(moved, where[..., None] * expected, **CLOSE)


def test_two_encoders_side_by_side_get_their_columns():
    clip = text_encoders.build("sdxl")
    found = text_features(clip, "clip_l.1+clip_g.1")
    assert found.width == text_encoders.WIDTH_L + text_encoders.WIDTH_G
    left = text_features(clip, "clip_l.1")._replace(directions=found.directions[:, : text_encoders.WIDTH_L])
    right = text_features(clip, "clip_g.1")._replace(directions=found.directions[:, text_encoders.WIDTH_L :])
    apart = text_encoders.encode(put(put(clip, found=left), found=right), TEXT)
    assert bits(text_encoders.encode(put(clip, found=found), TEXT), apart)
    with pytest.raises(FeaturesError, match="2 encoders"):
        put(clip, mode=SCALE, found=found)


def test_the_identity_autoencoder_adds_the_concepts_own_rows():
    """Each position's direction is what the block gives for the concept there: x' = x + s x_C; with the concept as the prompt and -1, 0."""
    clip = text_encoders.build("sd15")
    site = text_sites(clip, "clip_l.1")
    concept, _ = captured(clip, site, clip.tokenize("red"))
    base = text_features(clip, "clip_l.1", m=77)
    found = base._replace(directions=concept[0], unit=torch.ones(77), positions=torch.arange(77))
    for text, s in (("a blue star", 0.7), ("red", -1.0)):
        before, _ = captured(clip, site, clip.tokenize(text))
        acting, seen = put(clip, s, found=found), []
        handle = site[0].module.register_forward_hook(lambda _, given, output, seen=seen: seen.append(output.clone()))
        text_encoders.encode(acting, text)
        handle.remove()
        torch.testing.assert_close(seen[0], before + s * concept, **CLOSE)
    assert float(seen[0].abs().max()) < 1e-4


def test_the_second_clip_is_the_other_way():
    clip = text_encoders.build("sd15")
    found = text_features(clip, "clip_l.1")

    def outputs(negative):
        positive, other, _ = SteerText.execute(clip, "none", 0.9, "add", "all", 0.0, negative, found, keep_norm="off").result
        return [at_site(one) for one in (positive, other)]

    def at_site(one):
        seen = []
        handle = text_sites(clip, "clip_l.1")[0].module.register_forward_hook(lambda _, given, output: seen.append(output.clone()))
        text_encoders.encode(one, "a star")
        handle.remove()
        return seen[0]

    base = at_site(clip)
    there, back = outputs("opposite")
    torch.testing.assert_close(there - base, base - back, **CLOSE)
    assert torch.equal(*outputs("same")) and torch.equal(outputs("none")[1], base)


class TestClipSkip:
    def test_behind_what_is_read_is_refused(self):
        clip = text_encoders.build("sdxl")
        seat = next(seat for seat in seats(clip) if seat.part == "clip_l")
        assert read_last(clip, seat) == 1
        with pytest.raises(FeaturesError, match=r"clip_l\.2 lies behind clip_l\.1.*nothing would come of it"):
            put(clip, found=text_features(clip, "clip_l.2"))

    def test_set_behind_the_node_is_an_error_and_not_silence(self):
        clip = text_encoders.build("sdxl")
        later = put(clip, found=text_features(clip, "clip_l.1")).clone()
        later.clip_layer(-3)
        with pytest.raises(FeaturesError, match="clip skip"):
            text_encoders.encode(later, TEXT)
        assert not later.busy

    def test_the_pooled_vector_alone_is_told(self):
        clip = text_encoders.build("sd15").clone()
        clip.clip_layer(-2)
        found = text_features(clip, "clip_l.2")
        positive, _, report = SteerText.execute(clip, "none", 0.9, "add", "all", 0.0, "none", found).result
        assert "only the pooled vector changes" in report
        (rows, options), (plain_rows, plain) = text_encoders.encode(positive, TEXT)[0], text_encoders.encode(clip, TEXT)[0]
        assert torch.equal(rows, plain_rows) and not torch.equal(options["pooled_output"], plain["pooled_output"])

    def test_an_earlier_block_follows_it(self):
        clip = text_encoders.build("sd15").clone()
        clip.clip_layer(-2)
        assert not bits(text_encoders.encode(put(clip, found=text_features(clip, "clip_l.1")), TEXT), text_encoders.encode(clip, TEXT))


class TestTextRefusals:
    def test_sites(self):
        clip = text_encoders.build("sd15")
        with pytest.raises(FeaturesError, match=r"no site 'clip_g\.3'\. Its sites are clip_l\.0 to clip_l\.2"):
            text_sites(clip, "clip_g.3")
        with pytest.raises(FeaturesError, match="one encoder twice"):
            text_sites(clip, "clip_l.0+clip_l.1")

    def test_width_and_kind(self):
        clip, other = text_encoders.build("sd15"), lab.load_clip()
        with pytest.raises(FeaturesError, match=r"128 numbers in a row, and clip_l\.1 of this CLIP has 24"):
            put(clip, found=text_features(other, "clip_l.1"))
        with pytest.raises(FeaturesError, match="connect it to Steer Model"):
            put(clip, found=models.features(models.build()))

    def test_no_gate(self):
        clip = text_encoders.build("sd15")
        with pytest.raises(FeaturesError, match="no gate of their own"):
            put(clip, gate=1.0, found=text_features(clip, gate=None))


@pytest.mark.parametrize("gate", [0.0, 1.0])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("kind", "sites", "empty"),
    [("sd3 without t5", ("clip_l.1", "clip_l.1+clip_g.1"), ("l", "g")), ("flux", ("t5xxl.1", "t5xxl.1+clip_l.1"), ("t5xxl",))],
)
def test_an_encoder_without_windows_is_left_alone(kind, sites, empty, whole, gate):
    """The host's nodes for Stable Diffusion 3 give an encoder none for an empty text."""
    clip = text_encoders.build(kind)
    tokens = clip.tokenize("a red circle") | {part: [] for part in empty}
    plain = clip.encode_from_tokens_scheduled(tokens, show_pbar=False)
    for site in sites:
        found = text_features(clip, site, gate=1e-6, whole=whole)
        rows, content = captured(clip, text_sites(clip, site), tokens)
        assert rows.shape[2] == found.width and not content.numel()
        got = put(clip, gate=gate, found=found).encode_from_tokens_scheduled(tokens, show_pbar=False)
        # Of several encoders' columns, those with windows are steered: their gate is read over all of them.
        assert bits(got, plain) == (gate > 0 or not site.startswith("t5xxl.1+"))


def test_scheduled_hooks_are_steered_too(plain):
    """The host encodes once for every part of sampling there, past `encode_from_tokens`."""
    import comfy.hooks

    clip = text_encoders.build("sd15").clone()
    hook = comfy.hooks.create_hook_lora({}, 1.0, 1.0)
    hook.set_keyframes_on_hooks(comfy.hooks.HookKeyframeGroup())
    clip.patcher.forced_hooks = hook
    clip.use_clip_schedule = True
    entries, moved = (one.encode_from_tokens_scheduled(one.tokenize(TEXT), show_pbar=False) for one in (clip, put(clip)))
    assert len(entries) == len(moved) and not torch.equal(entries[0][0], moved[0][0])


# --- finding ----------------------------------------------------------------------------------------------------------------------


class TestFinding:
    def test_in_text_is_the_difference_of_means(self):
        clip = text_encoders.build("sd15")
        positive, negative = ("a red star", "a red cat"), ("a star", "a cat in a hat")
        found = in_text(clip, "clip_l.1", positive, negative, WORDS, "red").features
        site = text_sites(clip, "clip_l.1")

        def mean(text):
            rows, content = captured(clip, site, clip.tokenize(text))
            return rows[content].mean(0)

        way = (mean(positive[0]) + mean(positive[1]) - mean(negative[0]) - mean(negative[1])) / 2
        torch.testing.assert_close(found.unit * found.directions[0], way)
        assert found.site == "clip_l.1" and found.prompts == (positive, negative)

    def test_for_each_position(self):
        clip = text_encoders.build("sd15")
        found = in_text(clip, "clip_l.1", ("a red star",), ("a blue star",), POSITIONS, "red").features
        site = text_sites(clip, "clip_l.1")
        one, other = (captured(clip, site, clip.tokenize(text))[0][0] for text in ("a red star", "a blue star"))
        assert found.positions.tolist() == list(range(2, 77))  # causal: before the word nothing differs
        torch.testing.assert_close(found.unit[:, None] * found.directions, (one - other)[2:])

    def test_equal_prompts_have_no_direction(self):
        with pytest.raises(FeaturesError, match="the same at clip_l.1"):
            in_text(text_encoders.build("sd15"), "clip_l.1", ("a star",), ("a star",), WORDS, "")

    @pytest.mark.parametrize("kind", ["sd15", "flux"])
    def test_in_a_model_is_what_its_block_gives(self, kind):
        """The means at the noise levels, by listening with a hook of the test's own to the same samplings one by one."""
        model, clip = sampling.loaded(lambda: models.build(kind)), texts_of(kind)
        runs = Runs(64, 64, 3, 1.0, 2, 1, 5)
        before = state.of_patcher(model), state.of_model(model.model)
        found = in_model(model, clip, models.SITES[kind], "out", ("p", "q"), ("r",), runs, "x").features
        assert state.differences(before[0], state.of_patcher(model)) == []
        assert state.differences(before[1], state.of_model(model.model)) == []
        assert same(found, in_model(model, clip, models.SITES[kind], "out", ("p", "q"), ("r",), runs, "x").features)
        module = model.model.diffusion_model.get_submodule(models.SITES[kind])
        down = model.model.latent_format.spacial_downscale_ratio
        means = {}
        for text in "pqr":
            seen, cond = [], clip.encode_from_tokens(text, return_pooled=True)
            handle = module.register_forward_hook(lambda _, given, output, seen=seen: seen.append(output[0] if kind == "flux" else output))
            with torch.inference_mode():
                conditioning = [[cond[0], {"pooled_output": cond[1]}]]
                latent = {"samples": torch.zeros(1, models.channels(model), 64 // down, 64 // down)}
                nodes.common_ksampler(model, 5, 3, 1.0, "euler", "normal", conditioning, conditioning, latent)
            handle.remove()
            means[text] = [(one.flatten(2).mT if one.ndim == 4 else one).mean((0, 1)) for one in seen]
        for level, step in enumerate((0, 2)):
            way = (means["p"][step] + means["q"][step]) / 2 - means["r"][step]
            gap = float(found.positive[level] - found.negative[level])
            assert gap == pytest.approx(float(way @ found.directions[0]), rel=1e-2, abs=1e-4)

    def test_names_and_messages(self):
        assert name_of(("a red star", "a red cat"), ("a star",)) == "red"
        clip = text_encoders.build("sd15")
        with pytest.raises(FeaturesError, match="negative is empty"):
            DirectionFind.execute(clip, "a star", " \n", "text encoder", "auto", "")
        with pytest.raises(FeaturesError, match="Nothing is connected to model"):
            DirectionFind.execute(clip, "a star", "a cat", "model", "auto", "")
        with pytest.raises(FeaturesError, match="cannot be a file's name"):
            DirectionFind.execute(clip, "a star", "a cat", "text encoder", "auto", "../x")

    def test_a_file_is_written_and_one_of_its_name_kept(self):
        clip = text_encoders.build("sd15")
        for text in ("a cat", "a dog"):
            found, report = DirectionFind.execute(clip, "a red star", text, "text encoder", "clip_l.1", "kept").result
            assert "Saved as" in report
        there = sorted(path.name for path in host_features.output_folder().glob("kept*"))
        assert there == ["kept.safetensors", "kept_00001.safetensors"]
        assert same(host_features.read(host_features.path_of("kept.safetensors")), found)

    def test_the_same_again_is_no_new_file(self):
        clip = text_encoders.build("sd15")
        folder = host_features.output_folder()
        for _ in range(3):
            report = DirectionFind.execute(clip, "a red star", "a cat", "text encoder", "clip_l.1", "again").result[1]
            assert f"Saved as {folder / 'again.safetensors'}" in report
        assert [path.name for path in folder.glob("again*")] == ["again.safetensors"]

    def test_a_failed_write_leaves_the_file(self):
        """A name so long that there is no room for the mark of an unfinished file."""
        clip, stem = text_encoders.build("sd15"), "long" * 59
        path = host_features.output_folder() / f"{stem}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"before")
        report = DirectionFind.execute(clip, "a red star", "a cat", "text encoder", "clip_l.1", stem).result[1]
        assert "NOT saved as" in report and path.read_bytes() == b"before"
        assert [kept.name for kept in path.parent.glob("long*")] == [path.name]

    def test_can_be_queued_by_itself(self):
        assert DirectionFind.GET_SCHEMA().is_output_node

    def test_other_files_of_the_folder_are_not_listed(self, tmp_path):
        """Where an extra-paths file named the folder first, the host knows no endings for it."""
        known = folder_paths.folder_names_and_paths
        before = known.pop(host_features.FOLDER, None)
        try:
            folder_paths.add_model_folder_path(host_features.FOLDER, str(tmp_path))
            for name in ("readme.md", "one.safetensors"):
                (tmp_path / name).write_bytes(b"")
            assert "one.safetensors" in host_features.names() and "readme.md" not in host_features.names()
        finally:
            known.pop(host_features.FOLDER)
            if before is not None:
                known[host_features.FOLDER] = before


def texts_of(kind):
    """Something that encodes a letter, for models whose contexts are random."""
    model = models.build(kind)

    class Clip:
        def tokenize(self, text):
            return text

        def encode_from_tokens(self, text, return_pooled=True):
            ((context, options),) = models.conditioning(model, 100 + sum(map(ord, text)))
            return context, options.get("pooled_output")

    return Clip()


# --- on pictures ------------------------------------------------------------------------------------------------------------------

COLOURS = ("blue", "green", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "star")
PLAIN = [f"a {colour} {shape} on a grey background" for colour, shape in zip(COLOURS, SHAPES, strict=True)]
RED = [f"a red {shape} on a grey background" for shape in SHAPES], PLAIN
NEON = [f"{text}, neon style" for text in PLAIN], [f"{text}, flat style" for text in PLAIN]


@pytest.fixture(scope="module")
def loaded():
    return lab.load("unet")


@pytest.fixture(scope="module")
def eye():
    return Eye.load()


@pytest.mark.parametrize(("prompts", "pooling"), [(RED, WORDS), (NEON, ROWS)])
def test_prompts_below_the_gate_are_bit_for_bit_what_they_were(loaded, prompts, pooling):
    """Other texts than it was found on, with the concept and without it."""
    found = in_text(loaded.clip, "clip_l.3", *prompts, pooling, "x").features
    acting = put(loaded.clip, 1.0, ABLATE, gate=1.0, found=found)
    word = "red" if prompts is RED else "neon"

    def untouched(text):
        return bits(text_encoders.encode(acting, text), text_encoders.encode(loaded.clip, text))

    for colour, shape in zip(COLOURS, reversed(SHAPES), strict=True):
        text = f"a large {colour} {shape} at the top on white"
        assert untouched(text)
        assert not untouched(text.replace(colour, "red") if word == "red" else f"{text}, neon style")


def test_a_colour_comes_and_goes_in_the_model(loaded, eye):
    """Along all cross-attention at once, on figures that the directions were not found on."""
    found = in_model(loaded.model, loaded.clip, AUTO, "out", *RED, Runs(64, 64, 10, 4.0, 3, 1, 0), "red").features
    kinds = ("heart", "diamond", "crescent", "cross", "heart", "diamond", "crescent", "cross")
    open_ones = [f"a large {kind} on the left on a grey background" for kind in kinds]

    def red(texts, strength=0.0, mode=ADD):
        model = cases.put_steer(loaded.model, strength, mode=mode, found=found)
        readings = eye.read(draw(loaded, texts, size=64, seed=5000, model=model, steps=12))
        return sum(any(seen.colour == "red" for seen in reading.objects) for reading in readings) / len(texts)

    closed = [text.replace("large", "large red") for text in open_ones]
    assert red(open_ones) <= 0.25 and red(open_ones, 1.0) >= 0.75
    assert red(closed) >= 0.75 and red(closed, 1.0, ABLATE) <= 0.25


def test_a_style_comes_in_the_text(loaded, eye):
    found = in_text(loaded.clip, "clip_l.3", *NEON, ROWS, "neon").features
    texts = [f"a large {colour} {shape} on the left on a grey background" for colour in COLOURS[:2] for shape in SHAPES]

    def neon(strength):
        clip = put(loaded.clip, strength, found=found, scope=BUT_FIRST, keep=True)
        readings = eye.read(draw(loaded._replace(clip=clip), texts, size=64, seed=5000, steps=12))
        return sum(reading.style == "neon" for reading in readings) / len(texts)

    assert neon(0.0) <= 0.25 and neon(1.5) >= 0.75
