"""How a question becomes the tokens that a language model reads, by the name that a profile gives it."""

from __future__ import annotations

from collections.abc import Callable

from cloud_server.backends.tokenizer import Tokenizer
from shared.errors import UnknownName

Format = Callable[[Tokenizer, str], list[int]]


def plain(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """As published for LLaMA-Adapter's captions: the prompt and nothing else."""
    return [*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode(prompt)]


def chatml(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """SmolLM2's chat format, without a system message."""
    return tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")


FORMATS: dict[str, Format] = {"plain": plain, "chatml": chatml}


def prompt_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in FORMATS:
        raise UnknownName(f"no prompt format named {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]
