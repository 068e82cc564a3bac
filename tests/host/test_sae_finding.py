"""Latents found from prompts: a planted one comes first, and what is steered with is what the autoencoder says."""

import models
import pytest
import text_encoders
import torch

from concept_nodes.host import features as host_features
from concept_nodes.host import lab
from concept_nodes.host.directions import ROWS, WORDS, Runs, gated, in_text
from concept_nodes.host.feature_sites import text_sites, width_at
from concept_nodes.host.features import Features, FeaturesError, Readers
from concept_nodes.host.sae_files import SAEFile
from concept_nodes.host.sae_finding import SCORES, SHARE, Reading, Wish, find_in_model
from concept_nodes.host.text_steering import captured, score
from concept_nodes.nodes.features import SAEFind
from concept_nodes.nodes.steering import LIKE, SteerModel, SteerText
from concept_nodes.ops.sae import BATCH_TOPK, JUMPRELU, RELU, SAE, TOPK

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SITE, PLANTED = "clip_l.2", 7
POSITIVE = "a red circle\na red square\na large red star"
NEGATIVE = "a blue circle\na green square\na large yellow star"


def random_sae(d, n=40, activation=JUMPRELU, seed=3, norms=True, **options) -> SAE:
    """Random weights, with norms of its own and a bias that is taken off first."""
    rows = models.seeded((n, d), seed, d**-0.5)
    thresholds = {JUMPRELU: models.seeded((n,), seed + 4).abs() * 0.1, BATCH_TOPK: torch.tensor(0.15)}
    own = dict(
        W_enc=rows,
        b_enc=models.seeded((n,), seed + 1, 0.1),
        W_dec=models.seeded((n, d), seed + 2),
        b_dec=models.seeded((d,), seed + 3, 0.3),
        activation=activation,
        k=5 if activation in (TOPK, BATCH_TOPK) else 0,
        threshold=thresholds.get(activation),
        mean=models.seeded((d,), seed + 5, 0.2) if norms else None,
        std=models.seeded((d,), seed + 6).abs() + 0.5 if norms else None,
    )
    return SAE(**own | options)


def told(sae, site=SITE, **config):
    return SAEFile(sae, {"site": site, "io": "text", "family": "CLIP-L"} | config, {})


def first_rows(model, site):
    """What a site gives in the first call of a sampling, (rows, T, d)."""
    seen = []
    handle = model.model.diffusion_model.get_submodule(site).register_forward_hook(lambda _, given, output: seen.append(output))
    models.sample(model, steps=1)
    handle.remove()
    first = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return (first.flatten(2).mT if first.ndim == 4 else first).clone()


def equal(one, other) -> bool:
    tensors = ("directions", "unit", "mean", "sigmas", "positive", "negative")
    told = all(getattr(one, name) == getattr(other, name) for name in ("name", "family", "site", "io", "gate", "fingerprint", "prompts"))
    pairs = [(getattr(one, name), getattr(other, name)) for name in tensors] + list(zip(one.readers, other.readers, strict=True))
    return told and all(torch.equal(*pair) for pair in pairs)


@pytest.fixture(scope="module")
def clip():
    return lab.load_clip()


@pytest.fixture(scope="module")
def planted(clip):
    """An autoencoder one of whose latents reads what 'red' is to the lab's encoder, from half way between with and without."""
    found = in_text(clip, SITE, tuple(POSITIVE.splitlines()), tuple(NEGATIVE.splitlines()), WORDS, "red").features
    direction, gap = found.directions[0], float(found.unit[0])
    sae = random_sae(found.width)
    rows, bias = sae.W_enc.clone() * 0.2 / sae.mean.norm(), sae.b_enc.clone()
    rows[PLANTED] = direction * sae.std
    bias[PLANTED] = rows[PLANTED] @ sae.b_dec + direction @ (sae.mean - found.mean) - gap / 2
    return told(sae._replace(W_enc=rows, b_enc=bias))


@pytest.mark.parametrize("score", SCORES)
def test_a_planted_latent_comes_first(clip, planted, score):
    found, report = SAEFind.execute(planted, clip, POSITIVE, NEGATIVE, score, 3, "").result
    assert torch.equal(found.directions[0], planted.sae.directions(torch.tensor([PLANTED]))[0])
    assert found.name == "red" and found.io == "text" and found.site == SITE and found.family == "CLIP-L"
    assert f"  {PLANTED}: score" in report and "They lie apart" in report and "approximation" not in report
    other, _ = SAEFind.execute(planted, clip, NEGATIVE, POSITIVE, score, 3, "").result
    assert not torch.equal(other.directions[0], found.directions[0])


