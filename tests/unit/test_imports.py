"""docs/architecture.md: imports run one way, and --help answers at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "shared": {"shared"},
    "edge_client": {"edge_client", "shared"},
    "cloud_server": {"cloud_server", "shared"},
    "evaluation": {"evaluation", "training", "cloud_server", "edge_client", "shared"},
    "training": {"training", "evaluation", "cloud_server", "edge_client", "shared"},
}
HEAVY = {"torch", "grpc", "numpy", "PIL", "transformers", "fastapi", "uvicorn", "compressai"}


def imported(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            yield node.module or ""


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    ours = {*MAY_IMPORT, "comneck", "benchmarks", "tests"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for name in imported(path)
        if name.split(".")[0] in ours - MAY_IMPORT[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["edge_client.cli", "cloud_server.cli"])
def test_help_imports_nothing_heavy(module: str) -> None:
    script = (
        f"import sys, {module} as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print('\\n', *sys.modules, file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "exit codes:" in run.stdout
    assert HEAVY & set(run.stderr.split()) == set()


WITHOUT_COMPRESSAI = """
import sys
sys.modules["compressai"] = None  # from here on, importing it fails
from pathlib import Path
import cloud_server.engine, cloud_server.server, cloud_server.backends.llama_adapter
import numpy, torch
from cloud_server.pipeline import load_entrances
from edge_client.client import Client
from edge_client.encoder import Encoder
from edge_client.stored import reconstruct
from shared.images import Photo
from shared.profiles import get_profile
photo = Photo(numpy.full((256, 256, 3), 99, numpy.uint8), (256, 256))
bitstream = Encoder("small").encode(photo)
entrance = load_entrances(get_profile("small"), torch.device("cpu"))[bitstream.quality]
tokens = entrance.neck(entrance.codec.decode(bitstream).y_hat)
print(tuple(tokens.shape), reconstruct(bitstream).pixels.shape)
"""


def test_encoding_and_decoding_take_no_compressai() -> None:
    command = [sys.executable, "-c", WITHOUT_COMPRESSAI]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "(1, 257, 768) (256, 256, 3)\n"), run.stderr
