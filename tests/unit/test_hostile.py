"""Whatever bytes come: an error by name, or the very stream that was encoded. (At length: benchmarks/hostile.py.)"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import pytest
from torch import Tensor

from benchmarks.mutation import MUTATIONS, compare, fate
from benchmarks.tiny import GAINS, noise, write_tiny_codec
from shared.codecs.artefact import read_artefact
from shared.codecs.codec import Codec
from shared.codecs.exact import KERNELS

COUNT = 300  # of streams by each mutation
MAX_PIXELS = 2 * 64**2  # what is larger takes long; it is measured in benchmarks/hostile.py


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> list[Codec]:
    """The same codec with each kernel."""
    path = tmp_path_factory.mktemp("tiny") / "codec.safetensors"
    write_tiny_codec(path)
    return [Codec(read_artefact(path), kernel=kernel) for kernel in KERNELS]


@pytest.fixture(scope="module")
def codec(codecs: list[Codec]) -> Codec:
    return codecs[0]


@pytest.fixture(scope="module")
def real(codec: Codec) -> dict[bytes, Tensor]:
    streams = [codec.encode(noise(64, 64, seed), "d1", quality) for seed in range(2) for quality in GAINS]
    return {bytes(stream): codec.decode(stream).y_hat for stream in streams}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated_streams_are_refused_by_name_or_are_real_ones(
    codec: Codec, real: dict[bytes, Tensor], mutation: Callable[[Random, Sequence[bytes]], bytes]
) -> None:
    streams = list(real)
    fates = Counter(fate(codec, mutation(Random(seed), streams), real, MAX_PIXELS) for seed in range(COUNT))
    assert fates["BadBitstream"] > COUNT / 4
    assert fates["identical"] < COUNT / 4


def test_any_payload_is_the_same_to_every_kernel(codecs: list[Codec], real: dict[bytes, Tensor]) -> None:
    random = Random(0)
    headers = [data[:16] for data in real]
    payloads = [random.randbytes(random.choice((0, 1, 50, 1000))) for _ in range(60)]
    assert sum(compare(codecs, random.choice(headers) + payload) for payload in payloads) > 30
