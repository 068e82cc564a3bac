"""Attention is captured beside a sampling that it does not touch, and phrases find their tokens in it."""

import math
from collections import OrderedDict

import cases
import comfy.ldm.flux.layers as flux_layers
import comfy.ldm.modules.attention as attention
import models
import pytest
import sampling
import text_encoders
import torch
from comfy.ldm.flux.math import apply_rope
from comfy.patcher_extension import WrappersMP

import nodes
from concept_nodes.host import capture, dispatcher, lab, maps
from concept_nodes.host.capture import ATTENTION, CONCEPTS, STAGES
from concept_nodes.host.families import FAMILIES
from concept_nodes.host.maps import Bound, MapsError, Settings
from concept_nodes.host.places import Place
from concept_nodes.host.regions import TextEffect
from concept_nodes.nodes.maps import Capture, Maps

SD15, SDXL, FLUX, _ = FAMILIES
each_kind = pytest.mark.parametrize("kind", list(models.KINDS))


@pytest.fixture(autouse=True)
def _nothing_of_other_tests(monkeypatch):
    monkeypatch.setattr(capture, "_captures", OrderedDict())


def capturing(model, layers=capture.ALL, start=0.0, end=1.0, **options):
    return Capture.execute(model, layers, start, end, **options).result[0]


def group(samples, source=ATTENTION, entry=0, layer=None):
    return next(g for g in capture.find(samples).groups if (g.source, g.entry) == (source, entry) and layer in (None, g.layer))


def sample(model, positive, negative, latent, cfg=3.0, steps=4):
    with torch.inference_mode():
        return nodes.common_ksampler(model, 3, steps, cfg, "euler", "normal", positive, negative, latent)[0]["samples"]


def means(found):
    """A group's maps over all calls."""
    weights = torch.tensor([float(calls) for calls in found.calls])
    return (found.maps.float() * weights[:, None, None, None]).sum(0) / weights.sum()


