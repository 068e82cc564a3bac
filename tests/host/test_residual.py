"""Personalized residuals: what is trained, the loss, the file, what cannot be learnt from, and that they work beside all else."""

import contextlib
import json
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from concept_nodes.host import adapters, lab, lag, localize
from concept_nodes.host.dispatcher import attach
from concept_nodes.host.families import family_of
from concept_nodes.host.maps import Bound
from concept_nodes.host.residual_training import (
    BLOCKS,
    LEAST,
    OUTPUTS,
    PICTURE,
    Lesson,
    ResidualObjective,
    layers_of,
    least_rank,
    rank_of,
)  # fmt: skip
from concept_nodes.host.slider_training import Text
from concept_nodes.host.training import Loop, Trainee, TrainingError, _Counted, published_names, sizes
from concept_nodes.lab import sliders
from concept_nodes.lab.portraits import draw_portraits
from concept_nodes.nodes import NODES
from concept_nodes.nodes import residual as node
from concept_nodes.nodes.lab import LabCharacters
from concept_nodes.nodes.residual import Residual, ResidualTrain
from concept_nodes.ops.maps import over_otsu

CLOSE = {"rtol": 1e-4, "atol": 1e-3}


def text(model, seed):
    context, options = models.conditioning(model, seed)[0]
    return Text(context, options.get("pooled_output"))


def learner(model, share=0.05, **options):
    return Trainee(model, family_of(model.model).residual_layers, rank=rank_of(share), alpha=None, seed=1, square=True, **options)


def moved(trainee, size=0.1):
    """The trainee with adapters that do something."""
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return trainee


def objective(trainee, model, mask=None, batch=2, seed=3, captions=1, **options):
    latent = models.seeded((trainee.model.latent_format.latent_channels, 8, 8), 7)
    given = tuple(text(model, 10 * number + 1) for number in range(captions))
    return ResidualObjective(trainee, [Lesson(latent, mask, given)], batch=batch, seed=seed, **options), latent


HALF = torch.zeros(32, 32)
HALF[:, :16] = 1


