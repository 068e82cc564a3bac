"""Readings of a faultless eye, to be spoilt by tests."""

from concept_nodes.lab.eye import Reading, Seen
from concept_nodes.lab.scenes import COLOURS, FILLS, KINDS, STYLES


def true_reading(scenes, i: int) -> Reading:
    """What a faultless eye reads in scene i."""
    objects = [
        Seen(
            KINDS[scenes.kind[i, k]],
            COLOURS[scenes.colour[i, k]],
            FILLS[scenes.fill[i, k]],
            *(float(value[i, k]) for value in (scenes.diameter, scenes.x, scenes.y)),
            sure=1.0,
        )
        for k in range(int(scenes.count[i]))
    ]
    return Reading(float(scenes.background[i]), STYLES[scenes.style[i]], 1.0, objects)
