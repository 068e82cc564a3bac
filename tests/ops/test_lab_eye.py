"""The eye reads true scenes rightly and knows spoilt pictures; scores follow from what it read. None of it needs the host."""

import os
import subprocess
import sys

import pytest
import torch
from readings import true_reading

from concept_nodes.lab import corruptions, measure
from concept_nodes.lab.captions import ONE_WAY, PLAIN, WAYS
from concept_nodes.lab.eye import NETS, Eye, Reading, Seen
from concept_nodes.lab.scenes import BACKGROUNDS, CELLS, COLOURS, KINDS, SHAPES, STYLES, render, sample_scenes

from pack import ROOT


@pytest.fixture(scope="module", params=NETS)
def eye(request):
    return Eye.load(request.param)


def sample(n=200, seed=6, size=64, **options):
    return sample_scenes(n, height=size, width=size, generator=torch.Generator().manual_seed(seed), **options)


def read(eye, pictures):
    return eye.read(pictures.movedim(1, -1))


def nearest(reading: Reading, x: float, y: float) -> Seen | None:
    return min(reading.objects, key=lambda seen: (seen.x - x) ** 2 + (seen.y - y) ** 2, default=None)


class TestReading:
    @pytest.mark.parametrize(
        "size, options",
        [
            (64, {"counts": {1: 1.0, 2: 1.0}, "plain": True}),
            (64, {"counts": {1: 1.0, 2: 1.0}}),
            (128, {"counts": {6: 1.0}, "characters": 0.3}),
        ],
    )
    def test_true_scenes(self, eye, size, options):
        scenes = sample(200 if size == 64 else 40, size=size, **options)
        right = {key: [] for key in ("kind", "colour", "fill", "x", "y", "diameter")}
        readings = read(eye, render(scenes))
        for i, reading in enumerate(readings):
            for true in true_reading(scenes, i).objects:
                seen = nearest(reading, true.x, true.y)
                shape = true.kind in SHAPES
                for key in ("kind", "colour", "fill"):
                    if shape or key == "kind":
                        right[key].append(seen is not None and getattr(seen, key) == getattr(true, key))
                for key, tolerance in (("x", 1.0), ("y", 1.0), ("diameter", 2.5)):
                    right[key].append(seen is not None and abs(getattr(seen, key) - getattr(true, key)) < tolerance)
        shares = {key: sum(values) / len(values) for key, values in right.items()}
        assert min(shares.values()) >= 0.96, shares
        assert min(shares["kind"], shares["colour"]) >= 0.98, shares
        rightly = [
            (len(reading.objects) == int(scenes.count[i]))
            + (reading.style == STYLES[scenes.style[i]])
            + (reading.background_word() == BACKGROUNDS[scenes.background_word()[i]])
            for i, reading in enumerate(readings)
        ]
        assert sum(rightly) / (3 * len(rightly)) >= 0.98

    def test_background_lightness(self, eye):
        scenes = sample(counts={1: 1.0}, plain=True, any_background=True)
        told = torch.tensor([reading.background for reading in read(eye, render(scenes))])
        assert (told - scenes.background).abs().max() < 0.06

    def test_surest_first_and_nothing_without_objects(self, eye):
        for reading in read(eye, render(sample(40, counts={2: 1.0}))):
            assert [seen.sure for seen in reading.objects] == sorted((seen.sure for seen in reading.objects), reverse=True)
        assert all(reading.objects == [] for reading in read(eye, render(sample(20, counts={0: 1.0}))))

    def test_batching_changes_nothing(self, eye):
        pictures = render(sample(10)).movedim(1, -1)
        assert [reading.objects[0].kind for reading in eye.read(pictures)] == [r.objects[0].kind for r in eye.read(pictures, batch=3)]


