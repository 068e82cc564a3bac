"""What acts in places, on models that are not plain float32 in place: lower precisions, quantised layers, offloaded, compiled, cloned,
interrupted before.

Two things hold in all of them: what is set to do nothing is the plain model bit for bit, and a picture is the same in a batch, in calls of
its own, and after one of another size.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import cases
import models
import pytest
import sampling
import state
import torch

# How far apart two ways to compute one picture may lie (root mean square over the picture's): units of rounding of what is computed in.
# Batches and splits only change which matrix kernel adds what in which order; over a few steps, plain models move by up to eight units.
ROUNDINGS = 24
UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


class State(NamedTuple):
    """build: a model of a kind; dtype: what it computes in; ready: what happens with the acting model before it is looked at."""

    build: Callable
    dtype: torch.dtype = torch.float32
    ready: Callable = lambda acting, model: acting
    kinds: tuple[str, ...] = ("sd15", "flux")
    steps: int = 4


def interrupted(acting, model):
    sampling.interrupted(acting, model)
    return acting


STATES = {
    "float32": State(models.build),
    "float16": State(partial(models.build, dtype="float16"), torch.float16),
    "bfloat16": State(partial(models.build, dtype="bfloat16"), torch.bfloat16),
    "fp8 computed in bfloat16": State(partial(models.build, dtype="float8_e4m3fn", compute="bfloat16"), torch.bfloat16),
    "scaled fp8": State(lambda kind: models.build_quantised(), kinds=("sd15",)),
    "packed": State(models.build_packed),
    "half offloaded": State(sampling.half_offloaded),
    "compiled": State(sampling.compiled, kinds=("flux",), steps=2),
    "clone of a clone": State(models.build, ready=lambda acting, model: acting.clone().clone()),
    "deep copy": State(models.build, ready=lambda acting, model: acting.clone(force_deepcopy=True)),
    "interrupted before": State(models.build, ready=interrupted),
}
ALL = [pytest.param(state, kind, id=f"{name}-{kind}") for name, state in STATES.items() for kind in state.kinds]


PUT = {"masked": cases.put_masked, "regions": cases.put_regions}
NEUTRAL = {"masked": cases.EFFECTS["ConceptNodes_MaskedLoRA"].neutral, "regions": cases.EFFECTS["ConceptNodes_RegionsApply"].neutral}


@pytest.mark.parametrize("node", PUT)
@pytest.mark.parametrize("how, kind", ALL)
class TestNothing:
    def test_what_does_nothing_is_the_plain_model(self, how, kind, node):
        model = how.build(kind)
        expected = models.sample(model, steps=how.steps)
        for setting, apply in NEUTRAL[node].items():
            ready = how.ready(apply(model), model)
            assert torch.equal(models.sample(ready, steps=how.steps), expected), setting

    def test_outside_of_its_window_too(self, how, kind, node):
        """Half of the steps before it begins."""
        model = how.build(kind)
        late = how.ready(PUT[node](model, 0.8, 0.5), model)
        run = partial(models.sample, steps=4, scheduler="simple")
        assert torch.equal(run(late, last_step=2), run(model, last_step=2))
        assert not torch.equal(run(late), run(model))

    def test_and_after_a_run_the_model_is_what_it_was(self, how, kind, node):
        model = how.build(kind)
        expected = models.sample(model, steps=how.steps)
        before = state.of_model(model.model)
        acting = how.ready(PUT[node](model), model)
        assert not torch.equal(models.sample(acting, steps=how.steps), expected)
        assert state.differences(before, state.of_model(model.model)) == []
        assert torch.equal(models.sample(model, steps=how.steps), expected)


def far(one, other) -> float:
    return float((one - other).pow(2).mean().sqrt() / other.pow(2).mean().sqrt())


@pytest.mark.parametrize("how, kind", ALL)
def test_the_same_picture_in_a_batch_and_in_other_calls(how, kind):
    model, close = how.build(kind), ROUNDINGS * UNIT[how.dtype]
    acting = how.ready(cases.put_regions(model, size=1.5), model)
    run = partial(models.sample, steps=how.steps)
    expected = run(acting)
    assert far(expected, run(model)) > 2 * close, "the effect is too small to tell anything"
    assert far(run(acting, batch=2)[:1], expected) < close
    for change in (sampling.turned_around, sampling.one_by_one, partial(sampling.one_by_one, order=-1)):
        assert far(run(change(acting)), expected) < close


@pytest.mark.parametrize("how, kind", ALL)
def test_the_same_picture_after_one_of_another_size(how, kind):
    model = how.build(kind)
    acting = how.ready(cases.put_regions(model), model)
    run = partial(models.sample, acting, steps=how.steps)
    first = run()
    assert torch.equal(run(), first)
    assert run(size=12).isfinite().all()
    assert torch.equal(run(), first)
