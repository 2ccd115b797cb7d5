"""Getting a source's files into a folder, checked against the catalogue: the border between us and other machines.

A folder may hold what an earlier, interrupted call left: ``<file>.part`` is continued, a finished file is kept. A file
has its own name only once its size and SHA-256 are right.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from shared.weights.catalogue import HubSource, IndexSource, PinnedFile, RemoteSource

if TYPE_CHECKING:
    import httpx

HUB = "https://huggingface.co"
CONNECT_TIMEOUT = 5.0  # seconds: a machine without the hub is to learn it soon and try the next source
READ_TIMEOUT = 30.0  # seconds without a byte
TRIES = 5  # connections for one file; each after the first only because the one before brought something
BLOCK = 1 << 20


class SourceFailed(Exception):
    """A source did not give what the catalogue pins. The message is the reason, in one line."""


def fetch(source: RemoteSource, folder: Path) -> None:
    """Puts the source's files into ``folder``, by their last names.

    Raises:
        SourceFailed: it cannot be reached, does not have them, or has others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [file for file in source.files if not _is_there(file, folder)]
    if wanted and isinstance(source, HubSource):
        _fetch_from_hub(source, wanted, folder)
    elif wanted and isinstance(source, IndexSource):
        _fetch_from_index(source, wanted, folder)


def sha256(path: Path) -> str:
    """Of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_name(file: PinnedFile) -> str:
    """What a file is called once it is fetched: its name without the folders."""
    return PurePosixPath(file.name).name


def one_line(problem: BaseException) -> str:
    """An exception's message on one line, never empty and never long."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_there(file: PinnedFile, folder: Path) -> bool:
    path = folder / local_name(file)
    return _size(path) == file.size and path.is_file() and sha256(path) == file.sha256


def _accept(part: Path, file: PinnedFile) -> None:
    """Gives a finished download its name, or deletes it."""
    size, digest = part.stat().st_size, sha256(part)
    if (size, digest) != (file.size, file.sha256):
        part.unlink()
        raise SourceFailed(
            f"{file.name} has {size:,} bytes with SHA-256 {digest[:12]}, not {file.size:,} with {file.sha256[:12]}"
        )
    part.replace(part.with_name(local_name(file)))


def _fetch_from_hub(source: HubSource, files: list[PinnedFile], folder: Path) -> None:
    import httpx

    hub = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    timeout = httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    # bytes are counted and continued as they come, so they must come uncompressed
    with httpx.Client(timeout=timeout, follow_redirects=True, headers={"Accept-Encoding": "identity"}) as client:
        for file in files:
            part = folder / f"{local_name(file)}.part"
            _download(client, hub, f"/{source.repo}/resolve/{source.revision}/{file.name}", file, part)
            _accept(part, file)


def _download(client: httpx.Client, hub: str, path: str, file: PinnedFile, part: Path) -> None:
    """Brings ``part`` to the file's size, going on from what is there."""
    import httpx

    reason = ""
    for _ in range(TRIES):
        start = _size(part)
        if start >= file.size:
            return
        try:
            _receive(client, hub + path, file, part, start)
            reason = "the download ends too early"
        except httpx.HTTPStatusError as problem:
            part.unlink(missing_ok=True)  # the server has no such file, or no such rest of it
            raise SourceFailed(f"{hub} answers {problem.response.status_code} for {file.name}") from problem
        except (httpx.HTTPError, httpx.InvalidURL) as problem:
            reason = one_line(problem)
        if _size(part) <= start:
            break
    if _size(part) < file.size:
        raise SourceFailed(f"{hub}: {reason} (have {_size(part):,} of {file.size:,} bytes of {file.name})")


def _receive(client: httpx.Client, url: str, file: PinnedFile, part: Path, start: int) -> None:
    """Asks for the bytes from ``start`` on, and appends what comes to ``part``."""
    from tqdm import tqdm

    with client.stream("GET", url, headers={"Range": f"bytes={start}-"} if start else {}) as response:
        response.raise_for_status()
        if response.status_code != 206:  # the whole file, as the server knows no ranges
            start = 0
        with (
            part.open("ab" if start else "wb") as out,
            tqdm(desc=file.name, total=file.size, initial=start, unit="B", unit_scale=True, disable=None) as bar,
        ):
            for block in response.iter_bytes():
                out.write(block)
                bar.update(len(block))
                if out.tell() > file.size:
                    return  # another file, as its size will tell


def _fetch_from_index(source: IndexSource, files: list[PinnedFile], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix="wheel-") as wheels:
        _pip_download(source.requirement, Path(wheels))
        try:
            (path,) = Path(wheels).glob("*.whl")
            with zipfile.ZipFile(path) as wheel:
                for file in files:
                    if wheel.getinfo(file.name).file_size != file.size:  # before a bomb is unpacked
                        raise SourceFailed(f"{file.name} in {path.name} has not the {file.size:,} bytes expected")
                    part = folder / f"{local_name(file)}.part"
                    with wheel.open(file.name) as member, part.open("wb") as out:
                        shutil.copyfileobj(member, out, BLOCK)
                    _accept(part, file)
        except (KeyError, ValueError, zipfile.BadZipFile) as problem:
            raise SourceFailed(f"{source.requirement} is not the wheel expected: {one_line(problem)}") from problem


def _pip_download(requirement: str, folder: Path) -> None:
    """Downloads one wheel with pip, so that the user's own index and proxy settings hold."""
    options = ["--no-input", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    shows = sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL  # pip draws its own progress bar
    ran = subprocess.run(
        [*_pip(), "download", *options, requirement], stdout=shows, stderr=subprocess.PIPE, text=True, check=False
    )
    if ran.returncode:
        errors = [line.removeprefix("ERROR: ") for line in ran.stderr.splitlines() if line.startswith("ERROR: ")]
        raise SourceFailed(f"pip: {errors[-1] if errors else f'exit code {ran.returncode}'}")


def _pip() -> list[str]:
    """The command for pip: of this interpreter, else (uv makes environments without it) the one on the PATH."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip") or shutil.which("pip3"):
        return [found]
    raise SourceFailed(f"there is no pip in {sys.executable} nor on the PATH; `python -m ensurepip` installs it")