@pytest.mark.parametrize("pooling", [WORDS, ROWS])
def test_likeness_is_the_cosine_with_the_dense_direction(clip, planted, pooling, tmp_path):
    """And is kept in the file; latents that add something else recommend the other way in both nodes."""
    found, report = SAEFind.execute(planted, clip, POSITIVE, NEGATIVE, SHARE, 4, "", pooling=pooling).result
    dense = in_text(clip, SITE, tuple(POSITIVE.splitlines()), tuple(NEGATIVE.splitlines()), pooling, "red").features
    added = (found.unit * found.weights) @ found.directions
    assert found.likeness == pytest.approx(float(torch.cosine_similarity(added, dense.directions[0], dim=0)), abs=1e-4)
    assert f"{found.likeness:.2f} with the difference" in report and dense.likeness is None
    host_features.write(found, tmp_path / "x.safetensors")
    assert host_features.read(tmp_path / "x.safetensors").likeness == found.likeness

    def recommended(one) -> bool:
        return "Find Direction is likely" in SteerText.execute(clip, "none", 1.0, "add", "all", 0.0, "none", one).result[2]

    assert recommended(found._replace(likeness=LIKE - 0.01)) and not recommended(found._replace(likeness=LIKE)) and not recommended(dense)
    model = models.build("sd15")
    features = models.features(model)._replace(likeness=LIKE - 0.01)
    assert "Find Direction is likely" in SteerModel.execute(model, "none", 1.0, "add", 0.0, 1.0, "cond", features=features).result[1]


@pytest.mark.parametrize("pooling", [WORDS, ROWS])
def test_numbers_are_those_of_the_codes(clip, planted, pooling):
    sides = []
    for text in (POSITIVE, NEGATIVE):
        codes = []
        for line in text.splitlines():
            rows, content = captured(clip, text_sites(clip, SITE), clip.tokenize(line))
            codes.append(planted.sae.encode(rows[content] if pooling == WORDS else rows[0, 1:]))
        sides.append(codes)
    means = [torch.stack([codes.mean(0) for codes in side]).mean(0) for side in sides]
    shares = means[0] / means[0].sum() - means[1] / means[1].sum()
    best = shares.argsort(descending=True)[:4]
    found, _ = SAEFind.execute(planted, clip, POSITIVE, NEGATIVE, SHARE, 4, "", pooling=pooling).result
    torch.testing.assert_close(found.directions, planted.sae.directions(best))
    torch.testing.assert_close(found.unit, means[0][best])
    torch.testing.assert_close(found.negative[0], means[1][best])
    torch.testing.assert_close(found.weights, ((means[0] - means[1]) / means[0])[best].clamp(0, 1))
    assert 0 < float(found.weights.min()) < 0.9 and float(found.weights[0]) > 0.9
    most, _ = SAEFind.execute(planted, clip, POSITIVE, NEGATIVE, SHARE, 4, "", unit="max", pooling=pooling).result
    torch.testing.assert_close(most.unit, torch.cat(sides[0]).amax(0)[best])


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("activation", [JUMPRELU, BATCH_TOPK, RELU])
def test_readers_read_what_the_autoencoder_encodes(activation, center):
    sae = random_sae(24, activation=activation, center=center)
    chosen, x = torch.tensor([3, 0, 17]), models.seeded((200, 24), 9)
    rows, bias = sae.readers(chosen)
    z = x @ rows.T + bias
    torch.testing.assert_close(z, sae.pre(x)[:, chosen], rtol=1e-5, atol=1e-5)
    threshold = Reading(sae).thresholds(chosen)
    torch.testing.assert_close(torch.where(z > threshold, z, 0).clamp_min(0), sae.encode(x)[:, chosen], rtol=1e-5, atol=1e-5)


def test_of_those_that_keep_a_number_the_threshold_is_the_mean_of_the_least_kept(clip):
    sae = random_sae(text_sites(clip, SITE)[0].width, activation=TOPK)
    found, report = SAEFind.execute(told(sae), clip, POSITIVE, NEGATIVE, SHARE, 2, "").result
    least = []
    for line in (POSITIVE + "\n" + NEGATIVE).splitlines():
        rows, content = captured(clip, text_sites(clip, SITE), clip.tokenize(line))
        least.append(sae.pre(rows[content]).topk(5).values[:, -1])
    torch.testing.assert_close(found.readers.thresholds, torch.cat(least).mean().expand(2))
    assert "approximation" in report


