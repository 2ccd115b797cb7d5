"""Fetching and keeping artefacts: against a small hub of our own, and real pip with a folder of wheels."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shared.errors import WeightsUnavailable
from shared.weights import fetch
from shared.weights.catalogue import Artefact, HubSource, IndexSource, PackageSource, PinnedFile
from shared.weights.store import Store

REVISION = "0" * 40
CONTENT = bytes(range(256)) * 1000
CONFIG = b'{"layers": 2}'

has_pip = bool(shutil.which("pip") or shutil.which("pip3"))
needs_pip = pytest.mark.skipif(not has_pip, reason="no pip on the PATH")


class Hub(ThreadingHTTPServer):
    """A hub that can be made to misbehave.

    Attributes:
        files: by name, whatever the repository.
        ranges: whether it continues a download.
        cut: after how many bytes of an answer it hangs up, if at all.
        pause: seconds before each 10,000 bytes.
        requests: (file, Range header) of each.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files = {"model.bin": CONTENT, "config.json": CONFIG}
        self.ranges = True
        self.cut: int | None = None
        self.pause = 0.0
        self.requests: list[tuple[str, str | None]] = []


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        asked = self.headers.get("Range")
        self.server.requests.append((name, asked))
        if name not in self.server.files:
            self.send_error(404)
            return
        body = self.server.files[name]
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        sent = body[start:] if self.server.cut is None else body[start : start + self.server.cut]
        for at in range(0, len(sent), 10_000):
            time.sleep(self.server.pause)
            self.wfile.write(sent[at : at + 10_000])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch) -> Path:
    """A package index with ``tiny-weights`` 1.0, whose wheel holds tiny_weights/model.bin."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/model.bin", CONTENT)
        wheel.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        wheel.writestr(
            "tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def pin(name: str, content: bytes = CONTENT) -> PinnedFile:
    return PinnedFile(name, len(content), hashlib.sha256(content).hexdigest())


def on_hub(*files: PinnedFile, convert: str | None = None) -> HubSource:
    return HubSource("someone/tiny", REVISION, files or (pin("model.bin"),), convert)


def on_index(member: str = "tiny_weights/model.bin", requirement: str = "tiny-weights==1.0") -> IndexSource:
    return IndexSource(requirement, (pin(member),))


def make_store(home: Path, *sources, installs: tuple[str, ...] = ("model.bin",)) -> tuple[Store, list[str]]:
    said: list[str] = []
    artefact = Artefact("tiny", "llm", "A tiny model", "MIT", installs, sources or (on_hub(),))
    return Store(home, {"tiny": artefact}, said.append), said


def failure(store: Store) -> str:
    """Why ``tiny`` cannot be pulled, which is one line."""
    with pytest.raises(WeightsUnavailable) as caught:
        store.pull("tiny")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everything_in(home: Path) -> list[str]:
    """Files below the cache folder, without its locks."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and path.suffix != ".lock")


# --- installing ----------------------------------------------------------------------------------------------------


def test_a_pulled_artefact_is_installed_with_a_receipt_and_nothing_is_left_over(tmp_path: Path, hub: Hub):
    store, _ = make_store(tmp_path)
    path = store.pull("tiny")
    assert path == store.path("tiny") == tmp_path / "weights/tiny/model.bin"
    assert path.read_bytes() == CONTENT
    receipt = json.loads((path.parent / "receipt.json").read_text())
    assert receipt["artefact"] == "tiny"
    assert receipt["source"] == "hub someone/tiny"
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert receipt["files"] == [{"name": "model.bin", "size": len(CONTENT), "sha256": digest}]
    assert everything_in(tmp_path) == ["weights/tiny/model.bin", "weights/tiny/receipt.json"]


def test_an_artefact_of_several_files_is_a_folder(tmp_path: Path, hub: Hub):
    source = on_hub(pin("config.json", CONFIG), pin("sub/model.bin"))
    store, _ = make_store(tmp_path, source, installs=("config.json", "model.bin"))
    folder = store.ensure("tiny")
    assert folder == tmp_path / "weights/tiny"
    assert (folder / "config.json").read_bytes() == CONFIG
    assert (folder / "model.bin").read_bytes() == CONTENT


def test_what_is_installed_is_not_fetched_again_unless_forced(tmp_path: Path, hub: Hub):
    store, _ = make_store(tmp_path)
    store.pull("tiny")
    store.pull("tiny")
    store.ensure("tiny")
    assert len(hub.requests) == 1
    store.pull("tiny", force=True)
    assert len(hub.requests) == 2
    assert everything_in(tmp_path) == ["weights/tiny/model.bin", "weights/tiny/receipt.json"]