class TestRanks:
    def test_a_share_of_the_width(self):
        """The published 16, 32 and 64, from the layers of the published model, and its number of parameters."""
        for kind, parameters in (("sd15", 1_239_040), ("sdxl", 1_187_840)):
            layers = self.layers(models.full_size(kind))
            ranks = {sizes(layer)[0]: rank_of(0.05)(layer) for layer in layers.values()}
            assert {width: rank for width, rank in ranks.items() if width in (320, 640, 1280)} == ranks
            assert ranks == {width: width // 20 for width in ranks}
            assert sum(2 * sizes(layer)[0] * rank_of(0.05)(layer) for layer in layers.values()) == parameters

    def test_flux_has_one_in_each_block(self):
        layers = self.layers(models.full_size("flux"))
        assert len(layers) == 19 + 38
        assert all(not name.split(".")[-2].startswith("txt") for name in layers)

    @pytest.mark.parametrize("kind", ["sd15", "flux"])
    def test_the_pictures_layers_are_all_but_the_prompts(self, kind):
        family = family_of(models.full_size(kind).model)
        words = {"sd15": (".attn2.to_k", ".attn2.to_v"), "flux": (".txt_",)}[kind]
        every, found = (set(self.layers(models.full_size(kind), layers_of(family, choice))) for choice in (BLOCKS, PICTURE))
        assert found == {name for name in every if not any(word in name for word in words)}
        assert len(found) < len(every) and len(found) > 100

    def test_no_less_than_what_can_learn(self):
        assert rank_of(0.05)(torch.nn.Linear(64, 64)) == LEAST
        assert [rank_of(0.05, least_rank(choice))(torch.nn.Linear(16, 64)) for choice in (OUTPUTS, BLOCKS)] == [LEAST, 1]
        assert rank_of(0.5)(torch.nn.Conv2d(64, 64, 1)) == 32
        assert rank_of(0.5)(torch.nn.Linear(64, 256)) == rank_of(0.5)(torch.nn.Linear(256, 64)) == 32

    @staticmethod
    def layers(patcher, pattern=None):
        import re

        pattern = pattern or family_of(patcher.model).residual_layers
        prefix = "diffusion_model."
        named = {name.removeprefix(prefix): layer for name, layer in patcher.model.named_modules() if name.startswith(prefix)}
        return {name: layer for name, layer in named.items() if re.search(pattern, name)}


@pytest.mark.parametrize("kind", list(models.KINDS))
class TestOnEveryFamily:
    def test_the_loss_is_the_models_own(self, kind):
        """The noise, for a flow the velocity, predicted at strength 1 from the noisy picture and a caption of its."""
        model = models.build(kind)
        with learner(model) as trainee:
            made, latent = objective(moved(trainee), model)
            plain, drawn = trainee.predict, []
            trainee.predict = lambda *given: drawn.append(given) or plain(*given)
            (loss,) = [float(loss().detach()) for loss in made.losses(5)]
            ((x, sigma, given, strength),) = drawn
            wide, clean = sigma[:, None, None, None], trainee.model.process_latent_in(latent)
            noise = (x - (1 - wide) * clean) / wide if kind == "flux" else (x - clean) / wide
            assert abs(float(noise.mean())) < 0.15
            assert float(noise.std()) == pytest.approx(1, abs=0.15)
            with torch.no_grad():
                wanted = noise - clean if kind == "flux" else noise
                assert loss == pytest.approx(float((plain(x, sigma, given, 1.0) - wanted).square().mean()), rel=1e-3)
            assert strength == 1.0

    def test_nothing_outside_of_the_mask_counts(self, kind):
        """The mask's own mean, whatever it covers: only what the model says inside changes the loss."""
        model = models.build(kind)
        with learner(model) as trainee:
            made, _ = objective(moved(trainee), model, HALF)
            plain = trainee.predict

            def loss(inside=0.0, outside=0.0):
                trainee.predict = lambda x, *given: (
                    plain(x, *given) + torch.cat([x.new_full((8, 4), inside), x.new_full((8, 4), outside)], 1)
                )
                with torch.no_grad():
                    return float(made.losses(5)[0]())

            assert loss(outside=100.0) == loss()
            # Ten thousand times its square, however small the mask: the loss is a mean over the mask.
            assert loss(inside=1000.0) == pytest.approx(1e6, rel=0.02)

    def test_other_captions_are_held_to_what_they_said(self, kind):
        """Beside the lesson, which stays what it was: the whole of the same pictures, half as many, against the untaught prediction."""
        model = models.build(kind)
        other = text(model, 50)
        with learner(model) as trainee:
            (alone,) = objective(trainee, model, HALF, batch=4)[0].losses(5)
            made, latent = objective(trainee, model, HALF, batch=4, preserve=[other], weight=0.3)
            plain, drawn = trainee.predict, []
            trainee.predict = lambda *given: drawn.append(given) or plain(*given)
            learn, keep = made.losses(5)
            with torch.no_grad():
                assert float(learn()) == float(alone())
                assert float(keep()) == 0  # nothing was learnt yet
            moved(trainee)
            drawn.clear()
            loss = keep()
            (x, sigma, given, before), (_, _, _, after) = drawn
            assert (len(x), before, after) == (2, 0.0, 1.0)
            with torch.no_grad():
                told = trainee.condition(other.context.repeat(2, 1, 1), None if other.pooled is None else other.pooled.repeat(2, 1), x)
                first, last = (plain(x.clone(), sigma, told, strength) for strength in (0.0, 1.0))
                assert float(loss.detach()) == pytest.approx(0.3 * float((last - first).square().mean()), rel=1e-4)
            loss.backward()
            assert any(parameter.grad is not None and parameter.grad.any() for parameter in trainee.parameters())

    def test_up_to_a_share_of_sampling(self, kind):
        """No less noise than there is at that share, and all of it up to there."""
        model = models.build(kind)
        with learner(model) as trainee:
            least = trainee.sampling.percent_to_sigma(0.4)
            drawn, plain = {}, trainee.predict
            for end in (1.0, 0.4):
                trainee.predict = lambda *given, end=end: drawn.setdefault(end, given[1]) is None or plain(*given)
                with torch.no_grad():
                    objective(trainee, model, batch=64, end=end)[0].losses(0)[0]()
            assert float(drawn[1.0].min()) < least <= float(drawn[0.4].min())
            assert float(drawn[0.4].max()) > trainee.sampling.percent_to_sigma(0.1)

    def test_a_mask_of_all_is_none(self, kind):
        model = models.build(kind)
        with learner(model) as trainee:
            found = [objective(moved(trainee, 0.0), model, mask)[0].losses(5)[0]() for mask in (None, torch.ones(32, 32), torch.ones(8, 8))]
        assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-6)
        assert float(found[0]) == float(found[2])

    def test_the_file_is_what_was_trained(self, kind):
        """Personalized Residual and the stock loader read the state, and do to the picture what the adapters did to the prediction."""
        model = models.build(kind)
        with learner(model, share=0.2) as trainee:
            made, _ = objective(trainee, model)
            Loop(trainee.parameters(), steps=3, rate=0.05, identity="", file=None).run(made)
            with torch.no_grad():
                x, sigma = models.seeded((1, trainee.model.latent_format.latent_channels, 8, 8), 9), torch.tensor([0.7])
                own = trainee.predict(x, sigma, trainee.condition(*text(model, 10), x), 0.7)
            state = trainee.state(published_names(trainee.model))
            layers = len(trainee.adapters)
        if kind == "flux":
            down, up = (state[f"lora_unet_single_blocks_0_linear2.lora_{part}.weight"] for part in ("down", "up"))
            assert (down.shape[1], up.shape[0]) == (64 + 256, 64)
            assert down[:, :64].any() and not down[:, 64:].any()
        ours, report = Residual.execute(model, "none", 0.7, 0.0, 1.0, lora=state).result
        assert f"Placed on {layers} layers" in report and "Not applied" not in report
        stock = comfy.sd.load_lora_for_models(model, None, state, 0.7, 0)[0]
        assert len(stock.patches) == layers
        assert not torch.equal(models.sample(ours), models.sample(model))
        torch.testing.assert_close(models.sample(ours), models.sample(stock), **CLOSE)
        with torch.inference_mode(), learner(stock) as merged:
            merged.adapters.clear()
            again = merged.predict(x.clone(), sigma, merged.condition(*text(model, 10), x), 0.0)
        torch.testing.assert_close(own, again, **CLOSE)

    def test_memory_is_what_a_step_takes(self, kind):
        model = models.build(kind)
        with learner(model) as trainee:
            made, _ = objective(trainee, model)
            with _Counted([*trainee.model.parameters(), *trainee.parameters()]) as counted:
                made.losses(0)[0]().backward()
            for parameter in trainee.parameters():
                parameter.grad = None
            assert made.memory().step == pytest.approx(counted.peak, rel=0.1)

    def test_resumed_is_uninterrupted(self, kind, tmp_path):
        model, states = models.build(kind), []

        def stop(step):
            if step == 2:
                raise comfy.model_management.InterruptProcessingException()

        for file in (None, tmp_path / "state"):
            for each in (stop, lambda step: None) if file else (lambda step: None,):
                with learner(model) as trainee, contextlib.suppress(comfy.model_management.InterruptProcessingException):
                    made, _ = objective(trainee, model, HALF, captions=3)
                    Loop(trainee.parameters(), steps=5, rate=1e-2, identity="", file=file).run(made, each)
                    states.append(trainee.state(published_names(trainee.model)))
        assert len(states) == 2
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


