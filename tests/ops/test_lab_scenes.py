"""The lab's scenes: what is sampled is what is drawn, and it is drawn where the truth says."""

import itertools

import pytest
import torch

from concept_nodes.lab.scenes import (
    BACKGROUND_RANGES,
    BACKGROUNDS,
    CHARACTERS,
    COLOUR_RGB,
    COLOURS,
    FILLS,
    KINDS,
    MAX_OBJECTS,
    SHAPES,
    SIZE_RANGES,
    SIZES,
    STYLES,
    Scenes,
    cat_scenes,
    render,
    sample_scenes,
)

CANVASES = [((64, 64), {1: 1.0, 2: 1.0}), ((64, 96), {2: 1.0, 3: 1.0}), ((128, 128), {6: 1.0})]
ATTRIBUTES = ("count", "kind", "colour", "fill", "diameter", "x", "y", "background", "style")


def sample(n=100, canvas=(64, 64), seed=0, **options) -> Scenes:
    return sample_scenes(n, height=canvas[0], width=canvas[1], generator=torch.Generator().manual_seed(seed), **options)


def single(n: int, *, background=0.5, style=0, **attributes) -> Scenes:
    """n scenes with one solid red circle of 26 px in the middle of a grey 64 px canvas; an attribute replaced holds a value per scene."""
    attributes = {"kind": 0, "colour": 0, "fill": 0, "diameter": 26.0, "x": 32.0, "y": 32.0} | attributes
    slots = {key: torch.as_tensor(value).expand(n)[:, None].repeat(1, MAX_OBJECTS) for key, value in attributes.items()}
    wide = {"background": torch.as_tensor(background).expand(n), "style": torch.as_tensor(style).expand(n)}
    return Scenes(64, 64, torch.ones(n, dtype=torch.long), **slots, **wide)


class TestSampling:
    @pytest.mark.parametrize("canvas, counts", CANVASES)
    def test_objects_lie_inside_the_canvas(self, canvas, counts):
        scenes = sample(300, canvas, counts=counts)
        present, radius = scenes.present(), scenes.diameter / 2
        for place, length in ((scenes.x, canvas[1]), (scenes.y, canvas[0])):
            assert (place - radius)[present].min() >= 1.5 - 1e-3
            assert (place + radius)[present].max() <= length - 1.5 + 1e-3

    @pytest.mark.parametrize("canvas, counts", CANVASES)
    def test_objects_keep_their_distance(self, canvas, counts):
        scenes = sample(300, canvas, counts=counts)
        both = scenes.present()[:, :, None] & scenes.present()[:, None] & ~torch.eye(MAX_OBJECTS, dtype=torch.bool)
        centres = torch.stack([scenes.x, scenes.y], -1)
        gap = torch.cdist(centres, centres) - (scenes.diameter[:, :, None] + scenes.diameter[:, None]) / 2
        assert both.any()
        assert gap[both].min() >= 3.0 - 1e-2

    def test_same_seed_same_scenes(self):
        first, again, other = sample(seed=4), sample(seed=4), sample(seed=5)
        for name in ATTRIBUTES:
            assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(first.x, other.x)

    def test_every_value_is_met(self):
        scenes = sample(2000, (96, 96), counts={3: 1.0}, characters=0.3)
        present = scenes.present()
        assert set(scenes.kind[present].tolist()) == set(range(len(KINDS)))
        assert set(scenes.colour[present].tolist()) == set(range(len(COLOURS)))
        assert set(scenes.fill[present].tolist()) == set(range(len(FILLS)))
        assert set(scenes.size_word()[present].tolist()) == set(range(len(SIZES)))
        assert set(scenes.background_word().tolist()) == set(range(len(BACKGROUNDS)))
        assert set(scenes.style.tolist()) == set(range(len(STYLES)))
        assert {(c, r) for c, r in zip(scenes.column()[present].tolist(), scenes.row()[present].tolist(), strict=True)} >= set(
            itertools.product(range(3), range(3))
        )

    def test_words_lie_within_their_ranges(self):
        scenes = sample(500)
        for value, word, ranges in (
            (scenes.diameter, scenes.size_word(), SIZE_RANGES),
            (scenes.background, scenes.background_word(), BACKGROUND_RANGES),
        ):
            low, high = torch.tensor(ranges)[word].unbind(-1)
            assert ((value >= low) & (value <= high)).all()

    def test_counts_are_those_asked_for_where_there_is_room(self):
        assert set(sample(200, counts={1: 1.0}).count.tolist()) == {1}
        assert sample(10, counts={0: 1.0}).count.tolist() == [0] * 10
        counts = sample(400, (128, 128), counts={3: 1.0}).count
        assert counts.max() == 3
        assert (counts == 3).float().mean() > 0.7

    def test_plain_scenes_are_solid_and_flat(self):
        scenes = sample(200, plain=True)
        assert (scenes.fill == 0).all()
        assert (scenes.style == 0).all()

    def test_a_place_between_two_words_has_none(self):
        scenes = single(5, x=torch.tensor([10.0, 25.6, 32.0, 38.4, 60.0]))
        assert scenes.column()[:, 0].tolist() == [0, -1, 1, -1, 2]
        assert (scenes.row()[:, 0] == 1).all()

    def test_joined_scenes_are_their_parts(self):
        parts = sample(3, seed=1), sample(5, seed=2)
        joined = cat_scenes(list(parts))
        assert len(joined) == 8
        assert torch.equal(render(joined), torch.cat([render(part) for part in parts]))
        assert torch.equal(render(joined[torch.tensor([6, 0])]), render(joined)[[6, 0]])


