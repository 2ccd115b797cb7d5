"""Choosing tokens, and turning them into text as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from cloud_server.backends import Piece
from cloud_server.backends.tokenizer import Tokenizer
from shared.conversation import Generation

Finish = Literal["stop", "length"]


def choose(logits: Tensor, generation: Generation, random: torch.Generator) -> Tensor:
    """The next token of each answer, (B, vocabulary) -> (B,): the likeliest, or a draw from the nucleus.

    The nucleus is LLaMA-Adapter's: tokens in descending order, dropped once the probability of those
    before them exceeds ``top_p``.
    """
    if generation.temperature == 0:
        return logits.argmax(-1)
    nucleus = nucleus_probabilities(logits.float().cpu(), generation.temperature, generation.top_p)
    return torch.multinomial(nucleus, 1, generator=random)[:, 0]


def nucleus_probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """(B, vocabulary) logits -> renormalised probabilities, 0 outside the nucleus."""
    probabilities, order = torch.softmax(logits / temperature, -1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before > top_p, 0.0, probabilities)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


class TextStream:
    """Turns tokens into text as they come, holding back bytes that are not yet a whole character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._sent = 0

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._text()
        return "" if text.endswith("\N{REPLACEMENT CHARACTER}") else self._send(text)

    def end(self) -> str:
        return self._send(self._text())

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens)

    def _send(self, text: str) -> str:
        piece, self._sent = text[self._sent :], max(self._sent, len(text))
        return piece


def whole(pieces: Iterator[Piece]) -> tuple[list[str], Sequence[Finish | None]]:
    """Runs an answer to its end: the texts of the batch and why each ended."""
    texts: list[str] = []
    finished: Sequence[Finish | None] = ()
    for piece in pieces:
        texts = [old + new for old, new in zip(texts or [""] * len(piece.texts), piece.texts, strict=True)]
        finished = piece.finished
    return texts, finished
