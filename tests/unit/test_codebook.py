"""The codebook as a file, from the published assets, and made from photos."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import BadInput, WeightsUnavailable
from shared.weights.codebook import Codebook, codebook_from_published
from shared.weights.digest import save_tensors, tensors_digest
from training.codebook import make_codebook, of_other_classes
from training.photos import Entry

WORDS = ("dog", " a dog", "żółw", "", "▁the", "cat")


def places(words: int = len(WORDS), width: int = 8) -> Tensor:
    return torch.randn(words, width, generator=torch.Generator().manual_seed(0))


def published(folder: Path, words: object, embedding: object) -> tuple[Path, Path]:
    np.save(folder / "global_vocabulary.npy", words)
    torch.save(embedding, folder / "global_codebook_embedding.pth")
    return folder / "global_vocabulary.npy", folder / "global_codebook_embedding.pth"


def test_a_codebook_returns_from_its_file(tmp_path: Path) -> None:
    Codebook(WORDS, places(), count=3).save(tmp_path / "c.safetensors", clip="some-clip")
    found = Codebook.load(tmp_path / "c.safetensors")
    assert (found.words, found.count, found.centre) == (WORDS, 3, None)
    assert torch.equal(found.places, places())


def test_a_centre_is_kept_and_places_may_be_stored_small(tmp_path: Path) -> None:
    words, centre = tuple(map(str, range(1000))), torch.full((8,), 0.5)
    Codebook(words, places(1000), 21, centre).save(tmp_path / "c.safetensors", "int8")
    found = Codebook.load(tmp_path / "c.safetensors")
    assert found.words == words
    assert torch.equal(found.centre, centre)
    torch.testing.assert_close(found.places, places(1000), atol=0.02, rtol=0)
    assert (tmp_path / "c.safetensors").stat().st_size < 1000 * (8 + 4 + 4) + 1000


def test_words_are_part_of_what_names_a_codebook(tmp_path: Path) -> None:
    Codebook(("cat", "dog"), places(2), 1).save(tmp_path / "a.safetensors")
    Codebook(("cat", "dot"), places(2), 1).save(tmp_path / "b.safetensors")
    assert tensors_digest(tmp_path / "a.safetensors") != tensors_digest(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"words": WORDS[:5]}, r"5 words, but their places are \(6, 8\)"),
        ({"places": places().flatten()}, r"places are \(48,\)"),
        ({"places": places().fill_(float("nan"))}, "not all finite"),
        ({"places": torch.zeros(6, 8, dtype=torch.int64)}, "not all finite"),
        ({"centre": torch.zeros(7)}, r"the centre is \(7,\), the places \(6, 8\)"),
        ({"count": 7}, "7 words are to describe a photo; there are 6"),
        ({"count": 0}, "0 words are to describe a photo"),
        ({"words": (*WORDS[:5], "c\0t")}, "zero byte"),
    ],
)
def test_what_does_not_fit_together_is_no_codebook(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        Codebook(**{"words": WORDS, "places": places(), "count": 3, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"codebook": places()}, {"config": '{"count": 3}'}),
        ({"words": torch.zeros(6, dtype=torch.uint8)}, {"config": '{"count": 3}'}),
        ({"codebook": places(), "words": torch.zeros(6, dtype=torch.uint8)}, {}),
        ({"codebook": places(), "words": torch.zeros(6, dtype=torch.uint8)}, {"config": "count 3"}),
        ({"codebook": places(), "words": torch.zeros(5, dtype=torch.uint8)}, {"config": '{"count": 3}'}),
        ({"codebook": places(), "words": torch.full((6,), 255, dtype=torch.uint8)}, {"config": '{"count": 3}'}),
    ],
)
def test_another_file_is_no_codebook(tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_tensors(tmp_path / "c.safetensors", tensors, "float32", metadata)
    with pytest.raises(WeightsUnavailable, match=r"c\.safetensors is no codebook"):
        Codebook.load(tmp_path / "c.safetensors")


@pytest.mark.parametrize("kind", [np.str_, object])
def test_published_words_are_read_however_they_were_saved(tmp_path: Path, kind: type) -> None:
    paths = published(tmp_path, np.array(WORDS, dtype=kind), torch.nn.Parameter(places().half()))
    found = codebook_from_published(*paths, count=3)
    assert (found.words, found.count, found.centre) == (WORDS, 3, None)
    assert torch.equal(found.places, places().half().float())


def test_a_vocabulary_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "it ran"),)

    paths = published(tmp_path, np.array([Hostile()], dtype=object), places(1))
    with pytest.raises(BadInput, match=r"it would run posix\.mkdir"):
        codebook_from_published(*paths, count=1)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (np.array(["cat", 7, "dog"] * 2, dtype=object), "holds a int among its words"),
        (np.arange(6), "holds a int among its words"),
        (np.array(WORDS[:5]), "5 words, but their places"),
    ],
)
def test_a_vocabulary_of_other_things_is_refused(tmp_path: Path, words: object, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        codebook_from_published(*published(tmp_path, words, places()), count=3)


@pytest.mark.parametrize("length", [0, 5, 60, 130, -1])
def test_a_vocabulary_cut_anywhere_is_refused(tmp_path: Path, length: int) -> None:
    vocabulary, embedding = published(tmp_path, np.array(WORDS, dtype=object), places())
    vocabulary.write_bytes(vocabulary.read_bytes()[:length])
    with pytest.raises(BadInput, match=r"global_vocabulary\.npy cannot be read"):
        codebook_from_published(vocabulary, embedding, count=3)


def test_a_vocabulary_that_claims_more_than_its_file_has_is_refused(tmp_path: Path) -> None:
    class Large:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return np.core.multiarray._reconstruct, (np.ndarray, (10**8,), b"f")  # type: ignore[attr-defined]

    paths = published(tmp_path, np.array([Large()], dtype=object), places(1))
    (tmp_path / "global_vocabulary.npy").write_bytes(
        paths[0].read_bytes().split(b"\n")[0] + b"\n" + pickle.dumps(Large(), protocol=3)
    )
    with pytest.raises(BadInput, match=r"100,000,000 words in \d+ bytes"):
        codebook_from_published(*paths, count=1)


def test_an_embedding_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds a dict instead of a tensor"):
        codebook_from_published(*published(tmp_path, np.array(WORDS), {"weight": places()}), count=3)
    with pytest.raises(BadInput, match="is no file"):
        codebook_from_published(tmp_path / "global_vocabulary.npy", tmp_path / "missing.pth", count=3)


def entry(*captions: str, label: str | None = None, wnid: str | None = None) -> Entry:
    return Entry(Path("photo.png"), captions=captions, label=label, wnid=wnid)


def test_a_word_lies_where_the_photos_lie_that_it_is_said_of() -> None:
    entries = [
        entry("A dog runs.", "The dog"),
        entry("a dog"),
        entry("a red car"),
        entry(label="race_car"),
    ]
    features = torch.tensor([[3.0, 0.1, 0], [3.0, -0.1, 0], [0, 0.1, 2.0], [0, -0.1, 2.0]])
    codebook = make_codebook(entries, features, least=2, count=2)
    assert codebook.words == ("a", "car", "dog")
    a, car, dog = codebook.places
    assert codebook.centre is not None
    dogs, cars = (torch.nn.functional.normalize(row, dim=0) - codebook.centre for row in (features[0], features[2]))
    assert torch.cosine_similarity(dog, dogs, dim=0) > 0.95 > 0 > torch.cosine_similarity(dog, cars, dim=0)
    assert torch.cosine_similarity(car, cars, dim=0) > 0.95
    assert a.norm() < 0.5 * dog.norm()  # said of anything, so near nothing


def test_without_words_there_is_no_codebook() -> None:
    with pytest.raises(BadInput, match="no word is said of 2 photos"):
        make_codebook([entry("a dog"), entry("the cat")], torch.eye(2), count=1)


def test_photos_of_a_tested_class_are_left_out_by_name_and_by_wordnet_id() -> None:
    train = [
        entry("a zebra crossing"),
        entry(label="Race_Car"),
        entry(label="crane", wnid="n01"),
        entry(label="crane", wnid="n02"),
        entry(label="ox"),
    ]
    test = [entry(label="race car"), entry(label="lifting device", wnid="n02"), entry("an ox")]
    assert of_other_classes(train, test) == [0, 2, 4]
