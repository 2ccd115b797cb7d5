"""The codec's walk from pixels to bytes and back, on a small network with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.bitstream import Bitstream
from shared.codecs.artefact import check_tensors, read_artefact
from shared.codecs.codec import Codec
from shared.codecs.elic import Elic, ElicConfig, checkerboard
from shared.codecs.entropy import LARGEST_SYMBOL, TOTAL, SymbolReader, SymbolWriter, Tables
from shared.codecs.exact import KERNELS, Kernel
from shared.codecs.interface import Pass
from shared.errors import BadBitstream, BadInput, ProfileMismatch, TooLarge
from shared.images import Photo
from shared.weights.digest import load_tensors, read_metadata, save_tensors
from training.codec import TrainedCodec, save_codec

TINY = {"N": 16, "M": 24, "groups": (4, 4, 4, 4, 8)}


def trained(layout: str = "chandelier") -> TrainedCodec:
    """Random weights, whose latents are large enough to be worth sending."""
    torch.manual_seed(0)
    codec = TrainedCodec(Elic(ElicConfig(**TINY, layout=layout)), (0.001, 0.004)).eval()
    with torch.no_grad():
        codec.network.g_a[-2].weight.mul_(40)
    return codec


@pytest.fixture(scope="module", params=["chandelier", "official"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    save_codec(trained(request.param), path)
    return path


@pytest.fixture(scope="module")
def codec(path: Path) -> Codec:
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
    assert torch.equal(decoded.y_hat, codec.quantise(codec.analyse(photo), 2))
    assert decoded.original_size == (640, 480)


def test_what_is_decoded_is_near_what_the_network_in_floats_says(codec: Codec, photo: Photo) -> None:
    y = codec.hyper(codec.analyse(photo), 2).y
    medians = codec.path.medians / 128

    def code(step: Pass) -> torch.Tensor:
        return (y[:, step.channels] - step.mean).round() + step.mean

    with torch.inference_mode():
        z_hat = (codec.network.h_a(y) - medians[:, None, None]).round() + medians[:, None, None]
        y_hat = codec.network.walk(z_hat, code) * codec._inverse_gains[1, :, None, None]
    exact = codec.quantise(codec.analyse(photo), 2)
    assert y_hat.abs().max() > 1
    assert (exact - y_hat).abs().mean() < 0.02


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_writes_and_reads_the_same_bytes(
    kernel: Kernel, path: Path, codec: Codec, photo: Photo, bitstream: Bitstream
) -> None:
    other = Codec(read_artefact(path), kernel=kernel)
    analysis = codec.hyper(codec.analyse(photo), 2)
    assert other.write(analysis)[0].payload == bitstream.payload
    assert torch.equal(other.decode(bitstream).y_hat, codec.decode(bitstream).y_hat)


def test_photos_decoded_together_are_those_decoded_alone(codec: Codec, photo: Photo) -> None:
    mirrored = Photo(photo.pixels[:, ::-1].copy(), (1, 1))
    streams = [codec.encode(photo, "d1", 1), codec.encode(mirrored, "d1", 2), codec.encode(photo, "d2", 2)]
    for together, stream in zip(codec.decode_all(streams), streams, strict=True):
        alone = codec.decode(stream)
        assert torch.equal(together.y_hat, alone.y_hat)
        assert together.original_size == alone.original_size


def test_a_better_quality_is_larger(codec: Codec, photo: Photo) -> None:
    assert len(codec.encode(photo, "d1", 1)) < len(codec.encode(photo, "d1", 2))


def test_a_quality_that_the_codec_has_not_is_refused(codec: Codec, photo: Photo) -> None:
    with pytest.raises(BadInput, match="no quality 3; it has 1, 2"):
        codec.encode(photo, "d1", 3)


def test_a_picture_over_the_limit_is_refused_before_anything_is_allocated(codec: Codec, bitstream: Bitstream) -> None:
    with pytest.raises(TooLarge, match=r"192x128 pixels; the limit is 20,000"):
        codec.decode(bitstream, max_pixels=20_000)
    with pytest.raises(TooLarge):
        codec.decode(replace(bitstream, height=255 * 64, width=255 * 64))


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


def test_tensors_that_are_not_the_codecs_are_listed_one_by_one(path: Path, tmp_path: Path) -> None:
    tensors = load_tensors(path)
    del tensors["g_a.0.bias"]
    tensors["g_a.99.weight"] = torch.zeros(2)
    tensors["h_a.0.weight"] = torch.zeros(3, 3)
    save_tensors(tmp_path / "wrong.safetensors", tensors, metadata=read_metadata(path))
    with pytest.raises(BadInput) as refusal:
        read_artefact(tmp_path / "wrong.safetensors")
    assert "3 tensors are wrong" in str(refusal.value)
    for said in (
        "g_a.0.bias is missing",
        "g_a.99.weight is not known",
        "h_a.0.weight is (3, 3) instead of (16, 24, 3, 3)",
    ):
        assert said in str(refusal.value)


def test_integers_that_could_overflow_are_refused(path: Path, tmp_path: Path) -> None:
    tensors = load_tensors(path)
    tensors["exact.h_s.0.bias"] = torch.full_like(tensors["exact.h_s.0.bias"], 2**31 - 1)
    save_tensors(tmp_path / "wrong.safetensors", tensors, metadata=read_metadata(path))
    with pytest.raises(BadInput, match="32 bits"):
        read_artefact(tmp_path / "wrong.safetensors")


def test_a_table_that_is_no_distribution_is_refused(path: Path, tmp_path: Path) -> None:
    tensors = load_tensors(path)
    tensors["tables.y.frequencies"][0] += 1
    save_tensors(tmp_path / "wrong.safetensors", tensors, metadata=read_metadata(path))
    with pytest.raises(BadInput, match="do not sum to 16,777,216"):
        read_artefact(tmp_path / "wrong.safetensors")


def test_the_digest_names_what_decoding_depends_on(tmp_path: Path) -> None:
    codec = trained()
    digests = []
    for name, trainable in (("lean", False), ("trainable", True)):
        save_codec(codec, tmp_path / name, trainable)
        digests.append(read_artefact(tmp_path / name).digest)
    assert digests[0] == digests[1]
    with torch.no_grad():
        codec.network.h_s[0].weight.mul_(1.5)
    save_codec(codec, tmp_path / "other")
    assert read_artefact(tmp_path / "other").digest != digests[0]


def test_training_can_go_on_from_a_trainable_artefact(tmp_path: Path) -> None:
    codec = trained()
    save_codec(codec, tmp_path / "codec")
    artefact = read_artefact(tmp_path / "codec")
    shapes = {name: value.shape for name, value in codec.network.state_dict().items()}
    check_tensors("network", shapes, artefact.network.state_dict())
    torch.testing.assert_close(artefact.network.h_s[0].weight, codec.network.h_s[0].weight, atol=1e-3, rtol=1e-3)
    assert artefact.bottleneck.keys() >= {"quantiles", "matrices.0"}


def test_anchors_are_the_positions_of_even_sum() -> None:
    assert checkerboard(2, 3, torch.device("cpu")).tolist() == [[True, False, True], [False, True, False]]


@pytest.fixture
def tables() -> Tables:
    """Two tables over -1, 0, 1 and over 0, 1, each with an escape."""
    frequencies = np.array(
        [5_000_000, 5_000_000, 5_000_000, TOTAL - 15_000_000, TOTAL // 2, TOTAL // 2 - 9, 9], np.int32
    )
    tables = Tables(frequencies, np.array([4, 3], np.int32), np.array([-1, 0], np.int32))
    tables.check()
    return tables


def test_symbols_outside_a_table_come_back_too(tables: Tables) -> None:
    symbols = np.array([0, 1, -1, 7, LARGEST_SYMBOL, -LARGEST_SYMBOL, 1, 0], np.int32)
    indexes = np.array([0, 1, 0, 1, 0, 1, 1, 0], np.int32)
    writer = SymbolWriter()
    writer.write(symbols, indexes, tables)
    writer.write(symbols[::-1].copy(), indexes, tables)
    reader = SymbolReader(writer.payload())
    assert reader.read(indexes, tables).tolist() == symbols.tolist()
    assert reader.read(indexes, tables).tolist() == symbols[::-1].tolist()


def test_a_payload_costs_less_than_a_byte_over_its_information(tables: Tables) -> None:
    random = np.random.default_rng(0)
    for count in (1, 10, 100, 20_000):
        symbols = random.choice([-1, 0, 1], size=count).astype(np.int32)
        writer = SymbolWriter()
        writer.write(symbols, np.zeros(count, np.int32), tables)
        payload = writer.payload()
        assert len(payload) < count * -np.log2(5_000_000 / TOTAL) / 8 + 1
        assert SymbolReader(payload).read(np.zeros(count, np.int32), tables).tolist() == symbols.tolist()


def test_nothing_written_is_no_bytes() -> None:
    assert SymbolWriter().payload() == b""
