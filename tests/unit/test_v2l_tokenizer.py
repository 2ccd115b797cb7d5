"""Labels from examples: what photos become, which labels can be answered, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_llm import ByteTokenizer, tiny_llm
from torch import Tensor

from cloud_server.backends import Question
from cloud_server.backends import v2l_tokenizer as module
from cloud_server.backends.language_model import LanguageModel
from cloud_server.backends.v2l_tokenizer import LAYOUTS, Decoding, V2lTokenizer, nearest, union_table
from cloud_server.generation import whole
from shared.bitstream import Bitstream
from shared.conversation import Conversation, Generation
from shared.errors import BadInput, PromptTooLong, UnknownName, WeightsUnavailable
from shared.profiles import BackendSpec, get_profile
from shared.weights.codebook import Codebook

TOKENIZER = ByteTokenizer()
LABELS = ("cat", "catfish", "great_white_shark")


def codebook() -> Codebook:
    words = tuple(f"w{n}" for n in range(40))
    return Codebook(words, torch.randn(40, 8, generator=torch.Generator().manual_seed(0)), count=5)


def backend(decoding: Decoding = "likeliest", layout: str = "list", llm: LanguageModel | None = None) -> V2lTokenizer:
    return V2lTokenizer(codebook(), llm or tiny_llm(), LAYOUTS[layout], {}, decoding)


def photo(seed: int) -> Tensor:
    return torch.randn(17, 8, generator=torch.Generator().manual_seed(seed))


def question(seed: int, labels: tuple[str, ...] = LABELS) -> Question:
    examples = [part for i, label in enumerate(labels) for part in (photo(100 + i), label)]
    return Question((*examples, photo(seed)), "label")


def answers(given: V2lTokenizer, questions: list[Question], **generation: float) -> list[str]:
    texts, finished = whole(given.write(questions, Generation(**generation)))  # type: ignore[arg-type]
    assert set(finished) == {"stop"}
    return texts


def test_a_photo_is_its_cls_alone_however_long() -> None:
    one = photo(0)
    other = torch.cat([7 * one[:1], photo(1)[1:]])
    first, second = backend().describe([one, other])
    assert first == second
    assert len(first.split(", ")) == 5


def test_of_two_words_in_the_same_direction_the_one_of_the_photos_length_is_nearer() -> None:
    direction = torch.tensor([0.6, 0.8])
    places = torch.stack([3 * direction, direction, 0.2 * direction, torch.tensor([0.0, -1.0])])
    distances, indices = nearest(Codebook(tuple("abcd"), places, 4), 50 * direction[None])
    assert indices.tolist() == [[1, 2, 3, 0]]
    torch.testing.assert_close(distances[0, :2], torch.tensor([0.0, 0.64]))


def test_what_all_photos_have_in_common_is_taken_out_first() -> None:
    common = torch.tensor([0.0, 0.0, 0.9])
    places = torch.eye(3)
    photos = torch.tensor([[0.3, 0.0, 1.0], [0.0, 0.3, 1.0]])
    plain, centred = (nearest(Codebook(tuple("abc"), places, 1, centre), photos)[1] for centre in (None, common))
    assert plain.flatten().tolist() == [2, 2]
    assert centred.flatten().tolist() == [0, 1]


def test_the_likeliest_label_is_the_one_that_the_words_speak_for_most() -> None:
    given, llm = backend(), tiny_llm()
    asked = question(1)
    *shown, words = given.describe(asked.photos)
    examples = "".join(f"\nInput: {each}\nOutput: {label}\n" for each, label in zip(shown, LABELS, strict=True))

    @torch.inference_mode()
    def score(words: str, label: str) -> float:
        prompt = [256, *f"{examples}\nInput: {words}\nOutput:".encode()]
        ending = list(f" {label}".encode())
        logits = llm.model(torch.tensor([[*prompt, *ending]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return float(logits[range(len(ending)), ending].sum())

    gained = {label: score(words, label) - score("", label) for label in LABELS}
    best, second = sorted(gained.values(), reverse=True)[:2]
    assert best - second > 0.01
    assert answers(given, [asked]) == [max(gained, key=gained.__getitem__)]


def test_a_likeliest_answer_is_always_one_of_the_labels_and_photos_decide_which() -> None:
    labels = ("cat", "dog", "cow")
    said = set(answers(backend(), [question(seed, labels) for seed in range(12)]))
    assert said <= set(labels)
    assert len(said) > 1


@pytest.mark.parametrize("layout", ["list", "plain"])
def test_a_union_answer_has_at_each_place_what_a_label_has_there(layout: str) -> None:
    prefix = LAYOUTS[layout].label
    for said in answers(backend("union", layout), [question(seed) for seed in range(6)]):
        places = list(zip(*(f"{prefix}{label}".ljust(30, "\0") for label in LABELS), strict=True))
        written = f"{prefix}{said}\0"  # and there ends a label
        assert all(letter in place for letter, place in zip(written, places, strict=False))


def test_photos_are_labelled_side_by_side_as_alone() -> None:
    questions = [question(1), question(2, ("a", "b")), question(3, ("one", "two", "three", "four"))]
    for decoding in ("likeliest", "union"):
        given = backend(decoding)
        assert answers(given, questions) == [answers(given, [each])[0] for each in questions]


def test_a_label_may_stand_under_two_examples_and_the_photo_among_its_own() -> None:
    parts = (photo(1), "cat", photo(2), "cat", photo(3), "dog", photo(9), "dog", photo(9))
    for decoding in ("likeliest", "union"):
        assert answers(backend(decoding), [Question(parts, "label")])[0] in ("cat", "dog", "cog", "dat", "cot", "dag")


def test_labels_of_any_script_come_back_as_they_were_given() -> None:
    labels = ("żółw", "猫", "a  b", "it's 3.5 = x")
    assert set(answers(backend(), [question(seed, labels) for seed in range(8)])) <= set(labels)


def test_the_table_of_a_union_is_that_of_all_labels_at_each_place() -> None:
    table = union_table([[1, 2, 0], [1, 3, 4, 0]], 6)
    assert [row.nonzero().flatten().tolist() for row in table] == [[1], [2, 3], [0, 4], [0]]


def test_examples_that_exceed_the_language_models_context_are_refused() -> None:
    for decoding in ("likeliest", "union"):
        with pytest.raises(PromptTooLong, match="context of 64"):
            answers(backend(decoding, llm=tiny_llm(context=64)), [question(1)])


@pytest.fixture
def photos(bitstream: Bitstream) -> list[Bitstream]:
    return [replace(bitstream, check=number) for number in range(6)]


def test_examples_and_then_a_photo_are_taken(photos: list[Bitstream]) -> None:
    a, b, c, *_ = photos
    backend().check(Conversation((a, "cat", b, "Cat", c), task="label"))


def test_what_is_no_task_for_examples_is_refused_with_what_to_do(photos: list[Bitstream]) -> None:
    a, b, c, d, *_ = photos
    wrong = {
        (): "last comes the photo",
        (a, "cat", b, "dog"): "last comes the photo",
        ("cat", a, "dog", b, c): "last comes the photo",
        (a, b, "cat", "dog", c): "last comes the photo",
        (a, "cat", b, "dog", "bird"): "last comes the photo",
        (a, b, c): "last comes the photo",
        (a,): "fewer than two labels",
        (a, "cat", b): "fewer than two labels",
        (a, "cat", b, " ", c): "label is empty",
        (a, "cat", b, "dog", c, "cat", d): "two examples have the label 'cat'",
    }
    for parts, complaint in wrong.items():
        with pytest.raises(BadInput, match=complaint):
            backend().check(Conversation(parts, task="label"))


def test_an_unknown_decoding_is_named() -> None:
    with pytest.raises(UnknownName, match="no decoding named 'tree'; there are: likeliest, union"):
        backend("tree")  # type: ignore[arg-type]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the codebook of this machine lies; the language model is a tiny one."""
    path = tmp_path / "codebook.safetensors"
    monkeypatch.setattr(module, "ensure", lambda name: path)
    monkeypatch.setattr(module, "digest_of", lambda name: f"digest of {name}")
    monkeypatch.setattr(LanguageModel, "load", lambda *_: tiny_llm())
    return path


