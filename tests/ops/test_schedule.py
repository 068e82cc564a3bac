"""Schedules as text: what they mean, and what is said of text that means nothing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concept_nodes.ops.schedule import Schedule, ScheduleError


def test_straight_lines_between_points():
    schedule = Schedule.parse("0:0, .3:1, 1:.5")
    assert [schedule.at(share) for share in (0, 0.15, 0.3, 0.65, 1)] == pytest.approx([0, 0.5, 1, 0.75, 0.5])


def test_as_text_it_can_be_read_again():
    schedule = Schedule.parse("0:0, .3:1, 1:.5")
    assert str(schedule) == "0:0, 0.3:1, 1:0.5"
    assert Schedule.parse(str(schedule)) == schedule


def test_constant_outside_of_the_points():
    schedule = Schedule.parse("0.2:2, 0.4:-1")
    assert (schedule.at(0), schedule.at(0.2), schedule.at(0.4), schedule.at(1)) == (2, 2, -1, -1)


def test_two_points_at_one_share_are_a_step():
    schedule = Schedule.parse("0:1; .5:1\n.5:0")
    assert (schedule.at(0.499), schedule.at(0.5), schedule.at(1)) == (1, 0, 0)


@pytest.mark.parametrize("text", ["", " ", " , \n"])
def test_no_text_is_no_schedule(text):
    assert Schedule.parse(text) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1", "Point 1 of the schedule is '1', which has no colon"),
        ("0:0, a:1", "Point 2 of the schedule is 'a:1', which is no pair of numbers"),
        ("0:", "which is no pair of numbers"),
        ("0:nan", "is '0:nan', which is not finite"),
        ("0:1, 1.5:1", "Point 2 of the schedule lies at 1.5"),
        ("0.5:1, 0.2:0", "at 0.2, lies before the one at 0.5"),
    ],
)
def test_what_cannot_be_read_is_told(text, told):
    with pytest.raises(ScheduleError, match="Write share:factor") as caught:
        Schedule.parse(text)
    assert told in str(caught.value)


shares = st.floats(0, 1)


@given(st.lists(st.tuples(shares, st.floats(-10, 10)), min_size=1, max_size=6), shares)
def test_factors_stay_between_those_of_the_points(points, share):
    points = sorted(points, key=lambda point: point[0])
    factors = [factor for _, factor in points]
    value = Schedule(tuple(points)).at(share)
    assert math.isfinite(value)
    assert min(factors) - 1e-9 <= value <= max(factors) + 1e-9
