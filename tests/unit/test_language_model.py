"""Continuing embeddings: side by side as alone, within what is allowed, with and without low-rank changes."""

from __future__ import annotations

import pytest
import torch
from tiny_llm import ByteTokenizer, tiny_llm
from torch import Tensor

from cloud_server.backends.language_model import LanguageModel
from cloud_server.backends.low_rank import LowRank
from cloud_server.generation import whole
from shared.conversation import Generation
from shared.errors import PromptTooLong

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def llm() -> LanguageModel:
    return tiny_llm()


def prompt(llm: LanguageModel, text: str) -> Tensor:
    return llm.embed(TOKENIZER.encode(text))


@torch.inference_mode()
def continued(llm: LanguageModel, text: str, tokens: int) -> list[int]:
    """What transformers' own generation writes."""
    given = torch.tensor([TOKENIZER.encode(text)])
    return llm.model.generate(given, max_new_tokens=tokens, do_sample=False, eos_token_id=257)[
        0, given.shape[1] :
    ].tolist()


def test_an_answer_is_what_transformers_itself_generates(llm: LanguageModel) -> None:
    texts, finished = whole(llm.write([prompt(llm, "what is this?")], Generation(max_tokens=20)))
    assert texts == [TOKENIZER.decode(continued(llm, "what is this?", 20))]
    assert list(finished) == ["length"]


@torch.inference_mode()
def test_prompts_of_different_lengths_are_answered_side_by_side_as_alone(llm: LanguageModel) -> None:
    prompts = [prompt(llm, text) for text in ("a", "what animal is in this photo?", "where?")]
    alone = [llm._next(one[None], torch.ones(1, len(one)), llm_cache(), {}) for one in prompts]
    longest = max(map(len, prompts))
    together = torch.zeros(3, longest, llm.width)
    mask = torch.zeros(3, longest, dtype=torch.long)
    for i, one in enumerate(prompts):
        together[i, longest - len(one) :], mask[i, longest - len(one) :] = one, 1
    torch.testing.assert_close(llm._next(together, mask, llm_cache(), {}), torch.cat(alone), atol=1e-5, rtol=0)
    texts, _ = whole(llm.write(prompts, Generation(max_tokens=12)))
    assert texts == [whole(llm.write([one], Generation(max_tokens=12)))[0][0] for one in prompts]


def test_only_what_is_allowed_is_written_and_an_answer_ends_where_nothing_is(llm: LanguageModel) -> None:
    labels = [b"cat", b"dogs"]

    def allowed(count: int) -> Tensor:
        may = torch.zeros(2, 258, dtype=torch.bool)
        for row, label in enumerate(labels):
            if count < len(label):
                may[row, label[count]] = True
        return may

    texts, finished = whole(llm.write([prompt(llm, "?"), prompt(llm, "!?")], Generation(max_tokens=9), allowed))
    assert texts == ["cat", "dogs"]
    assert list(finished) == ["stop", "stop"]


def test_draws_stay_within_what_is_allowed(llm: LanguageModel) -> None:
    may = torch.zeros(1, 258, dtype=torch.bool)
    may[0, list(b"xyz")] = True
    generation = Generation(max_tokens=30, temperature=2, top_p=1, seed=1)
    texts, _ = whole(llm.write([prompt(llm, "?")], generation, lambda count: may))
    assert set(texts[0]) == set("xyz")


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused() -> None:
    llm = tiny_llm(context=16)
    with pytest.raises(PromptTooLong, match="the prompt has 10 tokens and the answer may have 7"):
        next(llm.write([prompt(llm, "0123456789")], Generation(max_tokens=7)))


@torch.inference_mode()
def test_a_likelihood_is_the_sum_over_an_endings_tokens(llm: LanguageModel) -> None:
    endings = [TOKENIZER.encode(text) for text in ("cat", "a", "horses")]
    found = llm.likelihoods(prompt(llm, "what is it? "), endings)
    for ending, value in zip(endings, found, strict=True):
        tokens = torch.tensor([[*TOKENIZER.encode("what is it? "), *ending]])
        logits = llm.model(tokens).logits[0, -len(ending) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(value, logits[range(len(ending)), ending].sum(), atol=1e-4, rtol=0)


@torch.inference_mode()
def test_low_rank_changes_are_those_of_the_weights_and_only_while_they_are_applied(llm: LanguageModel) -> None:
    changed = tiny_llm().model
    changes = LowRank(changed, rank=3)
    tokens = torch.tensor([TOKENIZER.encode("a question")])
    before = changed(tokens).logits
    with changes.applied():  # none yet
        assert torch.equal(changed(tokens).logits, before)
    for number, up in enumerate(changes.up):
        torch.nn.init.normal_(up, std=0.1, generator=torch.Generator().manual_seed(number))
    with changes.applied():
        with_changes = changed(tokens).logits
    assert torch.equal(changed(tokens).logits, before)
    merged = tiny_llm().model
    layers = [module for module in merged.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    assert len(layers) == len(changes.up) == 2 * 7
    for layer, down, up in zip(layers, changes.down, changes.up, strict=True):
        layer.weight += up @ down
    assert (with_changes - before).abs().max() > 0.1
    torch.testing.assert_close(with_changes, merged(tokens).logits, atol=1e-4, rtol=0)


def llm_cache():
    from transformers import DynamicCache

    return DynamicCache()
