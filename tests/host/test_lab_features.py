"""The lab's autoencoders and features as they ship: made by the workflows, listed by the host, as good as they are said to be."""

import folder_paths
import pytest
import torch

from concept_nodes.benchmarks import _rulers, _steering
from concept_nodes.benchmarks import steer as bench
from concept_nodes.host import features as host_features
from concept_nodes.host import lab, sae_files
from concept_nodes.host.feature_sites import fitting, fitting_text
from concept_nodes.lab import concepts
from concept_nodes.lab import features as shipped
from concept_nodes.lab.eye import Eye
from concept_nodes.lab.scenes import render
from concept_nodes.nodes import NODES
from concept_nodes.nodes.features import SAELoader
from concept_nodes.ops.sae_training import measure

EVERY = [(kind, concept, way) for kind in shipped.KINDS for concept in concepts.CONCEPTS for way in shipped.WAYS]


@pytest.fixture(autouse=True)
def as_in_a_node():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def unet():
    with torch.inference_mode():
        return bench.Shipped.load("unet")


class TestConcepts:
    @pytest.mark.parametrize("concept", concepts.CONCEPTS)
    def test_is_seen_where_it_was_drawn_and_not_elsewhere(self, concept):
        """And how much of it: more than an even chance in the one, less in the other."""
        eye = Eye.load()
        for there in (True, False):
            asked = concepts.asked(concept, 12, 5, there=there)
            readings = eye.read(render(asked.scenes).movedim(1, -1))
            assert sum(concepts.holds(concept, one) == there for one in readings) >= 11
            assert sum((concepts.amount(concept, one) > 0) == there for one in readings) >= 11

    @pytest.mark.parametrize("concept", concepts.CONCEPTS)
    def test_captions_name_it_or_leave_it_open(self, concept):
        with_it, without = concepts.prompts(concept, 8, 5)
        open_ones = concepts.open_captions(concept, 8, 5)
        assert all(concept in text.split() or f"{concept}," in text.split() for text in with_it)
        values = concepts.VALUES[concepts.CONCEPTS[concept]]
        assert not any(value in text.replace(",", "").split() for text in open_ones for value in (*values, concept))
        assert not any(concept in text.split() for text in without)
        assert concepts.amount(concept, bench.Reading(0.5, "flat", 1.0, styles=torch.ones(4) / 4)) < 0


@pytest.mark.parametrize("kind", shipped.KINDS)
def test_workflows_give_nodes_what_they_ask_for(kind):
    """As a queue would check them: inputs that there are, all that must be, nodes that there are."""
    schemas = {schema.node_id: schema for schema in (node.define_schema() for node in NODES)}
    for graph in (shipped.training(kind), shipped.finding(kind, ["red", "neon"])):
        for node in graph.values():
            inputs = {one.id: one for one in schemas[node["class_type"]].inputs}
            assert set(node["inputs"]) <= set(inputs)
            needed = {name for name, one in inputs.items() if not one.optional and getattr(one, "default", None) is None}
            assert needed <= set(node["inputs"])
            assert all(value[0] in graph for value in node["inputs"].values() if isinstance(value, list))
    assert len(set(shipped.captions(20))) >= 18


def test_every_file_ships_and_is_small():
    shipped_files = {path.relative_to(lab.FEATURES).as_posix() for path in lab.FEATURES.rglob("*.safetensors")}
    assert shipped_files == {shipped.features_name(*one) for one in EVERY}
    assert {path.relative_to(lab.SAES).as_posix() for path in lab.SAES.rglob("*.safetensors")} == {
        shipped.sae_name(kind, at) for kind in shipped.KINDS for at in range(len(shipped.RECIPES[kind].sites))
    }
    assert sum(path.stat().st_size for folder in (lab.SAES, lab.FEATURES) for path in folder.rglob("*.safetensors")) <= 3e6