def test_the_digest_of_an_artefact_is_that_of_its_tensors_file_as_installed(tmp_path: Path, hub: Hub):
    hub.files = {"config.json": CONFIG, "model.safetensors": CONTENT}
    source = on_hub(pin("config.json", CONFIG), pin("model.safetensors"))
    store, _ = make_store(tmp_path, source, installs=("config.json", "model.safetensors"))
    with pytest.raises(WeightsUnavailable):
        store.digest("tiny")
    store.pull("tiny")
    assert store.digest("tiny") == hashlib.sha256(CONTENT).hexdigest()


def test_a_missing_artefact_is_named_with_the_command_that_gets_it(tmp_path: Path):
    store, _ = make_store(tmp_path)
    with pytest.raises(WeightsUnavailable, match="run `comneck weights pull tiny`"):
        store.path("tiny")
    assert not any(tmp_path.iterdir()), "asking writes nothing"


def test_a_folder_copied_from_another_machine_is_installed(tmp_path: Path, hub: Hub):
    make_store(tmp_path / "there")[0].pull("tiny")
    shutil.copytree(tmp_path / "there/weights/tiny", tmp_path / "here/weights/tiny")
    store, _ = make_store(tmp_path / "here")
    assert store.ensure("tiny").read_bytes() == CONTENT
    store.verify("tiny")
    assert len(hub.requests) == 1


def test_an_installation_that_this_version_does_not_pin_counts_as_missing(tmp_path: Path, hub: Hub):
    make_store(tmp_path)[0].pull("tiny")
    hub.files["model.bin"] = CONTENT[::-1]
    store, _ = make_store(tmp_path, on_hub(pin("model.bin", CONTENT[::-1])))
    with pytest.raises(
        WeightsUnavailable, match="files that this version does not pin: run `comneck weights pull tiny`"
    ):
        store.path("tiny")
    assert store.ensure("tiny").read_bytes() == CONTENT[::-1]


def test_two_processes_at_once_download_once(tmp_path: Path, hub: Hub):
    hub.pause = 0.02
    pulls = [start_pull(tmp_path) for _ in range(2)]
    assert [pull.wait(60) for pull in pulls] == [0, 0]
    assert len(hub.requests) == 1
    make_store(tmp_path)[0].verify("tiny")


# --- damage --------------------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_byte_and_a_forced_pull_repairs_it(tmp_path: Path, hub: Hub):
    store, _ = make_store(tmp_path)
    path = store.pull("tiny")
    store.verify("tiny")
    path.write_bytes(CONTENT[:500] + b"!" + CONTENT[501:])
    with pytest.raises(WeightsUnavailable, match=r"model\.bin has changed; run `comneck weights pull --force tiny`"):
        store.verify("tiny")
    store.pull("tiny", force=True)
    store.verify("tiny")