class TestDrawing:
    @pytest.mark.parametrize("canvas, counts", CANVASES)
    def test_pictures_are_finite_and_in_range(self, canvas, counts):
        pictures, masks = render(sample(60, canvas, counts=counts, characters=0.3), masks=True)
        assert pictures.shape == (60, 3, *canvas)
        assert masks.shape == (60, MAX_OBJECTS, *canvas)
        for drawn in (pictures, masks):
            assert drawn.min() >= 0
            assert drawn.max() <= 1

    def test_flat_corners_show_the_background(self):
        scenes = sample(200, plain=True)
        pictures = render(scenes)
        for row, column in itertools.product((0, -1), repeat=2):
            assert torch.equal(pictures[:, :, row, column], scenes.background[:, None].expand(-1, 3))

    def test_without_objects_there_is_only_background(self):
        scenes = sample(5, counts={0: 1.0}, plain=True)
        assert torch.equal(render(scenes), scenes.background[:, None, None, None].expand(5, 3, 64, 64))

    def test_solid_objects_are_their_mask_in_their_colour(self):
        scenes = sample(100, counts={1: 1.0}, plain=True)
        pictures, masks = render(scenes, masks=True)
        mask = masks[:, :1]
        colour = torch.tensor(COLOUR_RGB)[scenes.colour[:, 0]][:, :, None, None]
        expected = scenes.background[:, None, None, None] * (1 - mask) + colour * mask
        torch.testing.assert_close(pictures, expected)

    def test_masks_cover_every_pixel_that_differs(self):
        scenes = sample(100, (96, 96), counts={3: 1.0}, characters=0.4)
        scenes.style.zero_()
        pictures, masks = render(scenes, masks=True)
        differs = (pictures - scenes.background[:, None, None, None]).abs().amax(1) > 1e-6
        assert not (differs & (masks.amax(1) == 0)).any()
        assert (masks[~scenes.present()] == 0).all()
        assert (masks.flatten(2).amax(-1)[scenes.present()] == 1).all()

    def test_silhouettes_hardly_meet(self):
        _, masks = render(sample(150, (128, 128), counts={6: 1.0}, characters=0.3), masks=True)
        shared = (masks.sum(1) > 1.01).flatten(1).sum(1)
        assert shared.max() <= 4, "pixels that two objects share"
        assert (shared > 0).float().mean() < 0.02

    def test_masks_are_centred_where_the_truth_says(self):
        scenes = sample(200, counts={1: 1.0})
        _, masks = render(scenes, masks=True)
        mask = masks[:, 0]
        middle = torch.arange(64) + 0.5
        x = (mask.sum(1) * middle).sum(1) / mask.sum((1, 2))
        y = (mask.sum(2) * middle).sum(1) / mask.sum((1, 2))
        # A crescent's centre of mass lies outside of the middle of its circle.
        reach = 0.35 * scenes.diameter[:, 0]
        assert ((x - scenes.x[:, 0]).abs() < reach).all()
        assert ((y - scenes.y[:, 0]).abs() < reach).all()

    def test_a_larger_object_covers_more(self):
        for kind in range(len(KINDS)):
            _, masks = render(single(3, kind=kind, diameter=torch.tensor([16.0, 22.0, 28.0])), masks=True)
            areas = masks[:, 0].sum((1, 2))
            torch.testing.assert_close(areas / areas[0], torch.tensor([16.0, 22.0, 28.0]).square() / 256, rtol=0.06, atol=0)


class TestDistinctness:
    def test_every_shape_has_its_own_silhouette(self):
        _, masks = render(single(len(SHAPES), kind=torch.arange(len(SHAPES))), masks=True)
        for (first, a), (second, b) in itertools.combinations(zip(SHAPES, masks[:, 0], strict=True), 2):
            overlap = torch.minimum(a, b).sum() / torch.maximum(a, b).sum()
            assert overlap < 0.85, (first, second)

    def test_every_character_has_its_own_look(self):
        pictures = render(single(len(CHARACTERS), kind=torch.arange(len(SHAPES), len(KINDS))))
        for (first, a), (second, b) in itertools.combinations(zip(CHARACTERS, pictures, strict=True), 2):
            assert (a - b).abs().mean() > 0.02, (first, second)
        for name, picture in zip(CHARACTERS, pictures, strict=True):
            assert len(torch.unique((picture.flatten(1).T * 5).round(), dim=0)) >= 4, f"{name} is made of several colours"

    def test_characters_keep_their_own_colours(self):
        first, second = (render(single(len(CHARACTERS), kind=torch.arange(len(SHAPES), len(KINDS)), colour=c)) for c in (0, 5))
        assert torch.equal(first, second)

    @pytest.mark.parametrize("attribute, n", [("colour", len(COLOURS)), ("fill", len(FILLS)), ("style", len(STYLES))])
    def test_every_value_changes_the_picture(self, attribute, n):
        pictures = render(single(n, **{attribute: torch.arange(n)}))
        for a, b in itertools.combinations(pictures, 2):
            assert (a - b).abs().mean() > 0.01
