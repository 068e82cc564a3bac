"""Browse Latents: what is told of a latent is what the autoencoder encodes there, and what is drawn is what is told."""

import json

import comfy.model_management
import models
import pytest
import torch
from text_encoders import Letters

from concept_nodes.host import lab
from concept_nodes.host.directions import ROWS, WORDS, Runs, in_text
from concept_nodes.host.feature_sites import text_sites, width_at
from concept_nodes.host.features import FeaturesError
from concept_nodes.host.sae_browsing import browse_model, browse_text, latent_of, numbers_in
from concept_nodes.host.sae_files import SAEFile
from concept_nodes.host.text_steering import captured
from concept_nodes.nodes.feature_browsing import SAEBrowse
from concept_nodes.nodes.steering import SteerModel, SteerText
from concept_nodes.ops.sae import JUMPRELU, SAE, TOPK

SITE, PLANTED = "clip_l.2", 7
COLOURS = ("red", "blue", "green", "yellow", "purple")
PROMPTS = tuple(f"a {size} {colour} {shape}" for size in ("small", "large") for colour in COLOURS for shape in ("circle", "star"))
RUNS = Runs(64, 32, 2, 1.0, 2, 2, 5)


def random_sae(d, n=40, **options) -> SAE:
    own = dict(
        W_enc=models.seeded((n, d), 3, d**-0.5),
        b_enc=models.seeded((n,), 4, 0.1),
        W_dec=models.seeded((n, d), 5),
        b_dec=models.seeded((d,), 6, 0.1),
        activation=TOPK,
        k=5,
        std=models.seeded((d,), 7).abs() + 0.5,
    )
    return SAE(**own | options)


@pytest.fixture(scope="module")
def clip():
    return lab.load_clip()


@pytest.fixture(scope="module")
def planted(clip):
    """An autoencoder of which one latent reads what 'red' is to the lab's encoder, and fires beyond half of that."""
    red, others = ([text for text in PROMPTS if ("red" in text) == wanted] for wanted in (True, False))
    found = in_text(clip, SITE, red, others, WORDS, "red").features
    sae = random_sae(found.width, activation=JUMPRELU, k=0, threshold=torch.full((40,), 0.5), std=None, center=False)
    rows, bias = sae.W_enc.clone(), sae.b_enc.clone()
    rows[PLANTED], bias[PLANTED] = found.directions[0], -found.directions[0] @ found.mean - float(found.unit[0])
    return SAEFile(sae._replace(W_enc=rows, b_enc=bias), {"site": SITE, "io": "text", "family": "CLIP-L"}, {})


def browse(clip, sae, latents="", order="most specific", count=3, examples=4, prompts=PROMPTS, **options):
    return SAEBrowse.execute(sae, clip, "\n".join(prompts), latents, order, count, examples, **options).result


@pytest.mark.parametrize("pooling", [WORDS, ROWS])
def test_numbers_are_those_of_the_codes(clip, planted, pooling):
    browsed = browse_text(clip, planted, PROMPTS, pooling)
    codes = []
    for text in PROMPTS:
        rows, content = captured(clip, text_sites(clip, SITE), clip.tokenize(text))
        codes.append(planted.sae.encode(rows[content] if pooling == WORDS else rows[0, 1:])[:, PLANTED])
    every, told = torch.cat(codes), latent_of(browsed, PLANTED, 4)
    fires = every > 0
    assert told.density == pytest.approx(float(fires.float().mean()))
    assert told.mean == pytest.approx(float(every[fires].mean()), rel=1e-4)
    assert told.most == pytest.approx(float(every.max()), rel=1e-4)
    assert told.items == sum(bool((one > 0).any()) for one in codes) and int(told.counts.sum()) == int(fires.sum())
    best = sorted(range(len(PROMPTS)), key=lambda at: -float(codes[at].max()))[:4]
    assert [one.most for one in told.firing] == pytest.approx([float(codes[at].max()) for at in best], rel=1e-4)
    for one in told.firing:
        torch.testing.assert_close(one.heat, codes[PROMPTS.index(one.item.text)], rtol=1e-4, atol=1e-5)
        assert len(one.item.words) == len(one.heat)


