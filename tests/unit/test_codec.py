"""The codec's walk from pixels to bytes and back, on a small network with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.bitstream import Bitstream
from shared.codecs.codec import Codec
from shared.codecs.elic import Elic, ElicConfig, checkerboard
from shared.codecs.entropy import LARGEST_SYMBOL, SymbolReader, SymbolWriter, Tables
from shared.errors import BadBitstream, BadInput, ProfileMismatch
from shared.images import Photo
from training.codec import save_codec


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    torch.manual_seed(0)
    elic = Elic(ElicConfig(N=16, M=24, groups=(4, 4, 4, 4, 8)))
    with torch.no_grad():
        elic.net.g_a[-2].weight.mul_(40)  # latents large enough to be worth sending
        elic(torch.rand(1, 3, 64, 64))  # as after training: CompressAI's masked layers zero their weights in forward
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    save_codec(elic, path)
    return Codec.load(path)


@pytest.fixture(scope="module")
def photo() -> Photo:
    rows, columns = np.mgrid[:128, :192]
    pixels = np.stack([rows * 2, columns, (rows * columns) % 256], -1).astype(np.uint8)
    return Photo(pixels, (640, 480))


@pytest.fixture(scope="module")
def bitstream(codec: Codec, photo: Photo) -> Bitstream:
    return codec.encode(photo, "d1", 2)


def test_decoding_gives_the_latents_that_encoding_quantised(codec: Codec, photo: Photo, bitstream: Bitstream) -> None:
    decoded = codec.decode(Bitstream.parse(bytes(bitstream)))
    pixels = torch.from_numpy(photo.pixels.copy()).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        y_hat, bits = codec.transforms.quantise(codec.transforms.g_a(pixels))
    assert decoded.y_hat.abs().max() > 1
    torch.testing.assert_close(decoded.y_hat, y_hat, atol=1e-4, rtol=1e-4)
    assert decoded.original_size == (640, 480)
    assert (
        8 * len(bitstream.payload) < 1.1 * float(bits) + 64
    )  # random tables fit badly; the shipped codec's test is stricter


def test_encoding_is_repeatable(codec: Codec, photo: Photo, bitstream: Bitstream) -> None:
    assert bytes(codec.encode(photo, "d1", 2)) == bytes(bitstream)


def test_every_flipped_bit_of_the_payload_is_found(codec: Codec, bitstream: Bitstream) -> None:
    for place in range(0, 8 * len(bitstream.payload), 97):
        payload = bytearray(bitstream.payload)
        payload[place // 8] ^= 1 << place % 8
        with pytest.raises(BadBitstream):
            codec.decode(replace(bitstream, payload=bytes(payload)))


def test_a_stream_cut_anywhere_is_refused(codec: Codec, bitstream: Bitstream) -> None:
    data = bytes(bitstream)
    for length in range(0, len(data), 41):
        with pytest.raises(BadBitstream):
            codec.decode(Bitstream.parse(data[:length]))


def test_a_stream_of_another_codec_is_refused_by_name(codec: Codec, bitstream: Bitstream) -> None:
    with pytest.raises(ProfileMismatch, match=r"00010203.*same profile"):
        codec.decode(replace(bitstream, codec_digest=bytes(range(4))))


def test_a_photo_that_does_not_fit_the_strides_is_refused(codec: Codec) -> None:
    with pytest.raises(BadInput, match="multiples of 64"):
        codec.encode(Photo(np.zeros((100, 128, 3), np.uint8), (128, 100)), "d1", 2)


def test_weights_of_other_sizes_are_refused_with_what_is_wrong(codec: Codec) -> None:
    weights = codec.transforms.state_dict()
    with pytest.raises(BadInput, match=r"net\.g_a\.0\.bias, net\.g_a\.0\.weight"):
        Elic(ElicConfig(N=32, M=24, groups=(4, 4, 4, 4, 8))).load_artefact(weights)


def test_the_digest_names_the_weights_and_not_the_file(codec: Codec, tmp_path: Path) -> None:
    save_codec(codec.transforms, tmp_path / "again.safetensors")
    assert Codec.load(tmp_path / "again.safetensors").digest == codec.digest


def test_anchors_are_the_positions_of_even_sum() -> None:
    assert checkerboard(2, 3, torch.device("cpu")).tolist() == [[True, False, True], [False, True, False]]


@pytest.fixture
def tables() -> Tables:
    """Two tables over -1, 0, 1 and over 0, 1, each with an escape."""
    cdf = np.array([0, 20000, 40000, 60000, 2**16, 0, 2**15, 2**16 - 100, 2**16], np.int32)
    return Tables(cdf, np.array([5, 4], np.int32), np.array([-1, 0], np.int32))


def test_symbols_outside_a_table_come_back_too(tables: Tables) -> None:
    symbols = np.array([0, 1, -1, 7, LARGEST_SYMBOL, -LARGEST_SYMBOL, 1, 0], np.int32)
    indexes = np.array([0, 1, 0, 1, 0, 1, 1, 0], np.int32)
    writer = SymbolWriter()
    writer.write(symbols, indexes, tables)
    writer.write(symbols[::-1].copy(), indexes, tables)
    reader = SymbolReader(writer.payload())
    assert reader.read(indexes, tables).tolist() == symbols.tolist()
    assert reader.read(indexes, tables).tolist() == symbols[::-1].tolist()


def test_a_payload_costs_no_more_than_its_entropy_and_a_word(tables: Tables) -> None:
    random = np.random.default_rng(0)
    symbols = random.choice([-1, 0, 1], size=20000, p=[20000 / 2**16, 20000 / 2**16, 25536 / 2**16]).astype(np.int32)
    writer = SymbolWriter()
    frequencies = np.array([20000, 20000, 20000]) / 2**16
    writer.write(symbols, np.zeros(len(symbols), np.int32), tables)
    bits = -np.log2(frequencies[symbols + 1]).sum()
    assert len(writer.payload()) <= bits / 8 + 8
