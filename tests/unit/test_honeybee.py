"""Honeybee's prompts as published, choices by letter and by likelihood, and what its answers say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_llm import ByteTokenizer, tiny_llm
from torch import Tensor

from cloud_server.backends import Found, Question
from cloud_server.backends.honeybee import CAbstractor, Connector, Honeybee, Scoring, tokens_after, tokens_before
from cloud_server.generation import whole
from cloud_server.vision.clip import VisionNeeds
from shared.bitstream import Bitstream
from shared.conversation import Conversation, Generation
from shared.errors import BadInput, WeightsUnavailable
from shared.weights.folders import TensorFolder

ASKED = "What animal?"
CHOICES = ("cat", "dog", "bird", "fish")
PUBLISHED = (
    "The following is a conversation between a curious human and AI assistant.\nHuman: ",
    "\nHuman: Answer with the option's letter from the given choices directly. What animal?\n"
    "There are several options:\nA. cat\nB. dog\nC. bird\nD. fish\n\nAI: ",
)


class Chunks(ByteTokenizer):
    """Begins every text with a mark, as LLaMA's tokenizer does with a blank."""

    def encode(self, text: str) -> list[int]:
        return [0, *text.encode()]


def honeybee(scoring: Scoring = "letters") -> Honeybee:
    llm = tiny_llm()
    sizes = {"width": 24, "grid": 4, "queries": 4, "llm_width": llm.width, "hidden": 16, "depth": 1}
    torch.manual_seed(1)
    connector = Connector(llm.model, sizes, last_block=-2, rank=2).eval()
    return Honeybee(connector, llm, {}, scoring)


def photo(seed: int = 0) -> Tensor:
    return torch.randn(17, 24, generator=torch.Generator().manual_seed(seed))


def test_the_prompt_is_the_published_one() -> None:
    tokenizer = ByteTokenizer()
    before, after = tokens_before(tokenizer), tokens_after(tokenizer, ASKED, CHOICES)
    assert before[0] == tokenizer.bos
    assert (bytes(before[1:]).decode(), bytes(after).decode()) == PUBLISHED


def test_a_question_without_choices_has_no_letters() -> None:
    assert bytes(tokens_after(ByteTokenizer(), ASKED)).decode() == "\nHuman: What animal?\nAI: "


def test_texts_are_split_at_roles_today_and_were_not_when_the_weights_were_released() -> None:
    def marked(tokens: list[int]) -> str:
        return bytes(tokens).decode().replace("\0", "|")

    assert marked(tokens_before(Chunks())[1:]).endswith("assistant.|\nHuman: ")
    assert marked(tokens_after(Chunks(), ASKED)) == "|\nHuman: |What animal?|\nAI: "
    assert marked(tokens_after(Chunks(), ASKED, splitting="image")) == "|\nHuman: What animal?\nAI: "


def test_visual_tokens_stand_in_the_place_of_the_image() -> None:
    backend = honeybee()
    visual = torch.arange(4.0)[:, None].expand(4, backend.llm.width)
    embedded = backend._prompt(Question((photo(), ASKED), "choice", CHOICES), visual)
    before, after = (
        backend.llm.embed(tokens) for tokens in (tokens_before(ByteTokenizer()), list(PUBLISHED[1].encode()))
    )
    assert torch.equal(embedded, torch.cat([before, visual, after]))


def test_the_likeliest_choice_is_taken_whatever_the_order_and_the_company() -> None:
    backend = honeybee("texts")
    questions = [Question((photo(seed), ASKED), "choice", CHOICES) for seed in range(3)]
    together, finished = whole(backend.write(questions, Generation()))
    assert list(finished) == ["stop"] * 3
    for question, text in zip(questions, together, strict=True):
        turned = replace(question, choices=CHOICES[::-1])
        assert whole(backend.write([turned], Generation()))[0] == [text]
        assert backend.find(text, question) == Found(choice=CHOICES.index(text))


def test_another_photo_is_another_prompt() -> None:
    backend = honeybee()
    first, second = (backend.connector(photo(seed)[None]) for seed in (0, 1))
    assert (first - second).abs().max() > 0.01


@pytest.mark.parametrize(
    ("text", "choice"),
    [("B", 1), (" b\n", 1), ("D", 3), ("E", None), ("B.", None), ("dog", None), ("", None), ("A B", None)],
)
def test_a_letter_is_read_as_published_and_nothing_else(text: str, choice: int | None) -> None:
    assert honeybee().find(text, Question((photo(), ASKED), "choice", CHOICES)).choice == choice


def test_more_choices_than_letters_are_refused(bitstream: Bitstream) -> None:
    choices = tuple(map(str, range(27)))
    with pytest.raises(BadInput, match="27 choices; there are at most 26"):
        honeybee().check(Conversation((bitstream, ASKED), task="choice", choices=choices))


def published(folder: Path, projector: dict[str, Any], positions: int = 17) -> TensorFolder:
    """A checkpoint as Honeybee's authors write it, of tiny sizes; positions as in old ones, with CLS."""
    abstractor = CAbstractor(width=24, grid=4, queries=4, llm_width=32, hidden=24, depth=3).state_dict()
    abstractor["pos_emb"] = torch.randn(1, positions, 24)
    save_file({f"abstractor.{name}": value for name, value in abstractor.items()}, folder / "model.safetensors")
    config = {"model_type": "mllm", "num_query_tokens": 4, "visual_projector_config": projector}
    (folder / "config.json").write_text(json.dumps(config))
    return TensorFolder(folder)


@pytest.mark.parametrize("positions", [16, 17])
def test_a_published_abstractor_is_read_with_the_sizes_that_its_tensors_have(tmp_path: Path, positions: int) -> None:
    told = {"projector_type": "c-abs", "num_eos_tokens": 0, "feature_layer_index": -2}
    tensors = published(tmp_path, told, positions)
    llm = tiny_llm()
    connector = Connector.published(llm.model, tensors)
    assert Honeybee(connector, llm, {}).needs == VisionNeeds(last_block=-2)
    assert torch.equal(connector.abstractor.pos_emb, tensors["abstractor.pos_emb"][:, -16:])
    assert connector(torch.randn(2, 17, 24)).shape == (2, 4, 32)


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ({"projector_type": "d-abs"}, "its projector is d-abs"),
        ({}, "its projector is none"),
        ({"projector_type": "c-abs", "num_eos_tokens": 1}, "1 to end them"),
        ({"projector_type": "c-abs", "num_queries": 5}, "of 5 tokens"),
    ],
)
def test_another_projector_than_a_c_abstractor_is_refused(tmp_path: Path, told: dict[str, Any], complaint: str) -> None:
    with pytest.raises(WeightsUnavailable, match=complaint):
        Connector.published(tiny_llm().model, published(tmp_path, told))


def test_a_question_about_no_photo_is_refused() -> None:
    with pytest.raises(BadInput, match="0 photos; Honeybee answers about one"):
        honeybee().check(Conversation((ASKED,)))
