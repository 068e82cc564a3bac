"""What `bench filter` measures with: ways that act while the model samples, and searches against a guard."""

import comfy.sample
import pytest
import torch

from concept_nodes.benchmarks import _attacks, _english, _guided, _report
from concept_nodes.benchmarks import filter as bench
from concept_nodes.host import lab
from concept_nodes.host.encoders import Reader, seats, words


@pytest.fixture(scope="module")
def loaded():
    return lab.load("unet")


@pytest.fixture(autouse=True)
def as_in_a_node():
    with torch.inference_mode():
        yield


def conditioning(loaded, text: str) -> list:
    return [[bench.encode(loaded.clip, text)[0], {}]]


@pytest.mark.parametrize("cfg", [1.0, 5.0])
def test_sld_without_a_scale_is_plain_guidance(loaded, cfg):
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    given = [conditioning(loaded, text) for text in ("a red circle", "", "red")]
    nothing = _guided.Safety(0.0, 0.0, 1.0, 0.0, 0.0)
    mine = _guided.sample_safely(loaded.model, noise, 4, cfg, *given, nothing)
    plain = comfy.sample.sample(
        loaded.model, noise, 4, cfg, "euler", "normal", *given[:2], torch.zeros_like(noise), disable_pbar=True
    )  # fmt: skip
    assert torch.allclose(mine, plain, atol=1e-3)
    assert not torch.allclose(_guided.sample_safely(loaded.model, noise, 4, cfg, *given, _guided.MOST), plain, atol=1e-2)


def test_sld_waits_for_its_warm_up(loaded):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    given = [conditioning(loaded, text) for text in ("a red circle", "", "red")]
    late, never = (
        _guided.sample_safely(loaded.model, noise, 4, 5.0, *given, _guided.Safety(share, 5000, 1.0, 0.5, 0.7)) for share in (0.75, 1.0)
    )
    plain = _guided.sample_safely(loaded.model, noise, 4, 5.0, *given, _guided.Safety(0.0, 0.0, 1.0, 0.0, 0.0))
    assert torch.equal(never, plain) and not torch.equal(late, plain)


def test_a_search_comes_nearer_to_what_was_asked(loaded, monkeypatch):
    monkeypatch.setattr(_attacks, "ROUNDS", 4)
    asked, gaps = bench.gaps("red", 4)
    search = _attacks.Search(loaded, 16, gaps, list(asked), seed=3)
    found = {word for word, _ in search.vocabulary}
    assert len(found) > 2000 and {"red", "circle"} <= found

    def contexts(texts):
        return bench.ARMS["none"].prompts(loaded.clip, texts, "red").contexts

    start = tuple(sorted(found)[: _attacks.WORDS])
    begun, asked_plainly = search._losses(contexts, [start, ("red",)])
    held, loss = search.run(contexts)
    assert set(held) <= found and asked_plainly < loss < begun
    better = search._spoken_for(start)
    assert any("red" in best for best in better)


def test_an_embedding_is_learnt_and_forgotten(loaded):
    asked, gaps = bench.gaps("red", 2)
    embedding = _attacks.invert(loaded, gaps, list(asked), 0, "red", None)
    before = loaded.clip.tokenizer.clip_l.embedding_directory
    with _attacks.learnt(loaded.clip, embedding) as word:
        (window,) = loaded.clip.tokenize(f"a {word} circle", return_word_ids=True)["l"]
        assert sum(torch.is_tensor(item[0]) for item in window) == 1
    assert loaded.clip.tokenizer.clip_l.embedding_directory is before
    seat = seats(loaded.clip)[0]
    plain = loaded.clip.tokenize("a red circle", return_word_ids=True)["l"][0]
    vectors = Reader(loaded.clip).read(seat, [window, plain, loaded.clip.tokenize("a blue circle", return_word_ids=True)["l"][0]])[0]
    near, far = torch.cosine_similarity(vectors[:1], vectors[1:])
    assert near > 0.9 and near > far + 0.1
    assert [found.text for found in words(loaded.clip, seat, [window])] == ["a", "embedding", "circle"]


def test_ordinary_prompts_are_many_and_all_different():
    made = _english.ordinary(bench.ENGLISH)
    assert len(set(made)) == bench.ENGLISH >= 1000


def told(arm, held, way="adaptive", concept="red"):
    return {"model": "unet", "way": way, "cfg": 5.0, "concept": concept, "arm": arm, "n": 4, "held": held}


class TestParts:
    ROWS = (told("none", 1.0), told("paper", 0.75), told("SLD max", 0.5), told("ours", 0.25))

    def test_arms_drawn_again_take_their_old_places_and_others_stay(self, tmp_path, monkeypatch):
        monkeypatch.setattr(_report, "RESULTS", tmp_path)
        asked, rows = [], [told("none", 1.0, "explicit"), told("ours", 0.0, "explicit")]

        def measure(ours, sample, parts):
            asked.append((ours, sample, list(parts)))
            return {f"{parts[0]}_rate": _report.share([False])}, rows

        monkeypatch.setattr(bench, "_measure", measure)
        bench.main(["--again", "explicit"])
        assert "adaptive_lead" not in _report.committed("filter")["figures"]  # which no search has told of yet
        rows[:] = self.ROWS
        bench.main(["--again", "adaptive"])
        before = _report.committed("filter")
        assert before["figures"]["adaptive_lead"]["value"] == 0.25
        rows[:] = [told("ours", 0.0)]
        bench.main(["--again", "adaptive", "--ours"])
        after = _report.committed("filter")
        own = {"part": "adaptive"} | rows[0]
        assert after["arms"] == [*before["arms"][:-1], own] and len(after["arms"]) == 6
        assert after["figures"]["adaptive_lead"]["value"] == 0.5 and after["figures"]["explicit_rate"]["n"] == 1
        assert bench.main(["--check"]) == 0
        assert asked == [
            (False, False, ["explicit"]),
            (False, False, ["adaptive"]),
            (True, False, ["adaptive"]),
            (False, True, ["explicit", "adaptive"]),
        ]

    def test_of_what_is_committed_every_row_has_a_place_of_its_own(self):
        result = _report.committed("filter")
        assert len({bench._place(row) for row in result["arms"]}) == len(result["arms"])
        assert {row["part"] for row in result["arms"]} == set(bench.PARTS) - {"overhead"}  # which has figures alone
        for key, figure in bench.compared(result["arms"]).items():
            committed = _report.Figure(**result["figures"][key])
            assert figure == pytest.approx(committed, abs=1e-6), key
