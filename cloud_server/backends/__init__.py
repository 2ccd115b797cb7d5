"""Backends: the language models that answer. Other packages add theirs under the entry point ``comneck.backends``.

A backend says what it reads from CLIP, turns questions about photos into text, a token at a time, and finds in the text
what was asked for:

    needs, tasks   what it reads from CLIP, what kinds of answer it gives
    load           the only place where it reads weights
    check          whether it can answer a conversation, before anything is computed
    write          questions -> pieces of text
    find           text -> a choice, a box

docs/backends.md walks through one of sixty lines; docs/architecture.md shows where it stands in the life of a request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from shared.conversation import join_texts
from shared.errors import BadInput
from shared.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cloud_server.vision.clip import VisionNeeds
    from shared.conversation import Conversation, Generation, Task
    from shared.profiles import BackendSpec, Profile

backends = Registry(
    "backend",
    "comneck.backends",
    {
        "llama-adapter": "cloud_server.backends.llama_adapter:LlamaAdapter",
        "honeybee": "cloud_server.backends.honeybee:Honeybee",
        "shikra": "cloud_server.backends.shikra:Shikra",
        "llava": "cloud_server.backends.llava:Llava",
        "v2l-tokenizer": "cloud_server.backends.v2l_tokenizer:V2lTokenizer",
    },
)


@dataclass(frozen=True)
class Question:
    """What one answer is wanted for.

    Attributes:
        parts: of the conversation, in order; in the place of each photo what ``needs`` asks of CLIP for it,
            (1 + patches, D or projection).
        task, choices: as in shared.conversation.Conversation.
    """

    parts: tuple[str | Tensor, ...]
    task: Task = "text"
    choices: tuple[str, ...] = ()

    @property
    def photos(self) -> tuple[Tensor, ...]:
        """In order."""
        return tuple(part for part in self.parts if not isinstance(part, str))

    @property
    def prompt(self) -> str:
        """Its texts, a line each."""
        return join_texts(self.parts)


@dataclass(frozen=True)
class Piece:
    """One step of a batch of answers being written: the new text of each, and whether and why it ended."""

    texts: tuple[str, ...]
    finished: tuple[Literal["stop", "length"] | None, ...]


@dataclass(frozen=True)
class Found:
    """What an answer's text holds besides words.

    Attributes:
        choice: which of the question's choices, from 0.
        box: (left, top, right, bottom) as fractions of the picture that the codec was given.
    """

    choice: int | None = None
    box: tuple[float, float, float, float] | None = None


class Backend(ABC):
    """A language model that answers from CLIP's features.

    Attributes:
        needs: what it reads from CLIP.
        tasks: kinds of answer it gives, the one it is made for first.
        max_images: photos that one question may be about.
        digests: SHA-256 of its models, by role.
    """

    needs: VisionNeeds
    tasks: ClassVar[tuple[Task, ...]] = ("text",)
    max_images: ClassVar[int] = 1
    digests: dict[str, str]

    @classmethod
    @abstractmethod
    def load(cls, spec: BackendSpec, profile: Profile, device: torch.device) -> Backend:
        """Reads the artefacts that ``spec`` names; they are in the cache already."""

    def check(self, conversation: Conversation) -> None:
        """Raises BadInput for what it cannot answer; task and number of photos are right by then."""
        if not conversation.prompt:
            raise BadInput('the prompt is empty: say what you want to know, "describe this" for instance')

    @abstractmethod
    def write(self, questions: Sequence[Question], generation: Generation) -> Iterator[Piece]:
        """Answers questions side by side.

        Raises:
            PromptTooLong: a question and its answer do not fit the model's context.
        """

    def find(self, text: str, question: Question) -> Found:
        """What a finished answer holds besides words; nothing where the text does not say it."""
        return Found()
