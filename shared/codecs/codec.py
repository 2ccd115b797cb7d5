"""A codec ready for use: transforms, tables and digest, loaded from one artefact.

Photo -> encode -> Bitstream -> decode -> Latents (y_hat)
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.bitstream import Bitstream, Scenario
from shared.codecs import codecs
from shared.codecs.elic import Elic
from shared.codecs.entropy import LARGEST_SYMBOL, SymbolReader, Symbols, SymbolWriter, Tables
from shared.errors import BadBitstream, BadInput, ProfileMismatch
from shared.images import Photo
from shared.weights.digest import load_tensors, read_metadata, tensors_digest


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
    """One codec with one set of weights. Encoding and decoding are deterministic on one build of one machine.

    Args:
        transforms: the network, in eval mode.
        z_tables: one per channel of z.
        y_tables: one per scale of ``scales``.
        scales: (T,) ascending standard deviations; a symbol is coded under the first table whose scale is not less.
        digest: SHA-256 of the tensors, in hex.
    """

    def __init__(self, transforms: Elic, z_tables: Tables, y_tables: Tables, scales: Tensor, digest: str) -> None:
        self.transforms = transforms.eval().requires_grad_(False)
        self.z_tables = z_tables
        self.y_tables = y_tables
        self.scales = scales
        self.digest = digest

    @classmethod
    def load(cls, path: Path) -> Codec:
        """Reads an artefact that ``shared.codecs.artefact`` wrote."""
        tensors = load_tensors(path)
        metadata = read_metadata(path)
        digest = tensors_digest(tensors)
        z_tables, y_tables = (
            Tables(*(tensors.pop(f"tables.{name}.{part}").numpy() for part in ("cdf", "lengths", "offsets")))
            for name in ("z", "y")
        )
        scales = tensors.pop("tables.scales")
        transforms = codecs.get(metadata["codec"]).build(json.loads(metadata["config"]))
        transforms.load_artefact(tensors)
        return cls(transforms, z_tables, y_tables, scales, digest)

    @property
    def digest_bytes(self) -> bytes:
        """The four bytes by which a bitstream names its codec."""
        return bytes.fromhex(self.digest[:8])

    @torch.inference_mode()
    def encode(self, photo: Photo, scenario: Scenario, rate: int) -> Bitstream:
        """Encodes a prepared photo, H and W multiples of 64."""
        if photo.height % Elic.stride or photo.width % Elic.stride:
            raise BadInput(f"the codec takes multiples of {Elic.stride} pixels, not {photo.width}x{photo.height}")
        pixels = torch.from_numpy(photo.pixels.copy()).permute(2, 0, 1)[None].float() / 255
        y = self.transforms.g_a(pixels.contiguous(memory_format=torch.channels_last))
        z = self.transforms.h_a(y)
        z_symbols = _integers(z - self.transforms.z_medians)
        writer = SymbolWriter()
        writer.write(z_symbols.reshape(-1), _z_indexes(z_symbols.shape), self.z_tables)
        psi = self.transforms.h_s(_values(z_symbols) + self.transforms.z_medians)
        y_hat = self.transforms.empty_groups(psi)
        symbols = [np.zeros(group.shape[1:], np.int32) for group in y_hat]
        targets = y.split(self.transforms.config.groups, 1)
        for step in self.transforms.passes(psi, y_hat):
            mask = step.mask.numpy()
            coded = _integers(targets[step.group] - step.mean)[:, mask]
            writer.write(coded.reshape(-1), self._y_indexes(step.scale, mask), self.y_tables)
            symbols[step.group][:, mask] = coded
            y_hat[step.group] += (_values(symbols[step.group]) + step.mean) * step.mask
        return Bitstream(
            scenario=scenario,
            rate=rate,
            codec_digest=self.digest_bytes,
            height=photo.height,
            width=photo.width,
            original_size=photo.original_size,
            check=_check(z_symbols, symbols),
            payload=writer.payload(),
        )

    @torch.inference_mode()
    def decode(self, bitstream: Bitstream) -> Latents:
        """Entropy-decodes a bitstream to y_hat.

        Raises:
            ProfileMismatch: the bitstream was made with other weights.
            BadBitstream: the payload is damaged, found by the coder or by the check value.
        """
        if bitstream.codec_digest != self.digest_bytes:
            raise ProfileMismatch(
                f"the bitstream was encoded by codec {bitstream.codec_digest.hex()}, this side has "
                f"{self.digest_bytes.hex()}: use the same profile and version on both sides"
            )
        reader = SymbolReader(bitstream.payload)
        shape = (self.transforms.config.N, bitstream.height // 64, bitstream.width // 64)
        z_symbols = reader.read(_z_indexes(shape), self.z_tables).reshape(shape)
        psi = self.transforms.h_s(_values(z_symbols) + self.transforms.z_medians)
        y_hat = self.transforms.empty_groups(psi)
        symbols = [np.zeros(group.shape[1:], np.int32) for group in y_hat]
        for step in self.transforms.passes(psi, y_hat):
            mask = step.mask.numpy()
            decoded = reader.read(self._y_indexes(step.scale, mask), self.y_tables)
            symbols[step.group][:, mask] = decoded.reshape(step.mean.shape[1], -1)
            y_hat[step.group] += (_values(symbols[step.group]) + step.mean) * step.mask
        if _check(z_symbols, symbols) != bitstream.check:
            raise BadBitstream("the payload is damaged: its symbols do not match the check value")
        return Latents(torch.cat(y_hat, 1), bitstream.original_size)

    @torch.inference_mode()
    def reconstruct(self, latents: Latents) -> Photo:
        """Pixels through g_s, for human eyes and for the Reconstruction baseline."""
        x_hat = self.transforms.g_s(latents.y_hat)[0].clamp(0, 1)
        return Photo((x_hat.permute(1, 2, 0) * 255).round().byte().numpy(), latents.original_size)

    def _y_indexes(self, scale: Tensor, mask: npt.NDArray[np.bool_]) -> Symbols:
        indexes = torch.bucketize(scale[0], self.scales[:-1]).numpy()
        return indexes[:, mask].reshape(-1).astype(np.int32)


def _integers(values: Tensor) -> Symbols:
    """(1, C, h, w) floats -> (C, h, w) symbols."""
    return values[0].round().clamp(-LARGEST_SYMBOL, LARGEST_SYMBOL).int().numpy()


def _values(symbols: Symbols) -> Tensor:
    """(C, h, w) symbols -> (1, C, h, w) floats."""
    return torch.from_numpy(symbols).float()[None]


def _z_indexes(shape: tuple[int, ...]) -> Symbols:
    channels, rows, columns = shape
    return np.repeat(np.arange(channels, dtype=np.int32), rows * columns)


def _check(z_symbols: Symbols, y_symbols: list[Symbols]) -> int:
    check = zlib.crc32(z_symbols.astype("<i2").tobytes())
    for group in y_symbols:
        check = zlib.crc32(group.astype("<i2").tobytes(), check)
    return check
