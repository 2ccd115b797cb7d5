"""Which codec encodes at which quality, and the best quality that fits into so many bytes. The codecs are scripted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_client import encoder as module
from edge_client.encoder import Encoder
from shared.bitstream import Bitstream, Scenario
from shared.codecs.codec import Codec
from shared.conversation import ServerProfile
from shared.errors import BadInput, ProfileMismatch, TooLarge, UnknownName, WeightsUnavailable
from shared.images import Photo
from shared.profiles import Profile, get_profile

SERVER = ServerProfile("small", {1: "00000001", 2: "00000001"}, "d1", 1, ("x",), 1, 1, 1, "9.9")


class ScriptedCodec:
    """Encodes at quality q in 100 q bytes."""

    def __init__(self, digest: int = 1) -> None:
        self.digest_bytes = digest.to_bytes(4, "big")
        self.analysed = 0

    def analyse(self, photo: Photo) -> str:
        self.analysed += 1
        return "latents"

    def encode(self, photo: Photo, scenario: Scenario, quality: int, y: str) -> Bitstream:
        assert y == "latents"
        size = (photo.height, photo.width)
        return Bitstream(scenario, quality, self.digest_bytes, *size, (1, 1), 0, bytes(100 * quality - 16))


@pytest.fixture
def photo() -> Photo:
    return Photo(np.zeros((256, 256, 3), np.uint8), (256, 256))


@pytest.fixture
def codecs(monkeypatch: pytest.MonkeyPatch) -> dict[str, ScriptedCodec | Exception]:
    """By artefact's name: what is on this machine. A test may add and replace."""
    there: dict[str, ScriptedCodec | Exception] = {"small-codec": ScriptedCodec()}

    def load(path: Path) -> ScriptedCodec:
        found = there[path.name]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr("shared.weights.store.ensure", Path)
    monkeypatch.setattr(Codec, "load", load)
    return there


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch, codecs: dict[str, ScriptedCodec | Exception]) -> Profile:
    """The profile `small`, its codec in an artefact for each quality; that of quality 4 is not to be had."""
    small = get_profile("small")
    profile = replace(small, codec=replace(small.codec, weights="codec-{quality}"))
    monkeypatch.setattr(module, "get_profile", lambda name: profile)
    codecs.update({f"codec-{quality}": ScriptedCodec(quality) for quality in (1, 2, 3)})
    codecs["codec-4"] = WeightsUnavailable("codec-4 is not installed")
    return profile


pytestmark = pytest.mark.usefixtures("codecs")
Codecs = dict[str, ScriptedCodec]


def test_a_photo_is_encoded_at_the_profiles_quality_unless_another_is_asked_for(photo: Photo) -> None:
    encoder = Encoder("small")
    assert encoder.encode(photo).quality == get_profile("small").quality == 3
    assert encoder.encode(photo, 1).quality == 1


def test_the_servers_own_quality_goes_before_the_profiles(photo: Photo) -> None:
    assert Encoder.for_server(SERVER).encode(photo).quality == SERVER.quality == 1


@pytest.mark.parametrize("quality", [0, 5, -1])
def test_a_quality_that_there_is_not_is_refused_with_those_there_are(photo: Photo, quality: int) -> None:
    with pytest.raises(BadInput, match=f"profile 'small' has no quality {quality}; it has 1, 2, 3, 4"):
        Encoder("small").encode(photo, quality)


def test_a_quality_that_the_server_does_not_decode_is_refused_with_those_it_does(photo: Photo) -> None:
    with pytest.raises(ProfileMismatch, match="does not decode quality 4; it decodes quality 1, 2 by codec 00000001"):
        Encoder.for_server(SERVER).encode(photo, 4)


def test_other_codec_weights_than_the_servers_are_a_mismatch(photo: Photo) -> None:
    server = replace(SERVER, qualities={1: "00000001", 2: "00c0ffee"})
    encoder = Encoder.for_server(server)
    assert encoder.encode(photo, 1).quality == 1
    with pytest.raises(ProfileMismatch, match=r"quality 2 is 00c0ffee, this client's is 00000001: .* comneck, 9\.9"):
        encoder.encode(photo, 2)


