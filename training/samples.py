"""What a connector is taught: for each photo, questions with their answers, in the words that users use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from shared.conversation import Task
from shared.errors import BadInput
from training.photos import Entry, Thing

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


THING_PROMPTS = ("What is there in the photo?", "Which of these things is in the picture?", "What can be seen here?")
COUNT_PROMPTS = ("How many {} are there?", "How many {} are in the photo?", "how many {} can you see ?")
PRESENCE_PROMPTS = ("Is there {} in the photo?", "Is there {}?", "Can you see {} here?")


@dataclass(frozen=True)
class Sample:
    """One exchange about one photo.

    Attributes:
        photo: the photo's place in its set.
        prompt, answer: what the user says and what the model is to say.
        task: that is asked for.
        thing: of the task ``box``, what the prompt names.
    """

    photo: int
    prompt: str
    answer: str
    task: Task = "text"
    thing: Thing | None = None


Exchange = Callable[[int, Entry, torch.Generator], Sample]


class SampleSource:
    """Draws exchanges about photos, of each kind as often as its share says.

    captions, labels     one of a photo's; the word for it in a sentence
    names                the word for it by itself, as choices are written
    questions            of people, with their answers
    things               something that a box shows
    counts, presence     how many of a thing there are, whether there is one; where all things have boxes
    phrases              where a thing is, of which there is but one

    Args:
        entries: the photos, in the order of their features.
        shares: by kind; kinds that no photo has are left out.
    """

    def __init__(self, entries: Sequence[Entry], shares: Mapping[str, float]) -> None:
        self.entries = entries
        self._names = sorted({name for entry in entries if _counted(entry) for name in _names(entry)})
        kinds: dict[str, tuple[Callable[[Entry], Any], Exchange]] = {
            "captions": (lambda entry: entry.captions, _caption),
            "labels": (lambda entry: entry.label, _label),
            "names": (lambda entry: entry.label, _named),
            "questions": (lambda entry: entry.questions, _question),
            "things": (lambda entry: entry.things, _thing),
            "counts": (_counted, _count),
            "presence": (_counted, self._presence),
            "phrases": (lambda entry: any(thing.alone for thing in entry.things), _phrase),
        }
        self._kinds: list[tuple[float, list[int], Exchange]] = []
        for name, share in shares.items():
            has, exchange = kinds[name]
            if photos := [i for i, entry in enumerate(entries) if has(entry)]:
                self._kinds.append((share, photos, exchange))
        if not self._kinds:
            raise BadInput(f"none of the training photos has {', '.join(shares)}: there is nothing to teach")

    def draw(self, count: int, per_photo: int, source: torch.Generator) -> list[Sample]:
        """``count`` photos with ``per_photo`` exchanges each, photo by photo."""
        weights = torch.tensor([share for share, _, _ in self._kinds], dtype=torch.float32)
        samples = []
        for which in torch.multinomial(weights, count, replacement=True, generator=source).tolist():
            _, photos, exchange = self._kinds[which]
            photo = photos[_pick(len(photos), source)]
            samples += [exchange(photo, self.entries[photo], source) for _ in range(per_photo)]
        return samples

    def _presence(self, photo: int, entry: Entry, source: torch.Generator) -> Sample:
        there = bool(_pick(2, source))
        own = _names(entry)
        name = _choose(own if there else [name for name in self._names if name not in own], source)
        return Sample(photo, _choose(PRESENCE_PROMPTS, source).format(with_article(name)), "yes" if there else "no")


def _caption(photo: int, entry: Entry, source: torch.Generator) -> Sample:
    return Sample(photo, _choose(CAPTION_PROMPTS, source), tidy(_choose(entry.captions, source)))


def _label(photo: int, entry: Entry, source: torch.Generator) -> Sample:
    prompts = LABEL_PROMPTS + ANIMAL_PROMPTS * (entry.wnid is not None and entry.wnid <= LAST_ANIMAL)
    return Sample(photo, _choose(prompts, source), f"{with_article(entry.label or '')}.")


def _named(photo: int, entry: Entry, source: torch.Generator) -> Sample:
    asked, name = _label(photo, entry, source), (entry.label or "").replace("_", " ")
    return replace(asked, answer=_choose((name, with_article(name)), source))


def _question(photo: int, entry: Entry, source: torch.Generator) -> Sample:
    question = _choose(entry.questions, source)
    return Sample(photo, tidy(question.text), ", ".join(question.answers))


def _thing(photo: int, entry: Entry, source: torch.Generator) -> Sample:
    name = _choose(_choose(entry.things, source).names, source)
    bare = re.sub(r"^(a|an|the) ", "", name)
    return Sample(photo, _choose(THING_PROMPTS, source), _choose((name, bare, with_article(bare)), source))


def _count(photo: int, entry: Entry, source: torch.Generator) -> Sample:
    name = _choose(_names(entry), source)
    count = sum(name in thing.names for thing in entry.things)
    return Sample(photo, _choose(COUNT_PROMPTS, source).format(plural(name)), str(count))


def _phrase(photo: int, entry: Entry, source: torch.Generator) -> Sample:
    thing = _choose([thing for thing in entry.things if thing.alone], source)
    name = _choose(thing.names, source)
    return Sample(photo, name if " " in name else f"the {name}", "", "box", thing)


def _counted(entry: Entry) -> bool:
    """Whether every thing of some kinds has a box: COCO's annotators drew them all, and named kinds by one word."""
    return bool(entry.things) and entry.source == "coco"


def _names(entry: Entry) -> list[str]:
    return sorted({name for thing in entry.things for name in thing.names})


def plural(name: str) -> str:
    """ "dogs", "benches", "people"."""
    irregular = {"person": "people", "knife": "knives", "mouse": "mice", "sheep": "sheep", "skis": "skis"}
    if name in irregular:
        return irregular[name]
    return f"{name}es" if name.endswith(("s", "sh", "ch", "x")) else f"{name}s"


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
