"""What backends are examined in: items from what is known of a photo, scores, and what guessing gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.exams import EXAMS, Boxes, Captions, Choices, Exam, Item, Labels
from shared.conversation import Box
from shared.errors import BadInput
from training.photos import Entry, Question, Thing


def coco(name: str, *things: str) -> Entry:
    boxes = tuple(Thing((thing,), (0.1, 0.2, 0.6, 0.9), things.count(thing) == 1) for thing in things)
    return Entry(Path(name), source="coco", split="test", things=boxes, size=(320, 240))


PHOTOS = [
    coco("a", "dog", "dog", "person"),
    coco("b", "car", "truck", "bus", "bird"),
    coco("c", "cup", "fork", "knife", "dog"),
    *(
        Entry(Path(name), source="nips17", label=name)
        for name in ("tench", "drake", "ant", "wall_clock", "digital clock")
    ),
    Entry(Path("room"), source="daquar", questions=(Question("what ?", ("lamp",), ("bed", "lamp", "sink", "tv")),)),
    Entry(Path("d"), source="flickr8k", captions=("A dog runs .", "The dog plays .")),
    Entry(Path("k"), source="flickr8k", captions=("Two men sit on a bench .",)),
]
TAUGHT = [
    Entry(Path("e"), captions=("A man stands .", "a man stands", "A cat .")),
    Entry(Path("f"), label="red fox"),
    Entry(Path("g"), source="coco", things=(Thing(("dog",), (0.8, 0.8, 0.9, 0.9), True),), size=(320, 240)),
]


def right(items: list[Item]) -> list[tuple[str, int | None, Box | None]]:
    """What somebody says who knows."""
    said = []
    for item in items:
        choice = item.truth if isinstance(item.truth, int) else None
        box = item.truth if isinstance(item.truth, Box) else None
        text = item.truth[0] if isinstance(item.truth, tuple) else str(item.truth)
        said.append((text, choice, box))
    return said


@pytest.mark.parametrize("kind", EXAMS.values())
def test_who_knows_beats_who_guesses(kind: type[Exam]) -> None:
    exam = kind()
    items = exam.draw(PHOTOS, seed=0)
    scores, guessed = exam.scores(items, right(items)), exam.baseline(items, TAUGHT)
    assert len(scores) == len(guessed) == len(items)
    assert scores.mean() > guessed.mean()


@pytest.mark.parametrize("kind", EXAMS.values())
def test_the_same_seed_asks_the_same(kind: type[Exam]) -> None:
    exam = kind()
    items = exam.draw(PHOTOS, seed=0)
    assert exam.draw(PHOTOS, seed=0) == items
    assert exam.draw([items[0].entry, *PHOTOS], seed=0)[0].prompt == items[0].prompt


@pytest.mark.parametrize("kind", EXAMS.values())
def test_photos_of_which_nothing_is_known_are_no_exam(kind: type[Exam]) -> None:
    with pytest.raises(BadInput, match="what this exam asks about"):
        kind().draw([Entry(Path("x"))], seed=0)


def test_choices_hold_one_that_is_right_and_others_that_are_not() -> None:
    for seed in range(20):
        for item in Choices().draw(PHOTOS, seed):
            assert len(set(item.choices)) == len(item.choices) == (2 if item.group == "coco, is there" else 4)
            chosen = item.choices[item.truth]
            present = [name for thing in item.entry.things for name in thing.names]
            if item.group == "coco, which is there":
                assert [choice for choice in item.choices if choice in present] == [chosen]
            elif item.group == "coco, how many":
                asked = next(name for name in present if name[:3] in item.prompt or name == "person")
                assert chosen == str(present.count(asked))
            elif item.group == "coco, is there":
                assert (chosen == "yes") == any(f" {name} in" in item.prompt for name in present)
            elif item.entry.label:
                assert chosen == item.entry.label.replace("_", " ")
                if chosen.endswith("clock"):  # another clock would be right as well
                    assert sum(choice.endswith("clock") for choice in item.choices) == 1
            else:
                assert (item.group, chosen) == ("daquar, asked by people", "lamp")


def test_things_that_are_alone_are_sought_in_pixels_of_the_photo() -> None:
    items = Boxes().draw(PHOTOS, seed=0)
    assert [item.prompt for item in items if item.entry.path.name == "a"] == ["the person"]
    assert items[0].truth == Box(32, 48, 192, 216)
    said = [("Answer", None, None)] * len(items)
    assert Boxes().scores(items, said).tolist() == [0] * len(items)


def test_guesses_are_what_was_most_frequent_in_training() -> None:
    captions = Captions().draw([PHOTOS[-1], Entry(Path("h"), captions=("a man stands",))], seed=0)
    said = [("A man stands.", None, None)] * 2
    assert Captions().baseline(captions, TAUGHT).tolist() == Captions().scores(captions, said).tolist()
    assert Captions().baseline(captions, TAUGHT)[1] > 100
    labels = Labels().draw([Entry(Path("i"), label="arctic fox"), Entry(Path("j"), label="tench")], seed=0)
    assert Labels().baseline(labels, TAUGHT).tolist() == [100, 0]