PICTURES = torch.rand(2, 40, 64, 3, generator=torch.Generator().manual_seed(1))
MASKS = torch.ones(2, 40, 64)


class TestSubjects:
    def test_pictures_of_many_sizes_are_cut_with_their_masks(self):
        made = node.subjects([PICTURES, torch.rand(1, 35, 40, 4)], [MASKS, torch.ones(35, 40)], 8)
        assert [tuple(part.shape) for pair in made for part in pair] == [(40, 64, 3), (40, 64)] * 2 + [(32, 40, 3), (32, 40)]
        assert [mask for _, mask in node.subjects([PICTURES[:1]], None, 8)] == [None]

    @pytest.mark.parametrize(
        ("images", "masks", "told"),
        [
            (PICTURES, MASKS[:1], "2 pictures and 1 masks. Give one mask for each"),
            (PICTURES[:1], MASKS, "1 pictures and 2 masks"),
            (PICTURES, torch.ones(2, 64, 40), "Mask 1 is 40 x 64 pixels and picture 1 64 x 40"),
            (PICTURES, torch.stack([MASKS[0], 0 * MASKS[1]]), "Mask 2 is empty, so nothing of picture 2 would be learnt"),
            (PICTURES, torch.zeros(2, 64, 64), "Mask 1 is empty"),
            (PICTURES, MASKS / 0 * 0, "Mask 1 is no mask"),
            (PICTURES / 0, None, "Picture 1 holds values that are no numbers"),
            (PICTURES[:, :6], None, "Picture 1 is 64 x 6 pixels, which is less"),
            (PICTURES[:0], None, "images holds no picture"),
        ],
    )
    def test_what_cannot_be_learnt_from_is_told(self, images, masks, told):
        with pytest.raises(TrainingError, match=told):
            node.subjects([images], None if masks is None else [masks], 8)

    def test_a_mask_outside_of_what_is_read_is_told(self):
        mask = torch.zeros(1, 44, 64)
        mask[:, 40:] = 1
        with pytest.raises(TrainingError, match="white in what is cut off picture 1"):
            node.subjects([torch.rand(1, 44, 64, 3)], [mask], 8)


