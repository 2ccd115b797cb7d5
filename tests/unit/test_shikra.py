"""Shikra's prompts and tokens as published, what is asked of it, boxes there and back, both ways to load it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tiny_llm import ByteTokenizer, tiny_llm
from torch import Tensor

from cloud_server.backends import Found, Question, shikra
from cloud_server.backends import connector as artefacts
from cloud_server.backends.prompts import prompt_format
from cloud_server.backends.shikra import (
    AFTER,
    BEFORE,
    Connector,
    Shikra,
    box_text,
    expression,
    parse_box,
    prompt_embeddings,
    tokens_around,
)
from cloud_server.backends.tokenizer import SentencePieceTokenizer
from cloud_server.generation import whole
from cloud_server.pipeline import in_photo
from evaluation.metrics import box_overlaps, located
from shared.bitstream import Bitstream
from shared.conversation import Box, Conversation, Generation, Task
from shared.errors import BadInput, WeightsUnavailable
from shared.images import Fit, Preparation
from shared.profiles import BackendSpec, get_profile
from shared.weights.digest import save_tensors

GRID, CLIP_WIDTH = 4, 24
CPU = torch.device("cpu")


def photo(seed: int = 0) -> Tensor:
    return torch.randn(1 + GRID**2, CLIP_WIDTH, generator=torch.Generator().manual_seed(seed))


def small(rank: int = 2) -> Shikra:
    """On a language model that it shares: two patches a side are a word, changes of low rank."""
    llm = tiny_llm()
    torch.manual_seed(1)
    connector = Connector(llm.model, CLIP_WIDTH, join=2, rank=rank).eval().requires_grad_(False)
    if connector.low_rank:
        for up in connector.low_rank.up:
            torch.nn.init.normal_(up, std=0.3)
    return Shikra(connector, llm, "chatml", {})


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model of LLaMA's kind: BPE, digits alone, bytes for what it does not know, a blank before a text."""
    format = prompt_format("vicuna-v1.1")
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([format.before + BEFORE, AFTER.format("the dog") + format.after, "what is it?"] * 20),
        model_writer=written,
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


@pytest.mark.parametrize(
    ("task", "text", "before", "after"),
    [
        (
            "box",
            "the dog",
            "▁questions.▁USER:▁In▁the▁given",
            "▁,▁could▁you▁find▁and▁tell▁me▁the▁coordinates▁of▁the▁dog?▁ASSISTANT:",
        ),
        ("text", "what is  it?", "▁questions.▁USER:", "▁what▁is▁▁it?▁ASSISTANT:"),
    ],
    ids=["box", "text"],
)
def test_each_side_of_a_photo_is_tokenised_by_itself_with_a_blank_before_and_none_after(
    vocabulary: Path, task: Task, text: str, before: str, after: str
) -> None:
    model = SentencePieceProcessor(model_file=str(vocabulary))
    tokens = tokens_around(SentencePieceTokenizer(vocabulary), prompt_format("vicuna-v1.1"), task, text)
    assert tokens[0][0] == model.bos_id()
    pieces = ["".join(map(model.id_to_piece, side)) for side in tokens]
    assert pieces[0].startswith("<s>▁A▁chat▁between")
    assert pieces[0].endswith(before)
    assert pieces[1] == after


def test_what_looks_like_a_special_token_in_a_users_text_is_text(vocabulary: Path) -> None:
    tokenizer = SentencePieceTokenizer(vocabulary)
    _, after = tokens_around(tokenizer, prompt_format("vicuna-v1.1"), "text", "</s><im_end>")
    assert tokenizer.eos not in after
    assert max(after) < tokenizer.size
    assert tokenizer.decode(after) == "</s><im_end> ASSISTANT:"


