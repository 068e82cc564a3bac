"""A training on vectors as they come: what is left out of it, cancelled, resumed, gone wrong, and what it takes."""

import math

import comfy.model_management
import pytest
import torch

from concept_nodes.host.sae_training import _Flow, memory, train
from concept_nodes.host.training import TrainingError, _Counted
from concept_nodes.ops.sae_training import KINDS, Settings, Trainer

D, N = 16, 48
SETTINGS = Settings(N, 3, steps=60, batch=64, seed=1)


def vectors(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(32, D, generator=torch.Generator().manual_seed(99)), dim=1)
    chosen = torch.rand(count, 32, generator=generator).topk(3).indices
    return torch.zeros(count, 32).scatter(1, chosen, 0.5 + torch.rand(count, 3, generator=generator)) @ atoms


def source(batches=10_000, size=100, seen=None):
    for number in range(batches):
        if seen is not None:
            seen.append(number)
        yield vectors(size, number)


def test_learns_from_a_source_and_says_how_well():
    outcome = train(source(), SETTINGS._replace(steps=400), ring=2000, device="cpu")
    first, last = outcome.steps[0], outcome.steps[-1]
    assert len(outcome.steps) == 400 and last.fvu < 0.5 * first.fvu
    assert outcome.measured.metrics.fvu == pytest.approx(sum(step.fvu for step in outcome.steps[-20:]) / 20, rel=0.25)
    assert outcome.measured.stats["freq"].shape == (N,) and outcome.told == []


def test_vectors_held_out_are_not_trained_on():
    flow = _Flow(source(), 2000, 0)
    held = flow.held_out()
    drawn = torch.cat([flow.batch(64) for _ in range(60)])
    assert len(held) == 125 and len(drawn) == 3840
    assert not bool((held[:, None] == drawn[None]).all(-1).any())


def test_the_source_is_asked_for_no_more_than_is_needed():
    seen = []
    train(source(seen=seen), SETTINGS, ring=2000, device="cpu")
    assert len(seen) * 100 <= 60 * 64 + 2 * 2000


def test_a_source_that_ends_comes_again():
    outcome = train(source(5), SETTINGS, ring=2000, device="cpu")
    assert len(outcome.steps) == 60 and "ended after 468 vectors" in outcome.told[0]


def test_in_inference_mode_as_nodes_are():
    with torch.inference_mode():
        inside = train(source(), SETTINGS, ring=500, device="cpu")
    assert torch.equal(inside.sae.W_dec, train(source(), SETTINGS, ring=500, device="cpu").sae.W_dec)


@pytest.mark.parametrize("batches, size, told", [(0, 1, "0 vectors"), (1, 20, "20 vectors")])
def test_too_few_are_told(batches, size, told):
    with pytest.raises(TrainingError, match=told):
        train(source(batches, size), SETTINGS, ring=500, device="cpu")


class TestStopped:
    def cancel_at(self, stop):
        def each(step, seen):
            if step == stop:
                raise comfy.model_management.InterruptProcessingException()

        return each

    def test_a_cancel_leaves_what_to_go_on_from(self, tmp_path):
        file = tmp_path / "folder" / "mine.safetensors"
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(source(), SETTINGS, ring=500, device="cpu", file=file, identity="a", each=self.cancel_at(29))
        done = []
        outcome = train(source(), SETTINGS, ring=500, device="cpu", file=file, identity="a", each=lambda step, seen: done.append(step))
        assert done == list(range(30, 60)) and len(outcome.steps) == 60 and outcome.told == ["Resumed at step 30."]
        assert not file.exists() and list(file.parent.iterdir()) == []

    @pytest.mark.parametrize("change", ["identity", "settings", "cut short"])
    def test_what_is_of_another_training_is_not_resumed(self, tmp_path, change):
        file = tmp_path / "mine.safetensors"
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(source(), SETTINGS, ring=500, device="cpu", file=file, identity="a", each=self.cancel_at(29))
        if change == "cut short":
            file.write_bytes(file.read_bytes()[:500])
        settings = SETTINGS._replace(n=N + 1) if change == "settings" else SETTINGS
        outcome = train(source(), settings, ring=500, device="cpu", file=file, identity="b" if change == "identity" else "a")
        assert outcome.told == [] and len(outcome.steps) == 60

    def test_the_hosts_own_cancel_is_heard(self, tmp_path):
        def each(step, seen):
            comfy.model_management.interrupt_current_processing()

        done = []
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(source(seen=done), SETTINGS, ring=500, device="cpu", each=each)
        assert len(done) < 20

    def test_numbers_that_run_away_end_in_the_last_good_state(self, monkeypatch):
        kept, plain = {}, Trainer.step

        def step(trainer, batch):
            if trainer.done == 25 and "state" not in kept:
                kept["state"] = trainer.state()
            return plain(trainer, batch * math.inf if trainer.done == 40 else batch)

        monkeypatch.setattr(Trainer, "step", step)
        outcome = train(source(), SETTINGS, ring=500, device="cpu")
        assert "Stopped at step 41 of 60" in outcome.told[0] and "after step 25" in outcome.told[0]
        assert torch.equal(outcome.sae.W_enc, kept["state"]["learnt.W_enc"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, d, batch", [(512, 64, 256), (2048, 128, 256), (256, 256, 1024), (1024, 1024, 512)])
def test_memory_is_what_a_step_takes(kind, n, d, batch):
    """Within a fifth of the bytes counted in a step with dead latents."""
    settings = Settings(n, 8, kind, steps=1000, batch=batch, dead_after=1, revive=False)
    x = torch.randn(2 * batch, d, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(settings, x)
    trainer.step(x[:batch])
    own = sum(tensor.numel() for tensor in trainer.learnt.values())
    held = [*trainer.learnt.values(), *(tensor for state in trainer.optimizer.state.values() for tensor in state.values())]
    held += [tensor.grad for tensor in trainer.learnt.values()]
    for tensor in trainer.learnt.values():
        tensor.grad = None
    with _Counted(held) as counted:
        trainer.step(x[batch:])
    told = memory(settings, d, 1000)
    assert told.weights == 16 * own and told.ring == 4000 * d
    assert counted.peak + 12 * own == pytest.approx(told.weights + told.step, rel=0.2)