def test_a_planted_latent_is_known_by_its_words_and_prompts(clip, planted):
    sheets, found, numbers, report = browse(clip, planted, str(PLANTED))
    (told,) = json.loads(numbers)["latents"]
    assert (
        told["words"][0][0] == told["said"][0][0] == "red"
        and all("red" in one["prompt"] for one in told["examples"])
        and len(told["examples"]) == 4
    )
    assert sheets.shape[0] == 1 and sheets.shape[2] == 1024 and f"  {PLANTED}: on" in report and "red" in report
    assert torch.equal(found.directions, planted.sae.directions(torch.tensor([PLANTED])))
    browsed = browse_text(clip, planted, PROMPTS, WORDS)
    assert float(browsed.survey.spread()[PLANTED]) < 5  # four of twenty prompts are red


def test_what_it_finds_steers(clip, planted):
    """Strength 1 adds the latent's mean activation where it fires."""
    found = browse(clip, planted, str(PLANTED))[1]
    told = latent_of(browse_text(clip, planted, PROMPTS, WORDS), PLANTED, 4)
    assert float(found.unit[0]) == pytest.approx(told.mean)
    site, seen = text_sites(clip, SITE)[0], []
    acting = SteerText.execute(clip, "none", 1.0, "add", "all", 0.0, "none", found, keep_norm="off").result[0]
    for one in (clip, acting):
        handle = site.module.register_forward_hook(lambda _, given, output: seen.append(output.clone()))
        one.encode_from_tokens(one.tokenize("a small blue circle"))
        handle.remove()
    torch.testing.assert_close(seen[1] - seen[0], (told.mean * found.directions[0]).expand_as(seen[0]), rtol=1e-4, atol=1e-4)


def test_latents_come_by_number_by_features_or_by_an_order(clip, planted):
    def numbers(*args, **options):
        return [one["latent"] for one in json.loads(browse(clip, planted, *args, **options)[2])["latents"]]

    assert numbers("3, 17, 5-7") == [3, 17, 5, 6, 7]
    browsed = browse_text(clip, planted, PROMPTS, WORDS)
    for order in ("most often", "most specific", "strongest"):
        assert numbers(order=order, count=4) == browsed.survey.ranked(order, 4)
    found = browse(clip, planted, "9, 4")[1]
    assert numbers(features=found) == [9, 4] and numbers("1", features=found) == [1]
    dense = in_text(clip, SITE, [PROMPTS[0]], [PROMPTS[2]], WORDS, "x").features
    report = browse(clip, planted, features=dense)[3]
    assert "is no latent; the nearest is" in report


def test_a_page_is_warm_where_the_latent_fires(clip, planted):
    """Pages of the latent and of one that fires nowhere differ by its colour, and grow with what they show."""
    few, many = (browse(clip, planted, str(PLANTED), examples=count)[0] for count in (1, 4))
    assert many.shape[1] > few.shape[1]

    def warm(pages):
        return int(((pages[0, ..., 0] > 0.95) & (pages[0, ..., 2] < 0.5)).sum())

    silent = browse(clip, SAEFile(planted.sae._replace(threshold=torch.full((40,), 1e6)), planted.config, {}), "3", prompts=PROMPTS[:2])
    assert warm(many) > 1000 > 10 > warm(silent[0]) and json.loads(silent[2])["latents"][0]["examples"] == []