def test_a_file_cut_short_is_noticed_without_hashing_and_fetched_again(tmp_path: Path, hub: Hub):
    store, _ = make_store(tmp_path)
    path = store.pull("tiny")
    path.write_bytes(CONTENT[:-1])
    assert store.status("tiny").state == "damaged"
    with pytest.raises(WeightsUnavailable, match="tiny is damaged"):
        store.path("tiny")
    assert store.ensure("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("receipt", ["", "{", "[]", '{"artefact": "tiny"}'])
def test_a_damaged_receipt_counts_as_missing(tmp_path: Path, hub: Hub, receipt: str):
    store, _ = make_store(tmp_path)
    store.pull("tiny")
    (tmp_path / "weights/tiny/receipt.json").write_text(receipt)
    assert store.status("tiny").state == "missing"
    assert store.ensure("tiny").read_bytes() == CONTENT


# --- the hub -------------------------------------------------------------------------------------------------------


def test_an_interrupted_download_continues_where_it_stopped(tmp_path: Path, hub: Hub):
    hub.cut = 100_000
    assert make_store(tmp_path)[0].pull("tiny").read_bytes() == CONTENT
    assert hub.requests == [("model.bin", None), ("model.bin", "bytes=100000-"), ("model.bin", "bytes=200000-")]


def test_a_download_that_stops_for_good_is_continued_by_the_next_pull(tmp_path: Path, hub: Hub):
    store, _ = make_store(tmp_path)
    hub.cut = 20_000
    assert f"(have 100,000 of {len(CONTENT):,} bytes of model.bin)" in failure(store)
    assert len(hub.requests) == fetch.TRIES
    hub.cut = None
    store.pull("tiny")
    assert hub.requests[-1] == ("model.bin", "bytes=100000-")
    store.verify("tiny")


def test_a_server_without_ranges_is_read_from_the_start(tmp_path: Path, hub: Hub):
    store, _ = make_store(tmp_path)
    hub.cut, hub.ranges = 100_000, False
    failure(store)
    assert len(hub.requests) == 2, "to ask a third time would bring no more"
    hub.cut = None
    assert store.pull("tiny").read_bytes() == CONTENT


def test_a_killed_process_leaves_a_download_that_the_next_one_continues(tmp_path: Path, hub: Hub):
    hub.pause = 0.05
    process = start_pull(tmp_path)
    wait_until(lambda: sum(path.stat().st_size for path in tmp_path.rglob("*.part")) >= 50_000)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    hub.pause = 0
    store, _ = make_store(tmp_path)
    assert store.status("tiny").state == "missing"
    store.pull("tiny")
    (first, again) = hub.requests
    assert first == ("model.bin", None)
    assert int((again[1] or "").removeprefix("bytes=").removesuffix("-")) >= 50_000
    store.verify("tiny")
    assert everything_in(tmp_path) == ["weights/tiny/model.bin", "weights/tiny/receipt.json"]


@pytest.mark.parametrize("wrong", [CONTENT[:-1] + b"!", CONTENT + b"!", CONTENT[:-1], b""])
def test_wrong_bytes_are_never_installed(tmp_path: Path, hub: Hub, wrong: bytes):
    hub.files["model.bin"] = wrong
    store, _ = make_store(tmp_path)
    failure(store)
    assert store.status("tiny").state == "missing"
    hub.files["model.bin"] = CONTENT
    assert store.pull("tiny").read_bytes() == CONTENT


def test_wrong_bytes_are_deleted_and_the_next_source_is_tried_and_said_so(tmp_path: Path, hub: Hub):
    hub.files["model.bin"], hub.files["copy.bin"] = b"?" * len(CONTENT), CONTENT
    store, said = make_store(tmp_path, on_hub(), on_hub(pin("copy.bin"), convert=f"{__name__}:rename"))
    store.pull("tiny")
    assert len(said) == 1
    assert "tiny: hub someone/tiny failed: model.bin has 256,000 bytes with SHA-256" in said[0]
    assert everything_in(tmp_path) == ["weights/tiny/model.bin", "weights/tiny/receipt.json"]


def test_a_file_that_the_hub_does_not_have_is_named(tmp_path: Path, hub: Hub):
    del hub.files["model.bin"]
    assert f"http://127.0.0.1:{hub.server_port} answers 404 for model.bin" in failure(make_store(tmp_path)[0])
    assert len(hub.requests) == 1


def test_without_any_source_the_message_has_each_reason_and_what_to_do(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    other = HubSource("someone/else", REVISION, (pin("model.bin"),))
    message = failure(make_store(tmp_path, on_hub(), other)[0])
    assert time.monotonic() - begin < 15
    assert "hub someone/tiny: http://127.0.0.1:9: " in message
    assert "hub someone/else: " in message
    for way_out in ("HF_ENDPOINT", "pip config", f"copy {tmp_path}/weights/tiny"):
        assert way_out in message


@pytest.mark.parametrize("endpoint", ["not a url", "ftp://127.0.0.1", "http://[::1"])
def test_a_senseless_endpoint_is_one_clear_line(tmp_path: Path, monkeypatch, endpoint: str):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "hub someone/tiny" in failure(make_store(tmp_path)[0])


# --- the package index ---------------------------------------------------------------------------------------------


@needs_pip
def test_a_wheels_member_is_installed_without_installing_the_wheel(tmp_path: Path, wheels: Path):
    store, said = make_store(tmp_path / "home", on_index())
    assert store.pull("tiny").read_bytes() == CONTENT
    assert everything_in(tmp_path / "home") == ["weights/tiny/model.bin", "weights/tiny/receipt.json"]
    assert store.status("tiny").origin == "index tiny-weights==1.0"
    assert said == []
    with pytest.raises(ImportError):
        __import__("tiny_weights")


@needs_pip
def test_a_requirement_that_the_index_does_not_have_is_named(tmp_path: Path, wheels: Path):
    message = failure(make_store(tmp_path / "home", on_index(requirement="tiny-weights==2.0"))[0])
    assert "pip: No matching distribution found for tiny-weights==2.0" in message


@pytest.mark.parametrize("member", ["tiny_weights/other.bin", "tiny_weights-1.0.dist-info/METADATA"])
def test_a_wheel_without_the_pinned_member_is_refused(tmp_path: Path, wheels: Path, monkeypatch, member: str):
    monkeypatch.setattr(fetch, "_pip_download", lambda _, folder: shutil.copy(next(wheels.glob("*.whl")), folder))
    assert member.rpartition("/")[2] in failure(make_store(tmp_path / "home", on_index(member))[0])


def test_a_python_without_pip_is_told_so(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    assert f"there is no pip in {sys.executable} nor on the PATH" in failure(make_store(tmp_path, on_index())[0])


# --- converting ----------------------------------------------------------------------------------------------------


def rename(fetched: Path, installed: Path) -> None:
    shutil.copy(next(fetched.iterdir()), installed / "model.bin")


def give_up_half_way(fetched: Path, installed: Path) -> None:
    (installed / "model.bin").write_bytes(b"half")
    raise ValueError("tensor 7\nmakes no sense")


def fill_the_disk(fetched: Path, installed: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def import_what_is_not_there(fetched: Path, installed: Path) -> None:
    __import__("a_package_nobody_has")


def make_nothing(fetched: Path, installed: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("converter", "reason"),
    [
        (give_up_half_way, "it cannot be converted: tensor 7 makes no sense"),
        (import_what_is_not_there, "needs the Python package a_package_nobody_has"),
        (make_nothing, "it gives no model.bin"),
    ],
)
def test_a_failed_conversion_installs_nothing_and_keeps_the_download(tmp_path: Path, hub: Hub, converter, reason: str):
    store, _ = make_store(tmp_path, on_hub(convert=f"{__name__}:{converter.__name__}"))
    assert reason in failure(store)
    assert store.status("tiny").state == "missing"
    make_store(tmp_path, on_hub(convert=f"{__name__}:rename"))[0].pull("tiny")
    assert len(hub.requests) == 1


def test_a_full_disk_ends_the_pull_in_one_line_and_no_other_source_is_tried(tmp_path: Path, hub: Hub):
    store, _ = make_store(tmp_path, on_hub(convert=f"{__name__}:fill_the_disk"), on_hub(pin("config.json", CONFIG)))
    assert failure(store).startswith(f"no space left on the disk of {tmp_path}")
    assert len(hub.requests) == 1


def test_a_cache_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    message = failure(make_store(tmp_path / "file/home")[0])
    assert "Not a directory" in message
    assert "COMNECK_HOME" in message


# --- shipped files -------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path) -> tuple[Store, Path]:
    path = tmp_path / "package/files/tiny.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    source = PackageSource(path, pin("files/tiny.safetensors"))
    artefact = Artefact("tiny", "codec", "A tiny codec", "MIT", ("tiny.safetensors",), (), source)
    return Store(tmp_path / "home", {"tiny": artefact}), path


def test_a_shipped_file_is_used_in_place(shipped: tuple[Store, Path]):
    store, path = shipped
    assert store.path("tiny") == store.ensure("tiny") == store.pull("tiny", force=True) == path
    assert store.status("tiny").state == "shipped"
    assert store.digest("tiny") == hashlib.sha256(CONTENT).hexdigest()
    store.verify("tiny")
    assert not store.home.exists()


def test_a_shipped_file_that_changed_is_found_by_verify(shipped: tuple[Store, Path]):
    store, path = shipped
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(WeightsUnavailable, match="has changed; install the package again"):
        store.verify("tiny")


@pytest.mark.parametrize("content", [None, b"version https://git-lfs.github.com/spec/v1"])
def test_a_shipped_file_that_is_missing_or_a_pointer_is_refused(shipped: tuple[Store, Path], content: bytes | None):
    store, path = shipped
    path.unlink()
    if content:
        path.write_bytes(content)
    with pytest.raises(WeightsUnavailable, match=r"tiny\.safetensors (is missing|has 42 bytes).*install the package"):
        store.ensure("tiny")


# --- helpers -------------------------------------------------------------------------------------------------------


def start_pull(home: Path) -> "subprocess.Popen[bytes]":
    """Another process that pulls ``tiny`` from the hub into ``home``."""
    root, tests = Path(__file__).parents[2], Path(__file__).parent
    script = (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(tests)!r}]; from pathlib import Path; "
        f"from {Path(__file__).stem} import make_store; make_store(Path({str(home)!r}))[0].pull('tiny')"
    )
    return subprocess.Popen([sys.executable, "-c", script])


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
