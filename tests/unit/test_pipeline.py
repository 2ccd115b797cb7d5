"""Which codec and neck a bitstream goes through, and what is served where not all weights are there. All scripted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cloud_server import pipeline as module
from cloud_server.pipeline import Entrance, Pipeline, load_entrances
from shared.bitstream import Bitstream
from shared.codecs.codec import Codec, Latents
from shared.errors import UnknownName, WeightsUnavailable
from shared.profiles import Profile, get_profile

CPU = torch.device("cpu")


class ScriptedCodec:
    """Decodes to the number that is the payload's length."""

    M = 192

    def __init__(self, path: Path = Path("codec")) -> None:
        self.digest = f"digest of {path.name}"
        self.qualities = (1, 2, 3, 4)
        self.batches: list[int] = []

    def decode_all(self, bitstreams: Sequence[Bitstream]) -> list[Latents]:
        self.batches.append(len(bitstreams))
        return [Latents(torch.full((1, 1, 1, 1), float(len(one.payload))), (1, 1)) for one in bitstreams]


class ScriptedNeck:
    """Adds a number to the latents."""

    def __init__(self, *sizes: int, plus: float = 0) -> None:
        self.sizes, self.plus = sizes, plus

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass

    def eval(self) -> ScriptedNeck:
        return self

    def requires_grad_(self, required: bool) -> ScriptedNeck:
        return self

    def to(self, device: torch.device) -> ScriptedNeck:
        return self

    def __call__(self, y_hat: Tensor) -> Tensor:
        return y_hat.flatten(1) + self.plus


def entrance(plus: float, name: str) -> Entrance:
    return Entrance(ScriptedCodec(Path(name)), ScriptedNeck(plus=plus), f"neck of {name}")  # type: ignore[arg-type]


def made_of(entrances: dict[int, Entrance]) -> Pipeline:
    tower: Any = None
    return Pipeline(get_profile("small"), entrances, tower, {}, CPU)


@pytest.fixture
def photo(bitstream: Bitstream) -> Callable[[int, int], Bitstream]:
    return lambda quality, size: replace(bitstream, quality=quality, payload=bytes(size))


def test_each_bitstream_takes_its_qualitys_way_and_keeps_its_place(photo: Callable[[int, int], Bitstream]) -> None:
    low, high = entrance(0.25, "low"), entrance(0.5, "high")
    pipeline = made_of({1: low, 2: low, 4: high})
    tokens = pipeline.enter([photo(4, 10), photo(1, 20), photo(2, 30), photo(4, 40), photo(1, 50)])
    assert tokens[:, 0].tolist() == [10.5, 20.25, 30.25, 40.5, 50.25]


def test_bitstreams_of_one_codec_are_decoded_at_once(photo: Callable[[int, int], Bitstream]) -> None:
    low, high = entrance(0, "low"), entrance(0, "high")
    made_of({1: low, 2: low, 4: high}).enter([photo(4, 1), photo(1, 1), photo(2, 1), photo(4, 1), photo(1, 1)])
    batches: list[Any] = [low.codec, high.codec]
    assert [codec.batches for codec in batches] == [[3], [2]]


def test_digests_name_the_models_that_took_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "digest_of", lambda name: f"digest of {name}")
    low, high = entrance(0, "low"), entrance(0, "high")
    pipeline = made_of({1: low, 2: low, 4: high})
    backend: Any = SimpleNamespace(digests={"llm": "11a"})
    text = {"clip": "digest of clip-vit-b-16", "llm": "11a"}
    assert pipeline.digests(backend, []) == text
    assert pipeline.digests(backend, [2, 1]) == text | {"codec": "digest of low", "neck": "neck of low"}
    both = text | {"codec": "digest of low digest of high", "neck": "neck of low neck of high"}
    assert pipeline.digests(backend, [1, 4]) == both
    assert pipeline.digests(backend) == both


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception | None]:
    """By artefact's name: None, or why it is not to be had. Others are not known."""
    there: dict[str, Exception | None] = {}

    def ensure(name: str) -> Path:
        problem = there.get(
            name, UnknownName(f"{name} is not on this machine: run `comneck weights import {name}.tar`")
        )
        if problem:
            raise problem
        return Path(name)

    monkeypatch.setattr(module, "ensure", ensure)
    monkeypatch.setattr(module, "digest_of", lambda name: f"digest of {name}")
    monkeypatch.setattr(module, "load_tensors", lambda path: {})
    monkeypatch.setattr(module, "TransformNeck", ScriptedNeck)
    monkeypatch.setattr(Codec, "load", lambda path: ScriptedCodec(path))
    return there


@pytest.fixture
def paper() -> Profile:
    return get_profile("vit-l-14")


Installed = dict[str, Exception | None]


def test_qualities_of_the_same_weights_share_them(installed: Installed) -> None:
    installed.update({"small-codec": None, "small-neck-d1": None})
    entrances = load_entrances(get_profile("small"), CPU)
    assert list(entrances) == [1, 2, 3, 4]
    assert len(set(entrances.values())) == 1


def test_each_quality_has_its_own_weights_where_they_differ(installed: Installed, paper: Profile) -> None:
    installed.update({f"comneck-{part}-d1-{quality}": None for part in ("codec", "neck") for quality in (1, 2, 3, 4)})
    entrances = load_entrances(paper, CPU)
    assert [one.codec.digest for one in entrances.values()] == [f"digest of comneck-codec-d1-{q}" for q in (1, 2, 3, 4)]
    assert [one.neck_digest for one in entrances.values()] == [f"digest of comneck-neck-d1-{q}" for q in (1, 2, 3, 4)]
    neck: Any = entrances[1].neck
    assert neck.sizes == (192, 16, 1024, 16)


def test_a_quality_without_weights_is_left_out_with_one_line_that_says_what_to_do(
    installed: Installed, paper: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    installed.update({"comneck-codec-d1-2": None, "comneck-neck-d1-2": None, "comneck-codec-d1-4": None})
    installed["comneck-neck-d1-4"] = WeightsUnavailable("the neck is damaged")
    with caplog.at_level(logging.WARNING):
        assert list(load_entrances(paper, CPU)) == [2]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0].startswith("quality 1 of profile vit-l-14 is left out: comneck-codec-d1-1 is not on this machine")
    assert "comneck weights import" in lines[0]
    assert lines[2] == "quality 4 of profile vit-l-14 is left out: the neck is damaged"


def test_a_quality_that_the_codec_has_not_is_left_out(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed.update({"small-codec": None, "small-neck-d1": None})
    codec = ScriptedCodec()
    codec.qualities = (1, 2)
    monkeypatch.setattr(Codec, "load", lambda path: codec)
    assert list(load_entrances(get_profile("small"), CPU)) == [1, 2]
    assert caplog.records[0].getMessage().endswith("left out: small-codec has no quality 3; it has 1, 2")


@pytest.mark.usefixtures("installed")
def test_a_profile_without_any_quality_is_an_error_that_says_what_to_do(
    paper: Profile, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(WeightsUnavailable, match=r"'vit-l-14' can be decoded here: comneck-codec-d1-2 .*weights import"),
    ):
        load_entrances(paper, CPU)
    assert not caplog.records