def test_the_host_lists_them_and_trains_into_its_own_folder():
    lab.show_files()
    assert {shipped.sae_name(kind) for kind in shipped.KINDS} <= set(sae_files.names())
    assert {shipped.features_name(*one) for one in EVERY} <= set(host_features.names())
    assert folder_paths.get_folder_paths(sae_files.FOLDER)[0] != str(lab.SAES)
    loaded, report = SAELoader.execute(shipped.sae_name("text")).result
    assert loaded.sae.W_enc.dtype == torch.float16 and "clip_l." in report


@pytest.mark.parametrize("kind", lab.MODELS)
def test_features_are_for_the_models_that_ship(kind):
    model, clip = lab.load_model(kind), lab.load_clip()
    for _, concept, way in (one for one in EVERY if one[0] == kind):
        found = host_features.read(shipped.features_path(kind, concept, way))
        assert all(fitting(model.model, one) for one in found.each()) and found.name == f"{concept} ({way})"
        assert (found.readers is None) == (way == shipped.DENSE)
        of_text = host_features.read(shipped.features_path(shipped.TEXT, concept, way))
        assert fitting_text(clip, of_text) and of_text.gate is not None


def test_the_texts_autoencoder_does_on_other_captions_what_is_said_of_it(unet):
    parts = bench.rows_of(unet, unet.text, shipped.TEXT, bench.fresh(48))
    assert measure(unet.text.sae, parts).metrics.fvu <= 0.1


def test_a_concept_goes_from_what_asks_for_it_and_other_texts_stay(unet):
    """Two concepts that the benchmark has over all of them, four pictures each."""
    for concept in ("red", "neon"):
        way = bench.on_text(unet, unet.features(concept), bench.OUT, "ablate", gate=1.0)
        wished = concepts.asked(concept, 4, 7)
        drawn = [unet.eye.read(bench.draw(unet, one, wished)) for one in (bench.plain(unet), way)]
        before, after = (sum(concepts.holds(concept, one) for one in readings) for readings in drawn)
        assert before >= 3 and after == 0
        for text in concepts.asked(concept, 4, 8, there=False):
            assert all(map(torch.equal, way.encode(text), bench.plain(unet).encode(text)))


