"""What a connector is taught: for each photo, questions with their answers, in the words that users use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from shared.errors import BadInput
from training.photos import Entry

T = TypeVar("T")

CAPTION_PROMPTS = (
    "describe this",
    "Describe this image.",
    "Describe the photo in one sentence.",
    "Generate caption of this image :",
    "What is happening in this picture?",
    "What do you see?",
)
LABEL_PROMPTS = ("what is this?", "What is in this photo?", "Name the main thing in this picture.")
ANIMAL_PROMPTS = ("what animal is this?", "Which animal is in the photo?")
LAST_ANIMAL = "n02655020"  # of ImageNet-1k's WordNet ids in ascending order: the puffer; what follows are things


@dataclass(frozen=True)
class Sample:
    """One exchange about one photo.

    Attributes:
        photo: the photo's place in its set.
        prompt, answer: what the user says and what the model is to say.
    """

    photo: int
    prompt: str
    answer: str


class SampleSource:
    """Draws exchanges about photos: captions most of the time, then names of things, then questions.

    Args:
        entries: the photos, in the order of their features.
        shares: how often captions, labels and questions are drawn; kinds that the photos lack are left out.
    """

    def __init__(self, entries: Sequence[Entry], shares: tuple[float, float, float] = (0.8, 0.13, 0.07)) -> None:
        self.entries = entries
        kinds = (
            [i for i, entry in enumerate(entries) if entry.captions],
            [i for i, entry in enumerate(entries) if entry.label],
            [i for i, entry in enumerate(entries) if entry.questions],
        )
        self._kinds = [
            (share, kind, photos) for kind, (share, photos) in enumerate(zip(shares, kinds, strict=True)) if photos
        ]

        if not self._kinds:
            raise BadInput("none of the training photos has captions, a label or questions: there is nothing to teach")

    def draw(self, count: int, per_photo: int, source: torch.Generator) -> list[Sample]:
        """``count`` photos with ``per_photo`` exchanges each, photo by photo."""
        weights = torch.tensor([share for share, _, _ in self._kinds], dtype=torch.float32)
        samples = []
        for which in torch.multinomial(weights, count, replacement=True, generator=source).tolist():
            _, kind, photos = self._kinds[which]
            photo = photos[_pick(len(photos), source)]
            entry = self.entries[photo]
            for _ in range(per_photo):
                samples.append(Sample(photo, *self._exchange(kind, entry, source)))
        return samples

    @staticmethod
    def _exchange(kind: int, entry: Entry, source: torch.Generator) -> tuple[str, str]:
        if kind == 0:
            return _choose(CAPTION_PROMPTS, source), tidy(_choose(entry.captions, source))
        if kind == 1:
            prompts = LABEL_PROMPTS + ANIMAL_PROMPTS * (entry.wnid is not None and entry.wnid <= LAST_ANIMAL)
            return _choose(prompts, source), f"{with_article(entry.label or '')}."
        question = _choose(entry.questions, source)
        return tidy(question.text), ", ".join(question.answers)


def tidy(text: str) -> str:
    """A tokenised caption as people write: no blank before punctuation, no quotes left open, one stop at the end."""
    text = re.sub(r"\s+([.,!?;:'])", r"\1", text.replace('"', " ")).strip()
    text = re.sub(r"\s+", " ", text)
    return text if text[-1:] in ".!?" else text + "."


def with_article(label: str) -> str:
    """ "an abacus", "a tench"; plurals and names that carry an article stay as they are."""
    label = label.replace("_", " ")
    if label.lower().startswith(("a ", "an ", "the ")) or (
        label.endswith("s") and not label.endswith(("ss", "us", "is"))
    ):
        return label
    return f"{'an' if label[:1].lower() in 'aeiou' else 'a'} {label}"


def _pick(count: int, source: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=source))


def _choose(options: Sequence[T], source: torch.Generator) -> T:
    return options[_pick(len(options), source)]
