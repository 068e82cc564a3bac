"""What the canvas shows is what Python draws, and what it refuses Python refuses."""

import json
import random
import re
import time

import numpy as np
import pytest
import torch
from canvas_node import node  # noqa: F401

from concept_nodes.ops.masks import rasterize
from concept_nodes.ops.regions import DocumentError, dump, parse

DOCUMENTS = 200
FUZZED = 2500
SIZES = (64, 96, 128, 200, 320, 512, 768, 1024, 1536, 2048)


def random_shape(rng: random.Random) -> dict:
    """Any shape there is: a polygon may cross itself, a stroke stand still, both leave the canvas."""

    def at(low=-1500, high=11500):
        return rng.randint(low, high)

    kind = rng.choice(("box", "ellipse", "polygon", "stroke"))
    erase = {"erase": True} if rng.random() < 0.2 else {}
    if kind in ("box", "ellipse"):
        return {kind: [at(-1000, 8000), at(-1000, 8000), rng.randint(300, 7000), rng.randint(300, 7000)]} | erase
    points = [at(), at()]
    spread = 3000 if kind == "polygon" else 900
    for _ in range(rng.randint(2 if kind == "polygon" else 0, 14)):
        points += [rng.randint(-spread, spread), rng.randint(-spread, spread)]
    for axis in (0, 1):  # no point beyond what a document may hold
        total = points[axis]
        for i in range(axis + 2, len(points), 2):
            step = max(-9000 - total, min(19000 - total, points[i]))
            points[i] = step
            total += step
    return {kind: points} | ({"radius": rng.randint(150, 1500)} if kind == "stroke" else {}) | erase


def random_document(rng: random.Random) -> dict:
    regions = []
    for index in range(rng.randint(1, 4)):
        region = {"name": f"r{index}", "shapes": [random_shape(rng) for _ in range(rng.randint(1, 4))]}
        if rng.random() < 0.4:
            region["feather"] = round(rng.random() ** 3, 3)
        if rng.random() < 0.3:
            region["weight"] = round(rng.random(), 2)
        if rng.random() < 0.1:
            region["visible"] = False
        if index == 2:
            region["live"] = {"phrase": "a cat", "threshold": "otsu", "start": 0.2, "largest": True}
        regions.append(region)
    if rng.random() < 0.3:
        regions.append({"name": "rest", "rest": True})
    return {"version": 1, "overlap": rng.choice(("normalize", "priority", "max")), "regions": regions}


@pytest.mark.parametrize("batch", range(8))
def test_panel_and_python_draw_the_same(node, batch):  # noqa: F811
    """Each region's own mask: intersection over union of at least .995, edges within .75 of a pixel; and shares after the overlap rule."""
    for seed in range(batch, DOCUMENTS, 8):
        rng = random.Random(seed)
        document = random_document(rng)
        width, height = rng.choice(SIZES[: 10 if seed % 5 == 0 else 6]), rng.choice(SIZES[: 10 if seed % 5 == 0 else 6])
        text = json.dumps(document)
        parsed = parse(text)
        answer, own = node.ask(text, width, height, raw=True)
        assert answer["error"] is None, answer["error"]
        for region, mine in zip(parsed.regions, own, strict=True):
            drawn = rasterize(region.shapes, height, width, region.feather).numpy()
            ramp = max(1.0, region.feather * min(width, height))
            hard, other = drawn >= 0.5, mine >= 0.5
            union = (hard | other).sum()
            assert union == 0 or (hard & other).sum() / union >= 0.995, (seed, region.name)
            unlike = hard != other
            off = np.maximum(np.abs(drawn - 0.5), np.abs(mine - 0.5))[unlike] * ramp
            assert not unlike.any() or off.max() <= 0.75, (seed, region.name)
        shares = parsed.masks(height, width).numpy()
        _, seen = node.ask(text, width, height)
        assert (np.abs(seen - shares) > 0.02).mean() <= 0.002, seed


def test_a_wrong_raster_would_be_seen(node):  # noqa: F811
    """The comparison has power: a shape moved by two pixels fails it."""
    text = '{"regions": [{"name": "a", "shapes": [{"ellipse": [2000, 2000, 3000, 3000]}]}]}'
    moved = text.replace("[2000", "[2200")
    _, own = node.ask(text, 128, 128, raw=True)
    drawn = rasterize(parse(moved).regions[0].shapes, 128, 128).numpy() >= 0.5
    hard = own[0] >= 0.5
    assert (hard & drawn).sum() / (hard | drawn).sum() < 0.995


