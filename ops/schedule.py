"""Strengths that change in the course of sampling, written as text."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple


class ScheduleError(ValueError):
    """A schedule that cannot be read, and how to write it."""


class Schedule(NamedTuple):
    """Factors at shares of sampling (0 the first step, 1 the last), straight lines between them; before the first and after the last the
    factor stays as it is there. Two points at one share make a step, whose second factor holds from there on.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def parse(cls, text: str) -> Schedule | None:
        """A schedule from `0:0, .3:1, 1:.5` (share:factor, ...), or None where the text is empty. Raises ScheduleError."""
        parts = [part.strip() for part in text.replace("\n", ",").replace(";", ",").split(",") if part.strip()]
        points: list[tuple[float, float]] = []
        for number, part in enumerate(parts, 1):
            share, colon, factor = part.partition(":")
            try:
                point = float(share), float(factor)
            except ValueError:
                told = "which is no pair of numbers" if colon else "which has no colon"
                raise ScheduleError(f"Point {number} of the schedule is '{part}', {told}. {HOW}") from None
            if not all(map(math.isfinite, point)):
                raise ScheduleError(f"Point {number} of the schedule is '{part}', which is not finite. {HOW}")
            if not 0.0 <= point[0] <= 1.0:
                raise ScheduleError(f"Point {number} of the schedule lies at {point[0]:g}; shares of sampling go from 0 to 1. {HOW}")
            if points and point[0] < points[-1][0]:
                raise ScheduleError(f"Point {number} of the schedule, at {point[0]:g}, lies before the one at {points[-1][0]:g}. {HOW}")
            points.append(point)
        return cls(tuple(points)) if points else None

    def silent(self) -> bool:
        """Whether it is 0 throughout."""
        return not any(factor for _, factor in self.points)

    def at(self, share: float) -> float:
        """The factor at a share of sampling."""
        after = bisect_right(self.points, share, key=lambda point: point[0])
        if after == 0:
            return self.points[0][1]
        (x0, y0), (x1, y1) = self.points[after - 1], self.points[min(after, len(self.points) - 1)]
        return y0 if x1 <= x0 else y0 + (y1 - y0) * (share - x0) / (x1 - x0)

    def __str__(self) -> str:
        return ", ".join(f"{share:g}:{factor:g}" for share, factor in self.points)


HOW = "Write share:factor, in the order of sampling, as in 0:0, .3:1, 1:.5."
