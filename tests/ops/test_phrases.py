"""Things that a prompt names, where its wording is plain."""

import pytest

from concept_nodes.ops.phrases import things


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "a large red heart on the left and a large blue square on the right on a white background",
            ["large red heart", "large blue square"],
        ),
        ("a picture of a small red circle, a blue star above the green cross", ["small red circle", "blue star", "green cross"]),
        ("A cat with a hat and a dog", ["cat", "hat", "dog"]),
        ("two girls, one in a red dress, the other in a blue coat", ["girls", "red dress", "blue coat"]),
        ("a medium orange heart top left of a cyan star, in neon style", ["medium orange heart", "cyan star"]),
        ("an icon of a red star over a white backdrop neon", ["red star"]),
        ("a circle that is red at the top and a star which is blue", ["circle that is red", "star which is blue"]),
        ("red cat, dog", []),
        ("", []),
        ("a", []),
    ],
)
def test_phrases_end_where_their_nouns_do(text, found):
    assert things(text) == found


def test_a_phrase_that_stands_twice_bears_the_number_of_its_place():
    assert things("a red circle and a red circle") == ["red circle #1", "red circle #2"]
    assert things("a red circle and a big red circle") == ["red circle #1", "big red circle"]


def test_words_that_only_hold_it_are_no_places_of_it():
    assert things("a cat and a catfish") == ["cat", "catfish"]
