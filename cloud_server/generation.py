"""Writing an answer token by token with a key-value cache, for a batch that shares one prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from cloud_server.backends import Piece
from shared.conversation import Generation
from shared.errors import PromptTooLong

Finish = Literal["stop", "length"]


def write(
    step: Callable[[Tensor, DynamicCache], Tensor],
    prompt: Tensor,
    batch: int,
    generation: Generation,
    tokenizer: Any,
    context: int,
) -> Iterator[Piece]:
    """Yields one piece per token, until every answer of the batch has ended.

    Args:
        step: tokens (B, T) and the cache -> logits of the next token (B, vocabulary).
        prompt: (T,) tokens, the same for the whole batch.
        batch: B, answers to write.
        context: tokens that the model can hold.

    Raises:
        PromptTooLong: prompt and ``max_tokens`` exceed ``context``.
    """
    if len(prompt) + generation.max_tokens > context:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens and the answer may have {generation.max_tokens}, which exceeds the "
            f"language model's context of {context}: shorten the prompt or lower max_tokens"
        )
    cache = DynamicCache()
    random = torch.Generator().manual_seed(generation.seed)
    texts = [TextStream(tokenizer) for _ in range(batch)]
    ended: list[Finish | None] = [None] * batch
    tokens = prompt.expand(batch, -1)
    for count in range(1, generation.max_tokens + 1):
        chosen = choose(step(tokens, cache), generation, random)
        pieces = []
        for i, token in enumerate(chosen.tolist()):
            if ended[i] is None and token == tokenizer.eos_token_id:
                ended[i] = "stop"
                pieces.append(texts[i].end())
            elif ended[i] is None and count == generation.max_tokens:
                ended[i] = "length"
                pieces.append(texts[i].add(token) + texts[i].end())
            else:
                pieces.append("" if ended[i] else texts[i].add(token))
        yield Piece(tuple(pieces), tuple(ended))
        if all(ended):
            return
        tokens = chosen[:, None].to(prompt.device)


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

    def __init__(self, tokenizer: Any) -> None:
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
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text

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
