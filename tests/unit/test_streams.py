"""Golden bitstreams of the shipped codec (streams/make.py): what was written once is decoded alike ever after."""

from __future__ import annotations

import pytest
import torch
from streams.make import DOCUMENT, FOLDER, HASHES, MARKED, SHIPPED, example, y_hat_hash

from shared.bitstream import Bitstream
from shared.codecs.artefact import read_artefact
from shared.codecs.codec import Codec
from shared.codecs.exact import KERNELS, proves_itself

STREAMS = dict(reversed(line.split()) for line in HASHES.read_text().splitlines())


@pytest.fixture(scope="module", params=KERNELS, ids=lambda kernel: kernel.name)
def codec(request: pytest.FixtureRequest) -> Codec:
    if not proves_itself(request.param, torch.device("cpu")):
        pytest.skip("not exact on this machine, and never taken here")
    return Codec(read_artefact(SHIPPED), kernel=request.param)


@pytest.mark.parametrize("name", STREAMS)
def test_a_golden_stream_decodes_to_the_recorded_integers_with_every_kernel(codec: Codec, name: str) -> None:
    bitstream = Bitstream.parse((FOLDER / name).read_bytes())
    assert y_hat_hash(codec, bitstream) == STREAMS[name]


def test_every_golden_stream_has_its_hash() -> None:
    assert {path.name for path in FOLDER.glob("*.cnk")} == set(STREAMS)


def test_the_example_in_the_document_is_a_golden_stream() -> None:
    (written,) = MARKED.findall(DOCUMENT.read_text())
    assert written == example()
