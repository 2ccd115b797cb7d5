"""Text and tokens, whichever way a language model's folder describes its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from shared.errors import WeightsUnavailable


class Tokenizer(Protocol):
    """What the backends ask of a tokenizer.

    Attributes:
        bos: the token that begins a text; None where the model knows none.
        eos: the token that ends an answer.
        size: tokens that it can give; at most as many as the model has embeddings.
    """

    bos: int | None
    eos: int
    size: int

    def encode(self, text: str) -> list[int]:
        """Tokens of a text by itself, without any that begin or end it."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens; special ones say nothing."""
        ...


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, read by transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.bos: int | None = self._tokenizer.bos_token_id
        self.eos: int = self._tokenizer.eos_token_id
        self.size = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class SentencePieceTokenizer:
    """LLaMA's ``tokenizer.model``, read by sentencepiece itself.

    Every text that is encoded begins with the dummy blank that LLaMA was trained with. Later tokenizers of transformers
    put it elsewhere around special tokens, and published prompts then become other tokens than they were trained as.
    """

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=str(path))
        self.bos: int | None = self._model.bos_id()
        self.eos: int = self._model.eos_id()
        self.size: int = self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        tokens: list[int] = self._model.encode(text)
        return tokens

    def decode(self, tokens: list[int]) -> str:
        text: str = self._model.decode([token for token in tokens if token < self.size])
        return text


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a language model's folder; ``tokenizer.model`` wins where both are there.

    Raises:
        WeightsUnavailable: there is none.
    """
    if (folder / "tokenizer.model").exists():
        return SentencePieceTokenizer(folder / "tokenizer.model")
    if (folder / "tokenizer.json").exists():
        return HuggingFaceTokenizer(folder)
    raise WeightsUnavailable(f"{folder} has no tokenizer: neither tokenizer.model nor tokenizer.json")
