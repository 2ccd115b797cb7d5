"""V2L-Tokenizer's codebook as an artefact: words, and where each lies in CLIP's joint space.

A safetensors file (shared/weights/digest.py):

    codebook   (n, D)   the words' places
    words      uint8    the words themselves, UTF-8, a zero byte after each
    centre     (D,)     what is taken from a photo's place first; a published codebook has none

and the metadata ``config``, a JSON object, says under ``count`` how many words describe a photo.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import BadInput, ComneckError, WeightsUnavailable
from shared.files import read_file
from shared.weights.digest import Storage, load_tensors, read_metadata, save_tensors
from shared.weights.folders import load_pickle

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PUBLISHED_COUNT = 21
VOCABULARY_LIMIT = 1 << 26  # bytes; the published one has under a megabyte


@dataclass(frozen=True, eq=False)
class Codebook:
    """Words with their places.

    Attributes:
        words: n of them.
        places: (n, D), not normalised: the shorter, the less often its word is taken.
        count: how many describe a photo.
        centre: (D,); None where there is none.

    Raises:
        BadInput: these do not fit each other.
    """

    words: tuple[str, ...]
    places: Tensor
    count: int = PUBLISHED_COUNT
    centre: Tensor | None = None

    def __post_init__(self) -> None:
        if self.places.ndim != 2 or len(self.places) != len(self.words):
            raise BadInput(f"{len(self.words):,} words, but their places are {tuple(self.places.shape)}")
        if not self.places.is_floating_point() or not self.places.isfinite().all():
            raise BadInput("the words' places are not all finite numbers")
        if self.centre is not None and self.centre.shape != self.places.shape[1:]:
            raise BadInput(f"the centre is {tuple(self.centre.shape)}, the places {tuple(self.places.shape)}")
        if not 1 <= self.count <= len(self.words):
            raise BadInput(f"{self.count} words are to describe a photo; there are {len(self.words):,}")
        if any("\0" in word for word in self.words):
            raise BadInput("a word has a zero byte in it")

    @classmethod
    def load(cls, path: Path) -> Codebook:
        """
        Raises:
            WeightsUnavailable: the file is missing, damaged, or something else.
        """
        tensors = load_tensors(path)
        try:
            words = bytes(tensors["words"].numpy()).decode().split("\0")[:-1]
            count = json.loads(read_metadata(path)["config"])["count"]
            return cls(tuple(words), tensors["codebook"].float(), int(count), _centre(tensors))
        except (BadInput, KeyError, TypeError, ValueError) as problem:
            raise WeightsUnavailable(f"{path} is no codebook: {problem!r}") from problem

    def to(self, device: torch.device) -> Codebook:
        """The same on that device."""
        return replace(
            self, places=self.places.to(device), centre=None if self.centre is None else self.centre.to(device)
        )

    def save(self, path: Path, storage: Storage = "float32", **metadata: str) -> None:
        """Writes the artefact. ``metadata`` is stored beside it."""
        from torch import frombuffer, uint8

        words = "".join(f"{word}\0" for word in self.words).encode()
        tensors = {"codebook": self.places, "words": frombuffer(bytearray(words), dtype=uint8)}
        if self.centre is not None:
            tensors["centre"] = self.centre
        save_tensors(path, tensors, storage, {"config": json.dumps({"count": self.count}), **metadata})


def codebook_from_published(vocabulary: Path, embedding: Path, count: int = PUBLISHED_COUNT) -> Codebook:
    """The global codebook of the V2L-Tokenizer authors, read as data only.

    Args:
        vocabulary: their global_vocabulary.npy.
        embedding: their global_codebook_embedding.pth, (11908, 768).
        count: words that describe a photo.

    Raises:
        BadInput: a file is missing, damaged or something else, or the two do not belong together.
    """
    from torch import Tensor

    places = load_pickle(embedding)
    if not isinstance(places, Tensor):
        raise BadInput(f"{embedding.name} holds a {type(places).__name__} instead of a tensor")
    try:
        return Codebook(tuple(_read_vocabulary(vocabulary)), places.detach().float(), count)
    except BadInput as problem:
        raise BadInput(f"{vocabulary.name} and {embedding.name} make no codebook: {problem}") from problem


def _centre(tensors: dict[str, Tensor]) -> Tensor | None:
    return tensors["centre"].float() if "centre" in tensors else None


def _read_vocabulary(path: Path) -> list[str]:
    """A .npy file of strings; where they are Python objects, they were pickled."""
    import numpy as np

    content = read_file(path, VOCABULARY_LIMIT, "global_vocabulary.npy", "it is no vocabulary")
    data = BytesIO(content)
    try:
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        _, _, kind = header[np.lib.format.read_magic(data)](data)
        if kind.hasobject:
            words = np.asarray(_Words(data).load())
        else:
            data.seek(0)
            words = np.load(data, allow_pickle=False)
        if words.size > len(content):
            raise ValueError(f"{words.size:,} words in {len(content):,} bytes")
        found = words.reshape(-1).tolist()
    except ComneckError:
        raise
    except Exception as problem:  # whatever damage makes a reader of pickles stumble over
        raise BadInput(f"{path.name} cannot be read as an array of words: {problem!r}") from problem
    if wrong := [word for word in found if not isinstance(word, str)]:
        raise BadInput(f"{path.name} holds a {type(wrong[0]).__name__} among its words")
    return found


class _Words(pickle.Unpickler):
    """Reads pickled arrays of strings; whatever else a pickle could call is refused."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) in {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}:
            return getattr(np.core.multiarray, name)
        raise BadInput(f"the vocabulary is refused: to read it would run {module}.{name}, and it is read as data only")
