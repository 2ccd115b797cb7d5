"""A causal language model that continues embeddings: what every backend writes its answers with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

from cloud_server.backends import Piece
from cloud_server.backends.gated_attention import NAME as GATED
from cloud_server.backends.tokenizer import Tokenizer, load_tokenizer
from cloud_server.generation import Finish, TextStream, choose
from shared.conversation import Generation
from shared.errors import PromptTooLong

Allowed = Callable[[int], Tensor]


class LanguageModel:
    """A model of transformers with its tokenizer, frozen.

    Args:
        model: of the LLaMA family: ``model.model`` gives hidden states, ``model.lm_head`` logits.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.width: int = model.config.hidden_size
        self.context: int = model.config.max_position_embeddings

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> LanguageModel:
        """Reads a folder in Hugging Face's layout; float32 on a CPU, float16 on a GPU. Backends share what is equal."""
        return _load(folder, device)

    def embed(self, tokens: Sequence[int]) -> Tensor:
        """(T, D)"""
        which = torch.tensor(tokens, dtype=torch.long, device=self.model.device)
        return self.model.get_input_embeddings()(which)

    def write(
        self, prompts: Sequence[Tensor], generation: Generation, allowed: Allowed | None = None, **inputs: Any
    ) -> Iterator[Piece]:
        """Continues several prompts side by side; one piece per token, until every answer has ended.

        Args:
            prompts: embeddings (T, D), of any lengths.
            allowed: for the n-th token of the answers, from 0, which of the vocabulary may be taken, (B, vocabulary) of
                booleans; an answer that none is left for has ended.
            inputs: passed on to the model at every step.

        Raises:
            PromptTooLong: a prompt and ``max_tokens`` exceed the model's context.
        """
        longest = max(map(len, prompts))
        if longest + generation.max_tokens > self.context:
            raise PromptTooLong(
                f"the prompt has {longest} tokens and the answer may have {generation.max_tokens}, which exceeds the "
                f"language model's context of {self.context}: shorten the prompt or lower max_tokens"
            )
        device = self.model.device
        embeddings = torch.zeros(len(prompts), longest, self.width, dtype=self.model.dtype, device=device)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        for i, prompt in enumerate(prompts):  # padded on the left, so that all go on from the same place
            embeddings[i, longest - len(prompt) :] = prompt
            mask[i, longest - len(prompt) :] = 1
        cache = DynamicCache()
        random = torch.Generator().manual_seed(generation.seed)
        texts = [TextStream(self.tokenizer) for _ in prompts]
        ended: list[Finish | None] = [None] * len(prompts)
        for count in range(generation.max_tokens):
            logits = self._next(embeddings, mask, cache, inputs)
            if allowed is not None:
                may = allowed(count).to(device)
                ended = [end or (None if left else "stop") for end, left in zip(ended, may.any(1), strict=True)]
                logits = logits.masked_fill(~may & may.any(1, keepdim=True), -torch.inf)
            chosen = choose(logits, generation, random)
            pieces = []
            for i, token in enumerate(chosen.tolist()):
                if ended[i] is None and token == self.tokenizer.eos:
                    ended[i] = "stop"
                    pieces.append(texts[i].end())
                elif ended[i] is None and count == generation.max_tokens - 1:
                    ended[i] = "length"
                    pieces.append(texts[i].add(token) + texts[i].end())
                else:
                    pieces.append("" if ended[i] else texts[i].add(token))
            yield Piece(tuple(pieces), tuple(ended))
            if all(ended):
                return
            embeddings = self.model.get_input_embeddings()(chosen.to(device))[:, None]
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)

    @torch.inference_mode()
    def likelihoods(self, prompt: Tensor, endings: Sequence[Sequence[int]], **inputs: Any) -> Tensor:
        """Log-probability of each ending after a prompt (T, D), mean over its tokens: (endings,) float32."""
        longest = max(map(len, endings))
        tokens = torch.tensor([[*ending, *[0] * (longest - len(ending))] for ending in endings]).to(prompt.device)
        after = self.model.get_input_embeddings()(tokens)
        whole = torch.cat([prompt.to(after.dtype).expand(len(endings), -1, -1), after], 1)
        hidden = self.model.model(inputs_embeds=whole, use_cache=False, **inputs).last_hidden_state
        logits = self.model.lm_head(hidden[:, len(prompt) - 1 : -1]).float()
        each = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        lengths = torch.tensor([len(ending) for ending in endings], device=prompt.device)
        there = torch.arange(longest, device=prompt.device) < lengths[:, None]
        return (each * there).sum(1) / lengths

    @torch.inference_mode()
    def _next(self, embeddings: Tensor, mask: Tensor, cache: DynamicCache, inputs: dict[str, Any]) -> Tensor:
        """Logits of what comes after ``embeddings`` (B, T, D): (B, vocabulary)."""
        padded: dict[str, Any] = {}
        if not mask.all():
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
            padded = {"attention_mask": mask, "position_ids": positions}
        hidden = self.model.model(
            inputs_embeds=embeddings, past_key_values=cache, use_cache=True, **padded, **inputs
        ).last_hidden_state
        return self.model.lm_head(hidden[:, -1])


@cache
def _load(folder: Path, device: torch.device) -> LanguageModel:
    disable_progress_bar()  # of a second's loading
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32 if device.type == "cpu" else torch.float16, attn_implementation=GATED
    )
    return LanguageModel(model.to(device), load_tokenizer(folder))
