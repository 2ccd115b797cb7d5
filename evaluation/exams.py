"""What backends are examined in: items to be answered, how answers are scored, and what knows nothing and guesses.

captions   "describe this", CIDEr; against the most frequent training caption
labels     "what is this?", whether the answer names the label's noun; against the most frequent label
choices    questions with choices, of people and made of labels and boxes; against a random choice
boxes      where a phrase is, IoU over 0.5; against the box that is right most often in the training photos
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np

from evaluation.metrics import Scores, box_overlaps, cider, located, names, words
from shared.conversation import Box, Task
from shared.errors import BadInput
from training.photos import Entry, in_pixels
from training.samples import plural, tidy, with_article

T = TypeVar("T")
Said = tuple[str, int | None, Box | None]
"""An answer's text, choice and box."""


@dataclass(frozen=True)
class Item:
    """One thing to be answered about one photo.

    Attributes:
        group: under which it is reported.
        truth: what the exam scores by.
    """

    entry: Entry
    group: str
    prompt: str
    truth: Any
    choices: tuple[str, ...] = ()


class Exam(ABC):
    """One kind of items.

    Attributes:
        backend: that is examined where no other is named.
        task: that is asked for.
        metric: in which scores are; 100 is perfect, but for CIDEr.
        guess: what the baseline is, in words.
        max_tokens: of an answer.
    """

    backend: ClassVar[str]
    task: ClassVar[Task]
    metric: ClassVar[str]
    guess: ClassVar[str]
    max_tokens: ClassVar[int] = 32

    @abstractmethod
    def items(self, entry: Entry, others: Sequence[Entry], draw: random.Random) -> Iterator[Item]:
        """What is asked about a photo; ``others`` are all photos of the exam."""

    @abstractmethod
    def scores(self, items: Sequence[Item], said: Sequence[Said]) -> Scores:
        """Of each answer."""

    @abstractmethod
    def baseline(self, items: Sequence[Item], taught: Sequence[Entry]) -> Scores:
        """What guessing gets; ``taught`` are the training photos."""

    def draw(self, entries: Sequence[Entry], seed: int) -> list[Item]:
        """All items, the same for the same photos and seed.

        Raises:
            BadInput: none of the photos has what it takes.
        """
        items = [
            item
            for entry in entries
            for item in self.items(entry, entries, random.Random(f"{seed} {entry.source} {entry.path.name}"))
        ]
        if not items:
            raise BadInput("none of these photos has what this exam asks about")
        return items


class Captions(Exam):
    """CIDEr of one sentence."""

    backend, task, metric, guess = "llama-adapter", "text", "CIDEr", "the most frequent caption"

    def items(self, entry: Entry, others: Sequence[Entry], draw: random.Random) -> Iterator[Item]:
        if entry.captions:
            yield Item(entry, entry.source, "describe this", entry.captions)

    def scores(self, items: Sequence[Item], said: Sequence[Said]) -> Scores:
        return cider([text for text, _, _ in said], [item.truth for item in items])

    def baseline(self, items: Sequence[Item], taught: Sequence[Entry]) -> Scores:
        captions = Counter(" ".join(words(caption)) for entry in taught for caption in entry.captions)
        return cider([captions.most_common(1)[0][0]] * len(items), [item.truth for item in items])


class Labels(Exam):
    """Whether a free answer names the label."""

    backend, task, metric, guess = "llama-adapter", "text", "named %", "the most frequent label"

    def items(self, entry: Entry, others: Sequence[Entry], draw: random.Random) -> Iterator[Item]:
        if entry.label and not entry.captions:
            yield Item(entry, entry.source, "what is this?", entry.label)

    def scores(self, items: Sequence[Item], said: Sequence[Said]) -> Scores:
        return np.array([100.0 * names(text, item.truth) for item, (text, _, _) in zip(items, said, strict=True)])

    def baseline(self, items: Sequence[Item], taught: Sequence[Entry]) -> Scores:
        nouns = Counter(words(entry.label.replace("_", " "))[-1] for entry in taught if entry.label)
        return self.scores(items, [(nouns.most_common(1)[0][0], None, None)] * len(items))


