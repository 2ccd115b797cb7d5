"""How a conversation becomes the text that a language model reads, by the name that a profile gives it."""

from __future__ import annotations

from collections.abc import Callable

from shared.errors import UnknownName


def plain(prompt: str) -> str:
    """As published for LLaMA-Adapter's captions: the prompt and nothing else."""
    return prompt


def chatml(prompt: str) -> str:
    """SmolLM2's chat format, without a system message."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


FORMATS: dict[str, Callable[[str], str]] = {"plain": plain, "chatml": chatml}


def prompt_format(name: str) -> Callable[[str], str]:
    """The format of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in FORMATS:
        raise UnknownName(f"no prompt format named {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]