class TestCaptions:
    @staticmethod
    def captions(prompt, pictures=2, identifier="sks", class_word="robot"):
        return node.captions(prompt, pictures, identifier, class_word, lambda line, word: word in line.split())

    def test_one_for_all_one_each_or_any(self):
        assert self.captions("a sks robot\n") == [("a sks robot",)] * 2
        assert self.captions("a sks robot\nmy sks robot") == [("a sks robot",), ("my sks robot",)]
        assert self.captions("a sks robot\nmy sks robot", 1) == [("a sks robot", "my sks robot")]
        assert self.captions("a sks", class_word="") == [("a sks",)] * 2

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ({"prompt": "a robot"}, "'a robot' of prompt does not hold the identifier 'sks'"),
            ({"prompt": "a sks robot\na sks"}, "'a sks' of prompt does not hold the class_word 'robot'"),
            ({"prompt": " \n"}, "prompt is empty: it does not hold the identifier 'sks'"),
            ({"prompt": "a sks", "identifier": ""}, "identifier is empty"),
        ],
    )
    def test_words_that_are_not_there_are_told(self, given, told):
        with pytest.raises(TrainingError, match=told):
            self.captions(**given)

    def test_what_is_kept_is_others_and_nothing(self):
        def found(text):
            return node.kept_lines(text, "sks", lambda line, word: word in line.split())

        assert found(" \n") == []
        assert found("a dog\n\n a robot ") == ["a dog", "a robot", ""]
        with pytest.raises(TrainingError, match="'a sks dog' of preserve holds the identifier 'sks'"):
            found("a dog\na sks dog")


