"""The regions document: read, written back, and refused with the field's name."""

import contextlib
import json
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from concept_nodes.ops.masks import Box, Ellipse, Polygon, Stroke
from concept_nodes.ops.regions import MOST, SCOPES, THRESHOLDS, UNIT, Document, DocumentError, Live, LoraFile, Region, dump, parse

TWO = {
    "version": 1,
    "overlap": "priority",
    "regions": [
        {
            "name": "cat",
            "colour": "#4363d8",
            "prompt": "a cat",
            "negative": "a dog",
            "weight": 0.9,
            "feather": 0.02,
            "shapes": [
                {"box": [500, 1000, 4000, 8000]},
                {"stroke": [1000, 1000, 50, 0, 50, 20], "radius": 300, "erase": True},
                {"ellipse": [0, 0, 10000, 5000]},
                {"polygon": [0, 0, 5000, 0, 0, 5000]},
            ],
            "loras": [{"file": "cats\\tom.safetensors", "model": 0.8, "clip": 0.5, "start": 0.1, "end": 0.9}],
        },
        {"name": "background", "rest": True, "prompt": "ein Garten ⭐"},
    ],
}

share = st.integers(0, UNIT).map(lambda value: value / UNIT)
positive = st.integers(1, UNIT).map(lambda value: value / UNIT)
point = st.tuples(share, share)
shapes = st.one_of(
    st.builds(Box, share, share, positive, positive, st.booleans()),
    st.builds(Ellipse, share, share, positive, positive, st.booleans()),
    st.builds(Polygon, st.lists(point, min_size=3, max_size=6).map(tuple), st.booleans()),
    st.builds(Stroke, st.lists(point, min_size=1, max_size=6).map(tuple), positive, st.booleans()),
)
loras = st.builds(LoraFile, st.just("a/b.safetensors"), st.floats(-2, 2), st.floats(-2, 2))
lives = st.builds(
    Live,
    phrase=st.text(),
    background=st.text(),
    threshold=st.sampled_from(THRESHOLDS),
    level=st.floats(0, 1),
    scope=st.sampled_from(SCOPES),
    smoothing=st.floats(0, 0.95),
    start=st.floats(0, 0.5),
    end=st.floats(0.5, 1),
    until=st.floats(0, 1),
    largest=st.booleans(),
    grown=st.integers(0, 8),
)
regions = st.builds(
    Region,
    name=st.text("abcdefgh", min_size=1),
    shapes=st.lists(shapes, max_size=4).map(tuple),
    prompt=st.text(),
    negative=st.text(),
    loras=st.lists(loras, max_size=2).map(tuple),
    weight=st.floats(0, 1),
    feather=st.floats(0, 1),
    visible=st.booleans(),
    locked=st.booleans(),
    live=st.none() | lives,
)
documents = st.builds(
    Document,
    st.lists(regions, max_size=4, unique_by=lambda region: region.name).map(tuple),
    st.sampled_from(["normalize", "priority", "max"]),
)


class TestReading:
    def test_every_field(self):
        document = parse(json.dumps(TWO))
        cat, rest = document.regions
        assert document.overlap == "priority"
        assert (cat.name, cat.prompt, cat.negative, cat.weight, cat.feather) == ("cat", "a cat", "a dog", 0.9, 0.02)
        assert cat.shapes[0] == Box(0.05, 0.1, 0.4, 0.8)
        assert cat.shapes[1] == Stroke(((0.1, 0.1), (0.105, 0.1), (0.11, 0.102)), 0.03, True)
        assert cat.loras == (LoraFile("cats/tom.safetensors", 0.8, 0.5, 0.1, 0.9),)
        assert rest.rest and rest.prompt == "ein Garten ⭐"

    @given(documents)
    def test_what_is_written_is_read_back(self, document):
        assert parse(dump(document)) == document

    @pytest.mark.parametrize("text", ["", "{}", '{"version": 1}', '{"regions": []}'])
    def test_nothing_is_no_regions(self, text):
        assert parse(text) == Document()

    def test_names_and_colours_that_are_left_out(self):
        first, second = parse({"regions": [{}, {}]}).regions
        assert (first.name, second.name) == ("region 1", "region 2")
        assert first.colour != second.colour


def changed(path, value):
    data = json.loads(json.dumps(TWO))
    at = data
    for key in path[:-1]:
        at = at[key]
    if value is KeyError:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return data


