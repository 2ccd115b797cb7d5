"""docs/bitstream.md is enough: a decoder written from it alone (slow_decoder.py) gets what Codec.decode gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from slow_decoder import Artefact, RangeDecoder, Refused, decode
from streams.make import FOLDER, SHIPPED, y_hat_hash

from benchmarks.tiny import GAINS, noise, write_tiny_codec
from shared.bitstream import Bitstream, Extension
from shared.codecs.codec import Codec
from shared.codecs.entropy import SymbolReader
from shared.errors import BadBitstream


@pytest.fixture(scope="module", params=["chandelier", "official"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "codec.safetensors"
    write_tiny_codec(path, request.param)
    return path


@pytest.fixture(scope="module")
def codec(path: Path) -> Codec:
    return Codec.load(path)


@pytest.fixture(scope="module")
def artefact(path: Path) -> Artefact:
    return Artefact(path)


def test_the_digest_is_what_the_document_says(codec: Codec, artefact: Artefact) -> None:
    assert artefact.digest == codec.digest_bytes


@pytest.mark.parametrize("quality", GAINS)
@pytest.mark.parametrize("size", [(64, 64), (128, 192), (192, 64)])
def test_both_decoders_get_the_same_latents(
    codec: Codec, artefact: Artefact, size: tuple[int, int], quality: int
) -> None:
    bitstream = codec.encode(noise(*size), "d1", quality)
    decoded = decode(artefact, bytes(bitstream))
    assert bitstream.seal(decoded.symbols) == bitstream.check
    assert y_hat_hash(codec, bitstream) == decoded.hash()
    np.testing.assert_array_equal(decoded.values, codec.decode(bitstream).y_hat[0].numpy(), strict=True)


def test_both_decoders_skip_the_same_extensions(codec: Codec, artefact: Artefact) -> None:
    bitstream = codec.encode(noise(64, 64), "d2", 3)
    wanted = decode(artefact, bytes(bitstream))
    extended = replace(bitstream, extensions=(Extension(1, b"importance"), Extension(127, b"")))
    extended = replace(extended, check=extended.seal(wanted.symbols))
    np.testing.assert_array_equal(decode(artefact, bytes(extended)).y_hat, wanted.y_hat)
    codec.decode(Bitstream.parse(bytes(extended)))


@pytest.mark.parametrize("quality", [1, 4])
def test_both_decoders_agree_on_a_photo_of_the_shipped_codec(quality: int) -> None:
    data = (FOLDER / f"chelsea-{quality}.cnk").read_bytes()
    assert decode(Artefact(SHIPPED), data).hash() == y_hat_hash(Codec.load(SHIPPED), Bitstream.parse(data))


def test_both_range_decoders_read_the_same_from_any_bytes(codec: Codec, artefact: Artefact) -> None:
    random = np.random.default_rng(0)
    refused = 0
    for length in [*range(12), *[2000] * 100]:
        payload = random.integers(0, 256, length, np.uint8).tobytes()
        under = random.integers(0, len(artefact.y_tables), 300).astype(np.int32)
        slow, fast = RangeDecoder(payload), SymbolReader(payload)
        for _ in range(10):
            try:
                wanted = slow.read_pass(under, artefact.y_tables)
            except Refused:
                with pytest.raises(BadBitstream):
                    fast.read(under, codec.y_tables)
                refused += 1
                break
            np.testing.assert_array_equal(fast.read(under, codec.y_tables), wanted)
    assert 10 < refused < 100