@pytest.fixture
def places(tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path


def loaded(kind):
    """A lab model as the host's loader nodes leave it: made in inference mode."""
    with torch.inference_mode():
        return lab.load(kind)


def train(given, images=None, masks=None, **changes):
    """The node on drawn pictures, in a few steps."""
    drawn, silhouettes, lines = draw_portraits("cat", 3, word="ohwx", height=64, width=64, seed=1)
    asked = dict(
        prompt="\n".join(lines), identifier="ohwx", class_word="", steps=3, batch=2, learning_rate=1e-2, rank_share=0.05, layers=OUTPUTS,
        seed=3, name="my cat", previews=0,
    ) | changes  # fmt: skip
    listed = {key: [value] for key, value in asked.items()}
    with torch.inference_mode():
        masks = {"masks": [silhouettes]} if masks is True else {"masks": masks} if masks else {}
        return ResidualTrain.execute([given.model], [given.clip], [given.vae], images or [drawn], **listed, **masks)


class TestNode:
    @pytest.mark.parametrize("kind", lab.MODELS)
    def test_trains_saves_and_tells(self, kind, places):
        given = loaded(kind)
        lora, losses, path, report = train(given, masks=True, previews=1).result
        layers = {"unet": 10, "dit": 7}[kind]
        assert len(losses["loss"]) == 3
        for part in (f"on {layers} layers", "3 pictures of 'ohwx', inside masks over", "Saved as", "MB for the weights"):
            assert part in report
        path = Path(path)
        assert path.parent == places / "output" / "loras" / "concept_nodes"
        assert path.stat().st_size <= 100_000
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["concept_nodes"])
        assert {"identifier": "ohwx", "class_word": "", "kind": "personalized residual"}.items() <= about.items()
        assert about["base"] == family_of(given.model.model).name
        state = adapters.read(path)
        assert all(torch.equal(state[key], lora[key]) for key in lora) and state.keys() == lora.keys()
        put, told = Residual.execute(given.model, "none", 1.0, 0.0, 1.0, lora=lora).result
        assert put is not given.model
        assert "Its words are 'ohwx'" in told and f"{layers} layers" in told

    def test_other_prompts_are_preserved(self, places):
        """They lead elsewhere, and the file says so."""
        given = loaded("unet")
        (plain, _, at, _), (kept, _, other, _) = (
            train(given, name=name, preserve=lines).result for name, lines in (("plain", ""), ("kept", "a red circle\na heart"))
        )
        assert any(not torch.equal(plain[key], kept[key]) for key in plain)
        told = []
        for path in (at, other):
            with safe_open(path, framework="pt") as file:
                told.append(json.loads(file.metadata()["concept_nodes"])["objective"])
        assert "preserved" not in told[0] and "attention outputs, other prompts preserved: 2," in told[1]

    def test_a_cancelled_training_goes_on(self, places):
        given = loaded("unet")
        whole = train(given).result[0]

        def hook(value, *_, **__):
            if value >= 2:
                raise comfy.model_management.InterruptProcessingException()

        before = comfy.utils.PROGRESS_BAR_HOOK
        comfy.utils.set_progress_bar_global_hook(hook)
        try:
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                train(given)
        finally:
            comfy.utils.set_progress_bar_global_hook(before)
        # Neither other pictures, nor other masks, nor another word is the same training.
        assert "Resumed" not in train(given, masks=True).result[3]
        assert "Resumed" not in train(given, prompt="an ohwx").result[3]
        lora, _, _, report = train(given).result
        assert "Resumed at step" in report, report
        assert all(torch.equal(whole[key], lora[key]) for key in whole)

    @pytest.mark.parametrize(("kind", "layers"), [("unet", 120), ("dit", 26)])
    def test_all_layers_of_the_blocks(self, kind, layers, places):
        given = loaded(kind)
        lora, _, _, report = train(given, layers=BLOCKS, steps=1).result
        assert f"on {layers} layers" in report
        put, told = Residual.execute(given.model, "none", 1.0, 0.0, 1.0, lora=lora).result
        assert put is not given.model and "Not applied" not in told

    def test_one_picture_of_any_size(self, places):
        picture = torch.rand(1, 67, 96, 3, generator=torch.Generator().manual_seed(2))
        assert (
            "1 pictures of 'sks shape'"
            in train(loaded("unet"), [picture], prompt="a sks shape", identifier="sks", class_word="shape").result[3]
        )

    def test_a_word_that_is_not_in_the_prompt(self, places):
        with pytest.raises(TrainingError, match="does not hold the identifier 'xjk'"):
            train(loaded("unet"), identifier="xjk")


class TestResidual:
    def put(self, lora=None, file="none", **options):
        model = models.build()
        put, report = Residual.execute(model, file, 0.7, 0.0, 1.0, lora=lora, **options).result
        return model, put, report

    def test_says_what_any_lora_is(self):
        model, put, report = self.put(models.lora(models.build()))
        assert put is not model
        assert "names no identifier: it is no residual" in report

    def test_reads_its_words_from_the_file(self, tmp_path, monkeypatch):
        import folder_paths

        monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
        monkeypatch.setattr(folder_paths, "filename_list_cache", {})
        about = {"identifier": "sks", "class_word": "robot", "range": [-2, 2]}
        save_file(models.lora(models.build(), only="proj_out"), tmp_path / "r.safetensors", metadata={"concept_nodes": json.dumps(about)})
        _, _, report = self.put(file="r.safetensors")
        assert "Its words are 'sks robot'" in report

    @pytest.mark.parametrize("told", [{"identifier": 3}, {"identifier": ""}, {}, {"class_word": "robot"}])
    def test_what_a_header_says_is_checked(self, told):
        assert "names no identifier" in self.put(adapters.Told(models.lora(models.build()), told))[2]


