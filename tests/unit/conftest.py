from __future__ import annotations

from collections.abc import Iterator

import pytest
from scripted import CODEC_DIGEST, RunningServer, ScriptedEngine, running

from shared.bitstream import Bitstream


@pytest.fixture(scope="session")
def _server() -> Iterator[RunningServer]:
    with running(ScriptedEngine()) as server:
        yield server


@pytest.fixture
def server(_server: RunningServer) -> RunningServer:
    """One server for all tests; each finds its engine as new."""
    _server.engine.reset()
    return _server


@pytest.fixture
def bitstream() -> Bitstream:
    return Bitstream(
        scenario="d1",
        quality=2,
        codec_digest=bytes.fromhex(CODEC_DIGEST),
        height=256,
        width=256,
        original_size=(480, 640),
        check=0x4319302A,
        payload=bytes(range(256)) * 2,
    )
