"""A real server in a process of its own, for benchmarks and the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

COMMANDS = Path(sys.executable).parent
PHOTO = "rocket.jpg"  # the launch of DSCOVR, SpaceX, CC0


@dataclass(frozen=True)
class Running:
    """A server that listens.

    Attributes:
        grpc: HOST:PORT.
        pid: of its process.
    """

    grpc: str
    pid: int


@contextmanager
def running_server(*flags: str) -> Iterator[Running]:
    """Starts ``cloud-server serve`` on free ports and stops it at the end.

    Raises:
        SystemExit: it ended before it listened; it has said why.
    """
    command = [COMMANDS / "cloud-server", "serve", "--grpc-port", "0", "--http-port", "0", "--json", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SystemExit(process.wait())
            yield Running(json.loads(line)["grpc"], process.pid)
        finally:
            process.terminate()


def sample_photo(name: str = PHOTO) -> Path:
    """A photograph that scikit-image's package carries, so that nobody has to fetch one."""
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise SystemExit("the photos come with scikit-image: pip install 'comneck[dev]'")
    return Path(package.origin).parent / "data" / name
