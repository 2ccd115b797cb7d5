"""Files are read with a bound, and written as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.errors import BadInput, TooLarge
from shared.files import check_writable, read_file, write_file


def test_a_file_of_just_the_limit_is_read_and_one_byte_more_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    assert read_file(path, 100, "one file", "make it smaller") == bytes(100)
    with pytest.raises(TooLarge, match="file is larger than 99 bytes: make it smaller"):
        read_file(path, 99, "one file", "make it smaller")


def test_a_device_without_end_is_too_large() -> None:
    with pytest.raises(TooLarge):
        read_file(Path("/dev/zero"), 1000, "one file", "make it smaller")


@pytest.mark.parametrize(
    ("name", "complaint"), [("", "is a folder; give one file"), ("no", "does not exist"), ("a\0b", "cannot be read")]
)
def test_what_is_no_file_is_bad_input(tmp_path: Path, name: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        read_file(tmp_path / name, 100, "one file", "make it smaller")


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old and longer")
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BadInput, match="file cannot be written: No space left on device; name another place"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_read_is_never_replaced(tmp_path: Path) -> None:
    path, link, hard = tmp_path / "file", tmp_path / "link", tmp_path / "hard"
    path.write_bytes(b"old")
    link.symlink_to(path)
    os.link(path, hard)
    for name in (path, link, hard, tmp_path / "x" / ".." / "file"):
        with pytest.raises(BadInput, match="is the file that is read"):
            write_file(name, b"new", path)
        with pytest.raises(BadInput, match="is the file that is read"):
            check_writable(name, path)
    assert path.read_bytes() == b"old"


def test_behind_a_link_the_file_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"old")
    link.symlink_to(path)
    write_file(link, b"new")
    assert link.is_symlink()
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("place", ["folder", "nowhere/file", "file/file", "circle", "a\0b", "x" * 300])
def test_a_place_that_cannot_be_written_is_bad_input(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=r"cannot be written|could be replaced"):
        write_file(tmp_path / place, b"new")
    with pytest.raises(BadInput, match=r"cannot be written|could be replaced"):
        check_writable(tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_finding_out_that_a_file_can_be_written_leaves_everything_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    check_writable(path)
    check_writable(tmp_path / "new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