def changed(sae, x, chosen, factor):
    """decode(z') - decode(z) in float64, where the chosen latents' codes are multiplied."""
    z = sae.encode(x).double()
    other = z.clone()
    other[..., chosen] *= factor
    return sae.decode(other) - sae.decode(z)


@pytest.mark.parametrize("activation", [JUMPRELU, BATCH_TOPK, RELU])
def test_steered_text_is_what_the_autoencoder_decodes(clip, activation):
    sae = random_sae(text_sites(clip, SITE)[0].width, activation=activation)
    found, _ = SAEFind.execute(told(sae), clip, POSITIVE, NEGATIVE, SHARE, 3, "").result
    chosen = [int((sae.directions(torch.arange(sae.n)) == row).all(1).nonzero()) for row in found.directions]
    site, seen = text_sites(clip, SITE)[0], []
    for mode, strength, factor in (("scale", 0.7, 1.7), ("ablate", 1.0, 0.0)):
        acting = SteerText.execute(clip, "none", strength, mode, "all", 0.0, "none", found, keep_norm="off").result[0]
        for one in (clip, acting):
            handle = site.module.register_forward_hook(lambda _, given, output: seen.append(output.clone()))
            text_encoders.encode(one, "a small red circle")
            handle.remove()
        before, after = seen[-2:]
        expected = changed(sae, before, chosen, 1 + (factor - 1) * found.weights)
        assert float(expected.abs().max()) > 0.05
        torch.testing.assert_close(after.double(), before + expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_steered_models_are_what_the_autoencoder_decodes(kind):
    model, site = models.build(kind), models.SITES[kind]
    sae = random_sae(width_at(model.model, site))
    family = models.features(model).family
    file = told(sae, "diffusion_model." + site, io="out", family=family)
    runs = Runs(64, 64, 3, 1.0, 2, 1, 5)
    wish = Wish(("p", "q"), ("r",), "x", top=3)
    found = find_in_model(model, text_encoders.Letters(model), file, wish, runs).features
    assert found.family == family and found.site == site and found.positive.shape == (2, 3)
    assert equal(found, find_in_model(model, text_encoders.Letters(model), file, wish, runs).features)
    chosen = [int((sae.directions(torch.arange(sae.n)) == row).all(1).nonzero()) for row in found.directions]
    acting = SteerModel.execute(model, "none", 1.0, "scale", 0.0, 1.0, "both", "", None, found, keep_norm="off").result[0]
    before, after = (first_rows(one, site) for one in (model, acting))
    expected = changed(sae, before, chosen, 1 + found.weights)
    assert float(expected.abs().max()) > 0.05
    torch.testing.assert_close(after.double(), before + expected, rtol=1e-5, atol=1e-5)


def test_means_in_a_model_are_those_of_the_codes():
    """By listening with a hook of the test's own to the same sampling."""
    model, site = models.build("sd15"), models.SITES["sd15"]
    sae, runs = random_sae(width_at(model.model, site)), Runs(64, 64, 1, 1.0, 1, 1, 5)
    file = told(sae, site, io="out", family=models.features(model).family)
    seen = []
    handle = model.model.diffusion_model.get_submodule(site).register_forward_hook(lambda _, given, output: seen.append(output.clone()))
    found = find_in_model(model, text_encoders.Letters(model), file, Wish(("p",), ("r",), "x", top=4), runs).features
    handle.remove()
    chosen = [int((sae.directions(torch.arange(sae.n)) == row).all(1).nonzero()) for row in found.directions]
    for rows, table in zip(seen, (found.positive, found.negative), strict=True):
        torch.testing.assert_close(table[0], sae.encode(rows.flatten(2).mT[0]).mean(0)[chosen], **CLOSE)


def test_a_texts_score_counts_latents_by_what_they_add(clip, planted):
    """One that hardly fires on the concept's own prompts and much on another text must not pass that text for the concept."""
    rows, content = captured(clip, text_sites(clip, SITE), clip.tokenize("a small blue star"))
    codes = planted.sae.encode(rows[content])
    for top in (1, 2, 5):
        found, report = SAEFind.execute(planted, clip, POSITIVE, NEGATIVE, SHARE, top, "").result
        assert 1 <= found.telling <= len(found.unit) and ("by the first" in report)
        first = slice(found.telling)
        by = (found.directions.norm(dim=1) * found.weights)[first]
        z = codes[:, [int((planted.sae.W_dec * planted.sae.std == row).all(1).nonzero()) for row in found.directions[first]]]
        assert score(found, rows, content) == pytest.approx(float((z @ by).max() / (found.unit[first] @ by)), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("wanted", "other", "telling"), [(((2.0, 1.0), (1.0, 0.1)), (0.0, 3.0), 1), (((2.0, 0.0), (0.1, 2.0)), (0.0, 0.0), 2)]
)
def test_the_gate_counts_the_latents_that_tell_the_texts_apart(wanted, other, telling):
    """The second fires on everything else as well; or each of two wordings of the concept has a latent of its own."""
    latents = Readers(torch.eye(2), torch.zeros(2), torch.zeros(2))
    found = Features(
        "x", "CLIP-L", SITE, "text", torch.eye(2), torch.ones(2), torch.ones(2), torch.zeros(2), torch.zeros(1), torch.ones(1, 2),
        torch.zeros(1, 2), latents, prompts=(("a", "b"), ("c",)),
    )  # fmt: skip
    content = torch.ones(1, 1, dtype=torch.bool)
    texts = {text: (torch.tensor([[row]]), content) for text, row in zip("abc", (*wanted, other), strict=True)}
    gated_ones, report = gated(found, texts)
    assert gated_ones.telling == telling and "They lie apart" in report
    assert score(gated_ones, *texts["c"]) < gated_ones.gate < min(score(gated_ones, *texts[one]) for one in "ab")


class TestRefusals:
    def find(self, file, clip, **options):
        return SAEFind.execute(file, clip, POSITIVE, NEGATIVE, SHARE, 3, "", **options)

    def test_width(self, clip):
        with pytest.raises(FeaturesError, match=r"of vectors of 24 numbers, and clip_l\.2 of this CLIP has 128"):
            self.find(told(random_sae(24)), clip)
        model = models.build("sd15")
        site, family = models.SITES["sd15"], models.features(model).family
        with pytest.raises(FeaturesError, match=f"of vectors of 24 numbers, and {site} of this model has {width_at(model.model, site)}"):
            self.find(told(random_sae(24), site, io="out", family=family), clip, model=model)

    def test_family(self, clip):
        with pytest.raises(FeaturesError, match="trained on CLIP-G, and this CLIP is of CLIP-L"):
            self.find(told(random_sae(128), family="CLIP-G"), clip)
        self.find(told(random_sae(128), family="Stable Diffusion 1.5"), clip)  # what the loader can say
        with pytest.raises(FeaturesError, match="trained on SDXL, and this model is of"):
            self.find(told(random_sae(128), models.SITES["sd15"], io="out", family="SDXL"), clip, model=models.build("sd15"))

    def test_site(self, clip):
        with pytest.raises(FeaturesError, match="does not say at which site"):
            self.find(told(random_sae(128), ""), clip)
        with pytest.raises(FeaturesError, match=r"has no site 'clip_l\.99'. Its sites are clip_l\.0 to"):
            self.find(told(random_sae(128), "clip_l.99"), clip)
        with pytest.raises(FeaturesError, match=r"has no site 'output_blocks\.99'"):
            self.find(told(random_sae(128), "output_blocks.99", io="out", family=None), clip, model=models.build("sd15"))
        with pytest.raises(FeaturesError, match="Nothing is connected to model"):
            self.find(told(random_sae(128), "output_blocks.1.1", io=None), clip)

    def test_nan_and_nothing(self, clip):
        sae = random_sae(128)
        spoilt = sae.W_enc.clone()
        spoilt[4, 4] = torch.nan
        with pytest.raises(FeaturesError, match="NaN or infinity"):
            self.find(told(sae._replace(W_enc=spoilt)), clip)
        with pytest.raises(FeaturesError, match="No latent stands for the concept"):
            SAEFind.execute(told(sae), clip, "a star", "a star", SHARE, 3, "")


def test_a_file_is_written_that_steers_the_same(clip, planted):
    found, report = SAEFind.execute(planted, clip, POSITIVE, NEGATIVE, SHARE, 3, "latents of red").result
    assert "Saved as" in report and found.name == "latents of red"
    assert equal(host_features.read(host_features.path_of("latents of red.safetensors")), found)
