"""Slider Sweep and Sheet: each of the list is Slider's own, and the page shows what it was given where it says."""

import json

import cases
import models
import pytest
import safetensors.torch
import torch

from concept_nodes.host import adapters
from concept_nodes.host.dispatcher import attached
from concept_nodes.host.sheet import lay_out
from concept_nodes.nodes.sliders import Sheet, SliderSweep, labelled, listed_strengths


@pytest.fixture(scope="module")
def plain():
    return models.build()


@pytest.fixture
def file(plain, tmp_path, monkeypatch):
    """A slider file that says of itself what it turns, and how far."""
    import folder_paths

    about = {"poles": ["young", "old"], "range": [-3, 3]}
    safetensors.torch.save_file(models.lora(plain), tmp_path / "age.safetensors", metadata={"concept_nodes": json.dumps(about)})
    safetensors.torch.save_file(models.lora(plain), tmp_path / "bare.safetensors", metadata={"concept_nodes": "no json"})
    extensions = folder_paths.folder_names_and_paths["loras"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return "age.safetensors"


def sweep(model, file="none", strengths="-1, 0, 0.5", **options):
    return SliderSweep.execute(model, file, strengths, 0.0, 1.0, **options).result


class TestSweep:
    def test_each_is_the_sliders_own(self, plain):
        swept, _, strengths, report = sweep(plain, lora=models.lora(plain))
        assert strengths == [-1.0, 0.0, 0.5]
        assert swept[1] is plain
        for model, strength in zip(swept, strengths, strict=True):
            assert torch.equal(models.sample(model), models.sample(cases.slide(plain, strength)))
        assert report.startswith("3 strengths: -1, 0, 0.5.")
        assert "119 layers" in report

    def test_nothing_is_patched_into_weights(self, plain):
        swept = sweep(plain, lora=models.lora(plain))[0]
        assert [len(model.patches) for model in swept] == [0, 0, 0]
        assert [len(attached(model)) for model in swept] == [1, 0, 1]
        assert all(model.model is plain.model for model in swept)

    def test_the_files_own_range_and_poles(self, plain, file):
        _, labels, strengths, _ = sweep(plain, file, "")
        assert strengths == [-3.0, -1.5, 0.0, 1.5, 3.0]
        assert labels == ["-3 young", "-1.5", "0", "+1.5", "+3 old"]

    def test_a_file_that_says_nothing_readable(self, plain, file):
        _, labels, strengths, _ = sweep(plain, "bare.safetensors", "")
        assert strengths == [-2.0, -1.0, 0.0, 1.0, 2.0]
        assert labels == ["-2", "-1", "0", "+1", "+2"]

    def test_poles_at_the_ends_that_turn_to_them_only(self):
        assert labelled([0.0, 1.0, 2.0], ["small", "large"]) == ["0", "+1", "+2 large"]
        assert labelled([-2.0, -1.0], ["small", "large"]) == ["-2 small", "-1"]
        assert labelled([1.0], []) == ["+1"]

    @pytest.mark.parametrize(
        "about",
        [{"range": "ab"}, {"range": 5}, {"range": [None, 1]}, {"range": [-100, 100]}, {"poles": "ab"}, {"poles": 5}, {"poles": ["a"]}, []],
    )
    def test_headers_that_are_wrong_are_none(self, about, tmp_path):
        file = tmp_path / "odd.safetensors"
        safetensors.torch.save_file({"a": torch.zeros(1)}, file, metadata={"concept_nodes": json.dumps(about)})
        assert adapters.about(file) == {}

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("1, two", "strengths holds 'two', which is no number"),
            ("1, nan", "strengths holds nan"),
            ("11", "strengths holds 11"),
            (", ;", "strengths holds no number"),
            (",".join(["1"] * 65), "strengths holds 65 numbers"),
        ],
    )
    def test_what_cannot_be_swept_is_told(self, text, told):
        with pytest.raises(ValueError, match=told):
            listed_strengths(text, None)


def pictures(n, height=8, width=8, seed=0):
    return torch.rand(n, height, width, 3, generator=torch.Generator().manual_seed(seed))


def make(images, labels=None, title="", side=64, columns=0):
    return Sheet.execute(images, [title], [side], [columns], labels).result


class TestSheet:
    def test_pictures_lie_where_it_says(self):
        batches = [pictures(2, seed=seed) for seed in range(3)]
        page, told = make(batches, ["a", "b", "c"], title="three")
        told = json.loads(told)
        assert told["size"] == [page.shape[2], page.shape[1]]
        assert [column["label"] for column in told["columns"]] == ["a", "b", "c"]
        for batch, column in zip(batches, told["columns"], strict=True):
            for picture, place in zip(batch, column["pictures"], strict=True):
                shown = page[0, place["y"] : place["y"] + place["height"], place["x"] : place["x"] + place["width"]]
                expected = (picture * 255).round().repeat_interleave(8, 0).repeat_interleave(8, 1) / 255
                torch.testing.assert_close(shown, expected)

    def test_pictures_do_not_overlap_and_bands_wrap(self):
        told = json.loads(make([pictures(2)] * 5, columns=2)[1])
        places = [place for column in told["columns"] for place in column["pictures"]]
        boxes = [(place["x"], place["y"], place["x"] + place["width"], place["y"] + place["height"]) for place in places]
        for i, one in enumerate(boxes):
            for other in boxes[:i]:
                assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
        assert len({place["x"] for place in places}) == 2
        assert all(box[0] >= 0 and box[2] <= told["size"][0] and box[3] <= told["size"][1] for box in boxes)

    def test_one_batch_is_a_column_for_each_picture(self):
        told = json.loads(make([pictures(3)])[1])
        assert [column["label"] for column in told["columns"]] == ["1", "2", "3"]

    def test_sizes_and_channels_may_differ(self):
        told = json.loads(make([pictures(1, 8, 16), torch.rand(1, 16, 8, 4)], ["wide", "tall"])[1])
        sizes = [(column["pictures"][0]["width"], column["pictures"][0]["height"]) for column in told["columns"]]
        assert sizes == [(64, 32), (32, 64)]

    def test_one_label_for_one_batch(self):
        """A sweep of one strength, and four pictures of it."""
        told = json.loads(make([pictures(4)], ["+1"])[1])
        assert [(column["label"], len(column["pictures"])) for column in told["columns"]] == [("+1", 4)]

    def test_one_channel_and_no_picture(self):
        assert make([torch.rand(1, 8, 8, 1)])[0].shape[-1] == 3
        with pytest.raises(ValueError, match="images holds no picture"):
            make([])

    def test_labels_of_several_lines_are_one(self):
        page, told = make([pictures(1)], ["one\ntwo three"])
        place = json.loads(told)["columns"][0]["pictures"][0]
        plain, _ = make([pictures(1)], ["one two three"])
        assert torch.equal(page, plain)
        assert place["y"] > 0

    def test_labels_that_do_not_match(self):
        with pytest.raises(ValueError, match="There are 2 labels for 3 columns"):
            make([pictures(1)] * 3, ["a", "b"])

    def test_a_long_label_stays_over_its_picture(self):
        short, long = (lay_out([pictures(1)] * 2, [label, ""], "", 64, 0).page for label in ("x", "a very long label " * 9))
        half = short.shape[2] // 2
        assert not torch.equal(short[..., :half, :], long[..., :half, :])
        assert torch.equal(short[..., half:, :], long[..., half:, :])