def test_options_and_layout_are_the_profiles(stored: Path) -> None:
    profile = get_profile("vit-l-14")
    spec = next(spec for spec in profile.backends if spec.name == "v2l-tokenizer")
    Codebook(tuple("abc"), torch.eye(3, 768), 2).save(stored)
    given = V2lTokenizer.load(spec, profile, torch.device("cpu"))
    assert (given.decoding, given.layout, given.needs.ln_post_times) == ("union", LAYOUTS["plain"], 1)
    assert given.digests == {"llm": "digest of llama-2-7b", "connector": "digest of v2l-codebook"}
    twice = V2lTokenizer.load(replace(spec, options={"ln_post_times": 2}), profile, torch.device("cpu"))
    assert (twice.decoding, twice.needs.ln_post_times) == ("likeliest", 2)


def test_another_clips_codebook_is_refused(stored: Path) -> None:
    codebook().save(stored)
    with pytest.raises(WeightsUnavailable, match="words in 8 dimensions, CLIP of profile 'small' has 512"):
        V2lTokenizer.load(BackendSpec("v2l-tokenizer", "llm", "words"), get_profile("small"), torch.device("cpu"))


def test_an_unknown_layout_is_named() -> None:
    with pytest.raises(UnknownName, match="no layout named 'chatml' for examples; there are: plain, list"):
        V2lTokenizer.load(
            BackendSpec("v2l-tokenizer", "llm", "words", "chatml"), get_profile("small"), torch.device("cpu")
        )
