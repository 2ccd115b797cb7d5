"""A language model that is whole but tiny, with random weights, and a tokenizer of bytes: nonsense in no time."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cloud_server.backends.gated_attention import NAME
from cloud_server.backends.language_model import LanguageModel


class ByteTokenizer:
    """A token is a byte; 256 begins a text and 257 ends an answer."""

    bos: int | None = 256
    eos = 257
    size = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


def tiny_llm(
    width: int = 32, layers: int = 2, vocabulary: int = 258, context: int = 2048, seed: int = 0
) -> LanguageModel:
    """In float32, with grouped queries."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=context,
        attn_implementation=NAME,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # large enough that each token matters
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=width**-0.5)
    return LanguageModel(model, ByteTokenizer())
