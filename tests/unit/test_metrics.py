"""How answers are judged."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.metrics import cider, interval, kept_interval, names, words

REFERENCES = [
    ["A black dog runs on grass .", "The dog is running ."],
    ["Two men play chess .", "Men at a chess board ."],
    ["A red car is parked .", "A parked red car ."],
]


def test_the_right_caption_scores_and_anothers_does_not() -> None:
    right = cider([texts[0] for texts in REFERENCES], REFERENCES)
    wrong = cider([REFERENCES[(i + 1) % 3][0] for i in range(3)], REFERENCES)
    assert right.min() > 300
    assert wrong.max() < 30


def test_case_and_punctuation_do_not_count() -> None:
    assert words("A man's dog, running!") == ["a", "man's", "dog", "running"]
    tidy = cider(["a black dog runs on grass"] * 3, REFERENCES)
    written = cider(["A black dog runs on grass."] * 3, REFERENCES)
    np.testing.assert_array_equal(tidy, written)


@pytest.mark.parametrize(
    ("answer", "label", "named"),
    [
        ("a giant panda.", "giant panda", True),
        ("Two pandas eat.", "giant panda", True),
        ("a pandanus.", "giant panda", False),
        ("A sandpiper on a beach.", "red-backed_sandpiper", True),
        ("a dog.", "golden retriever", False),
        ("a glass of water", "glasses", False),
    ],
)
def test_an_answer_names_a_label_by_its_noun(answer: str, label: str, named: bool) -> None:
    assert names(answer, label) is named


def test_intervals_hold_the_mean_and_pair_the_photos() -> None:
    scores = np.random.default_rng(1).normal(50, 10, 400)
    low, high = interval(scores)
    assert low < scores.mean() < high < low + 4
    assert kept_interval(scores * 0.8, scores) == pytest.approx((0.8, 0.8))