class TestValidity:
    @pytest.fixture(scope="class")
    def scenes(self):
        return sample(counts={1: 1.0, 2: 1.0})

    def test_true_scenes_are_valid(self, eye, scenes):
        assert share(valid(eye, render(scenes)) > 0.5) >= 0.98

    @pytest.mark.parametrize("kind", corruptions.TAUGHT)
    def test_taught_corruptions_are_not(self, eye, scenes, kind):
        torch.manual_seed(0)
        spoilt = corruptions.TAUGHT[kind](render(scenes))
        assert spoilt.shape == (200, 3, 64, 64)
        assert share(valid(eye, spoilt) < 0.5) >= 0.85

    @pytest.mark.parametrize("noise", [0.004, 0.012])
    def test_a_little_noise_says_nothing(self, eye, scenes, noise):
        """An eye that saw spoilt pictures without noise alone would take noise for a sign of a good one, and its absence for a fault."""
        torch.manual_seed(0)
        pictures, spoilt = render(scenes), torch.cat([corrupt(render(scenes)) for corrupt in corruptions.UNSEEN.values()])
        assert share(valid(eye, (pictures + noise * torch.randn_like(pictures)).clamp(0, 1)) > 0.5) >= 0.98
        assert share(valid(eye, (spoilt + noise * torch.randn_like(spoilt)).clamp(0, 1)) < 0.5) >= 0.85

    def test_unseen_corruptions_are_told_apart_on_average(self, eye, scenes):
        torch.manual_seed(0)
        spoilt = torch.cat([valid(eye, corrupt(render(scenes))) for corrupt in corruptions.UNSEEN.values()])
        true = valid(eye, render(scenes))
        assert true.mean() - spoilt.mean() > 0.4
        ranked = (true[:, None] > spoilt[None]).float().mean()
        assert ranked > 0.85, "chance that a true scene is judged above a spoilt one"


def valid(eye, pictures) -> torch.Tensor:
    return torch.tensor([reading.valid for reading in read(eye, pictures)])


def share(flags: torch.Tensor) -> float:
    return float(flags.float().mean())


class TestScore:
    @pytest.fixture(scope="class")
    def asked(self):
        return measure.ask(50, objects=2, size=128, seed=3)

    def test_asked_scenes_have_words_for_all_of_it(self, asked):
        scenes = asked.scenes
        assert len(asked) == len(scenes) == 50
        assert (scenes.count == 2).all()
        assert ((scenes.column() >= 0) & (scenes.row() >= 0))[scenes.present()].all()
        assert list(measure.ask(50, objects=2, size=128, seed=3)) == list(asked)
        assert list(measure.ask(50, objects=2, size=128, seed=3, wording=PLAIN)) != list(asked)

    def test_true_readings_score_one(self, asked):
        figures = measure.score(asked, [true_reading(asked.scenes, i) for i in range(50)])
        assert figures == dict.fromkeys(figures, 1.0)
        assert {"bind", "colours", "shapes", "count", "place", "size", "fill", "background", "style", "valid"} <= set(figures)

    @pytest.mark.parametrize(
        "change, falls",
        [
            ({"colour": "none"}, {"bind", "colours", "place", "size", "fill"}),
            ({"kind": "none"}, {"bind", "shapes", "place", "size", "fill"}),
            ({"fill": "none"}, {"fill"}),
            ({"diameter": 99.0}, {"size"}),
        ],
    )
    def test_one_wrong_attribute_lowers_its_scores(self, asked, change, falls):
        readings = [true_reading(asked.scenes, i) for i in range(50)]
        changed = next(reading.objects[1] for reading in readings if reading.objects[1].diameter < 24)
        for name, value in change.items():
            setattr(changed, name, value)
        figures = measure.score(asked, readings)
        assert {key for key, value in figures.items() if value < 1} == falls

    def test_swapped_colours_are_a_binding_error_only(self, asked):
        readings = [true_reading(asked.scenes, i) for i in range(50)]
        mixed = next(r for r in readings if len({(o.kind) for o in r.objects}) == len({(o.colour) for o in r.objects}) == 2)
        first, second = mixed.objects
        first.colour, second.colour = second.colour, first.colour
        figures = measure.score(asked, readings)
        assert figures["bind"] == 1 - 1 / 50
        assert figures["colours"] == figures["shapes"] == figures["count"] == 1.0

    def test_cells_tile_the_canvas(self):
        names = {measure.cell_of(x / 10 + 0.05, y / 10 + 0.05) for x in range(10) for y in range(10)}
        assert names == {(column, row) for column in CELLS[0] for row in CELLS[1]}
        assert [measure.size_word(d) for d in (0.0, 17.0, 22.0, 27.0, 99.0)] == [0, 0, 1, 2, 2]


