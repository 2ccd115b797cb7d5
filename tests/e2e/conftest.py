"""One real server for the end-to-end tests: its own process, the profile `small`, real sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import skimage

COMMANDS = Path(sys.executable).parent
PHOTOS = Path(skimage.__file__).parent / "data"
Edge = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass(frozen=True)
class Server:
    """Where the server listens, and its process."""

    grpc: str
    http: str
    process: subprocess.Popen[str]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    command = [COMMANDS / "cloud-server", "serve", "--grpc-port", "0", "--http-port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the server ended with {process.wait()} before it listened"
        where = json.loads(line)
        yield Server(where["grpc"], where["http"], process)
        process.terminate()
        assert process.wait(30) == 0


@pytest.fixture(scope="session")
def edge(server: Server) -> Edge:
    """Runs ``edge-client send`` against the server, or against the ``--server`` given."""

    def run(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        address = [] if "--server" in arguments else ["--server", server.grpc]
        return edge_client("send", *arguments, *address, timeout=timeout)

    return run


def edge_client(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs ``edge-client``."""
    return subprocess.run(
        [COMMANDS / "edge-client", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"COMNECK_DEBUG": ""},
        check=False,
    )


@pytest.fixture(scope="session")
def cat() -> Path:
    return PHOTOS / "chelsea.png"
