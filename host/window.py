"""When an effect acts: a window of noise levels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


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