class TestPortraits:
    def test_the_node_draws_one_character_with_its_mask_and_words(self):
        images, masks, lines = LabCharacters.execute("robot", "sks", 3, 0, 64, 64, 1).result
        assert images.shape == (3, 64, 64, 3) and masks.shape == (3, 64, 64)
        assert len(lines.splitlines()) == 3 and all("sks" in line.split() for line in lines.splitlines())
        # What the mask covers is not the background.
        for picture, mask in zip(images, masks, strict=True):
            assert 0.05 < float(mask.mean()) < 0.25
            ground = picture[0, 0]
            assert float((picture - ground).abs().sum(-1)[mask > 0.9].mean()) > 0.2

    def test_beside_another(self):
        images, masks, lines = LabCharacters.execute("robot", "sks", 3, 1, 64, 64, 1).result
        alone = LabCharacters.execute("robot", "sks", 3, 0, 64, 64, 1).result[2]
        assert len(images) == 3 and float(masks.mean()) < 0.25
        assert all(len(line.split()) > len(other.split()) for line, other in zip(lines.splitlines(), alone.splitlines(), strict=True))

    def test_too_many_beside_is_told(self):
        with pytest.raises(ValueError, match="Ask for less"):
            LabCharacters.execute("robot", "sks", 4, 5, 64, 64, 1)


def together(**settings):
    """A graph of a residual from its training, a slider, a filter, a steer and a region; a setting is the strength of each."""
    made = {"residual": 1.0, "slider": 1.5, "filter": 1.0, "steer": 1.0, "region": 1.0} | settings
    common = "a large ohwx on the left and a red circle on a grey background"
    red, blue = (f"a {colour} square on a grey background\na {colour} star on a grey background" for colour in ("red", "blue"))
    window = {"start_percent": 0.0, "end_percent": 1.0}
    wishes = {"clip": ["lab", 1], "concepts": "circle", "preset": "none", "method": "ours"}
    return {
        "lab": ("LabLoader", {"model": "unet"}),
        "pictures": (
            "LabCharacters",
            {"character": "cat", "word": "ohwx", "count": 3, "beside": 1, "width": 64, "height": 64, "seed": 1},
        ),
        "train": (
            "ResidualTrain",
            {
                "model": ["lab", 0], "clip": ["lab", 1], "vae": ["lab", 2], "images": ["pictures", 0], "masks": ["pictures", 1],
                "prompt": ["pictures", 2], "identifier": "ohwx", "class_word": "", "steps": 20, "batch": 2, "learning_rate": 1e-2,
                "rank_share": 0.1, "layers": OUTPUTS, "seed": 1, "name": "together", "previews": 0,
            },
        ),
        "residual": (
            "Residual",
            {"model": ["lab", 0], "file": "none", "strength": made["residual"], "lora": ["train", 0], **window},
        ),
        "slider": (
            "Slider",
            {"model": ["residual", 0], "file": sliders.file_of("unet", "background"), "strength": made["slider"], **window},
        ),
        "direction": (
            "DirectionFind",
            {
                "clip": ["lab", 1], "positive": red, "negative": blue, "where": "model", "site": "auto", "file_name": "",
                "model": ["lab", 0], "width": 64, "height": 64, "steps": 4, "levels": 2, "pictures": 1,
            },
        ),
        "steer": (
            "SteerModel",
            {
                "model": ["slider", 0], "file": "none", "strength": made["steer"], "mode": "add", "cfg_mode": "cond",
                "features": ["direction", 0], **window,
            },
        ),
        "region": (
            "Region",
            {
                "name": "right", "prompt": "a large yellow star", "negative": "", "shape": "box", "x": 0.5, "y": 0.0, "width": 0.5,
                "height": 1.0, "feather": 0.0, "weight": made["region"],
            },
        ),
        "positive": ("Filter", {**wishes, "text": common, "strength": made["filter"]}),
        "negative": ("Filter", {**wishes, "text": "", "strength": 0.0}),
        "apply": (
            "RegionsApply",
            {"model": ["steer", 0], "positive": ["positive", 0], "negative": ["negative", 0], "regions": ["region", 0], "clip": ["lab", 1]},
        ),
    }  # fmt: skip


