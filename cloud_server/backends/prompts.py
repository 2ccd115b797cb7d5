"""How a question becomes the tokens that a language model reads, by the name that a profile gives it."""

from __future__ import annotations

from dataclasses import dataclass

from cloud_server.backends.tokenizer import Tokenizer
from shared.errors import UnknownName


@dataclass(frozen=True)
class Format:
    """The text that a language model was trained to read around what a user says.

    Attributes:
        before, after: that text.
        bos: whether the token that begins a text comes first, where the tokenizer has one.
    """

    before: str = ""
    after: str = ""
    bos: bool = False

    def __call__(self, tokenizer: Tokenizer, prompt: str) -> list[int]:
        """Tokens of a prompt without photos."""
        return self._start(tokenizer) + tokenizer.encode(self.before + prompt + self.after)

    def around(self, tokenizer: Tokenizer, before: str, after: str) -> tuple[list[int], list[int]]:
        """Tokens before and after a photo that a user puts between two texts.

        Each text is tokenised by itself, without the blanks at its ends. So did transformers' LlamaTokenizer around
        added tokens when Shikra was trained (4.28); later ones make other tokens of the same text.
        """
        texts = (self.before + before).strip(" "), (after + self.after).strip(" ")
        return self._start(tokenizer) + tokenizer.encode(texts[0]), tokenizer.encode(texts[1])

    def _start(self, tokenizer: Tokenizer) -> list[int]:
        return [tokenizer.bos] if self.bos and tokenizer.bos is not None else []


FORMATS: dict[str, Format] = {
    "plain": Format(bos=True),  # as published for LLaMA-Adapter's captions: the prompt and nothing else
    "chatml": Format("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),  # SmolLM2's, no system message
    "vicuna-v1.1": Format(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ",
        " ASSISTANT:",
        bos=True,
    ),
}


def prompt_format(name: str) -> Format:
    """The format of that name.

    Raises:
        UnknownName: there is none.
    """
    if name not in FORMATS:
        raise UnknownName(f"no prompt format named {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]
