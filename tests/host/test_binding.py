"""Words bound to one another in the host's own attentions: against whole softmaxes by hand, in which rows, and when nothing is done."""

import math

import cases
import comfy.ldm.flux.layers as flux_layers
import comfy.sample
import models
import pytest
import sampling
import text_encoders
import torch
from comfy.ldm.flux.math import apply_rope

import nodes
from concept_nodes.host import run_record
from concept_nodes.host.binding import BindEffect, BindingError, Members, Suppress
from concept_nodes.host.capture import ALL, find
from concept_nodes.host.dispatcher import Call, attach, attached
from concept_nodes.host.maps import MapsError
from concept_nodes.host.places import Place
from concept_nodes.host.regions import Regions, TextEffect
from concept_nodes.host.window import remaining
from concept_nodes.nodes.binding import Bind
from concept_nodes.nodes.maps import Capture
from concept_nodes.ops import binding as ops
from concept_nodes.ops.masks import Box
from concept_nodes.ops.regions import Region

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
TEXT = "a red circle and a blue square"
ROWS = ((2, 3), (6,))  # of the groups in the seven rows of the models' contexts
each_kind = pytest.mark.parametrize("kind", list(models.KINDS))
each_form = pytest.mark.parametrize("mode", ["groups", "words", "dense"])


@pytest.fixture(scope="module")
def plain():
    return models.build()