def run_graph(graph, kept=None):
    """The outputs of each node of a graph; `kept`: of those that have run."""
    classes = {one.define_schema().node_id: one for one in NODES}
    made = dict(kept or {})

    def outputs(name):
        if name not in made:
            one = classes[f"ConceptNodes_{graph[name][0]}"]
            given = {key: outputs(value[0])[value[1]] if isinstance(value, list) else value for key, value in graph[name][1].items()}
            listed = one.define_schema().is_input_list
            made[name] = one.execute(**{key: [value] if listed else value for key, value in given.items()}).result
        return made[name]

    with torch.inference_mode():
        for name in graph:
            outputs(name)
    return made


EFFECTS = ("residual", "slider", "filter", "steer", "region")


def test_all_effects_work_together(places):
    """Each of them shows in a picture in which the others act, and with all of them at zero it is the plain model's, bit for bit."""
    import nodes

    lab.show_files()
    # Neither the training nor the search hangs on a strength: they are run once.
    kept = {name: made for name, made in run_graph(together()).items() if name in ("lab", "train", "direction")}
    lab_model, clip = kept["lab"][:2]

    def sample(model, positive, negative):
        with torch.inference_mode():
            start = {"samples": torch.zeros(1, 4, 16, 16), "downscale_ratio_spacial": 4}
            return nodes.common_ksampler(model, 3, 4, 4.0, "euler", "normal", positive, negative, start)[0]["samples"]

    def drawn(**strengths):
        return sample(*run_graph(together(**strengths), kept)["apply"][:3])

    with torch.inference_mode():
        common, nothing = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (together()["positive"][1]["text"], ""))
    assert torch.equal(drawn(**dict.fromkeys(EFFECTS, 0.0)), sample(lab_model, common, nothing))
    everything = drawn()
    changes = {name: float((drawn(**{name: 0.0}) - everything).abs().mean()) for name in EFFECTS}
    assert min(changes.values()) > 0.01, changes


def one_layer(model, name="diffusion_model.middle_block.1.proj_out", size=2.0):
    """A LoRA on one block's output: what comes before it in the first call is the plain model's."""
    return models.lora(model, only=name, size=size)


def put_local(model, lora, cut, rows=(3,), mask=None, length=7, strength=0.8):
    """The model with a residual that acts where its blocks attend to some rows of the context."""
    effect = adapters.AdapterEffect("random", adapters.place(model, lora, "random").parts, strength)
    finder = lag.localized(model.model, effect.parts, Bound("it", rows, ""), length, cut, mask)
    effect.place, effect.text = lag.place(finder), "none"
    model = model.clone()
    attach(model, effect)
    attach(model, finder)
    return model


