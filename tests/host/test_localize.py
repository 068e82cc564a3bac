"""Regions found by words while a picture is sampled: masks of the running model's own attention."""

from collections import OrderedDict
from dataclasses import replace

import models
import pytest
import sampling
import state
import text_encoders
import torch

import nodes
from concept_nodes.host import adapters, capture, lab, localize
from concept_nodes.host.dispatcher import attach
from concept_nodes.host.localize import Masks, Sought, cut
from concept_nodes.host.maps import Bound
from concept_nodes.host.places import LivePlace, group
from concept_nodes.host.regions import Hung, Regions, RegionsError, TextEffect
from concept_nodes.host.run_record import find
from concept_nodes.lab import characters
from concept_nodes.lab.eye import Eye
from concept_nodes.nodes.localize import Localize
from concept_nodes.nodes.maps import Maps
from concept_nodes.nodes.regions import RegionLoRA, RegionsApply, RegionSlider, RegionsToMasks
from concept_nodes.nodes.steering import RegionFeatures
from concept_nodes.ops.masks import Box
from concept_nodes.ops.regions import Live, Region
from concept_nodes.ops.steering import ADD

KINDS = list(models.KINDS)
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
TEXT = "cat dog"  # of five rows or fewer, as all samplings of models.sample read seven
WAYS = (
    "KSampler heun",
    "KSampler dpmpp_sde",
    "KSampler uni_pc",
    "KSampler dpm_adaptive",
    "scheduler karras",
    "batch of three",
    "without uncond",
    "img2img",
    "inpaint",
    "hires fix",
    "areas",
    "SamplerCustomAdvanced, BasicGuider",
    "DualCFGGuider regular",
    "PerpNegGuider",
    "DualModelGuider, positive model",
)
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _nothing_of_other_tests(monkeypatch):
    monkeypatch.setattr(capture, "_captures", OrderedDict())


def sought(phrases=1, background=0, **live):
    behind = tuple(Bound("behind", (1,), "") for _ in range(background))
    return [Sought(str(index), index, Bound("x", (index,), ""), behind, Live(**live)) for index in range(phrases)]