class TestRefusals:
    @pytest.mark.parametrize(
        "path, value, told",
        [
            (["version"], 2, r"version 2.*newer.*Update"),
            (["version"], "1", r"version.*whole number"),
            (["overlap"], "mix", r"overlap.*normalize, priority, max"),
            (["regions"], {}, r"regions.*list"),
            (["regions", 0], "cat", r"regions\[0\].*object"),
            (["regions", 0, "promt"], "x", r"regions\[0\].*'promt'.*Known: name, colour"),
            (["regions", 0, "name"], 3, r"regions\[0\]\.name.*text"),
            (["regions", 0, "name"], "  ", r"regions\[0\]\.name is empty"),
            (["regions", 1, "name"], "cat", r"regions\[0\] and regions\[1\].*'cat'"),
            (["regions", 0, "colour"], "blue", r"regions\[0\]\.colour.*#rrggbb"),
            (["regions", 0, "weight"], 2, r"regions\[0\]\.weight.*from 0 to 1"),
            (["regions", 0, "weight"], True, r"regions\[0\]\.weight.*number"),
            (["regions", 0, "feather"], float("nan"), r"regions\[0\]\.feather"),
            (["regions", 0, "visible"], 1, r"regions\[0\]\.visible.*true or false"),
            (["regions", 1, "shapes"], [{"box": [0, 0, 1, 1]}], r"regions\[1\].*rest.*shapes"),
            (["regions", 0, "shapes", 0], {"erase": True}, r"shapes\[0\].*exactly one of box"),
            (["regions", 0, "shapes", 0, "box"], [0, 0, 1], r"shapes\[0\]\.box has 3 numbers"),
            (["regions", 0, "shapes", 0, "box"], [0, 0, 0, 5], r"shapes\[0\]\.box.*width or height"),
            (["regions", 0, "shapes", 0, "box"], [0, 0.5, 1, 1], r"shapes\[0\]\.box\[1\].*whole number"),
            (["regions", 0, "shapes", 0, "box"], [0, 0, 10**9, 1], r"shapes\[0\]\.box\[2\]"),
            (["regions", 0, "shapes", 3, "polygon"], [0, 0, 1, 1], r"shapes\[3\]\.polygon.*at least 6"),
            (["regions", 0, "shapes", 1, "radius"], 0, r"shapes\[1\]\.radius.*from 1"),
            (["regions", 0, "live"], {"threshold": "peak"}, r"regions\[0\]\.live\.threshold.*argmax, otsu"),
            (["regions", 0, "live"], {"start": 0.9, "end": 0.5}, r"regions\[0\]\.live\.start 0\.9 lies after its end 0\.5"),
            (["regions", 1, "live"], {}, r"regions\[1\].*rest.*live"),
            (["regions", 0, "loras", 0, "file"], "", r"loras\[0\]\.file is empty"),
            (["regions", 0, "loras", 0, "model"], "1", r"loras\[0\]\.model.*number"),
            (["regions", 0, "loras", 0, "start"], 0.95, r"loras\[0\]\.start 0\.95 lies after its end 0\.9"),
        ],
    )
    def test_the_field_is_named(self, path, value, told):
        with pytest.raises(DocumentError, match=told):
            parse(changed(path, value))

    def test_too_many_regions(self):
        assert len(parse({"regions": [{}] * MOST}).regions) == MOST
        with pytest.raises(DocumentError, match=f"{MOST + 1} regions; at most {MOST}"):
            parse({"regions": [{}] * (MOST + 1)})

    @pytest.mark.parametrize("text", ["{", "[]", "3", '"x"', "{'a': 1}"])
    def test_other_texts(self, text):
        with pytest.raises(DocumentError):
            parse(text)

    @given(
        st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
    )
    def test_whatever_comes_is_read_or_refused(self, data):
        with contextlib.suppress(DocumentError):
            parse(data if isinstance(data, dict) else json.dumps(data))


class TestMasks:
    def test_rest_is_what_is_left_and_shares_add_up(self):
        masks = parse(TWO).masks(40, 60)
        assert masks.shape == (2, 40, 60)
        assert masks.sum(0).max() <= 1 + 1e-6
        assert torch.allclose(masks[1], 1 - masks[0], atol=1e-6)

    def test_invisible_regions_leave_their_place(self):
        shown, hidden = (parse(changed(["regions", 0, "visible"], visible)).masks(16, 16) for visible in (True, False))
        assert shown[0].sum() > 0
        assert hidden[0].sum() == 0
        assert torch.equal(hidden[1], torch.ones(16, 16))

    def test_given_masks_stand_for_shapes(self):
        given_mask = torch.zeros(8, 8)
        given_mask[:4] = 1
        masks = parse(changed(["regions", 0, "weight"], 1.0)).masks(16, 16, {"cat": given_mask})
        assert torch.equal(masks[0, :8], torch.ones(8, 16))
        assert masks[0, 8:].sum() == 0

    def test_no_regions(self):
        assert Document().masks(4, 5).shape == (0, 4, 5)


SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "regions.schema.json").read_text(encoding="utf-8"))


class TestSchema:
    """docs/regions.schema.json, for editors and scripts: what Python reads is valid, and what it refuses for its form is not."""

    @given(documents)
    def test_what_is_written_is_valid(self, document):
        jsonschema.validate(json.loads(dump(document)), SCHEMA)

    def test_the_example_is_valid(self):
        jsonschema.validate(TWO, SCHEMA)

    @pytest.mark.parametrize(
        "region",
        [
            {"name": " "},
            {"colour": "red"},
            {"weight": 1.5},
            {"rest": True, "shapes": [{"box": [0, 0, 1, 1]}]},
            {"shapes": [{"box": [0, 0, 1, 0]}]},
            {"shapes": [{"box": [0, 0, 1, 1], "ellipse": [0, 0, 1, 1]}]},
            {"shapes": [{"stroke": [0.5, 0]}]},
            {"shapes": [{"polygon": [0, 0, 1, 1]}]},
            {"shapes": [{"stroke": [0, 0], "radius": 0}]},
            {"loras": [{"model": 1}]},
            {"loras": [{"file": "a", "model": 101}]},
            {"mood": "blue"},
            {"live": {"phrase": 3}},
            {"live": {"threshold": "peak"}},
            {"live": {"smoothing": 0.99}},
            {"live": {"grown": 1.5}},
            {"live": {"words": "x"}},
            {"live": "x"},
            {"rest": True, "live": {}},
        ],
        ids=str,
    )
    def test_what_is_refused_is_not_valid(self, region):
        document = {"regions": [region]}
        with pytest.raises(DocumentError):
            parse(document)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, SCHEMA)
