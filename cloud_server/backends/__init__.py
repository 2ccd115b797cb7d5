"""Backends: the language models that answer. Other packages add theirs under the entry point ``comneck.backends``.

A backend says what it reads from CLIP and turns that and a prompt into text, a token at a time:

    needs       what it reads from CLIP (VisionNeeds)
    load        the only place where it reads weights
    write       features and a prompt -> pieces of text

docs/architecture.md shows where it stands in the life of a request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from shared.registry import Registry

if TYPE_CHECKING:
    import torch

    from cloud_server.vision.clip import VisionFeatures, VisionNeeds
    from shared.conversation import Generation
    from shared.profiles import BackendSpec, Profile

backends = Registry(
    "backend", "comneck.backends", {"llama-adapter": "cloud_server.backends.llama_adapter:LlamaAdapter"}
)


@dataclass(frozen=True)
class Piece:
    """One step of a batch of answers being written: the new text of each, and whether and why it ended."""

    texts: tuple[str, ...]
    finished: tuple[Literal["stop", "length"] | None, ...]


class Backend(ABC):
    """A language model that answers from CLIP's features."""

    needs: ClassVar[VisionNeeds]
    max_images: ClassVar[int] = 1
    digests: dict[str, str]

    @classmethod
    @abstractmethod
    def load(cls, spec: BackendSpec, profile: Profile, device: torch.device) -> Backend:
        """Reads the artefacts that ``spec`` names; they are in the cache already."""

    @abstractmethod
    def write(self, features: VisionFeatures | None, prompt: str, generation: Generation) -> Iterator[Piece]:
        """Answers ``prompt`` about each photo of ``features`` (B of them; None: about no photo, B = 1).

        Raises:
            PromptTooLong: prompt and answer do not fit the model's context.
        """