class Choices(Exam):
    """Questions with choices: those of the photos' annotators, and what, which and how many, from labels and boxes."""

    backend, task, metric, guess = "honeybee", "choice", "right %", "a random choice"

    def items(self, entry: Entry, others: Sequence[Entry], draw: random.Random) -> Iterator[Item]:
        for question in entry.questions:
            if question.choices:
                yield self._item(
                    entry,
                    f"{entry.source}, asked by people",
                    tidy(question.text),
                    question.answers[0],
                    [choice for choice in question.choices if choice != question.answers[0]],
                    draw,
                )
        if entry.label:
            labels = sorted({other.label for other in others if other.label and other.source == entry.source})
            wrong = [label.replace("_", " ") for label in labels if not names(label, entry.label)]
            yield self._item(
                entry,
                f"{entry.source}, what it is",
                "what is this?",
                entry.label.replace("_", " "),
                _some(wrong, draw),
                draw,
            )
        if entry.things:
            seen = {word for thing in entry.things for name in thing.names for word in words(name)}
            seen |= {word for caption in entry.captions for word in words(caption)}
            absent = _things(others, entry.source, lambda name: words(name)[-1] not in seen)
            right = draw.choice(draw.choice(entry.things).names)
            yield self._item(
                entry,
                f"{entry.source}, which is there",
                "Which of these things is in the picture?",
                right,
                _some(absent, draw),
                draw,
            )
        if entry.source == "coco" and entry.things:
            kinds = Counter(name for thing in entry.things for name in thing.names)
            name = draw.choice(sorted(kinds))
            near = [number for number in range(1, max(6, kinds[name] + 3)) if number != kinds[name]]
            near.sort(key=lambda number: abs(number - kinds[name]))
            yield self._item(
                entry,
                "coco, how many",
                f"How many {plural(name)} are there?",
                str(kinds[name]),
                list(map(str, _some(near[:5], draw))),
                draw,
            )
            missing = _things(others, "coco", lambda other: other not in kinds)
            there = draw.random() < 0.5
            asked = with_article(name if there else draw.choice(missing))
            yield self._item(
                entry,
                "coco, is there",
                f"Is there {asked} in the photo?",
                "yes" if there else "no",
                ["no" if there else "yes"],
                draw,
            )

    def scores(self, items: Sequence[Item], said: Sequence[Said]) -> Scores:
        return np.array([100.0 * (choice == item.truth) for item, (_, choice, _) in zip(items, said, strict=True)])

    def baseline(self, items: Sequence[Item], taught: Sequence[Entry]) -> Scores:
        return np.array([100 / len(item.choices) for item in items])

    @staticmethod
    def _item(entry: Entry, group: str, prompt: str, right: str, wrong: list[str], draw: random.Random) -> Item:
        choices = [right, *wrong]
        draw.shuffle(choices)
        return Item(entry, group, prompt, choices.index(right), tuple(choices))


class Boxes(Exam):
    """Where the things are that are alone of their kind; in pixels of the photo."""

    backend, task, metric, guess = "shikra", "box", "IoU > 0.5, %", "always the box that is right most often"

    def items(self, entry: Entry, others: Sequence[Entry], draw: random.Random) -> Iterator[Item]:
        for thing in entry.things:
            if thing.alone:
                name = thing.names[0]
                yield Item(
                    entry, entry.source, name if " " in name else f"the {name}", in_pixels(thing.box, entry.size)
                )

    def scores(self, items: Sequence[Item], said: Sequence[Said]) -> Scores:
        return 100.0 * located(
            box_overlaps([None if box is None else corners(box) for _, _, box in said], self._truth(items))
        )

    def baseline(self, items: Sequence[Item], taught: Sequence[Entry]) -> Scores:
        boxes = [thing.box for entry in taught for thing in entry.things if thing.alone]
        drawn = random.Random(0).sample(boxes, min(300, len(boxes)))
        often = [located(box_overlaps([box] * len(drawn), drawn)).sum() for box in drawn]
        best = drawn[int(np.argmax(often))]
        guesses = [corners(in_pixels(best, item.entry.size)) for item in items]
        return 100.0 * located(box_overlaps(guesses, self._truth(items)))

    @staticmethod
    def _truth(items: Sequence[Item]) -> list[tuple[float, float, float, float]]:
        return [corners(item.truth) for item in items]


EXAMS: dict[str, type[Exam]] = {"captions": Captions, "labels": Labels, "choices": Choices, "boxes": Boxes}


def _things(entries: Sequence[Entry], source: str, wanted: Callable[[str], bool]) -> list[str]:
    """Names of things that other photos of a source show."""
    names = {name for entry in entries if entry.source == source for thing in entry.things for name in thing.names}
    return sorted(name for name in names if words(name) and wanted(name))


def _some(wrong: Sequence[T], draw: random.Random) -> list[T]:
    """Three wrong choices, if there are so many."""
    return draw.sample(wrong, min(3, len(wrong)))


def corners(box: Box) -> tuple[float, float, float, float]:
    """(left, top, right, bottom)"""
    return box.left, box.top, box.right, box.bottom