class TestBenchmark:
    @pytest.mark.parametrize("concept", ["circle", "red", "striped", "neon", "vintage"])
    def test_rulers_follow_a_drawing_that_turns_into_the_concept(self, unet, concept):
        """Part by part of the way; pictures that change elsewhere stay where they are, and those that hold it already are left out."""
        others = concepts.CONCEPTS[concept] in ("shape", "colour")
        scenes = concepts.asked(concept, 4, 11, there=False).scenes if others else concepts.scenes_of(4, 11)  # plain but for these
        a, b = (render(one).movedim(1, -1) for one in (scenes, concepts.with_concept(scenes, concept)))
        a[0] = b[0]
        parts = torch.linspace(0, 1, 5)
        eyes = unet.eye, unet.second
        told = _rulers.amounts(concept, torch.stack([a + part * (b - a) for part in parts]), eyes)
        assert told.shape == (3, 5) and float(bench.spearman(told).mean()) > 0.95
        assert float((told[:, -1] - told[:, 0]).min()) > 0.8
        if concepts.CONCEPTS[concept] != "shape":
            torch.testing.assert_close(told, parts.double().expand(3, 5), rtol=0, atol=0.15)
        corner = a.clone()
        corner[:, :4, :4] = 0.5
        told = _rulers.amounts(concept, torch.stack([a, corner]), eyes)
        assert float((told[:, 1] - told[:, 0]).abs().max()) < (1.0 if concepts.CONCEPTS[concept] == "shape" else 0.15)

    def test_the_full_strength_is_the_least_that_holds_it_surely(self, unet, monkeypatch):
        """By halving, as one would find it by trying all; the greatest where none is enough."""
        monkeypatch.setattr(bench, "draw", lambda shipped, way, texts, seed: [way] * bench.TRIALS)
        monkeypatch.setattr(bench, "amount", lambda concept, reading: reading)
        reading = unet._replace(eye=type("", (), {"read": lambda self, pictures: pictures})())
        for slope, expected in ((6.0, 0.875), (0.0, 2.0), (100.0, 0.125)):
            assert bench.full_strength(reading, "red", lambda strength, slope=slope: slope * strength) == expected

    def test_leads_are_read_at_equal_distance(self):
        """Twice the effect in strength that costs twice the distance is no lead; the same distance for more of the concept is one."""
        strengths = torch.tensor(bench.DOSES, dtype=torch.float64)
        spread = torch.linspace(0.9, 1.1, 6, dtype=torch.float64)[:, None]

        def dose(slope: float, cost: float) -> bench.Dose:
            drawn = torch.ones(6, 9, dtype=torch.bool)
            return bench.Dose(slope * strengths * spread, cost * strengths.abs() * spread, drawn, torch.zeros(6, 9), list(range(6)))

        assert bench.lead(dose(1, 1), dose(2, 2)).value == pytest.approx(0.0, abs=1e-6)
        better = bench.lead(dose(2, 1), dose(1, 1))
        assert better.low > 0 and better.value == pytest.approx(17 / 32, rel=1e-6)
        assert bench.lead(dose(1, 1), dose(2, 1)).high < 0

    def test_spans_are_of_what_does_not_hold_it_yet(self):
        amount = torch.linspace(-bench.SURE, 2 * bench.SURE, 9, dtype=torch.float64).repeat(3, 1)
        amount[1] = bench.SURE
        dose = bench.Dose(amount, amount, amount > 0, amount[[0, 2]], [0, 2])
        torch.testing.assert_close(dose.spans, torch.ones(2, dtype=torch.float64))

    def test_random_latents_write_as_far_and_elsewhere(self, unet):
        found = unet.features("red")
        other = _steering.shuffled(found, unet.text.sae, 1)
        assert torch.allclose(other.directions.norm(dim=1), found.directions.norm(dim=1), rtol=1e-4)
        assert torch.equal(other.readers.rows, found.readers.rows) and other.checked()
        assert float(torch.cosine_similarity(other.directions[:, None], found.directions, dim=-1).max()) < 0.9

    def test_steerers_add_all_that_the_concepts_own_text_has(self, unet):
        clip, file = unet.loaded.clip, unet.text
        none, half, whole = (_steering.Steerers.of(clip, file, "red", strength) for strength in (0.0, -0.5, -1.0))
        assert torch.equal(2 * half.change, whole.change) and not none.change.any()
        assert torch.equal(none.encode(clip, "a red star")[0], bench.encode(clip, "a red star")[0])
        assert not torch.equal(half.encode(clip, "a red star")[0], half.encode(clip, "a red star", against=True)[0])

    def test_saeuron_mended_leaves_rows_in_which_nothing_exceeds_its_mean(self, unet):
        sae = unet.own.sae
        rows = unet.own.sae.mean + torch.randn(1, 6, sae.d, generator=torch.Generator().manual_seed(1)) * unet.own.sae.std
        chosen = torch.tensor([[0, 1]])
        never, always = torch.full((1, 2), torch.inf), torch.full((1, 2), -1.0)
        quiet, loud = (_steering.Course([1.0], chosen, level, torch.full((1, 2), 3.0)) for level in (never, always))
        assert torch.allclose(_steering.saeuron(quiet, sae, -1.0, True)(rows, 1.0), rows, atol=1e-3)
        rebuilt = sae.decode(sae.encode(rows))
        assert torch.allclose(_steering.saeuron(quiet, sae, -1.0, False)(rows, 1.0), 2 * rebuilt - rows, atol=1e-3)
        codes = sae.encode(rows)[..., :2]
        moved = _steering.saeuron(loud, sae, -1.0, True)(rows, 1.0) - rows
        assert torch.allclose(moved, sae.delta(-4.0 * codes, torch.tensor([0, 1])), atol=1e-2)
