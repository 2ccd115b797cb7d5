"""A causal language model that continues embeddings: what every backend writes its answers with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from cloud_server.backends import Piece
from cloud_server.backends.gated_attention import NAME as GATED
from cloud_server.backends.tokenizer import Tokenizer, load_tokenizer
from cloud_server.generation import Finish, TextStream, choose
from shared.conversation import Generation
from shared.errors import PromptTooLong, WeightsUnavailable
from shared.memory import free_memory, gigabytes
from shared.profiles import Dtype
from shared.weights.fetch import one_line
from shared.weights.folders import TensorFolder, differences, listed

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
    def load(cls, folder: Path, device: torch.device, dtype: Dtype = "auto", prefix: str = "") -> LanguageModel:
        """Reads a folder in Hugging Face's or Meta's layout, memory-mapped. Backends share what is equal.

        Args:
            dtype: ``auto`` is float32 on a CPU and float16 on a GPU. What a CPU is given in the type that it has on the
                disk is not copied: it is read when it is first used.
            prefix: of the language model's tensors, in a folder that holds more.

        Raises:
            WeightsUnavailable: the folder is damaged, its tensors are not those of its configuration, it has no
                tokenizer, or the device has too little memory.
        """
        if dtype == "auto":
            dtype = "float32" if device.type == "cpu" else "float16"
        return _load(folder, device, getattr(torch, dtype), prefix)

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
        self._check_room(longest, generation.max_tokens)
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
    def read(self, prompt: Tensor, **inputs: Any) -> DynamicCache:
        """What the model keeps of the beginning (T, D) that several prompts share; raises as ``likelihoods`` does."""
        self._check_room(len(prompt), 1)
        past = DynamicCache()
        self.model.model(inputs_embeds=prompt[None], past_key_values=past, use_cache=True, **inputs)
        return past

    @torch.inference_mode()
    def likelihoods(
        self, prompt: Tensor, endings: Sequence[Sequence[int]], past: DynamicCache | None = None, **inputs: Any
    ) -> Tensor:
        """Log-probability of each ending, a list of tokens, after a prompt (T, D): (endings,) float32.

        Args:
            past: what ``read`` kept of the prompt's beginning, which ``prompt`` is then without; it stays as it is.

        Raises:
            PromptTooLong: the prompt and its longest ending exceed the model's context.
        """
        past = DynamicCache() if past is None else deepcopy(past)
        longest = max(map(len, endings))
        self._check_room(past.get_seq_length() + len(prompt), longest)
        padded = [[*ending, *[0] * (longest - len(ending))] for ending in endings]
        tokens = torch.tensor(padded, device=self.model.device)
        prompt = prompt[None].to(self.model.dtype)
        logits = [self._next(prompt, prompt.new_ones(1, 1), past, inputs).expand(len(endings), 1, -1)]
        if longest > 1:
            past.batch_repeat_interleave(len(endings))
            after = self.model.get_input_embeddings()(tokens[:, :-1])
            hidden = self.model.model(inputs_embeds=after, past_key_values=past, use_cache=True, **inputs)
            logits.append(self.model.lm_head(hidden.last_hidden_state))
        each = torch.cat(logits, 1).float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        lengths = torch.tensor([len(ending) for ending in endings], device=self.model.device)
        there = torch.arange(longest, device=self.model.device) < lengths[:, None]
        return (each * there).sum(1)

    def _check_room(self, prompt: int, answer: int) -> None:
        if prompt + answer > self.context:
            raise PromptTooLong(
                f"the prompt has {prompt} tokens and the answer may have {answer}, which exceeds the "
                f"language model's context of {self.context}: shorten the prompt or lower max_tokens"
            )

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
def _load(folder: Path, device: torch.device, dtype: torch.dtype, prefix: str) -> LanguageModel:
    return LanguageModel(load_model(folder, device, dtype, prefix), load_tokenizer(folder))


def load_model(folder: Path, device: torch.device, dtype: torch.dtype, prefix: str = "") -> Any:
    """The model of ``LanguageModel.load``, without a tokenizer; raises as it does."""
    try:
        tensors = TensorFolder(folder)
        config = AutoConfig.for_model(**tensors.language_config(prefix))
        with init_empty_weights(include_buffers=False):  # buffers are computed, not read
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=GATED)
    except Exception as problem:  # whatever a configuration that makes no sense does to transformers
        raise WeightsUnavailable(f"{folder} holds no language model that can be read: {one_line(problem)}") from problem
    places = {name: f"{prefix}{name}" for name in model.state_dict()}
    if config.tie_word_embeddings:
        places["lm_head.weight"] = places["model.embed_tokens.weight"]
    expected = {places[name]: tuple(spec.shape) for name, spec in model.state_dict().items()}
    if wrong := differences(expected, {name: spec for name, spec in tensors.specs.items() if name in expected}):
        raise WeightsUnavailable(f"{folder} does not hold what its configuration says: {listed(wrong)}")
    _check_memory(folder, sum(map(math.prod, expected.values())), device, dtype)
    read = {place: tensors[place].to(device, dtype) for place in expected}
    model.load_state_dict({name: read[place] for name, place in places.items()}, assign=True)
    return model.to(device)


def _check_memory(folder: Path, parameters: int, device: torch.device, dtype: torch.dtype) -> None:
    needed, free = parameters * dtype.itemsize, free_memory(str(device))
    if needed > free:
        half = f" in float16 or bfloat16 it takes {gigabytes(2 * parameters)};" if dtype.itemsize > 2 else ""
        raise WeightsUnavailable(
            f"{folder} takes {gigabytes(needed)} of memory in {str(dtype).removeprefix('torch.')}, and {device} has "
            f"{gigabytes(free)} free:{half} end what else runs there, or take another device"
        )