def test_a_profile_that_the_client_does_not_know_is_a_mismatch() -> None:
    with pytest.raises(
        ProfileMismatch, match=r"speaks profile 'huge', this client knows small.*version of comneck, 9\.9"
    ):
        Encoder.for_server(replace(SERVER, profile="huge"))


@pytest.mark.parametrize(("max_bytes", "quality"), [(100, 1), (199, 1), (200, 2), (399, 3), (400, 4), (9999, 4)])
def test_the_best_quality_that_fits_is_taken(photo: Photo, max_bytes: int, quality: int) -> None:
    bitstream = Encoder("small").encode(photo, max_bytes=max_bytes)
    assert (bitstream.quality, len(bitstream)) == (quality, 100 * quality)


def test_a_quality_beside_a_size_is_the_best_that_may_be_taken(photo: Photo) -> None:
    encoder = Encoder("small")
    assert encoder.encode(photo, 2, 9999).quality == 2
    assert encoder.encode(photo, 15, 9999).quality == 4
    with pytest.raises(BadInput, match="no quality up to 0; there are 1, 2, 3, 4"):
        encoder.encode(photo, 0, 9999)


def test_only_what_the_server_decodes_is_tried(photo: Photo) -> None:
    assert Encoder.for_server(SERVER).encode(photo, max_bytes=9999).quality == 2


@pytest.mark.parametrize(("quality", "max_bytes"), [(None, 99), (3, 0), (1, -5)])
def test_where_nothing_fits_the_smallest_size_is_named(photo: Photo, quality: int | None, max_bytes: int) -> None:
    with pytest.raises(TooLarge, match=f"in {max_bytes} bytes: the smallest is quality 1 with 100 bytes"):
        Encoder("small").encode(photo, quality, max_bytes)


def test_a_photo_is_analysed_once_where_qualities_share_a_codec(photo: Photo, codecs: Codecs) -> None:
    assert Encoder("small").encode(photo, max_bytes=100).quality == 1
    assert codecs["small-codec"].analysed == 1


@pytest.mark.usefixtures("split")
def test_each_qualitys_own_codec_encodes_it_and_no_other_is_loaded(photo: Photo, codecs: Codecs) -> None:
    codecs.pop("codec-1")
    codecs.pop("codec-3")
    assert Encoder("small").encode(photo, 2).codec_digest == bytes([0, 0, 0, 2])


@pytest.mark.usefixtures("split")
def test_what_is_not_on_this_machine_is_passed_over_in_search_of_what_fits(photo: Photo, codecs: Codecs) -> None:
    encoder = Encoder("small")
    assert encoder.encode(photo, max_bytes=9999).quality == 3
    assert encoder.encode(photo, max_bytes=250).codec_digest == bytes([0, 0, 0, 2])
    assert [codecs[f"codec-{quality}"].analysed for quality in (1, 2, 3)] == [0, 1, 2]


@pytest.mark.usefixtures("split")
def test_a_codec_that_is_not_to_be_had_is_told_with_what_to_do(
    photo: Photo, codecs: dict[str, ScriptedCodec | Exception]
) -> None:
    with pytest.raises(WeightsUnavailable, match="codec-4 is not installed"):
        Encoder("small").encode(photo, 4)
    codecs.update({f"codec-{quality}": UnknownName(f"import codec-{quality}") for quality in (1, 2, 3)})
    with pytest.raises(WeightsUnavailable, match="codec-4 is not installed"):
        Encoder("small").encode(photo, max_bytes=9999)


def test_a_codec_is_loaded_once_and_not_before_it_is_needed(
    photo: Photo, codecs: Codecs, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []

    def load(path: Path) -> ScriptedCodec:
        loads.append(path)
        return codecs[path.name]

    monkeypatch.setattr(Codec, "load", load)
    encoder = Encoder("small")
    assert loads == []
    encoder.load()
    encoder.encode(photo, 1)
    encoder.encode(photo, max_bytes=9999)
    assert loads == [Path("small-codec")]


@pytest.mark.parametrize("kind", [str, Path, Path.read_bytes])
def test_a_photo_is_taken_as_path_bytes_or_pixels(kind: Callable[[Path], str | bytes], tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "photo.png"
    Image.new("RGB", (300, 200)).save(path)
    bitstream = Encoder("small").encode(kind(path))
    assert (bitstream.height, bitstream.width) == (256, 256)