class TestAgainstWholeAttention:
    """The reference computes whole softmaxes, at the place where the host calls its kernel."""

    @pytest.mark.parametrize("kind", ["sd15", "sdxl"])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_unet(self, monkeypatch, kind, batch):
        model, whole = models.build(kind), []
        kernel = attention.optimized_attention

        def watched(q, k, v, heads, *args, **kwargs):
            if k.shape[1] != q.shape[1] and q.shape[1] == 64:  # the finest grid
                rows = slice(0, batch) if kwargs["transformer_options"]["cond_or_uncond"][0] == 0 else slice(batch, None)
                asked, keys = (part[rows].unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k))
                whole.append((asked @ keys.transpose(-1, -2) / math.sqrt(asked.shape[-1])).softmax(-1).mean(1))
            return kernel(q, k, v, heads, *args, **kwargs)

        monkeypatch.setattr(attention, "optimized_attention", watched)
        out = models.sample(capturing(model), batch=batch)
        found = group(out, layer="8 x 8")
        assert sum(found.calls) == len(whole)
        torch.testing.assert_close(means(found), torch.stack(whole).mean(0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(means(found).sum(-1), torch.ones(batch, 64), rtol=0, atol=1e-3)

    def test_flux(self, monkeypatch):
        model, whole = models.build("flux"), []
        kernel = flux_layers.attention

        def watched(q, k, v, pe, mask=None, transformer_options={}):  # noqa: B006
            if transformer_options["block_type"] == "double":
                rows = transformer_options["cond_or_uncond"].index(0)
                turned, keys = apply_rope(q, k, pe)
                logits = turned[rows : rows + 1] @ keys[rows : rows + 1].transpose(-1, -2) / math.sqrt(q.shape[-1])
                whole.append(logits.softmax(-1).mean(1)[:, 7:, :7])
            return kernel(q, k, v, pe, mask=mask, transformer_options=transformer_options)

        monkeypatch.setattr(flux_layers, "attention", watched)
        found = group(models.sample(capturing(model)))
        assert sum(found.calls) == len(whole) == 4
        torch.testing.assert_close(means(found), torch.stack(whole).mean(0), rtol=1e-3, atol=1e-4)


class TestPicture:
    @each_kind
    @pytest.mark.parametrize("layers", [capture.DEFAULT, capture.ALL])
    def test_stays_bit_for_bit(self, kind, layers):
        model = models.build(kind)
        assert torch.equal(models.sample(capturing(model, layers), batch=2), models.sample(model, batch=2))

    def test_stays_with_concepts_beside_the_prompt(self):
        model = models.build("flux")
        acting = with_concepts(model, models.seeded((1, 3, models.CONTEXT), 8))
        assert torch.equal(models.sample(acting), models.sample(model))

    def test_compiled(self):
        for kind in ("flux", "sd15"):
            model = sampling.compiled(kind)
            out = models.sample(capturing(model), steps=2)
            assert torch.equal(out, models.sample(model, steps=2))
            compiled = means(group(out))
            capture._captures.clear()
            torch.testing.assert_close(compiled, means(group(models.sample(capturing(models.build(kind)), steps=2))))


def with_concepts(model, words, names=("a", "b", "c")):
    acting = model.clone()
    layers = capture.layers_of(model.model)
    dispatcher.attach(acting, capture.CaptureEffect(model.model, layers, concepts=names[: words.shape[1]], words=words))
    return acting


class TestConcepts:
    def test_equal_concepts_have_equal_maps_and_order_is_kept(self):
        model, words = models.build("flux"), models.seeded((1, 3, models.CONTEXT), 8)
        words[:, 2] = words[:, 0]
        found = means(group(models.sample(with_concepts(model, words)), CONCEPTS))
        torch.testing.assert_close(found[..., 2], found[..., 0])
        turned = means(group(models.sample(with_concepts(model, words[:, [1, 0, 2]])), CONCEPTS))
        torch.testing.assert_close(turned, found[..., [1, 0, 2]], rtol=2e-3, atol=2e-2)

    def test_are_what_the_texts_own_rows_would_be(self):
        """The prompt's own rows, sent along with the prompt's pooled vector, go the way that the text goes: they see the picture and
        themselves, as it does. What the text's attention gives is then what theirs does.
        """
        model = models.build("flux")
        context = models.conditioning(model, 10)[0][0]
        acting = with_concepts(model, context, tuple("abcdefg"))
        (effect,) = dispatcher.attached(acting)
        effect.parts.pop("diffusion_model.vector_in")
        in_run, given = effect.in_run, []

        def without_pooled(run):
            copy = in_run(run)
            copy.parts.pop("diffusion_model.vector_in")
            return copy

        effect.in_run = without_pooled
        block = model.model.diffusion_model.double_blocks[0]
        hooks = [block.img_attn.proj.register_forward_pre_hook(lambda _, args: given.append(args[0][:1]))]
        hooks += [block.txt_attn.proj.register_forward_pre_hook(lambda _, args: given.append(args[0][:1]))]
        out = models.sample(acting, cfg=1.0)
        for hook in hooks:
            hook.remove()
        # In each call: the picture's, the text's, the concepts'.
        assert len(given) == 12
        for text, concepts in zip(given[1::3], given[2::3], strict=True):
            torch.testing.assert_close(concepts, text)
        products = [picture @ text.transpose(-1, -2) for picture, text in zip(given[::3], given[1::3], strict=True)]
        torch.testing.assert_close(means(group(out, CONCEPTS)), torch.stack(products).mean(0), rtol=2e-3, atol=2e-2)

    def test_for_flux_only_and_with_an_encoder(self):
        with pytest.raises(MapsError, match="Flux models only"):
            capturing(models.build("sd15"), concepts="a cat")
        with pytest.raises(MapsError, match="clip is not"):
            capturing(models.build("flux"), concepts="a cat")


class TestWhoseRows:
    def test_batch_of_different_prompts(self):
        model = models.build()
        prompts = [models.conditioning(model, seed)[0][0] for seed in (10, 30)]
        negative, latent = models.conditioning(model, 20), models.latent(model, 2)
        both = means(group(sample(capturing(model), [[torch.cat(prompts), {}]], negative, latent)))
        for row, prompt in enumerate(prompts):
            alone = means(group(sample(capturing(model), [[prompt, {}]], negative, latent)))
            # The noise of a batch is drawn at once: row by row the same.
            torch.testing.assert_close(both[row], alone[row], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("way", [sampling.one_by_one, lambda model: sampling.one_by_one(model, -1), sampling.turned_around])
    def test_however_the_conditions_are_laid_out(self, way):
        model = models.build()
        expected = means(group(models.sample(capturing(model))))
        capture._captures.clear()
        torch.testing.assert_close(means(group(models.sample(way(capturing(model))))), expected, rtol=1e-3, atol=1e-4)

    def test_combined_prompts_are_kept_apart(self):
        model = models.build()
        positive = models.conditioning(model, 10) + models.conditioning(model, 30, 9)
        out = sample(capturing(model), positive, models.conditioning(model, 20), models.latent(model))
        shapes = {g.entry: g.maps.shape[-1] for g in capture.find(out).groups}
        assert set(shapes) == {0, 1}
        # Of unequal length, they go in calls of their own; in one call, the shorter would be repeated.
        assert all(rows % own == 0 for (_, rows), own in zip(sorted(shapes.items()), (7, 9), strict=True))

    def test_entries_are_counted_in_the_guiders_order(self):
        """Of prompts of one length the host takes a call's chunks from the end."""
        model, made = models.build(), models.build()
        positive = models.conditioning(made, 10) + models.conditioning(made, 30)
        negative, latent = models.conditioning(model, 20), models.latent(model)
        out = sample(capturing(model), positive, negative, latent, steps=1)
        for entry, prompt in enumerate(positive):
            alone = sample(capturing(model), [prompt], negative, latent, steps=1)
            torch.testing.assert_close(means(group(out, entry=entry)), means(group(alone)), rtol=1e-3, atol=1e-4)

    def test_entries_of_parts_of_sampling(self):
        """One of the prompts acts in the second half only: it is the second, though the first is the last to be seen."""
        model = models.build()
        later, earlier = (
            nodes.ConditioningSetTimestepRange().set_range(models.conditioning(model, seed), *window)[0]
            for seed, window in ((10, (0.5, 1.0)), (30, (0.0, 0.5)))
        )
        out = sample(capturing(model), later + earlier, models.conditioning(model, 20), models.latent(model), steps=10)
        assert [any(group(out, entry=entry).calls[:4]) for entry in (0, 1)] == [False, True]
        bound, captured = [Bound("p", (1,), "")], capture.find(out)
        with pytest.raises(MapsError, match=r"from 0.5 to 1 .* in entry 2\b.*entry 1: 0.5 to 1; entry 2: 0 to 0.5"):
            maps.draw(captured, bound, Settings(entry=2), length=7)

    def test_area_lies_where_it_is(self):
        model = models.build()
        (part,) = nodes.ConditioningSetArea().append(models.conditioning(model, 11, 9), 64, 32, 0, 32, 1.0)
        positive = models.conditioning(model, 10) + part
        out = sample(capturing(model), positive, models.conditioning(model, 20), models.latent(model))
        found = next(means(g).unflatten(1, g.grid) for g in capture.find(out).groups if g.maps.shape[-1] == 9 and g.layer == "8 x 8")
        assert found[:, 4:].sum(-1).allclose(torch.ones(1, 4, 8), atol=1e-3)
        assert not found[:, :4].any()

    def test_another_resolution(self):
        model = capturing(models.build())
        grids = []
        for height, width in ((8, 8), (12, 6), (7, 9), (8, 8)):
            latent = {"samples": torch.zeros(1, 4, height, width)}
            out = sample(model, models.conditioning(model, 10), models.conditioning(model, 20), latent)
            grids.append([g.grid for g in capture.find(out).groups])
        assert grids == [[(8, 8), (4, 4)], [(12, 6), (6, 3)], [(7, 9), (4, 5)], [(8, 8), (4, 4)]]

    @pytest.mark.parametrize("size, grid", [((6, 10), (3, 5)), ((7, 9), (4, 5))])
    def test_flux_grid_of_odd_latents(self, size, grid):
        model = models.build("flux")
        latent = {"samples": torch.zeros(1, 16, *size)}
        found = group(sample(capturing(model), models.conditioning(model, 10), models.conditioning(model, 20), latent))
        assert found.grid == grid
        assert found.maps.shape[2] == grid[0] * grid[1]


class TestWhatIsKept:
    def test_stages_and_window(self):
        model = models.build()
        found = group(models.sample(capturing(model, start=0.5), steps=10), layer="8 x 8")
        assert found.calls == (0, 0, 0, 0, 0, 3, 3, 3, 3, 3)
        whole = group(models.sample(capturing(model), steps=10), layer="8 x 8")
        assert whole.calls == (3,) * STAGES
        torch.testing.assert_close(whole.maps[5:], found.maps[5:])

    def test_nothing_of_an_interrupted_run(self):
        model = models.build()
        sampling.interrupted(capturing(model), model)
        assert not capture._captures

    def test_two_nodes_in_one_run(self):
        model = models.build()
        once = capture.find(models.sample(capturing(model)))
        twice = capture.find(models.sample(capturing(capturing(model, end=0.5), capture.DEFAULT)))
        assert {g.layer for g in once.groups} == {g.layer for g in twice.groups}

    def test_two_nodes_with_a_window_each(self):
        model = models.build()
        whole = capture.find(models.sample(capturing(model), steps=10))
        both = capture.find(models.sample(capturing(capturing(model, end=0.5), start=0.5), steps=10))
        assert both.calls == whole.calls
        for one, other in zip(whole.groups, both.groups, strict=True):
            assert one[:4] == other[:4]
            assert one.calls == other.calls
            assert torch.equal(one.maps, other.maps)

    def test_two_nodes_with_other_concepts(self):
        """Concepts are known by their number: those of one node only can be told."""
        model, words = models.build("flux"), models.seeded((1, 4, models.CONTEXT), 8)
        alone = group(models.sample(with_concepts(model, words[:, :2], ("a", "b"))), CONCEPTS)
        out = models.sample(with_concepts(with_concepts(model, words[:, :2], ("a", "b")), words[:, 2:], ("c", "d")))
        assert capture.find(out).concepts == ("a", "b")
        assert torch.equal(group(out, CONCEPTS).maps, alone.maps)
        assert "concepts" in " ".join(capture.find(out).notes)

    @pytest.mark.parametrize("source, size", [(ATTENTION, 1.7e-6), (CONCEPTS, 3e5)])
    def test_small_shares_and_large_products_keep_their_size(self, source, size):
        sums = capture.Sums((2, 3))
        maps = torch.rand(1, 6, 5) * size
        sums.add(0, maps)
        torch.testing.assert_close(sums.group(0, source, "x").maps[0], maps, rtol=1e-3, atol=1e-9)

    @pytest.mark.parametrize("kind", ["sd15", "flux"])
    def test_goes_on_behind_a_call_from_within_a_call(self, kind):
        """Another extension asks for the first picture alone, and a smaller one."""

        def again(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
            if transformer_options.get("depth", 0) == 0:
                at = transformer_options["cond_or_uncond"].index(0)
                inner = transformer_options | {"depth": 1, "uuids": [transformer_options["uuids"][at]], "cond_or_uncond": [0]}
                own = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
                executor.class_obj.apply_model(x[:1, ..., :4], t[:1], None, c_crossattn[:1], control, inner, **own)
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

        model = capturing(models.build(kind))
        expected = means(group(models.sample(model, batch=2)))
        capture._captures.clear()
        out = models.sample(sampling.wrapped(model, WrappersMP.APPLY_MODEL, again), batch=2)
        torch.testing.assert_close(means(group(out)), expected)

    def test_only_so_many_bytes(self, monkeypatch):
        model = capturing(models.build())
        first = models.sample(model)
        monkeypatch.setattr(capture, "KEPT_BYTES", 3 * capture.find(first).nbytes() // 2)
        second = models.sample(model, seed=8)
        assert capture.find(first) is None
        assert capture.find(second)
        monkeypatch.setattr(capture, "KEPT_BYTES", 0)
        assert capture.find(models.sample(model, seed=9)), "the last is always kept"

    @pytest.mark.parametrize("kind", ["sd15", "flux"])
    def test_a_text_read_by_all_of_the_picture_is_not_the_prompt(self, kind):
        """It has the prompt's rows by number, and other words."""
        model = capturing(models.build(kind))
        whole = Place(torch.ones(8, 8), {"positive": models.conditioning(model, 30)[0][0]})
        dispatcher.attach(model, TextEffect("'all': prompt", whole, 0.0, 1.0))
        found = capture.find(models.sample(model))
        assert not found.groups
        assert "regions read texts of their own" in " ".join(found.notes)
        with pytest.raises(MapsError, match="regions read texts of their own"):
            maps.captured_with(models.sample(model))

    def test_a_negative_text_of_a_region_is_no_matter(self):
        model = models.build()
        expected = means(group(models.sample(capturing(model), steps=1)))
        model = capturing(model)
        whole = Place(torch.ones(8, 8), {"negative": models.conditioning(model, 30)[0][0]})
        dispatcher.attach(model, TextEffect("'all': negative", whole, 0.0, 1.0))
        out = models.sample(model, steps=1)
        torch.testing.assert_close(means(group(out)), expected, rtol=1e-3, atol=1e-4)

    def test_regions_that_read_for_themselves_are_named(self):
        out = models.sample(cases.put_regions(capturing(models.build())))
        assert "regions read texts of their own" in " ".join(capture.find(out).notes)


@pytest.fixture(scope="module")
def drawn():
    """The lab's UNet with two objects: its latent as the host's sampler hands it on, CLIP, VAE and text."""
    made, text = lab.load("unet"), "a large red circle on the left and a large blue square on the right on a white background"
    positive, negative = ([[*_encoded(made.clip, words)]] for words in (text, ""))
    with torch.inference_mode():
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        (out,) = nodes.common_ksampler(capturing(made.model), 7, 20, 4.0, "euler", "normal", positive, negative, latent)
        picture = made.vae.decode(out["samples"])
    return out, made.clip, text, picture, capture.find(out["samples"])


def _encoded(clip, text):
    ((context, options),) = text_encoders.encode(clip, text)
    return context, options


class TestMaps:
    @pytest.fixture(autouse=True)
    def _found(self, drawn, _nothing_of_other_tests):
        capture._keep(drawn[4], [drawn[0]["samples"]])

    def run(self, drawn, phrases, **options):
        latent, clip, text, picture, _ = drawn
        with torch.inference_mode():
            return Maps.execute(latent, clip, text, phrases, picture, **options).result

    def test_objects_are_where_they_were_asked_for(self, drawn):
        masks, over, report = self.run(drawn, "red circle on the left\nblue square on the right")
        assert masks.shape == (2, 64, 64)
        assert over.shape == (2, 64, 64, 3)
        across = torch.arange(64.0)
        left, right = ((mask.sum(0) * across).sum() / mask.sum() for mask in masks)
        assert left < 28 < 36 < right
        assert 0.03 < masks[0].mean() < 0.3
        assert "'red circle on the left': tokens 3, 4, 5, 6, 7 (one place)" in report

    def test_masks_follow_the_edges_of_the_picture(self, drawn):
        """Inside a mask the picture has one colour and outside another, more so than by the grid alone; without a picture both agree."""
        latent, clip, text, picture, _ = drawn
        phrases = "red circle on the left\nblue square on the right"

        def parted(masks):
            colours = picture[0].flatten(0, 1)
            within = [mask.flatten() > 0 for mask in masks]
            left = ~torch.stack(within).any(0)
            return sum(colours[one].std(0).mean() * one.float().mean() for one in (*within, left))

        led, _, report = self.run(drawn, phrases, edges=True)
        grid, _, plain = self.run(drawn, phrases)
        assert parted(led) < 0.9 * parted(grid)
        assert "along the edges of the picture." in report and "edges" not in plain
        for edges in (True, False):
            masks, _, report = Maps.execute(latent, clip, text, phrases, edges=edges).result
            assert torch.equal(masks, grid) and report == plain

    def test_settings_need_no_new_sampling(self, drawn):
        small, large = (self.run(drawn, "circle", level=level)[0] for level in (0.8, 0.3))
        assert 0 < small.sum() < large.sum()
        assert self.run(drawn, "circle", dilation=3)[0].sum() > self.run(drawn, "circle")[0].sum()
        soft = self.run(drawn, "circle", threshold="soft")[0]
        assert 0.0 == soft.min() < soft.max() == 1.0
        for threshold in ("quantile", "otsu"):
            assert self.run(drawn, "circle", threshold=threshold, largest=True)[0].unique().tolist() == [0.0, 1.0]

    def test_argmax_shares_out(self, drawn):
        masks = self.run(drawn, "red circle\nblue square", threshold="argmax", background="white background")[0]
        assert masks.sum(0).max() == 1
        with pytest.raises(MapsError, match="at least two"):
            self.run(drawn, "red circle", threshold="argmax")

    def test_soft_says_what_it_does_not_use(self, drawn):
        masks, _, report = self.run(drawn, "circle", threshold="soft", background="white background", largest=True, dilation=3)
        assert "With soft, background, largest and dilation are not used." in report
        assert "Background:" not in report
        plain, _, report = self.run(drawn, "circle", threshold="soft")
        assert torch.equal(masks, plain)
        assert "not used" not in report

    def test_places_of_a_repeated_word(self, drawn):
        report = self.run(drawn, "large\nlarge #2")[2]
        assert "'large': tokens 2, 10 (2 places)" in report
        assert "'large #2': token 10 (place 2 of 2)" in report
        with pytest.raises(MapsError, match="2 times, so there is no #3"):
            self.run(drawn, "large #3")

    def test_words_that_are_not_there(self, drawn):
        with pytest.raises(MapsError, match=r"'red cirle' is not in the prompt.*Near it: 'red circle'"):
            self.run(drawn, "red cirle")
        with pytest.raises(MapsError, match=r"The prompt has: 'a', 'large'"):
            self.run(drawn, "xyzzy")

    def test_another_text_than_was_sampled(self, drawn):
        latent, clip, *_ = drawn
        with pytest.raises(MapsError, match="has 154 rows, and what was sampled had 77"):
            Maps.execute(latent, clip, "word " * 100, "word")

    def test_no_phrases(self, drawn):
        masks, over, report = self.run(drawn, " \n")
        assert not masks.any()
        assert "Nothing done" in report

    def test_no_phrases_give_the_pictures_back(self, drawn):
        latent, clip, text, _, captured = drawn
        two = captured._replace(groups=tuple(g._replace(kept=g.kept.repeat(1, 2, 1, 1)) for g in captured.groups))
        capture._keep(two, [latent["samples"]])
        pictures = torch.rand(2, 8, 12, 3)
        masks, over, _ = Maps.execute(latent, clip, text, "", pictures).result
        assert torch.equal(over, pictures)
        assert masks.shape == (2, 8, 12)
        masks, over, _ = Maps.execute(latent, clip, text, "").result
        assert not torch.cat([masks[..., None], over], -1).any()
        assert over.shape == (2, 64, 64, 3)

    def test_as_many_pictures_as_the_latent_holds_or_one(self, drawn):
        latent, clip, text, picture, captured = drawn
        for several in (captured, captured._replace(groups=tuple(g._replace(kept=g.kept.repeat(1, 3, 1, 1)) for g in captured.groups))):
            capture._keep(several, [latent["samples"]])
            with pytest.raises(MapsError, match=rf"image holds 2 pictures and the latent {several.pictures}"):
                Maps.execute(latent, clip, text, "circle", picture.repeat(2, 1, 1, 1))
        assert len(Maps.execute(latent, clip, text, "circle\nsquare", picture).result[1]) == 6

    def test_steps_that_were_not_captured(self, drawn):
        latent, clip, text, _, captured = drawn
        early = captured._replace(groups=tuple(g._replace(calls=(3, *[0] * (STAGES - 1))) for g in captured.groups))
        capture._keep(early, [latent["samples"]])
        with pytest.raises(MapsError, match=r"from 0.5 to 1 of sampling. There are some in 0 to 0.1"):
            Maps.execute(latent, clip, text, "circle")

    def test_latent_that_was_not_sampled(self, drawn):
        with pytest.raises(MapsError, match="Put Capture Attention between the model and the sampler"):
            Maps.execute({"samples": torch.zeros(1, 4, 8, 8)}, *drawn[1:3], "circle")

    def test_run_in_which_nothing_was_captured(self, drawn):
        model = models.build()
        out = models.sample(capturing(model, start=0.6, end=0.61), steps=3)
        with pytest.raises(MapsError, match="No step lay in its window"):
            maps.captured_with(out)

    def test_sources_and_entries_that_are_not_there(self, drawn):
        with pytest.raises(MapsError, match="No concepts travelled"):
            self.run(drawn, "circle", source=CONCEPTS)
        with pytest.raises(MapsError, match="entry is 2, and the sampler had 1"):
            self.run(drawn, "circle", entry=2)


class TestBinding:
    @pytest.mark.parametrize("kind, family", [("sd15", SD15), ("sdxl", SDXL), ("flux", FLUX)])
    def test_weights_and_long_prompts(self, kind, family):
        """Weights are no words, and windows of 77 lie behind one another."""
        clip = text_encoders.build(kind)
        text = "a (red:1.2) fox, " + "very " * 90 + "(old (stone bridge:1.3))"
        (fox,), (bridge,) = (maps.bind(clip, family, text, [phrase]) for phrase in ("red fox", "(stone:0.5) bridge"))
        assert fox.rows[0] in (1, 2)
        assert min(bridge.rows) > 90
        with torch.inference_mode():
            plain, other = (text_encoders.encode(clip, words)[0][0] for words in (text, text.replace("stone bridge", "blue tower")))
        changed = (plain - other)[0, list(bridge.rows)].abs().amax(-1)
        assert (changed > 0).all()

    def test_mean_over_a_phrases_rows(self):
        found = capture.Group(0, ATTENTION, "x", (2, 3), torch.rand(STAGES, 1, 6, 5).half(), (1,) * STAGES)
        got = maps.of_group(found, range(5, STAGES), [Bound("p", (1, 3), "")], 5)
        torch.testing.assert_close(got.flatten(2)[0, 0], found.maps[5:].float().mean(0)[0][:, [1, 3]].mean(-1))

    def test_a_background_takes_cells_and_phrases_do_not(self):
        own = torch.tensor([[9.0, 9.0, 1.0, 1.0], [8.0, 1.0, 9.0, 1.0], [0.0, 0.0, 0.0, 0.0]])[:2].view(1, 2, 1, 4)
        weak, strong = torch.zeros(1, 1, 1, 4), torch.tensor([8.5, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
        settings = Settings(level=0.2)
        alone = maps.cut(own, 2, settings)[0]
        assert alone.view(2, 4).tolist() == [[True, True, False, False], [True, False, True, False]]
        assert torch.equal(maps.cut(torch.cat([own, weak], 1), 2, settings)[0], alone)
        taken = maps.cut(torch.cat([own, weak, strong], 1), 2, settings)[0]
        assert taken.view(2, 4).tolist() == [[True, True, False, False], [False, False, True, False]]

    def test_settings_are_neutral_over_equal_layers(self):
        part = torch.rand(1, 2, 4, 4)
        torch.testing.assert_close(maps.together([part, 7 * part]), part / part.mean((-2, -1), keepdim=True))
        assert Settings().threshold == maps.PEAK
