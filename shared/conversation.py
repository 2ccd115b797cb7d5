"""What is asked and what is answered: the objects that client, fronts and engine hand to each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shared.bitstream import Bitstream
from shared.errors import BadInput, UnknownName

Part = str | Bitstream
Task = Literal["text", "choice", "box", "label"]
"""What kind of answer is wanted: free text, one of the choices given, a box in the photo, a label as in examples."""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the user's own upright photo, from (left, top) to (right, bottom)."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Generation:
    """How an answer is written.

    Attributes:
        max_tokens: the answer's length at most, in tokens of the backend's language model.
        temperature: 0 always takes the likeliest token; above it, tokens are drawn.
        top_p: when drawing, only from the likeliest tokens that together have this probability.
        seed: of the draw; the same seed gives the same answer.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 0.75
    seed: int = 0


@dataclass(frozen=True)
class Conversation:
    """One request: text and encoded photos in the order in which they are meant.

    Attributes:
        parts: text or bitstreams.
        backend: name of the backend that is to answer; empty for the server's default.
        generation: how the answer is written.
        task: what kind of answer is wanted; None for what the backend is made for, or a choice where there are choices.
        choices: for the task ``choice``, what may be chosen.

    For the task ``label``, parts are examples, each a photo and then its label, and last the photo to be labelled.
    """

    parts: tuple[Part, ...]
    backend: str = ""
    generation: Generation = field(default_factory=Generation)
    task: Task | None = None
    choices: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Bitstream, ...]:
        return tuple(part for part in self.parts if isinstance(part, Bitstream))

    @property
    def prompt(self) -> str:
        """The text parts, in order, a line each."""
        return join_texts(self.parts)


def join_texts(parts: Iterable[object]) -> str:
    """Those of the parts that are text, a line each."""
    return "\n".join(part for part in parts if isinstance(part, str)).strip()


@dataclass(frozen=True)
class Timings:
    """Where the server's time went, in milliseconds.

    Attributes:
        queue: waiting for the model.
        decode: entropy-decoding the bitstreams and the transform-neck.
        vision: CLIP from its third block on.
        generation: connector and language model.
    """

    queue: float = 0.0
    decode: float = 0.0
    vision: float = 0.0
    generation: float = 0.0


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: what the backend said.
        task: what kind of answer it is.
        choice: of the task ``choice``, which one, from 0; None where the text names none.
        box: of the task ``box``; None where the text has none.
        finish: ``stop`` where the model ended by itself, ``length`` where ``max_tokens`` ended it.
        tokens: how many it wrote.
        backend, profile: who answered.
        timings: where the server's time went.
        digests: SHA-256 of each model that took part, by role (codec, neck, clip, llm, connector); of several in one
            role, a space between them.
    """

    text: str
    finish: Literal["stop", "length"]
    tokens: int
    backend: str
    profile: str
    timings: Timings
    digests: dict[str, str]
    task: Task = "text"
    choice: int | None = None
    box: Box | None = None


@dataclass(frozen=True)
class ServerProfile:
    """What a server tells a client, so that the client encodes what the server expects.

    Attributes:
        profile: the profile's name; the client has a profile of that name too.
        qualities: that the server decodes, ascending; of each, hex of the 4 bytes that name its codec in a bitstream.
        scenario: that the server's necks were trained for.
        quality: that the server would have where nobody asks for another; one of ``qualities``.
        backends: what kinds of answer each gives, by its name; the default first, of both.
        max_request_bytes, max_images, max_tokens: limits of one request.
        version: of the server's software.
    """

    profile: str
    qualities: dict[int, str]
    scenario: str
    quality: int
    backends: dict[str, tuple[Task, ...]]
    max_request_bytes: int
    max_images: int
    max_tokens: int
    version: str

    def backend_for(self, name: str, task: Task | None, choices: Sequence[str] = ()) -> tuple[str, Task]:
        """Who answers and how: the backend of that name, or the first that gives such answers where none is named.

        Where no task is named, choices are there to be chosen from, and without any a backend does what else it does.

        Raises:
            UnknownName: there is no backend of that name.
            BadInput: it, or whoever there is, does not give such answers.
        """
        if name and name not in self.backends:
            raise UnknownName(f"no backend named {name!r} here; there are: {', '.join(self.backends)}")
        if task is None and choices:
            task = "choice"
        able = [other for other, tasks in self.backends.items() if task is None or task in tasks]
        chosen = name or next(iter(able), "")
        if chosen not in able:
            who = f"backend {name!r} answers with {' or '.join(self.backends[name])}, not with {task}: " if name else ""
            hint = f"ask {' or '.join(able)}" if able else f"no backend here answers with {task}"
            raise BadInput(who + hint)
        own = self.backends[chosen]
        return chosen, next((each for each in own if each == task or (task is None and each != "choice")), own[0])

    @property
    def offer(self) -> str:
        """The qualities in words: "quality 1, 2 by codec c0eb8fe5"."""
        by_codec: dict[str, list[str]] = {}
        for quality, digest in self.qualities.items():
            by_codec.setdefault(digest, []).append(str(quality))
        told = [f"quality {', '.join(names)} by codec {digest}" for digest, names in by_codec.items()]
        return "; ".join(told) or "nothing"