def test_the_photo_stands_in_the_question_between_its_ends() -> None:
    backend = small()
    visual = backend.connector(photo()[None])[0]
    assert visual.shape == (2 + (GRID // 2) ** 2, backend.llm.width)
    assert torch.equal(visual[[0, -1]], backend.connector.ends)
    read = prompt_embeddings(backend.llm, backend.format, visual, "box", "Where is the dog?")
    before, after = (
        backend.llm.embed(ByteTokenizer().encode(text))
        for text in (
            "<|im_start|>user\nIn the given",
            ", could you find and tell me the coordinates of the dog?<|im_end|>\n<|im_start|>assistant\n",
        )
    )
    assert torch.equal(read, torch.cat([before, visual, after]))


def test_a_word_is_made_of_the_patches_that_lie_together() -> None:
    connector = Connector(tiny_llm().model, clip_width=1, join=2)
    connector.mm_projector.weight.data.fill_(0.25)
    connector.mm_projector.bias.data.zero_()
    rows = torch.arange(4.0).repeat_interleave(4)
    columns = torch.arange(4.0).repeat(4)
    tokens = torch.cat([torch.tensor([torch.nan]), 10 * rows + columns])  # CLS is not read
    means = connector(tokens[None, :, None])[0, 1:-1]
    assert means[:, 0].tolist() == [5.5, 7.5, 25.5, 27.5]


# --- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("where is the dog?", "the dog"),
        ("Where's  the dog ?", "the dog"),
        ("Where\N{RIGHT SINGLE QUOTATION MARK}s the dog", "the dog"),
        ("where are\nthe two men in hats?", "the two men in hats"),
        ("find the red car", "the red car"),
        ("Find the red car.", "the red car"),
        ("please locate the cat", "the cat"),
        ("Can you find the man who can find things?", "the man who can find things"),
        ("could you please show me the left one", "the left one"),
        ("point to her hand!", "her hand"),
        ("the dog", "the dog"),
        ("woman, 2nd from left", "woman, 2nd from left"),
        ("finder of the keys", "finder of the keys"),
        ("a {} on a shelf", "a {} on a shelf"),
        ("where is?", ""),
        ("Find.", ""),
        ("?", ""),
    ],
)
def test_a_question_asks_for_what_it_names(text: str, what: str) -> None:
    assert expression(text) == what


@pytest.mark.parametrize("task", [None, "box"])
@pytest.mark.parametrize("prompt", ["where is?", "?!", "find"])
def test_a_question_that_names_nothing_is_refused(bitstream: Bitstream, task: Task | None, prompt: str) -> None:
    with pytest.raises(BadInput, match="names nothing to be found"):
        small().check(Conversation((bitstream, prompt), task=task))


def test_an_empty_prompt_is_refused_and_any_other_text_may_be_said(bitstream: Bitstream) -> None:
    backend = small()
    with pytest.raises(BadInput, match="the prompt is empty"):
        backend.check(Conversation((bitstream, " \n"), task="text"))
    backend.check(Conversation((bitstream, "?!"), task="text"))
    backend.check(Conversation((bitstream, "where is the dog?")))


def test_questions_side_by_side_are_answered_as_each_alone() -> None:
    backend = small()
    questions = [
        Question(("good morning",), "text"),
        Question((photo(1), "where is the big black dog?"), "box"),
        Question((photo(2), "what is this?"), "text"),
        Question((photo(2), "the cat"), "box"),
    ]
    generation = Generation(max_tokens=10)
    texts, _ = whole(backend.write(questions, generation))
    assert texts == [whole(backend.write([question], generation))[0][0] for question in questions]
    assert len(set(texts)) == len(texts)


def test_the_language_model_is_changed_only_while_shikra_writes() -> None:
    backend, question = small(), Question((photo(), "the dog"), "box")
    backend.format = prompt_format("plain")

    def alone() -> list[str]:
        return whole(backend.llm.write([backend.llm.embed([1, 2, 3])], Generation(max_tokens=8)))[0]

    before = alone()
    changed, _ = whole(backend.write([question], Generation(max_tokens=8)))
    assert alone() == before
    writing = backend.write([question], Generation(max_tokens=8))
    next(writing)
    assert alone() != before
    del writing  # its reader has left
    assert alone() == before
    backend.connector.low_rank = None
    assert whole(backend.write([question], Generation(max_tokens=8)))[0] != changed


# --- boxes -----------------------------------------------------------------------------------------------------------


def test_a_box_is_found_only_where_one_was_asked_for() -> None:
    said = "Answer: [0.100,0.250,0.500,1.000] ."
    backend = small()
    assert backend.find(said, Question((photo(), "the dog"), "box")) == Found(box=(0.1, 0.25, 0.5, 1.0))
    assert backend.find(said, Question((photo(), "where?"), "text")) == Found()
    assert backend.find("I see no dog.", Question((photo(), "the dog"), "box")) == Found()


@pytest.mark.parametrize("fit", ["pad", "squash"])
@pytest.mark.parametrize("size", [(640, 480), (333, 500), (5000, 100), (3, 2), (256, 256)])
def test_a_box_comes_back_to_its_place_in_the_photo(size: tuple[int, int], fit: Fit) -> None:
    preparation = Preparation(256, 256, fit)
    box = Box(0.2 * size[0], 0.3 * size[1], 0.65 * size[0], size[1])
    read = parse_box(box_text(box, size, preparation))
    assert read
    back = in_photo(read, size, preparation)
    precision = 0.0005 * max(size) + 1e-6
    for name in ("left", "top", "right", "bottom"):
        assert getattr(back, name) == pytest.approx(getattr(box, name), abs=precision)