class TestFaults:
    """What went wrong in a picture, named."""

    @pytest.fixture
    def asked(self):
        asked = measure.ask(50, objects=2, size=128, seed=3)
        scenes = asked.scenes
        pick = [i for i in range(50) if scenes.kind[i, 0] != scenes.kind[i, 1] and scenes.colour[i, 0] != scenes.colour[i, 1]][:1]
        return measure.Asked(scenes[pick], [asked[i] for i in pick])

    def told(self, asked, change):
        reading = true_reading(asked.scenes, 0)
        change(reading.objects)
        return {fault for fault, (found,) in measure.faults(asked, [reading]).items() if found}

    def test_a_faultless_picture_has_none(self, asked):
        assert self.told(asked, lambda objects: None) == set()

    def test_missing_and_extra_objects(self, asked):
        assert self.told(asked, lambda objects: objects.pop()) == {"missing"}
        assert self.told(asked, lambda objects: objects.append(objects[0])) == {"extra"}

    def test_swapped_colours(self, asked):
        def swap(objects):
            objects[0].colour, objects[1].colour = objects[1].colour, objects[0].colour

        assert self.told(asked, swap) == {"swapped"}

    @pytest.mark.parametrize("part, values", [("colour", COLOURS), ("kind", KINDS)])
    def test_leaked_or_wrong(self, asked, part, values):
        name = {"colour": "colour", "kind": "shape"}[part]

        def leak(objects):
            setattr(objects[0], part, getattr(objects[1], part))

        def spoil(objects):
            setattr(objects[0], part, next(value for value in values if value not in {getattr(o, part) for o in objects}))

        assert self.told(asked, leak) == {f"{name} leaked"}
        assert self.told(asked, spoil) == {f"{name} wrong"}

    def test_misplaced(self, asked):
        def move(objects):
            objects[0].x = 128 - objects[0].x if abs(objects[0].x - 64) > 20 else 4.0

        assert self.told(asked, move) == {"misplaced"}


class TestWordings:
    """One attribute said another way, the rest of the caption and the scene as they were."""

    def test_same_scenes_in_every_way(self):
        sets = {way: measure.ask_in(way, 30, size=64, seed=3) for way in WAYS}
        names = {"shape": SHAPES, "colour": COLOURS, "style": STYLES}
        for (attribute, plain), *others in zip(*(sets[way] for way in WAYS), strict=True):
            assert len(plain) == 10
            values = {"shape": plain.scenes.kind[:, 0], "colour": plain.scenes.colour[:, 0], "style": plain.scenes.style}
            for (same, asked), way in zip(others, WAYS[1:], strict=True):
                assert same == attribute
                assert torch.equal(asked.scenes.kind, plain.scenes.kind)
                assert torch.equal(asked.scenes.x, plain.scenes.x)
                for i, text in enumerate(asked):
                    word = names[attribute][int(values[attribute][i])]
                    # A misspelling leaves words of three letters alone.
                    assert word not in text.replace(",", "").split() or (way, word) == ("misspelt", "red"), text

    def test_held_out_synonyms_are_used(self):
        for attribute, asked in measure.ask_in("synonym", 30, size=64, seed=3):
            held = {word for wordings in ONE_WAY[attribute].values() for word in wordings.held_synonyms}
            assert all(any(word in text for word in held) for text in asked), attribute

    def test_styles_are_asked_for_where_there_is_one(self):
        (scenes,) = (asked.scenes for attribute, asked in measure.ask_in("plain", 30, size=64, seed=3) if attribute == "style")
        assert (scenes.style != STYLES.index("flat")).all()


def test_the_lab_is_read_without_the_host():
    """Scenes, captions, eye and measure import no ComfyUI, so that they serve where there is none."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); import pack; pack.load_pack()\n"
        "from concept_nodes.lab import captions, corruptions, eye, measure, pools, scenes\n"
        "eye.Eye.load()\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('comfy', 'comfy_api', 'folder_paths', 'transformers')])"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("COMFYUI_PATH", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