def test_what_the_panel_writes_is_what_was_read(node):  # noqa: F811
    for seed in range(200):
        text = json.dumps(random_document(random.Random(seed)))
        answer, _ = node.ask(text)
        assert parse(answer["text"]) == parse(text)
        again, _ = node.ask(answer["text"])
        assert again["text"] == answer["text"]
        assert parse(dump(parse(text))) == parse(text)


FIELD = re.compile(" is | are | must | has | holds ")  # what comes before one of these names the field
WRONG = [None, True, -1, 0, 0.5, 3, 1e9, -1e400, 10**30, "", " ", "x", "#12", "#zzzzzz", [], [1], [1, 2, 3], {}, {"a": 1}, [[[]]], "é" * 9]
KEYS = [
    "version",
    "overlap",
    "regions",
    "name",
    "colour",
    "shapes",
    "rest",
    "prompt",
    "negative",
    "loras",
    "weight",
    "feather",
    "visible",
    "locked",
    "box",
    "ellipse",
    "polygon",
]
KEYS += ["stroke", "radius", "erase", "file", "model", "clip", "start", "end", "extra", "__proto__", "constructor"]


def spoilt(rng: random.Random, value, depth=0):
    """A document with a fault in it, mostly; now and then a text that is no JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        value = dict(value)
        key = rng.choice(list(value))
        choice = rng.random()
        if choice < 0.08:
            value[rng.choice(KEYS)] = rng.choice(WRONG)
        elif choice < 0.16:
            del value[key]
        else:
            value[key] = spoilt(rng, value[key], depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.85:
        value = list(value)
        at = rng.randrange(len(value))
        choice = rng.random()
        if choice < 0.1:
            value.insert(at, rng.choice([*WRONG, *value]))
        elif choice < 0.2:
            del value[at]
        else:
            value[at] = spoilt(rng, value[at], depth + 1)
        return value
    return rng.choice(WRONG)


def test_fuzzed_documents_are_read_or_refused_alike(node):  # noqa: F811
    """Thousands of spoilt documents: both read them, or both name the same field; nothing else is ever raised."""
    refused = 0
    for seed in range(FUZZED):
        rng = random.Random(10_000 + seed)
        document = random_document(rng)
        document["regions"][0]["loras"] = [{"file": "a/b.safetensors", "model": 0.5, "start": 0.1}]
        document["regions"][0] |= {"colour": "#123456", "prompt": "a cat", "locked": True}
        for _ in range(rng.randint(0, 2)):
            document = spoilt(rng, document)
        text = json.dumps(document)
        if rng.random() < 0.1:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(["", "{", "]", "\\", "\x00", "NaN", text[at:]]) + text[at + 1 :]
        try:
            parsed, wrong = parse(text), None
        except DocumentError as error:
            parsed, wrong = None, str(error)
        answer, _ = node.ask(text)
        assert (answer["error"] is None) == (wrong is None), (text, wrong, answer["error"])
        refused += wrong is not None
        if wrong is None:
            assert parse(answer["text"]) == parsed
        elif "JSON" not in wrong:
            assert FIELD.split(answer["error"])[0] == FIELD.split(wrong)[0], text
    assert FUZZED / 4 < refused < FUZZED * 3 / 4  # both verdicts are exercised


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (" " * 2_000_001, "at most 2,000,000"),
        ("[" * 100_000, "document must be an object|nested too deeply|no JSON"),
        ('{"regions": NaN}', "JSON"),
        ('{"regions": [{"weight": 1e999}]}', r"regions\[0\].weight"),
        ('{"regions": [{"shapes": [{"box": [0, 0, 1e999, 5]}]}]}', r"box\[2\]"),
        ('{"version": 2}', "newer Concept Nodes"),
        ("[]", "the document must be an object"),
    ],
)
def test_extremes_are_refused_with_a_reason(node, text, told):  # noqa: F811
    with pytest.raises(DocumentError, match=told):
        parse(text)
    answer, _ = node.ask(text)
    assert re.search(told, answer["error"])


def test_thousands_of_points_are_drawn_at_once():
    """A lasso and a stroke of 5,000 points each at 1024 pixels: well under a second, where it took a minute segment by segment."""
    rng = random.Random(1)
    points = [5000, 5000] + [rng.randint(-60, 60) for _ in range(9998)]
    document = parse({"regions": [{"name": "a", "shapes": [{"polygon": points}, {"stroke": points, "radius": 100}]}]})
    torch.manual_seed(0)
    began = time.perf_counter()
    assert document.masks(1024, 1024).sum() > 0
    assert time.perf_counter() - began < 10
