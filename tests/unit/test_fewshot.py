"""Episodes: what they are made of, and when an answer is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cloud_server.backends import Backend, Piece, Question
from cloud_server.vision.clip import VisionNeeds
from evaluation.fewshot import Episode, draw_episodes, is_right, summarise
from shared.conversation import Generation
from shared.errors import BadInput
from training.photos import Entry


def entry(source: str, label: str, number: int) -> Entry:
    return Entry(Path(f"{source}-{label}-{number}.png"), source=source, label=label)


ENTRIES = [
    *(entry("a", f"a{kind}", number) for kind in range(9) for number in range(3)),
    *(entry("b", f"b{kind}", number) for kind in range(6) for number in range(2)),
    *(entry("c", f"c{kind}", number) for kind in range(4) for number in range(3)),  # too few classes
    *(entry("d", f"d{kind}", 0) for kind in range(9)),  # too few photos
]


def test_an_episode_shows_a_photo_of_each_class_and_asks_about_another_of_one() -> None:
    episodes = draw_episodes(ENTRIES, 300, 5, seed=0)
    assert len(episodes) == 300
    for episode in episodes:
        assert len({example.label for example in episode.examples}) == 5
        assert episode.query.label in {example.label for example in episode.examples}
        assert episode.query not in episode.examples
        assert len({each.source for each in (*episode.examples, episode.query)}) == 1
    assert {episode.query.source for episode in episodes} == {"a", "b"}
    asked = [[example.label for example in each.examples].index(each.query.label) for each in episodes]
    assert min(np.bincount(asked, minlength=5)) > 300 / 5 / 2  # every place alike, but for chance


def test_a_seed_draws_the_same_episodes_again() -> None:
    assert draw_episodes(ENTRIES, 9, 5, seed=1) == draw_episodes(ENTRIES, 9, 5, seed=1)
    assert draw_episodes(ENTRIES, 9, 5, seed=1) != draw_episodes(ENTRIES, 9, 5, seed=2)


def test_where_classes_are_too_few_it_is_said() -> None:
    with pytest.raises(BadInput, match="no source has 10 classes of two photos or more"):
        draw_episodes(ENTRIES, 9, 10, seed=0)


class Reader(Backend):
    """Always says the same, and remembers what it was asked."""

    needs = VisionNeeds()
    tasks = ("label",)

    def __init__(self, says: str) -> None:
        self.says, self.asked = says, []

    @classmethod
    def load(cls, *_: object) -> Backend:
        raise AssertionError

    def write(self, questions: Sequence[Question], generation: Generation) -> Iterator[Piece]:
        self.asked += questions
        yield Piece((self.says,), ("stop",))


EPISODE = Episode((entry("a", "ox", 0), entry("a", "cat", 0)), entry("a", "cat", 1))
PHOTOS = {one.path: torch.full((1, 2), float(n)) for n, one in enumerate((*EPISODE.examples, EPISODE.query))}


@pytest.mark.parametrize(("says", "right"), [("cat", True), ("cats", True), ("ox", False), ("ca", False), ("", False)])
def test_an_answer_is_right_that_begins_with_the_label(says: str, right: bool) -> None:
    assert is_right(Reader(says), EPISODE, PHOTOS) is right


def test_the_question_is_the_examples_and_the_photo_and_in_leaky_mode_the_photo_among_them() -> None:
    reader = Reader("cat")
    is_right(reader, EPISODE, PHOTOS)
    is_right(reader, EPISODE, PHOTOS, leaky=True)
    asked = [[part if isinstance(part, str) else part[0, 0].item() for part in each.parts] for each in reader.asked]
    assert asked == [[0, "ox", 1, "cat", 2], [0, "ox", 1, "cat", 2, "cat", 2]]


def test_figures_are_accuracies_in_per_cent() -> None:
    figures = summarise(np.array([True, True, True, False]), np.array([True, True, False, False]), 5)
    assert (figures["pixels"]["mean"], figures["bitstream"]["mean"], figures["baseline"]["mean"]) == (75, 50, 20)
    assert figures["kept"]["ratio"] == pytest.approx(2 / 3)
    low, high = figures["pixels"]["95%"]
    assert 0 <= low < 75 < high <= 100
