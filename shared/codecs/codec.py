"""A codec ready for use: transforms, entropy path and tables, loaded from one artefact.

    Photo -> analyse -> y -> hyper -> Analysis -> write -> Bitstream -> decode -> Latents (y_hat)

What an encoder computes in floating point, g_a and h_a, decides which symbols are sent. What they mean is computed in
integers, so that any machine decodes what any other has encoded.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.bitstream import MAX_PIXELS, Bitstream, Scenario
from shared.codecs.artefact import Artefact, read_artefact
from shared.codecs.entropy import LARGEST_SYMBOL, SymbolReader, Symbols, SymbolWriter, Tables
from shared.codecs.exact import ONE, ExactConv, Kernel, best_kernel
from shared.codecs.interface import ExactPass
from shared.errors import BadBitstream, BadInput, ProfileMismatch, TooLarge
from shared.images import Photo

LATENT_STRIDE, HYPER_STRIDE = 16, 64  # pixels a side of one position of y, of z


@dataclass(frozen=True)
class Analysis:
    """What is about to be coded: y (B, M, H/16, W/16) with its quality's gain, z (B, N, H/64, W/64), float32."""

    y: Tensor
    z: Tensor


@dataclass(frozen=True)
class Coded:
    """One photo's payload, and the CRC-32 of its symbols."""

    payload: bytes
    check: int


@dataclass(frozen=True)
class Latents:
    """What the neck reads.

    Attributes:
        y_hat: (1, M, H/16, W/16) float32.
        original_size: (width, height) of the photo before preparation.
    """

    y_hat: Tensor
    original_size: tuple[int, int]