def halves(height=64, width=64):
    masks = torch.zeros(2, height, width)
    masks[0, :, : width // 2] = masks[1, :, width // 2 :] = 1
    return masks


def put(model, mode="groups", strength=1.0, start=0.0, end=1.0, **options):
    masks = {"masks": halves()} if mode == "dense" else {}
    return cases.bind(model, strength, start, end, mode=mode, **masks, **options).result[0]


def drawn(model, *, cfg=3.0, steps=2, batch=1, size=(8, 8), positive=None):
    positive = models.conditioning(model, 10) if positive is None else positive
    with torch.inference_mode():
        latent = {"samples": torch.zeros(batch, models.channels(model), *size)}
        return nodes.common_ksampler(model, 3, steps, cfg, "euler", "normal", positive, models.conditioning(model, 20), latent)[0][
            "samples"
        ]


def members(words, groups=ROWS):
    found = torch.zeros(1, len(groups), words, dtype=torch.bool)
    for number, rows in enumerate(groups):
        found[0, number, list(rows)] = True
    return found


def whole(logits, words, mode, grid, strength, left=1.0):
    """(rows, heads, positions, keys): the attention as it should be, from all logits over words first."""
    plainly = logits.softmax(-1)
    own = members(words, ROWS if mode != "words" else [(row,) for rows in ROWS for row in rows])
    if mode == "dense":
        columns = torch.arange(grid[1])
        inside = torch.stack([columns < grid[1] // 2, columns >= grid[1] // 2]).float()[:, None].expand(-1, grid[0], -1).flatten(1)
        bias = ops.dense(logits[..., :words], own, inside[None], strength * left**5)
        return (logits + torch.nn.functional.pad(bias, (0, logits.shape[-1] - words))).softmax(-1)
    shares = logits[..., :words].softmax(-1).mean(1)
    maps = ops.smoothed(torch.stack([shares[..., rows].mean(-1) for rows in own[0]], 1), grid)
    won = torch.nn.functional.one_hot(maps.argmax(1), maps.shape[1]).bool()
    lost = own.any(1)[:, None] & ~(won[..., None] & own[:, None]).any(2)
    kept = plainly * (1 - strength * torch.nn.functional.pad(lost, (0, logits.shape[-1] - words)).float())[:, None]
    return kept if mode == "words" else kept / kept.sum(-1, keepdim=True)


def by_hand(model, mode, size, strength=1.0, left=1.0):
    """A clone of a UNet whose cross-attentions are whole softmaxes, through the host's own patch."""

    def replace(q, k, v, options):
        q, k, v = (part.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for part in (q, k, v))
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        attention = logits.softmax(-1)
        each = len(q) // len(options["cond_or_uncond"])
        side = round(math.sqrt(size[0] * size[1] / q.shape[2]))
        for chunk, number in enumerate(options["cond_or_uncond"]):
            own = slice(chunk * each, (chunk + 1) * each)
            if number == 0:
                attention[own] = whole(logits[own], k.shape[2], mode, (size[0] // side, size[1] // side), strength, left)
        return (attention @ v).transpose(1, 2).flatten(2)

    model = model.clone()
    for block in ("input", "middle", "output"):
        for number in range(12):
            model.set_model_attn2_replace(replace, block, number)
    return model


class TestAgainstWholeAttention:
    @each_form
    @pytest.mark.parametrize(("kind", "batch", "size"), [("sd15", 1, (8, 8)), ("sd15", 3, (8, 16)), ("sdxl", 2, (16, 8))])
    def test_unet(self, kind, mode, batch, size):
        model = models.build(kind)
        found = drawn(put(model, mode), steps=1, batch=batch, size=size)
        torch.testing.assert_close(found, drawn(by_hand(model, mode, size), steps=1, batch=batch, size=size), **CLOSE)
        assert not torch.allclose(found, drawn(model, steps=1, batch=batch, size=size), atol=1e-3)

    @pytest.mark.parametrize("mode", ["groups", "dense"])
    @pytest.mark.parametrize(("batch", "size"), [(1, (8, 8)), (2, (8, 16))])
    def test_flux(self, monkeypatch, mode, batch, size):
        model = models.build("flux")
        found = drawn(put(model, mode), steps=1, batch=batch, size=size)
        kernel, seen = flux_layers.attention, []

        def watched(q, k, v, pe, mask=None, transformer_options={}):  # noqa: B006
            out = kernel(q, k, v, pe, mask=mask, transformer_options=transformer_options)
            own = slice((at := transformer_options["cond_or_uncond"].index(0)) * batch, (at + 1) * batch)
            turned, keys = (part[own] for part in apply_rope(q, k, pe))
            logits = turned @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
            grid = (size[0] // 2, size[1] // 2)
            picture = whole(logits[:, :, 7:], 7, mode, grid, 1.0) @ v[own]
            seen.append(transformer_options["block_type"])
            out[own, 7:] = picture.transpose(1, 2).flatten(2)
            return out

        monkeypatch.setattr(flux_layers, "attention", watched)
        torch.testing.assert_close(found, drawn(model, steps=1, batch=batch, size=size), **CLOSE)
        assert set(seen) == {"double", "single"}

    @each_form
    def test_half_of_it(self, plain, mode):
        found = drawn(put(plain, mode, strength=0.5), steps=1)
        torch.testing.assert_close(found, drawn(by_hand(plain, mode, (8, 8), 0.5), steps=1), **CLOSE)


@each_kind
def test_dense_fades_with_the_fifth_power_of_what_is_left(kind):
    """From the noise level that the host has half way through sampling, one step to none."""
    model = models.build(kind)
    sampling_of = model.get_model_object("model_sampling")
    sigma = float(sampling_of.percent_to_sigma(0.5))
    effect = attached(put(model, "dense"))[0]
    assert remaining(sampling_of)(Call(model.model, None, torch.tensor([sigma]), {})) == pytest.approx(0.5, abs=2e-3)
    assert effect.form.weight(0.7, 0.5) == pytest.approx(0.7 * 0.5**5)


class TestRows:
    @each_kind
    def test_each_picture_of_a_batch_is_its_own(self, kind):
        model = models.build(kind)
        noise = torch.randn(3, models.channels(model), 8, 8, generator=torch.manual_seed(3))
        batch = drawn(put(model), batch=3)
        for number in range(3):
            with torch.inference_mode():
                one = comfy.sample.sample(
                    put(model),
                    noise[number : number + 1],
                    2,
                    3.0,
                    "euler",
                    "normal",
                    models.conditioning(model, 10),
                    models.conditioning(model, 20),
                    torch.zeros(1, models.channels(model), 8, 8),
                    disable_pbar=True,
                )
            torch.testing.assert_close(one, batch[number : number + 1], **CLOSE)

    def test_prompts_of_a_batch_have_words_of_their_own(self, plain):
        """Two prompts in one batch are each bound as they are alone."""
        contexts = [models.conditioning(plain, seed)[0][0] for seed in (10, 11)]
        groups = (((2, 3), (6,)), ((1,), (4, 5)))

        def bound(own):
            model = plain.clone()
            attach(model, BindEffect(plain.model, "bind", Suppress(), Members(own, 77), 1.0))
            return model

        both = drawn(bound(groups), batch=2, positive=[[torch.cat(contexts), {}]], steps=1)
        for number in range(2):
            alone = drawn(bound((groups[number],)), batch=2, positive=[[contexts[number], {}]], steps=1)
            torch.testing.assert_close(both[number], alone[number], **CLOSE)
        assert not torch.allclose(both[1], drawn(bound((groups[0],)), batch=2, positive=[[contexts[1], {}]], steps=1)[1], atol=1e-3)

    @each_kind
    def test_conditions_one_by_one_and_in_any_order_are_the_same(self, kind):
        model = models.build(kind)
        expected = models.sample(put(model))
        for other in (sampling.one_by_one(put(model)), sampling.one_by_one(put(model), -1), sampling.turned_around(put(model))):
            torch.testing.assert_close(models.sample(other), expected, **CLOSE)

    @each_kind
    def test_at_cfg_0_nothing_of_it_is_seen(self, kind):
        model = models.build(kind)
        torch.testing.assert_close(drawn(put(model), cfg=0.0), drawn(model, cfg=0.0), **CLOSE)

    def test_a_repeated_prompt_is_bound_in_every_repeat(self):
        assert torch.equal(Members((ROWS,), 7).on(14, 1), members(7).repeat(1, 1, 2))


class TestNothing:
    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"strength": 0.0}, "strength is 0"),
            ({"start": 0.4, "end": 0.4}, "both 0.4"),
            ({"groups": "red circle"}, "'red circle' alone, and two must be there"),
        ],
    )
    @each_kind
    def test_is_the_model_itself(self, kind, settings, reason):
        model = models.build(kind)
        output = cases.bind(model, **settings)
        assert output.result[0] is model and reason in output.result[2]

    def test_no_noun_phrase_is_nothing(self, plain):
        model, _, report = Bind.execute(
            plain, [], text_encoders.build("sd15"), "red circle, blue square", "", "groups", 1.0, 0.0, 1.0
        ).result
        assert model is plain and "there is none" in report

    @each_form
    def test_the_less_the_nearer(self, plain, mode):
        before = drawn(plain)
        moved = [float((drawn(put(plain, mode, strength=strength)) - before).norm()) for strength in (0.05, 0.3, 1.0)]
        assert 0 < moved[0] < moved[1] < moved[2]

    def test_after_the_window_the_steps_are_the_models_own(self, plain):
        told = run_record.find(models.sample(put(plain, end=0.5))).describe()
        assert "acted in 2 of 4 steps" in told and "4 model calls, none of them added" in told


class TestWords:
    def test_groups_are_read_where_none_are_written(self, plain):
        report = cases.bind(plain, groups="").result[2]
        assert "read out of the prompt: 'red circle': tokens 2, 3 (one place); 'blue square': tokens 6, 7 (one place)" in report

    def test_those_of_long_prompts_are_found_behind_the_first_window(self, plain):
        text = " ".join(["word"] * 80) + " a red circle and a blue square"
        report = Bind.execute(plain, [], text_encoders.build("sd15"), text, "", "groups", 1.0, 0.0, 1.0).result[2]
        rows = [int(row) for row in report.split("tokens ")[1].split(" (")[0].split(", ")]
        assert min(rows) > 77

    def test_words_that_are_not_there_are_an_error(self, plain):
        with pytest.raises(MapsError, match="'green circle' is not in the prompt as it is written there. Near it: 'red circle'"):
            cases.bind(plain, groups="green circle | blue square")

    def test_places_of_repeated_words_can_be_told_apart(self, plain):
        clip = text_encoders.build("sd15")
        report = Bind.execute(plain, [], clip, "a circle and a circle", "", "groups", 1.0, 0.0, 1.0).result[2]
        assert "'circle #1': token 2 (place 1 of 2); 'circle #2': token 5 (place 2 of 2)" in report


class TestPlaces:
    def regions(self, count=2):
        listed = Regions()
        for number in range(count):
            listed = listed.with_region(Region(f"part {number}", shapes=(Box(0.5 * number, 0, 0.5, 1),)))
        return listed

    def test_regions_and_masks_are_the_same(self, plain):
        by_regions = cases.bind(plain, mode="dense", regions=self.regions()).result
        torch.testing.assert_close(drawn(by_regions[0]), drawn(put(plain, "dense")), **CLOSE)
        assert "'red circle' in part 0; 'blue square' in part 1" in by_regions[2]

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({}, "needs to know where each group belongs"),
            ({"masks": halves()[:1]}, "2 groups and 1 places"),
            ({"masks": torch.full((2, 8, 8), torch.nan)}, "holds NaN"),
            ({"masks": halves(), "regions": Regions()}, "Both regions and masks"),
        ],
    )
    def test_what_does_not_fit_is_an_error(self, plain, given, told):
        with pytest.raises(BindingError, match=told):
            cases.bind(plain, mode="dense", **given)

    def test_an_area_sees_its_own_part_of_the_masks(self, plain):
        """A condition on the left half has nothing of the right group's place."""
        area = {"area": (8, 4, 0, 0), "strength": 1.0, "set_area_to_bounds": False}
        positive = [[models.conditioning(plain, 10)[0][0], area]]
        left = torch.stack([torch.ones(8, 4), torch.zeros(8, 4)])
        found = drawn(put(plain, "dense"), positive=positive, steps=1)
        wider = torch.cat([left, torch.zeros(2, 8, 4)], -1)
        other = cases.bind(plain, mode="dense", masks=wider).result[0]
        torch.testing.assert_close(found, drawn(other, positive=positive, steps=1), **CLOSE)


