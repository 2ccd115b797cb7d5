"""Coverage-guided fuzzing of container and decoder with atheris, on a tiny codec; benchmarks/hostile.py starts it.

python -m benchmarks.fuzz (raw | sealed) FOLDER [libFuzzer's options]

``raw`` takes bytes as they come. Few of them get past the check value, so ``sealed`` makes header and check value right
for whatever extensions and payload come, and compares what all kernels make of them. FOLDER receives the codec, the
corpus and the input of a failure.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import atheris
import torch

ARRAYS = ["shared.codecs.entropy", "shared.codecs.exact"]
"""Modules that compare arrays. Atheris 3.0 traces comparisons and never frees a result that is no bool."""

with atheris.instrument_imports(include=["shared"], exclude=ARRAYS, enable_loader_override=False):
    from benchmarks.mutation import compare, fate
    from benchmarks.tiny import GAINS, noise, write_tiny_codec
    from shared.bitstream import Bitstream
    from shared.codecs.artefact import read_artefact
    from shared.codecs.codec import Codec
    from shared.codecs.exact import KERNELS

MAX_PIXELS = 2**14


def raw(codecs: list[Codec], streams: list[Bitstream]) -> Callable[[bytes], None]:
    codec = codecs[0]
    real = {bytes(stream): codec.decode(stream).y_hat for stream in streams}

    def target(data: bytes) -> None:
        fate(codec, data, real, MAX_PIXELS)

    return target


def sealed(codecs: list[Codec], _: list[Bitstream]) -> Callable[[bytes], None]:
    codec = codecs[0]

    def target(data: bytes) -> None:
        choice = data[0] if data else 0
        quality, wide = codec.qualities[(choice >> 2) % len(codec.qualities)], choice >> 1 & 1
        fields = 16 | choice & 1, 16 | quality, codec.digest_bytes, 1, 1 + wide, 64, 64, 0
        compare(codecs, struct.pack(">BB4sBBHHI", *fields) + data[1:])

    return target


def main() -> None:
    name, folder, *options = sys.argv[1:]
    torch.set_num_threads(1)
    path, corpus = Path(folder) / "codec.safetensors", Path(folder) / "corpus"
    write_tiny_codec(path)
    codecs = [Codec(read_artefact(path), kernel=kernel) for kernel in KERNELS]
    streams = [codecs[0].encode(noise(64, 64), "d1", quality) for quality in GAINS]
    corpus.mkdir(exist_ok=True)
    for stream in streams:
        data = bytes(stream)
        (corpus / f"quality-{stream.quality}").write_bytes(data if name == "raw" else b"\0" + stream.payload)
    target = {"raw": raw, "sealed": sealed}[name](codecs, streams)
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={folder}/", *options], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