class Codec:
    """One codec with one set of weights, on one device.

    Args:
        kernel: how integers are multiplied; the fastest that proves itself on this device where left out.
    """

    def __init__(self, artefact: Artefact, device: torch.device | str = "cpu", kernel: Kernel | None = None) -> None:
        self.device = torch.device(device)
        self.digest, self.qualities = artefact.digest, artefact.qualities
        self.network = artefact.network
        self.N, self.M, self.stride = artefact.network.N, artefact.network.M, artefact.network.stride
        for transform in (self.network.g_a, self.network.h_a, self.network.g_s):
            transform.to(memory_format=torch.channels_last).to(self.device)
        self.path = artefact.path.to(self.device)
        self.kernel = kernel or best_kernel(self.device)
        for module in self.path.modules():
            if isinstance(module, ExactConv):
                module.use(self.kernel)
        self.z_tables, self.y_tables = artefact.z_tables, artefact.y_tables
        self._thresholds = artefact.thresholds.to(self.device)
        self._gains, self._inverse_gains = artefact.gains.to(self.device), artefact.inverse_gains.to(self.device)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Codec:
        """Reads an artefact. Raises what ``read_artefact`` raises."""
        return cls(read_artefact(path), device)

    @property
    def digest_bytes(self) -> bytes:
        """The four bytes by which a bitstream names its codec."""
        return bytes.fromhex(self.digest[:8])

    @torch.inference_mode()
    def analyse(self, photo: Photo) -> Tensor:
        """A prepared photo -> y (1, M, H/16, W/16), the same for every quality.

        Raises:
            BadInput: sides that are no multiples of the codec's stride.
        """
        if photo.height % self.stride or photo.width % self.stride:
            raise BadInput(f"the codec takes multiples of {self.stride} pixels, not {photo.width}x{photo.height}")
        pixels = torch.from_numpy(photo.pixels.copy()).to(self.device).permute(2, 0, 1)[None].float() / 255
        return self.network.g_a(pixels.contiguous(memory_format=torch.channels_last))

    @torch.inference_mode()
    def hyper(self, y: Tensor, quality: int) -> Analysis:
        """y (B, M, h, w) -> what is coded at that quality.

        Raises:
            BadInput: a quality that this codec has not.
        """
        y = y * self._gains[self._row(quality), :, None, None]
        return Analysis(y, self.network.h_a(y))

    @torch.inference_mode()
    def write(self, analysis: Analysis) -> list[Coded]:
        """Quantises and entropy-codes, a payload for each photo."""
        writers = [SymbolWriter() for _ in analysis.y]
        checks = [0] * len(writers)

        def put(symbols: Tensor, indexes: Tensor, tables: Tables) -> None:
            for i, (row, under) in enumerate(zip(_rows(symbols), _rows(indexes), strict=True)):
                writers[i].write(row, under, tables)
                checks[i] = _crc(row, checks[i])

        self._quantise(analysis, put)
        return [Coded(writer.payload(), check) for writer, check in zip(writers, checks, strict=True)]

    @torch.inference_mode()
    def quantise(self, y: Tensor, quality: int) -> Tensor:
        """y (B, M, h, w) -> y_hat (B, M, h, w) as a decoder gets it, without the coding in between."""
        analysis = self.hyper(y, quality)
        y_hat = self._quantise(analysis, lambda symbols, indexes, tables: None)
        return self._values(y_hat, [quality] * len(y), y.shape[-2:])

    def _quantise(self, analysis: Analysis, put: Callable[[Tensor, Tensor, Tables], None]) -> Tensor:
        """Hands every pass's symbols and tables to ``put``; returns y_hat (B, h w, M) in units of 1 / ONE."""
        y = analysis.y.permute(0, 2, 3, 1).flatten(1, 2)  # (B, h w, M)
        z = _symbols(analysis.z.permute(0, 2, 3, 1) - self.path.medians / ONE)  # (B, h/4, w/4, N)

        def code(step: ExactPass) -> Tensor:
            symbols = _symbols(y[..., step.channels].index_select(1, step.at) - step.mean / ONE)
            put(symbols, self._indexes(step), self.y_tables)
            return symbols

        put(z, self._z_indexes(z), self.z_tables)
        return self.path.walk(z, code)

    def encode(self, photo: Photo, scenario: Scenario, quality: int, y: Tensor | None = None) -> Bitstream:
        """Encodes a prepared photo.

        Args:
            y: what ``analyse`` gave for it, if that is known.

        Raises:
            BadInput: sides that do not fit, a quality that this codec has not.
        """
        self._row(quality)
        (coded,) = self.write(self.hyper(self.analyse(photo) if y is None else y, quality))
        bitstream = Bitstream(
            scenario=scenario,
            quality=quality,
            codec_digest=self.digest_bytes,
            height=photo.height,
            width=photo.width,
            original_size=photo.original_size,
            check=0,
            payload=coded.payload,
        )
        return replace(bitstream, check=bitstream.seal(coded.check))

    def decode(self, bitstream: Bitstream, max_pixels: int = MAX_PIXELS) -> Latents:
        """Entropy-decodes a bitstream to y_hat.

        Raises:
            ProfileMismatch: it was made with other weights.
            TooLarge: it is of more than ``max_pixels`` pixels.
            BadBitstream: it is damaged, found by the coder or by the check value.
        """
        (latents,) = self.decode_all([bitstream], max_pixels)
        return latents

    def decode_all(self, bitstreams: Sequence[Bitstream], max_pixels: int = MAX_PIXELS) -> list[Latents]:
        """Several bitstreams of one size at once; as ``decode``."""
        return self._read(bitstreams, max_pixels, lambda symbols, indexes, tables: None)

    def information(self, bitstream: Bitstream, max_pixels: int = MAX_PIXELS) -> tuple[float, float]:
        """Bits of z's and of y's symbols under their tables: the payload, to within a byte. As ``decode``."""
        bits: list[float] = []
        self._read([bitstream], max_pixels, lambda *coded: bits.append(coded[2].information(coded[0], coded[1])))
        return bits[0], sum(bits[1:])

    @torch.inference_mode()
    def _read(
        self, bitstreams: Sequence[Bitstream], max_pixels: int, watch: Callable[[Symbols, Symbols, Tables], object]
    ) -> list[Latents]:
        """Decodes; ``watch`` is shown every photo's symbols and their tables, pass by pass."""
        for bitstream in bitstreams:
            self._check(bitstream, max_pixels)
        height, width = bitstreams[0].height, bitstreams[0].width
        if any((one.height, one.width) != (height, width) for one in bitstreams):
            raise BadInput("bitstreams that are decoded at once are of one size")
        readers = [SymbolReader(bitstream.payload) for bitstream in bitstreams]
        checks = [0] * len(readers)

        def get(indexes: Tensor, tables: Tables) -> Tensor:
            symbols = np.empty((len(readers), indexes[0].numel()), np.int32)
            for i, (reader, under) in enumerate(zip(readers, _rows(indexes), strict=True)):
                symbols[i] = reader.read(under, tables)
                checks[i] = _crc(symbols[i], checks[i])
                watch(symbols[i], under, tables)
            return torch.from_numpy(symbols).view(indexes.shape).to(self.device)

        z = torch.empty(len(readers), height // HYPER_STRIDE, width // HYPER_STRIDE, self.N, dtype=torch.int32)
        z = get(self._z_indexes(z.to(self.device)), self.z_tables)
        y_hat = self.path.walk(z, lambda step: get(self._indexes(step), self.y_tables))
        for bitstream, check in zip(bitstreams, checks, strict=True):
            if bitstream.seal(check) != bitstream.check:
                raise BadBitstream("the bitstream is damaged: it does not match its check value")
        shape = (height // LATENT_STRIDE, width // LATENT_STRIDE)
        values = self._values(y_hat, [bitstream.quality for bitstream in bitstreams], shape)
        return [Latents(one[None], bitstream.original_size) for one, bitstream in zip(values, bitstreams, strict=True)]

    @torch.inference_mode()
    def reconstruct(self, latents: Latents) -> Photo:
        """Pixels through g_s, for human eyes and for the Reconstruction baseline."""
        x_hat = self.network.g_s(latents.y_hat.contiguous(memory_format=torch.channels_last))[0].clamp(0, 1)
        return Photo((x_hat.permute(1, 2, 0) * 255).round().byte().cpu().numpy(), latents.original_size)

    def _values(self, y_hat: Tensor, qualities: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Integers (B, h w, M) -> y_hat (B, M, h, w)."""
        rows = torch.tensor([self._row(quality) for quality in qualities], device=self.device)
        values = y_hat.float() / ONE * self._inverse_gains[rows, None]
        return values.unflatten(1, tuple(shape)).permute(0, 3, 1, 2).contiguous()

    def _row(self, quality: int) -> int:
        if quality not in self.qualities:
            raise BadInput(f"this codec has no quality {quality}; it has {', '.join(map(str, self.qualities))}")
        return self.qualities.index(quality)

    def _check(self, bitstream: Bitstream, max_pixels: int) -> None:
        if bitstream.codec_digest != self.digest_bytes:
            raise ProfileMismatch(
                f"the bitstream was encoded by codec {bitstream.codec_digest.hex()}, this side has "
                f"{self.digest_bytes.hex()}: use the same profile and version on both sides"
            )
        if bitstream.pixels > max_pixels:
            raise TooLarge(
                f"the bitstream is of {bitstream.width}x{bitstream.height} pixels; the limit is {max_pixels:,} in all"
            )
        if bitstream.height % self.stride or bitstream.width % self.stride or bitstream.quality not in self.qualities:
            raise BadBitstream(
                f"{bitstream.width}x{bitstream.height} at quality {bitstream.quality} is nothing that this codec writes"
            )

    def _indexes(self, step: ExactPass) -> Tensor:
        """(B, n, G) int32: the table of each symbol."""
        return torch.bucketize(step.scale.contiguous(), self._thresholds, right=True, out_int32=True)

    @staticmethod
    def _z_indexes(z: Tensor) -> Tensor:
        """Of z's shape: each channel has its own table."""
        return torch.arange(z.shape[-1], dtype=torch.int32, device=z.device).expand(z.shape)


def _symbols(values: Tensor) -> Tensor:
    return values.round().clamp(-LARGEST_SYMBOL, LARGEST_SYMBOL).int()


def _rows(values: Tensor) -> Symbols:
    """(B, ...) -> (B, n) on the CPU."""
    return values.flatten(1).cpu().numpy()


def _crc(symbols: Symbols, check: int) -> int:
    return zlib.crc32(symbols.astype("<i2").tobytes(), check)