def test_a_box_that_a_crop_cuts_ends_at_the_pictures_edge() -> None:
    assert box_text(Box(0, 0, 200, 200), (400, 200), Preparation(256, 256, "crop")) == (
        "Answer: [0.000,0.000,0.500,1.000] ."
    )


def test_a_box_is_right_where_it_overlaps_by_more_than_half() -> None:
    wanted = (0.0, 0.0, 1.0, 0.5)
    found = [wanted, (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.9), (0.5, 0.5, 1.0, 1.0), None]
    overlaps = box_overlaps(found, [wanted] * 5)
    assert overlaps.tolist() == pytest.approx([1, 0.5, 0.5 / 0.9, 0, 0])
    assert located(overlaps).tolist() == [1, 0, 1, 0, 0]
    assert box_overlaps([], []).tolist() == []


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where each artefact lies under its name."""
    for module in (shikra, artefacts):
        monkeypatch.setattr(module, "ensure", lambda name: tmp_path / name)
    monkeypatch.setattr(shikra, "digest_of", lambda name: f"digest of {name}")
    return tmp_path


def published(folder: Path, vocabulary: Path, tokens: int = 32003, projector: bool = True) -> dict[str, Tensor]:
    """A folder as `comneck weights import shikra` leaves it; gives back its tensors."""
    model = tiny_llm(width=16, layers=1, vocabulary=tokens).model
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if projector:
        tensors["model.mm_projector.weight"] = torch.randn(16, CLIP_WIDTH)
        tensors["model.mm_projector.bias"] = torch.randn(16)
    save_file(tensors, folder / "model.safetensors")
    return tensors


def load(spec: BackendSpec) -> Shikra:
    profile: Any = SimpleNamespace()
    return Shikra.load(spec, profile, CPU)


def test_the_published_model_brings_projector_and_ends_with_it(home: Path, vocabulary: Path) -> None:
    tensors = published(home / "shikra", vocabulary)
    backend = load(BackendSpec("shikra", "shikra", prompt="vicuna-v1.1"))
    for name in ("weight", "bias"):
        assert torch.equal(getattr(backend.connector.mm_projector, name), tensors[f"model.mm_projector.{name}"])
    assert torch.equal(backend.connector.ends, tensors["model.embed_tokens.weight"][[32001, 32002]])
    assert backend.connector(photo()[None]).shape == (1, 2 + GRID**2, 16)
    assert backend.digests == {"llm": "digest of shikra"}
    texts, finished = whole(backend.write([Question((photo(), "the dog"), "box")], Generation(max_tokens=4)))
    assert (len(texts), list(finished)) == (1, ["length"])


def test_a_language_model_without_projector_or_image_tokens_is_no_shikra(home: Path, vocabulary: Path) -> None:
    published(home / "other", vocabulary, projector=False)
    with pytest.raises(WeightsUnavailable, match=r"other is no Shikra: it has 32003 tokens and of .* nothing"):
        load(BackendSpec("shikra", "other", prompt="vicuna-v1.1"))
    published(home / "base", vocabulary, tokens=32000)
    with pytest.raises(WeightsUnavailable, match="base is no Shikra: it has 32000 tokens"):
        load(BackendSpec("shikra", "base", prompt="vicuna-v1.1"))


def test_a_small_connector_is_what_was_trained(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = small()
    metadata = {"config": json.dumps(trained.connector.config)}
    save_tensors(home / "connector", trained.connector.state_dict(), "float32", metadata)
    llm = tiny_llm()
    monkeypatch.setattr(shikra.LanguageModel, "load", lambda folder, device, dtype: llm)
    backend = load(BackendSpec("shikra", "llm", connector="connector", prompt="chatml"))
    question = Question((photo(), "where is the dog?"), "box")
    generation = Generation(max_tokens=12)
    assert whole(backend.write([question], generation)) == whole(trained.write([question], generation))
    assert backend.digests == {"llm": "digest of llm", "connector": "digest of connector"}


def test_the_paper_profile_pads_photos_for_shikra_alone() -> None:
    profile = get_profile("vit-l-14")
    assert profile.preparation_for("shikra").fit == "pad"
    assert profile.preparation_for("llama-adapter").fit == "crop"