class TestSimilarity:
    def test_moves_the_groups_rows_of_the_conditioning_alone(self, plain):
        clip = text_encoders.build("sd15")
        given = text_encoders.encode(clip, TEXT)
        before = given[0][0].clone()
        model, positive, report = Bind.execute(plain, given, clip, TEXT, "", "similarity", 1.0, 0.0, 1.0, likeness=0.0).result
        moved = (positive[0][0] != before).any(-1)[0].nonzero().flatten().tolist()
        assert model is plain and moved == [2, 3, 6, 7] and "4 rows" in report
        assert torch.equal(given[0][0], before) and positive[0][1] == given[0][1] and positive[0][1] is not given[0][1]

    def test_another_prompt_is_an_error(self, plain):
        with pytest.raises(BindingError, match="positive has 7 rows and `text` 77"):
            cases.bind(plain, mode="similarity")


class TestBesides:
    @pytest.mark.parametrize("kind", ["sd15", "flux"])  # SDXL is made of the same classes as the former
    def test_compiled(self, kind):
        model = sampling.compiled(kind)
        torch.testing.assert_close(models.sample(put(model), steps=2), models.sample(put(models.build(kind)), steps=2), **CLOSE)

    @each_kind
    def test_two_in_a_chain_both_act(self, kind):
        model = models.build(kind)
        once, twice = (models.sample(one) for one in (put(model), put(put(model), "dense")))
        assert not torch.equal(once, twice) and not torch.equal(twice, models.sample(put(model, "dense")))

    def test_words_lose_to_all_others_in_flux_and_it_is_said(self):
        model = models.build("flux")
        assert "it goes to all others" in cases.bind(model, mode="words").result[2]
        assert not torch.equal(models.sample(put(model, "words")), models.sample(put(model)))

    @pytest.mark.parametrize("kind", ["sd15", "flux"])
    def test_where_regions_read_texts_of_their_own_it_is_said(self, kind):
        model = models.build(kind)
        regions = model.clone()
        attach(regions, TextEffect("left", Place(halves()[0], {"positive": models.conditioning(model, 40)[0][0]})))
        out = models.sample(put(regions))
        told = run_record.find(out).describe()
        assert "attentions could not be followed" in told and torch.equal(out, models.sample(regions))

    @pytest.mark.parametrize("kind", ["sd15", "sdxl"])
    @pytest.mark.parametrize("first", ["capture", "bind"])
    def test_what_words_attend_to_is_captured_as_it_was_before_they_lost(self, kind, first):
        """The word of no value behind the prompt, which takes what others lose, is none of it."""

        def capture(model):
            return Capture.execute(model, ALL, 0.0, 1.0).result[0]

        def captured(model):
            found = find(models.sample(model, steps=1))
            assert not found.notes
            (shape,) = {part.kept.shape[-1] for part in found.groups}
            assert shape == 7
            return {part.layer: part.maps.float() for part in found.groups}

        model, little = models.build(kind), 1e-5
        both = put(capture(model), "words", little) if first == "capture" else capture(put(model, "words", little))
        plainly, with_words = captured(capture(model)), captured(both)
        assert plainly.keys() == with_words.keys()
        for layer, maps in plainly.items():
            torch.testing.assert_close(with_words[layer], maps, **CLOSE)
        captured(capture(put(model, "words")))