class TestMasks:
    @pytest.mark.parametrize("n", [4, 9, 25, 64])
    def test_the_median_lets_half_of_the_places_in(self, n):
        maps = torch.rand(3, 1, 1, n).argsort(-1).float()
        mask = cut(maps, sought(threshold="median"), 1, n)
        assert mask.sum((0, 2, 3)).tolist() == [n // 2] * 3

    @pytest.mark.parametrize("threshold", ["median", "otsu", "quantile", "soft"])
    def test_a_map_that_is_the_same_all_over_is_nowhere(self, threshold):
        for value in (0.0, 0.3):
            mask = cut(torch.full((2, 1, 8, 8), value), sought(threshold=threshold), 16, 16)
            assert torch.equal(mask, torch.zeros(1, 2, 16, 16))

    def test_order_of_phrases_does_not_matter(self):
        maps = models.seeded((2, 3, 8, 8), 1).exp()
        turned = cut(maps[:, [2, 0, 1]], sought(3), 16, 16)
        assert torch.equal(turned, cut(maps, sought(3), 16, 16)[[2, 0, 1]])

    def test_argmax_shares_all_out_and_a_background_takes_its_part(self):
        maps = models.seeded((2, 4, 8, 8), 1).exp()
        alone = cut(maps[:, :2], sought(2), 8, 8)
        assert torch.equal(alone.sum(0), torch.ones(2, 8, 8))
        behind = cut(maps, sought(2, background=1), 8, 8)
        assert ((behind == 0) | (alone == 1)).all()
        assert behind.sum() < alone.sum()

    def test_soft_ones_share_every_place(self):
        maps = models.seeded((2, 3, 8, 8), 1).exp()
        shares = cut(maps, sought(3, threshold="soft"), 8, 8)
        torch.testing.assert_close(shares.sum(0), torch.ones(2, 8, 8))
        assert torch.equal(shares.argmax(0), cut(maps, sought(3), 8, 8).argmax(0))

    def test_a_flat_map_and_a_sharp_one_compete_by_where_they_are_high(self):
        """Of two maps that are each one half of the picture, each has its half, however sharp."""
        left = torch.zeros(1, 1, 8, 8)
        left[..., :4] = 1
        maps = torch.cat([(5 * left).exp(), (0.1 * (1 - left)).exp()], 1)
        first, second = cut(maps, sought(2), 8, 8)
        assert torch.equal(first, left[0]) and torch.equal(second, 1 - left[0])

    def test_a_picture_does_not_see_the_others(self):
        maps = models.seeded((3, 2, 8, 8), 1).exp()
        for threshold in ("argmax", "otsu", "median", "soft"):
            every = cut(maps, sought(2, threshold=threshold), 16, 16)
            one = cut(maps[1:2], sought(2, threshold=threshold), 16, 16)
            assert torch.equal(every[:, 1:2], one)

    def test_steps_are_smoothed_and_stay_where_they_are_told_to(self):
        masks = Masks([*sought(1, smoothing=0.75), *sought(1, smoothing=0.0)], lambda height, width, found: found)
        first, second, third = (models.seeded((1, 16, 2), seed).exp() for seed in (1, 2, 3))

        def follow(maps, step, moving=(True, True)):
            masks.add((4, 4), maps, moving)
            return masks.version(step)

        def relative(maps):
            maps = maps.transpose(1, 2).unflatten(-1, (4, 4))
            return maps / maps.mean((-2, -1), keepdim=True)

        assert masks.version(0) == 0 and not masks.shares(4, 4).any()
        assert follow(first, 1) == 1
        torch.testing.assert_close(masks.maps, relative(first))
        masks.add((4, 4), second, (True, True))
        assert masks.version(1) == 1  # another call of the same step
        assert masks.version(2) == 2
        torch.testing.assert_close(masks.maps[:, 0], 0.75 * relative(first)[:, 0] + 0.25 * relative(second)[:, 0])
        torch.testing.assert_close(masks.maps[:, 1], relative(second)[:, 1])
        before = masks.maps.clone()
        follow(third, 3, (False, True))
        assert torch.equal(masks.maps[:, 0], before[:, 0])
        torch.testing.assert_close(masks.maps[:, 1], relative(third)[:, 1])


def kind_of(model) -> str:
    return next(kind for kind, (config, _) in models.KINDS.items() if type(model.model.model_config) is config)


SETTINGS = {
    "threshold": "argmax",
    "level": 0.5,
    "scope": "step",
    "smoothing": 0.5,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "freeze_percent": 1.0,
}
MEDIAN = SETTINGS | {"threshold": "median"}


def execute(model, strength=0.8, text="own", mask=None, names=("cat", "dog"), **live):
    """Two words found in a prompt of seven rows, a LoRA on each."""
    regions = None
    for seed, name in enumerate(names):
        lora = models.lora(model, seed=seed)
        (regions,) = Localize.execute(name, "", "none", strength, regions=regions, lora=lora, mask=mask, **SETTINGS | live).result
    return put(model, regions, text)


def put(model, regions, text="own", **options):
    given = {"clip": text_encoders.short(kind_of(model)), "prompt": TEXT} | options
    return RegionsApply.execute(model, [], [], regions, text, **given)


def acts(*args, **options):
    return execute(*args, **options).result[0]


def slid(model, start, seed=0, **options):
    """The same LoRA everywhere."""
    regions = Regions().with_region(Region("all", shapes=(Box(0, 0, 1, 1),)))
    regions = regions.with_lora("all", Hung("random", models.lora(model, seed=seed), 0.8, 0.0, start))
    return RegionsApply.execute(model, [], [], regions, **options).result[0]


class TestLaws:
    @each_kind
    def test_zero_is_nothing(self, kind):
        model = models.build(kind)
        expected = models.sample(model, batch=2)
        for neutral in ({"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}, {"mask": torch.zeros(8, 8)}):
            assert torch.equal(models.sample(acts(model, **neutral), batch=2), expected), neutral

    @each_kind
    def test_it_acts_and_says_so(self, kind):
        model = models.build(kind)
        output = execute(model)
        out = models.sample(output.result[0])
        assert not torch.equal(out, models.sample(model))
        assert "'cat': found while sampling" in output.result[-1] and "'cat': token 1 (one place)" in output.result[-1].replace(
            "token 0", "token 1"
        )
        told = find(out).describe()
        assert "Maps of 'cat', 'dog'" in told and "of the picture at the end" in told and "none of them added" in told

    @pytest.mark.parametrize("way", WAYS)
    def test_every_way_to_sample(self, way):
        model = models.build()
        assert not torch.equal(sampling.WAYS[way](acts(model)), sampling.WAYS[way](model))

    @pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
    def test_no_call_is_added(self, sampler):
        model = models.build()
        assert sampling.count_calls(acts(model), sampler=sampler) == sampling.count_calls(model, sampler=sampler)

    @pytest.mark.parametrize("situation", sampling.SITUATIONS)
    def test_nothing_is_mutated(self, situation):
        situation = sampling.situation(situation, ())
        model = situation.model()
        expected, before = situation.plain(model), state.of_model(model.model)
        acting = acts(model)
        acting_before = state.of_patcher(acting)
        situation.run(acting, model)
        assert state.differences(acting_before, state.of_patcher(acting)) == []
        assert state.differences(before, state.of_model(model.model)) == []
        assert torch.equal(situation.plain(model), expected)


class TestMasksOfARun:
    @pytest.mark.parametrize(
        ("kind", "text"), [(kind, text) for kind in KINDS for text in ("own", "all") if (kind, text) != ("flux", "own")]
    )
    def test_where_it_is_everywhere_it_is_the_plain_lora(self, kind, text):
        """From the second step on, as the first has to show it. (On Flux, 'own' acts on the region's own words: see below.)"""
        model = models.build(kind)
        live = acts(model, text=text, names=("cat",), threshold="quantile", level=0.0, start_percent=0.2)
        torch.testing.assert_close(models.sample(live, batch=2), models.sample(slid(model, 0.2, text=text), batch=2), **CLOSE)

    def test_on_flux_it_acts_on_its_own_words(self):
        model = models.build("flux")
        live = {"names": ("cat",), "threshold": "median"}
        assert torch.equal(models.sample(acts(model, **live)), models.sample(acts(model, text="span", **live)))
        assert "Acts on the common prompt's words 'cat'" in execute(model, **live).result[-1]

    @each_kind
    def test_each_picture_of_a_batch_has_its_own(self, kind):
        model = models.build(kind)
        acting = acts(model, threshold="otsu")
        both, alone = models.sample(acting, batch=3), models.sample(acting)
        torch.testing.assert_close(both[:1], alone, **CLOSE)

    @each_kind
    def test_however_the_conditions_are_laid_out(self, kind):
        model = models.build(kind)
        expected = models.sample(acts(model))
        for way in (sampling.one_by_one, sampling.turned_around, lambda model: sampling.one_by_one(model, -1)):
            torch.testing.assert_close(models.sample(way(acts(model))), expected, **CLOSE)

    @each_kind
    def test_nothing_stays_from_run_to_run(self, kind):
        acting = acts(models.build(kind))
        first, larger = models.sample(acting), models.sample(acting, size=12)
        sampling.interrupted(acting, None)
        assert torch.equal(models.sample(acting), first)
        assert torch.equal(models.sample(acting, size=12), larger)

    def test_a_drawn_mask_bounds_it(self):
        model = models.build()
        left = torch.zeros(1, 64, 64)
        left[..., :32] = 1
        seen = watch_masks(acts(model, mask=left, threshold="median"))
        assert seen.any() and not seen[..., 4:].any()

    def test_it_meets_drawn_regions_and_the_rest(self):
        model = models.build()
        regions = Regions().with_region(Region("top", shapes=(Box(0, 0, 1, 0.5),)))
        regions = regions.with_region(Region("cat", live=Live(threshold="median", start=0.0))).with_region(Region("rest", rest=True))
        for name in ("top", "cat", "rest"):
            regions = regions.with_lora(name, Hung(name, models.lora(model, seed=len(name))))
        top, cat, rest = watch_masks(put(model, regions).result[0])
        torch.testing.assert_close(top + cat + rest, torch.ones(1, 8, 8))
        assert cat[..., 4:, :].any() and rest.any() and float(top[..., :4, :].min()) >= 0.5

    @each_kind
    @pytest.mark.parametrize("text", ["own", "none"])
    def test_isolation_follows(self, kind, text):
        model = models.build(kind)
        regions = Regions()
        for seed, name in enumerate(("cat", "dog")):
            regions = regions.with_region(Region(name, live=Live(name, start=0.2)))
            regions = regions.with_lora(name, Hung(name, models.lora(model, seed=seed), 0.8, 0.0))
        apart, together = (put(model, regions, text, isolation=value, isolation_end=1.0).result[0] for value in (5.0, 0.0))
        assert not torch.equal(models.sample(apart), models.sample(together))
        torch.testing.assert_close(models.sample(apart, batch=2)[:1], models.sample(apart), **CLOSE)

    def test_isolation_of_pictures_before_the_regions_are_there(self):
        """In one sequence isolation then has a bias for each picture, and the texts one for all."""
        model = models.build("flux")
        regions = Regions()
        for seed, name in enumerate(("cat", "dog")):
            regions = regions.with_region(Region(name, live=Live(name, start=0.6)))
            regions = regions.with_lora(name, Hung(name, models.lora(model, seed=seed), 0.8, 0.0))
        apart = put(model, regions, "none", isolation=5.0, isolation_end=1.0).result[0]
        torch.testing.assert_close(models.sample(apart, batch=2)[:1], models.sample(apart), **CLOSE)

    @each_kind
    def test_features_follow_and_keep_to_its_window(self, kind):
        """Alone on a region that follows to the end, where strengths and layers stay the same from step to step."""
        model = models.build(kind)
        found = models.features(model)

        def steered(**live):
            regions = Regions().with_region(Region("cat", live=Live("cat", threshold="median", until=1.0, **live)))
            leaning = RegionFeatures.execute(regions, "cat", "none", 1.0, ADD, 0.0, 1.0, "cond", "", found).result[0]
            return models.sample(put(model, leaning).result[0])

        plain = models.sample(model)
        assert not torch.equal(steered(start=0.0), plain)
        assert not torch.equal(steered(start=0.0), steered(start=0.7))
        assert torch.equal(steered(start=0.5, end=0.5), plain)

    @pytest.mark.parametrize("freeze", [0.0, 0.25])
    def test_a_pass_that_begins_late_is_read_all_the_same(self, freeze):
        model = models.build()
        acting = sampling.from_picture(acts(model, freeze_percent=freeze))
        assert not torch.equal(acting, sampling.from_picture(model))

    def test_a_hidden_one_is_not_sought_and_takes_nothing(self):
        model = models.build()
        pair = [Region(name, live=Live(name, threshold="median", start=0.0)) for name in ("cat", "dog")]
        lora = models.lora(model)
        alone = Regions().with_region(pair[1]).with_lora("dog", Hung("dog", lora))
        hidden = Regions().with_region(replace(pair[0], visible=False)).with_region(pair[1]).with_lora("dog", Hung("dog", lora))
        assert torch.equal(models.sample(put(model, hidden).result[0]), models.sample(put(model, alone).result[0]))

    def test_maps_of_words_draws_the_same_run(self):
        model = models.build()
        out = models.sample(acts(model))
        latent, clip = {"samples": out}, text_encoders.short("sd15")
        masks, *_ = Maps.execute(latent, clip, TEXT, "cat\ndog", threshold="argmax").result
        assert masks.shape == (2, 64, 64) and 0 < float(masks[0].mean()) < 1

    def test_regions_of_their_own_texts_are_found_by_the_common_one(self):
        model = models.build()
        common = models.conditioning(model, 10)[0][0]
        source = localize.LocalizeEffect(model.model, capture.layers_of(model.model), sought(2), 7, lambda h, w, found: found)
        for texts in ({"positive": common}, {"positive": models.seeded((1, 9, models.CONTEXT), 3)}):
            acting = model.clone()
            attach(acting, source)
            places = [LivePlace(source.source, index, texts) for index in range(2)]
            group(places)
            for place in places:
                attach(acting, TextEffect("reads", place))
            seen = watch_masks(acting)
            torch.testing.assert_close(seen.sum(0), torch.ones(1, 8, 8))
            assert 0 < float(seen[0].mean()) < 1 and not [note for note in find(models.sample(acting)).notes if "could not be read" in note]


def watch_masks(acting) -> torch.Tensor:
    """(K, pictures, 8, 8) of the last step of a run."""
    finder = next(effect for effect in acting.get_attachment("concept_nodes") if isinstance(effect, localize.LocalizeEffect))
    seen, come_out = [], finder.come_out

    def watch(this, latents):
        seen.append(this.kept[finder.source].shares(8, 8))
        come_out(this, latents)

    finder.come_out = watch
    models.sample(acting)
    return seen[0]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
class TestOwnBlock:
    """LAG sampling: the mask of each attention block on what projects out of it, in the same call."""

    ALONE = SETTINGS | {"names": ("cat",), "scope": "block"}

    def put(self, model, only="proj_out", strength=0.8, **live):
        settings = self.ALONE | live
        names = settings.pop("names")
        regions = None
        for seed, name in enumerate(names):
            lora = models.lora(model, seed=seed, only=only)
            (regions,) = Localize.execute(name, "", "none", strength, regions=regions, lora=lora, **settings).result
        return put(model, regions).result[0]

    def test_is_the_mixing_form_as_published(self, kind):
        """(1 - M) f + M f', f' = (W + dW) x, M where the attention to the word is above its median: worked out beside the plain model."""
        model, lora = models.build(kind), models.lora(models.build(kind), seed=0, only="proj_out")
        acting = models.sample(self.put(model, threshold="median"), batch=2, cfg=1.0)
        handles, held = [], {}
        for name, module in model.model.named_modules():
            if name.endswith(("attn2.to_q", "attn2.to_k")):
                handles.append(module.register_forward_hook(lambda module, args, out, at=name[-1]: held.update({at: out})))
            if name.endswith("proj_out"):
                down, up = (lora[f"{name}.lora_{part}.weight"].flatten(1) for part in ("down", "up"))
                handles.append(module.register_forward_hook(self.mixing(held, 0.8 / len(down) * up @ down)))
        try:
            expected = models.sample(model, batch=2, cfg=1.0)
        finally:
            for handle in handles:
                handle.remove()
        assert not torch.equal(expected, models.sample(model, batch=2, cfg=1.0))
        torch.testing.assert_close(acting, expected, **CLOSE)

    @staticmethod
    def mixing(held, delta):
        def mix(module, args, out):
            q, k = (held[name].unflatten(-1, (4, -1)).transpose(1, 2) for name in "qk")
            word = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)[..., 1]
            on = (word > word.median(-1, keepdim=True).values)[..., None].float()
            assert on.sum(1).flatten().tolist() == [word.shape[1] // 2] * len(word)
            x = args[0] if args[0].ndim == 3 else args[0].flatten(2).transpose(1, 2)
            with_delta = x @ (module.weight.flatten(1) + delta).t() + module.bias
            f = out if out.ndim == 3 else out.flatten(2).transpose(1, 2)
            mixed = (1 - on) * f + on * with_delta
            return mixed if out.ndim == 3 else mixed.transpose(1, 2).unflatten(-1, out.shape[2:])

        return mix

    def test_a_mask_of_ones_is_the_whole_lora(self, kind):
        model = models.build(kind)
        everywhere = models.sample(self.put(model, threshold="quantile", level=0.0), batch=2)
        placement = adapters.place(model, models.lora(model, seed=0, only="proj_out"), "random")
        plain = model.clone()
        attach(plain, adapters.AdapterEffect("random", placement.parts, 0.8))
        torch.testing.assert_close(everywhere, models.sample(plain, batch=2), **CLOSE)

    def test_nothing_of_it_is_nothing(self, kind):
        model = models.build(kind)
        assert torch.equal(models.sample(self.put(model, strength=0.0, threshold="median")), models.sample(model))
        nowhere = models.sample(self.put(model, threshold="quantile", level=1.0))
        torch.testing.assert_close(nowhere, models.sample(model), rtol=0, atol=1e-6)

    def test_both_sides_and_all_pictures_have_their_masks(self, kind):
        model = models.build(kind)
        acting = self.put(model, names=("cat", "dog"), only="", start_percent=0.2)
        torch.testing.assert_close(models.sample(acting, batch=3)[:1], models.sample(acting), **CLOSE)
        torch.testing.assert_close(models.sample(sampling.turned_around(acting)), models.sample(acting), **CLOSE)
        assert not torch.equal(models.sample(acting), models.sample(self.put(model, scope="step", names=("cat", "dog"), only="")))

    def test_a_drawn_mask_bounds_it(self, kind):
        model = models.build(kind)
        empty = self.put(model, threshold="quantile", level=0.0, mask=torch.zeros(1, 8, 8))
        assert torch.equal(models.sample(empty), models.sample(model))
        left = torch.zeros(1, 8, 8)
        left[..., :4] = 1
        whole = self.put(model, threshold="quantile", level=0.0, mask=left)
        regions = Regions().with_region(Region("left", shapes=(Box(0, 0, 0.5, 1),)))
        regions = regions.with_lora("left", Hung("random", models.lora(model, seed=0, only="proj_out"), 0.8, 0.0))
        torch.testing.assert_close(models.sample(whole), models.sample(put(model, regions).result[0]), **CLOSE)


def test_own_block_is_for_unets():
    with pytest.raises(RegionsError, match="scope 'block' is for UNets.*Flux"):
        acts(models.build("flux"), scope="block")


class TestNodes:
    def test_what_hangs_on_regions_hangs_on_these(self):
        model = models.build()
        (regions,) = Localize.execute("cat", "", "none", 1.0, **MEDIAN).result
        lora = models.lora(model)
        (loras,) = RegionLoRA.execute(regions, "cat", "none", 0.8, 0.0, 0.0, 1.0, lora).result
        (sliders,) = RegionSlider.execute(regions, "cat", "none", 0.8, 0.0, 1.0, lora).result
        own = Localize.execute("cat", "", "none", 0.8, lora=models.lora(model), **MEDIAN).result[0]
        expected = models.sample(put(model, own).result[0])
        for hung in (loras, sliders):
            assert torch.equal(models.sample(put(model, hung).result[0]), expected)

    def test_words_that_are_not_in_the_prompt(self):
        with pytest.raises(RegionsError, match=r"'bird'.*'bird' is not in the prompt.*cat, dog|'bird'.*'cat', 'dog'"):
            acts(models.build(), names=("bird", "cat"))

    @pytest.mark.parametrize("missing", [{"clip": None}, {"prompt": " "}])
    def test_nothing_to_find_words_with(self, missing):
        (regions,) = Localize.execute("cat", "", "none", 1.0, **MEDIAN).result
        with pytest.raises(RegionsError, match="found by words of the common prompt"):
            put(models.build(), regions, **missing)

    def test_argmax_of_one(self):
        with pytest.raises(RegionsError, match="argmax compares"):
            acts(models.build(), names=("cat",))

    @pytest.mark.parametrize(
        "wrong", [{"smoothing": 0.99}, {"level": float("nan")}, {"freeze_percent": 2.0}, {"start_percent": 0.9, "end_percent": 0.1}]
    )
    def test_numbers_that_cannot_be(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            acts(models.build(), **wrong)

    def test_there_is_no_mask_before_the_run(self):
        (regions,) = Localize.execute("cat", "", "none", 1.0, **MEDIAN).result
        with pytest.raises(ValueError, match="'cat': found by words while a picture is sampled.*Maps of Words"):
            RegionsToMasks.execute(regions, 64, 64)


class TestWhereItIsRead:
    @pytest.mark.parametrize("kind, first, count", [("sd15", "output_blocks.3.1", 1), ("sdxl", "output_blocks.0.1", 10)])
    def test_on_models_of_published_size(self, kind, first, count):
        names = localize.layers_of(models.full_size(kind).model)
        assert len(names) == count and all(name.startswith(f"diffusion_model.{first}.") for name in names)

    def test_where_there_is_no_third_grid(self):
        model = models.build().model
        assert localize.layers_of(model) == capture.layers_of(model)


class TestBehaviour:
    """Two characters that the lab's UNet does not know, named in one prompt, and no mask drawn."""

    NAMES = ("robot", "cat")
    TEXT = "a large sks on the left and a large ohwx on the right on a grey background"
    PHRASES = ("large sks on the left", "large ohwx on the right")
    SEEDS = 8

    @pytest.fixture(scope="class")
    def loaded(self):
        return lab.load("unet")

    def draw(self, loaded, model) -> list:
        """What the eye sees, picture by picture."""
        with torch.inference_mode():
            positive, negative = (text_encoders.encode(loaded.clip, text) for text in (self.TEXT, ""))
            start = {"samples": torch.zeros(self.SEEDS, 4, 16, 16)}
            (out,) = nodes.common_ksampler(model, 3, 20, 4.0, "euler", "normal", positive, negative, start)
            return Eye.load().read(loaded.vae.decode(out["samples"])), out

    def localized(self, loaded, **live):
        regions = None
        for name, phrase in zip(self.NAMES, self.PHRASES, strict=True):
            lora = adapters.read(characters.path_of(name, "unet"))
            defaults = {item.id: item.default for item in Localize.define_schema().inputs if getattr(item, "default", None) is not None}
            given = defaults | {"name": name, "phrase": phrase, "lora": lora, "regions": regions} | live
            (regions,) = Localize.execute(**given).result
        positive = text_encoders.encode(loaded.clip, self.TEXT)
        return RegionsApply.execute(loaded.model, positive, [], regions, clip=loaded.clip, prompt=self.TEXT).result[0]

    def in_place(self, readings) -> tuple[float, float]:
        """Shares of the halves in which the surest object is its character, and the other one."""
        right = wrong = 0
        for reading in readings:
            for side, name in enumerate(self.NAMES):
                kinds = [seen.kind for seen in reading.objects if (seen.x >= 32) == bool(side)][:1]
                right += kinds == [name]
                wrong += kinds == [self.NAMES[1 - side]]
        return right / (2 * self.SEEDS), wrong / (2 * self.SEEDS)

    def test_each_is_where_its_words_are(self, loaded):
        model = self.localized(loaded)
        readings, out = self.draw(loaded, model)
        right, swapped = self.in_place(readings)
        everywhere = loaded.model
        for name in self.NAMES:
            everywhere = characters.with_lora(everywhere, characters.path_of(name, "unet"))
        mixed, _ = self.in_place(self.draw(loaded, everywhere)[0])
        assert right >= 0.7 and swapped <= 0.1 and right > mixed
        assert "'robot'" in find(out["samples"]).describe()