@contextlib.contextmanager
def watched(model, *names):
    """What modules are given and give, call by call."""
    seen, handles = {name: [] for name in names}, []
    for name in names:
        module = model.model.get_submodule(name)
        note = lambda _, args, output, name=name: seen[name].append((args[0].clone(), output.clone()))  # noqa: E731
        handles.append(module.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class TestLocalized:
    BLOCK = "diffusion_model.middle_block.1"
    ATTENTION = f"{BLOCK}.transformer_blocks.0.attn2"

    @pytest.mark.parametrize("cut", lag.CUTS)
    @pytest.mark.parametrize("kind", ["sd15", "sdxl"])
    def test_is_the_published_formula(self, kind, cut):
        """In one call: W x and, where the block's own attention to the words is above the cut, s B A x. Prompt and negative alike."""
        model, names = models.build(kind), (f"{self.BLOCK}.proj_out", f"{self.ATTENTION}.to_q", f"{self.ATTENTION}.to_k")
        lora = one_layer(model)
        with watched(model, *names) as seen:
            models.sample(put_local(model, lora, cut), steps=1, batch=2)
        ((x, given),), ((_, q),), ((_, k),) = (seen[name] for name in names)
        assert len(x) == 4  # two pictures, prompt and negative
        heads = model.model.get_submodule(self.ATTENTION).heads
        q, k = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k))
        shares = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)[..., 3]
        positive = self.positive(model, seen[names[2]][0][0])
        shares = shares[positive]
        masks = shares > shares.median(-1, keepdim=True).values if cut == "median" else over_otsu(shares[:, None])[:, 0]
        if cut == "median":
            assert masks.sum(-1).tolist() == [masks.shape[1] // 2] * 2
        with torch.no_grad():
            plain = model.model.get_submodule(names[0])(x)
        down, up = (lora[f"{names[0]}.lora_{part}.weight"].flatten(1) for part in ("down", "up"))
        rows = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        added = 0.8 / 2 * rows @ down.t() @ up.t() * torch.cat([masks, masks])[..., None]
        added = added.transpose(1, 2).reshape(x.shape) if x.ndim == 4 else added
        assert not torch.equal(given, plain)
        torch.testing.assert_close(given, plain + added, rtol=1e-4, atol=1e-4)

    @staticmethod
    def positive(model, context):
        """Which rows of a call have the prompt that models.sample gives as positive."""
        wanted = models.conditioning(model, 10)[0][0]
        return [row for row, one in enumerate(context) if torch.allclose(one, wanted[0])]

    def test_where_all_is_on_it_is_the_residual_and_where_nothing_is_the_model(self, monkeypatch):
        model = models.build()
        lora = models.lora(model, only="proj_out")
        everywhere = models.sample(Residual.execute(model, "none", 0.8, 0.0, 1.0, lora=lora).result[0])
        for value, expected in ((1.0, everywhere), (0.0, models.sample(model))):
            monkeypatch.setattr(localize, "cut", lambda maps, sought, h, w, value=value: maps.new_full((1, len(maps), h, w), value))
            torch.testing.assert_close(models.sample(put_local(model, lora, "median")), expected, **CLOSE)

    def test_a_mask_takes_its_share(self):
        model = models.build()
        lora = one_layer(model)
        free, masked, none = (
            models.sample(put_local(model, lora, "median", mask=mask)) for mask in (None, torch.eye(8).cumsum(1), torch.zeros(8, 8))
        )
        assert torch.equal(none, models.sample(model))
        assert not torch.equal(masked, free) and not torch.equal(masked, none)

    @pytest.mark.parametrize(("kind", "only"), [("flux", ""), ("sd15", ""), ("sdxl", "proj_out")])
    def test_on_any_layers_of_any_family(self, kind, only):
        """Layers that are behind no attention to the words follow the steps before: where nothing is known yet, the model's own."""
        model = models.build(kind)
        lora = models.lora(model, only=only)
        plain, everywhere, here = (
            models.sample(one)
            for one in (
                model,
                Residual.execute(model, "none", 0.8, 0.0, 1.0, lora=lora).result[0],
                put_local(model, lora, "median"),
            )
        )
        assert not torch.equal(here, plain) and not torch.equal(here, everywhere)

    def test_the_node_finds_the_words(self, places):
        given = loaded("unet")
        lora = adapters.Told(models.lora(given.model, only="proj_out"), {"identifier": "ohwx", "class_word": "cat"})

        def put(prompt, strength=1.0, **changes):
            asked = {"lora": lora, "localize": "median", "clip": given.clip, "prompt": prompt} | changes
            return Residual.execute(given.model, "none", strength, 0.0, 1.0, **asked).result

        report = put("a large ohwx on grey")[1]
        assert "where its own block attends to 'ohwx': token" in report
        assert "'ohwx cat': tokens" in put("a large ohwx cat on grey")[1]
        assert "'large': token" in put("a large thing", words="large")[1]
        assert put("a large ohwx", strength=0.0)[0] is given.model
        for changes, told in (
            ({"clip": None}, "Connect clip and prompt"),
            ({"prompt": " "}, "Connect clip and prompt"),
            ({"prompt": "a large cat"}, "'ohwx' is not in the prompt"),
            ({"lora": dict(lora)}, "names no words"),
        ):
            with pytest.raises(ValueError, match=told):
                put(**{"prompt": "a large ohwx"} | changes)
