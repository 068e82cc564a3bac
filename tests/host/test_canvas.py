"""The canvas node: a document in, regions, masks, a preview and a report out."""

import json
import re
from pathlib import Path

import folder_paths
import pytest
import torch

from concept_nodes.host.regions import Regions, RegionsError
from concept_nodes.nodes.canvas import Canvas
from concept_nodes.ops.masks import Box
from concept_nodes.ops.regions import Region, parse

DRAWN = {
    "version": 1,
    "overlap": "priority",
    "regions": [
        {"name": "left", "colour": "#ff0000", "prompt": "a cat", "shapes": [{"box": [0, 0, 5000, 10000]}]},
        {"name": "top", "colour": "#0000ff", "shapes": [{"box": [0, 0, 10000, 5000]}]},
        {"name": "others", "rest": True},
    ],
}


def run(document=DRAWN, *arguments, **inputs):
    """regions, masks, preview, report, and what is shown on the node."""
    output = Canvas.execute(json.dumps(document), *arguments, **inputs)
    return *output.result, output.ui


def test_masks_are_the_documents_own():
    regions, masks, _, _, _ = run(DRAWN, 96, 64)
    assert masks.shape == (3, 64, 96)
    assert torch.equal(masks, parse(json.dumps(DRAWN)).masks(64, 96))
    assert regions.names() == ["left", "top", "others"]
    assert regions.document.overlap == "priority"


def test_size_is_the_backgrounds_where_none_is_set():
    background = torch.rand(2, 40, 56, 4)
    assert run()[1].shape == (3, 512, 512)
    assert run(DRAWN, 0, 0, background=background)[1].shape == (3, 40, 56)
    assert run(DRAWN, 96, 64, background=background)[1].shape == (3, 64, 96)
    assert run(DRAWN, 0, 64, background=background)[1].shape == (3, 64, 56)


def test_preview_shows_colours_over_the_background():
    background = torch.full((1, 64, 64, 3), 0.5)
    _, _, preview, _, _ = run(DRAWN, background=background)
    assert preview.shape == (1, 64, 64, 3)
    low_left, high_right, low_right = preview[0, 60, 4], preview[0, 20, 60], preview[0, 60, 60]
    assert low_left[0] > 0.7 > 0.3 > low_left[2]
    assert high_right[2] > 0.7 > 0.3 > high_right[0]
    assert not torch.equal(low_right, background[0, 0, 0])  # the rest's colour


def test_report_tells_what_each_region_covers_reads_and_loads():
    document = json.loads(json.dumps(DRAWN))
    document["regions"][1] |= {"loras": [{"file": "a/b.safetensors", "model": 0.5}], "visible": False}
    report = run(document)[3]
    assert "'left': 50% of the picture; reads a prompt of its own." in report
    assert "'top' (hidden): nothing; reads the common prompt; LoRA 'a/b.safetensors' at 0.5." in report


def test_nothing_drawn_is_nothing():
    regions, masks, _, report, _ = run({})
    assert regions.names() == []
    assert masks.shape == (1, 512, 512) and not masks.any()
    assert "No regions yet" in report


def test_regions_that_came_in_lie_above():
    before = Regions().with_region(Region("first", shapes=(Box(0, 0, 0.5, 1),)))
    regions, masks, _, _, _ = run(DRAWN, 64, 64, regions=before)
    assert regions.names() == ["first", "left", "top", "others"]
    assert masks[0].sum() == 64 * 32 and masks[1].sum() == 0
    with pytest.raises(RegionsError, match="already a region named 'left'"):
        run(DRAWN, regions=Regions().with_region(Region("left")))


def test_masks_fill_regions_in_order_and_make_new_ones():
    lower = torch.zeros(1, 8, 8)
    lower[:, 4:] = 1
    corners = torch.zeros(2, 8, 8)
    corners[0, :4, 4:] = corners[1, :4, :4] = 1
    regions, masks, _, _, _ = run(DRAWN, 64, 64, masks={"mask10": corners, "mask2": lower})
    assert regions.names() == ["left", "top", "region 3", "others"]
    assert masks[0, 40:].min() == 1 and masks[0, :32].max() == 0
    assert masks[1, 4, 60] == 1 and masks[2, 4, 4] == 1
    assert run({}, 64, 64, masks={"mask0": lower})[0].names() == ["region 1"]
    with pytest.raises(ValueError, match="mask holds NaN"):
        run(DRAWN, masks={"mask0": lower * torch.nan})


def test_background_is_sent_to_the_panel_once():
    shown = run(DRAWN, background=torch.rand(3, 16, 16, 3))[4]
    assert [image["type"] for image in shown["concept_background"]] == ["temp"]
    assert "images" not in shown  # the node has a panel, not a picture
    assert "concept_background" not in run()[4]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"regions": [{"name": "a", "weight": 2}]}', r"regions\[0\].weight is 2"),
        ("{", "no JSON"),
        (
            '{"regions": [{"loras": [{"file": "concept_lab/bakground.safetensors"}]}]}',
            "There is no file 'concept_lab/bakground.safetensors'",
        ),
    ],
)
def test_faults_are_told_before_the_run(text, told):
    verdict = Canvas.validate_inputs(text)
    assert verdict is not True
    assert re.search(told, verdict)


def test_a_retrained_lora_is_seen():
    file = Path(folder_paths.get_folder_paths("loras")[0]) / "canvas_fingerprint.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"regions": [{"name": "a", "loras": [{"file": file.name}]}]})
    file.write_bytes(b"one")
    folder_paths.filename_list_cache.clear()
    first = Canvas.fingerprint_inputs(text)
    file.write_bytes(b"other")
    assert Canvas.fingerprint_inputs(text) != first
    file.unlink()
