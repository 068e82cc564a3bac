"""When an effect acts, and how strongly: windows of noise levels, and schedules over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol

import torch

from ..ops.schedule import Schedule


class Window(NamedTuple):
    """The noise levels at which an effect acts: end < sigma <= start."""

    start: float = math.inf
    end: float = -math.inf

    @classmethod
    def of(cls, model_sampling, start_percent: float, end_percent: float) -> Window:
        """A window given in shares of sampling, 0 to 1, by the host's own percent_to_sigma.

        A step exactly at the start acts and one exactly at the end does not, so that windows that meet share no step (the host's
        conditions take both ends). 0 and 1 reach beyond every sigma. Bounds are rounded to float32, like the sigmas they are compared
        with.
        """
        start = math.inf if start_percent <= 0 else float(model_sampling.percent_to_sigma(start_percent))
        end = -math.inf if end_percent >= 1 else float(model_sampling.percent_to_sigma(end_percent))
        return cls(*torch.tensor([start, end], dtype=torch.float32).tolist())

    def holds(self, sigma: float) -> bool:
        return self.end < sigma <= self.start


EVERYWHERE = Window()
HALVINGS = 24  # to find a share to less than 1e-7


class Level(Protocol):
    """What has a noise level: a call. Reading it waits for the GPU."""

    sigma: float


def course(model_sampling, start_percent: float, end_percent: float, schedule: Schedule | None = None) -> Callable[[Level], float]:
    """The factor of a strength call by call: that of the schedule (1 without one) within the window, 0 outside of it. Noise levels are read
    only where something depends on them.
    """
    window = Window.of(model_sampling, start_percent, end_percent)
    if schedule is None:
        return lambda call: 1.0 if window == EVERYWHERE or window.holds(call.sigma) else 0.0
    factor = cache(_over_levels(model_sampling, schedule))
    return lambda call: factor(call.sigma) if window == EVERYWHERE or window.holds(call.sigma) else 0.0


def remaining(model_sampling) -> Callable[[Level], float]:
    """What is left of sampling at a call, 1 at its beginning and 0 at its end."""
    left = cache(lambda sigma: 1.0 - _share(model_sampling, sigma, 0.0, 1.0))
    return lambda call: left(call.sigma)


def _over_levels(model_sampling, schedule: Schedule) -> Callable[[float], float]:
    """The schedule's factor at a sigma. A step exactly at a point counts as after it, as a step exactly at a window's start is in it."""
    points = schedule.points
    levels = [Window.of(model_sampling, share, 1.0).start for share, _ in points]

    def factor(sigma: float) -> float:
        after = sum(sigma <= level for level in levels)
        if after in (0, len(points)):
            return points[max(after, 1) - 1][1]
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        return y0 + (y1 - y0) * (_share(model_sampling, sigma, x0, x1) - x0) / (x1 - x0)

    return factor


def _share(model_sampling, sigma: float, low: float, high: float) -> float:
    """Where in sampling, between two shares, the noise has a level: the inverse of the host's percent_to_sigma."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if float(model_sampling.percent_to_sigma(middle)) >= sigma:
            low = middle
        else:
            high = middle
    return (low + high) / 2