@pytest.mark.parametrize("kind", ["sd15", "flux", "sd3"])
def test_in_a_model_heat_lies_where_the_rows_do(kind):
    """By listening with a hook of the test's own to the same sampling; pictures are not square."""
    model, site = models.build(kind), models.SITES[kind]
    d, family = width_at(model.model, site), models.features(model).family
    file = SAEFile(random_sae(d), {"site": "diffusion_model." + site, "io": "out", "family": family}, {})
    seen = []
    handle = model.model.diffusion_model.get_submodule(site).register_forward_hook(lambda _, given, output: seen.append(output))
    browsed = browse_model(model, Letters(model), file, ("p", "qq", "rrr"), RUNS, None)
    handle.remove()
    outputs = [one[int(kind == "sd3")] if isinstance(one, tuple) else one for one in seen]
    rows = torch.stack([one.flatten(2).mT if one.ndim == 4 else one for one in outputs], 1)  # (pictures, S, T, d)
    assert [item.text for item in browsed.items] == ["p", "qq", "rrr"] * 2 and browsed.survey.rows == rows.shape[:3].numel()
    codes = file.sae.encode(rows)
    for number in browsed.survey.ranked("strongest", 3):
        told = latent_of(browsed, number, 6)
        assert told.density == pytest.approx(float((codes[..., number] > 0).float().mean()))
        assert [mean for _, mean in told.by_level] == pytest.approx(codes[..., number].mean((0, 2)).tolist(), rel=1e-3)
        for one in told.firing:
            at = next(at for at, item in enumerate(browsed.items) if item is one.item)
            height, width = one.heat.shape
            assert width == 2 * height
            torch.testing.assert_close(one.heat.flatten(), codes[at, ..., number].mean(0), rtol=1e-3, atol=1e-3)


def test_of_a_model_with_its_pictures_and_on_to_the_sampler():
    loaded = lab.load("unet")
    d = width_at(loaded.model.model, "middle_block.1")
    sae = SAEFile(random_sae(d), {"site": "middle_block.1", "io": "out", "family": "Stable Diffusion 1.5"}, {})
    options = {"model": loaded.model, "width": 64, "height": 64, "steps": 2, "levels": 2, "pictures": 1}
    sheets, found, numbers, report = browse(loaded.clip, sae, count=2, prompts=PROMPTS[:4], vae=loaded.vae, **options)
    bare = browse(loaded.clip, sae, count=2, prompts=PROMPTS[:4], **options)
    assert sheets.shape[0] == 2 and "No vae is connected" in bare[3] and "No vae" not in report
    assert sheets.shape[1] > bare[0].shape[1] and sheets.shape[2] == 1024
    assert found.sigmas.tolist() == sorted(found.sigmas.tolist(), reverse=True) and len(found.sigmas) == 2
    steered = SteerModel.execute(loaded.model, "none", 1.0, "add", 0.0, 1.0, "cond", features=found).result[0]
    assert "4 pictures of 2 steps" in report and len(json.loads(numbers)["latents"]) == 2 and steered is not loaded.model


def test_it_can_be_cancelled(clip, planted, monkeypatch):
    seen = []

    def stop():
        seen.append(1)
        if len(seen) > 3:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        browse_text(clip, planted, PROMPTS, WORDS)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("text", "told"), [("3, x", "'x' is no latent's number"), ("40", "has the latents 0 to 39"), ("9-5", "no latent '9-5'"), ("-3", "'-3'")]
)
def test_numbers_that_are_none(text, told):
    with pytest.raises(FeaturesError, match=told):
        numbers_in(text, 40)


def test_refusals(clip, planted):
    def with_(sae=planted, **options):
        return browse(clip, sae, **options)

    other = in_text(clip, "clip_l.1", [PROMPTS[0]], [PROMPTS[2]], WORDS, "x").features
    spoilt = planted.sae.W_enc.clone()
    spoilt[3, 3] = torch.nan
    for told, options in (
        ("'x' lie at clip_l.1", {"features": other}),
        ("prompts is empty", {"prompts": ("",)}),
        ("trained on T5-XXL, and this CLIP is of CLIP-L", {"sae": planted._replace(config={"family": "T5-XXL", "site": SITE})}),
        ("NaN or infinity in W_enc", {"sae": planted._replace(sae=planted.sae._replace(W_enc=spoilt))}),
        ("vectors of 64 numbers", {"sae": planted._replace(sae=random_sae(64))}),
        ("Nothing is connected to model", {"sae": SAEFile(random_sae(64), {"site": "middle_block.1", "io": "out"}, {})}),
        ("does not say at which site", {"sae": planted._replace(config={"io": "text"})}),
    ):
        with pytest.raises(FeaturesError, match=told):
            with_(**options)
