from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path("shared/wire/comneck/v1")


def test_the_stubs_are_what_the_proto_says(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools is an extra of developers")
    subprocess.run([sys.executable, ROOT / "proto/generate.py", tmp_path], check=True)
    fresh = {path.name: path.read_bytes() for path in (tmp_path / STUBS).iterdir()}
    kept = {path.name: path.read_bytes() for path in (ROOT / STUBS).iterdir() if path.is_file()}
    assert sorted(kept) == sorted(fresh)
    changed = [name for name in fresh if fresh[name] != kept[name]]
    assert changed == [], "run `make proto` with the grpcio-tools of requirements.lock"


def test_the_proto_is_in_bufs_standard_style() -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
    if buf is None:
        pytest.skip("no `buf` here; the package buf-bin brings it")
    run = subprocess.run([buf, "lint"], cwd=ROOT / "proto", capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout + run.stderr) == (0, "")
