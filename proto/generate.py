"""Generates shared/wire/comneck/v1 from proto/: the one place that knows the command (``make proto``).

    python proto/generate.py [FOLDER]        FOLDER: repository root to write into, this one by default

``-I shared/wire=proto`` gives proto/ the path that the stubs have in the repository, so that they import each other as
``shared.wire.comneck.v1`` and take no top-level name ``comneck``. The protobuf package stays ``comneck.v1``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(root: Path) -> None:
    """Writes the stubs below ``root``."""
    outputs = [f"--{kind}_out={root}" for kind in ("python", "pyi", "grpc_python")]
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "proto").rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "shared/wire=proto", *outputs, *sources]
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
