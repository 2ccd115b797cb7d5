"""``edge-client encode | inspect | decode`` with the shipped codec: files in, files out, no server."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from edge_client.cli import main
from edge_client.encoder import Encoder
from edge_client.inspection import inspect
from edge_client.stored import MAX_FILE_BYTES, find_codec, is_stored, read_bitstream, reconstruct
from shared.bitstream import Bitstream, Extension
from shared.errors import BadBitstream, BadInput, ComneckError, ProfileMismatch, TooLarge
from shared.images import Photo, load_photo

Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("small")


@pytest.fixture(scope="module")
def photo(encoder: Encoder) -> Photo:
    return encoder.prepare(Photo(data.chelsea(), (451, 300)))


@pytest.fixture(scope="module")
def bitstream(encoder: Encoder, photo: Photo) -> Bitstream:
    return encoder.encode(photo)


@pytest.fixture
def cat(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    Image.fromarray(data.chelsea()).save(path)
    return path


@pytest.fixture
def cnk(tmp_path: Path, bitstream: Bitstream) -> Path:
    path = tmp_path / "cat.cnk"
    path.write_bytes(bytes(bitstream))
    return path


def fails(printed: Printed, kind: type[ComneckError], *arguments: str | Path) -> str:
    """The one line that a command prints when it fails as ``kind`` does."""
    assert main(list(map(str, arguments))) == kind.exit_code
    out, err = printed.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


# --- encode ----------------------------------------------------------------------------------------------------------


def test_encode_writes_the_bitstream_and_prints_one_line(
    cat: Path, tmp_path: Path, bitstream: Bitstream, capsys: Printed
) -> None:
    out = tmp_path / "out.cnk"
    assert main(["encode", str(cat), "-o", str(out)]) == 0
    assert out.read_bytes() == bytes(bitstream)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"([\d,]+) B, 0\.\d{3} bpp, quality 3, [\d.]+x smaller than JPEG 75 \([\d,]+ B\)\n", printed), (
        printed
    )
    assert printed.startswith(f"{len(bitstream):,} B, {bitstream.bpp:.3f} bpp")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png", "out.cnk"]


def test_every_quality_is_larger_than_the_one_before(cat: Path, tmp_path: Path) -> None:
    sizes = []
    for quality in (1, 2, 3, 4):
        out = tmp_path / f"{quality}.cnk"
        assert main(["encode", str(cat), "-o", str(out), "--quality", str(quality)]) == 0
        sizes.append(out.stat().st_size)
        assert read_bitstream(out).quality == quality
    assert sizes == sorted(set(sizes))


def test_max_bytes_bounds_the_file_and_takes_the_best_that_fits(cat: Path, tmp_path: Path, encoder: Encoder) -> None:
    sizes = {quality: len(encoder.encode(cat, quality)) for quality in (1, 2, 3, 4)}
    out = tmp_path / "out.cnk"
    for quality, size in sizes.items():
        assert main(["encode", str(cat), "-o", str(out), "--max-bytes", str(size)]) == 0
        assert (out.stat().st_size, read_bitstream(out).quality) == (size, quality)
    assert main(["encode", str(cat), "-o", str(out), "--max-bytes", str(sizes[4]), "--quality", "2"]) == 0
    assert read_bitstream(out).quality == 2


def test_a_size_that_cannot_be_kept_names_the_smallest_and_leaves_the_file_alone(
    cat: Path, tmp_path: Path, encoder: Encoder, capsys: Printed
) -> None:
    out = tmp_path / "out.cnk"
    out.write_bytes(b"of before")
    line = fails(capsys, TooLarge, "encode", cat, "-o", out, "--max-bytes", "99")
    assert f"in 99 bytes: the smallest is quality 1 with {len(encoder.encode(cat, 1)):,} bytes" in line
    assert out.read_bytes() == b"of before"


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["{cat}", "-o", "{folder}/out.png"], 2, "does not end in .cnk"),
        (["{cat}", "-o", "{folder}/no/out.cnk"], 2, "cannot be written: No such file or directory"),
        (["{cat}", "-o", "{cat}/out.cnk"], 2, "cannot be written: Not a directory"),
        (["{folder}", "-o", "{folder}/out.cnk"], 2, "is a folder"),
        (["{folder}/no.png", "-o", "{folder}/out.cnk"], 2, "does not exist"),
        (["{folder}/text", "-o", "{folder}/out.cnk"], 3, "no picture"),
        (["{cat}", "-o", "{folder}/out.cnk", "--quality", "9"], 2, "has no quality 9; it has 1, 2, 3, 4"),
        (["{cat}", "-o", "{folder}/out.cnk", "--profile", "huge"], 7, "no profile named 'huge'"),
        (["{folder}/cat.cnk", "-o", "{folder}/cat.cnk"], 2, "is the file that is read"),
    ],
)
def test_what_cannot_be_encoded_is_one_line_and_no_file(
    cat: Path, tmp_path: Path, capsys: Printed, arguments: list[str], code: int, complaint: str
) -> None:
    (tmp_path / "text").write_text("no picture at all")
    (tmp_path / "cat.cnk").write_bytes(cat.read_bytes())  # a picture, whatever it is called
    before = sorted(tmp_path.iterdir())
    assert main(["encode", *(argument.format(cat=cat, folder=tmp_path) for argument in arguments)]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert complaint in err
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "cat.cnk").read_bytes() == cat.read_bytes()


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_prints_every_field_and_that_it_decodes(cnk: Path, bitstream: Bitstream, capsys: Printed) -> None:
    assert main(["inspect", str(cnk)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in printed.splitlines())
    assert {rows.pop(part).split()[1] for part in ("z", "y")} == {"B,"}
    assert rows == {
        "size": f"{len(bitstream):,} B, {bitstream.bpp:.3f} bpp",
        "version": "1",
        "scenario": "d1",
        "quality": "3",
        "codec": bitstream.codec_digest.hex(),
        "codec's input": "256x256",
        "original photo": "451x300",
        "check value": f"{bitstream.check:08x}",
        "header": "16 B",
        "extensions": "0 B",
        "payload": f"{len(bitstream.payload):,} B",
        "decodes": "yes, with profile small",
    }


def test_inspect_json_holds_the_same(cnk: Path, bitstream: Bitstream, capsys: Printed) -> None:
    assert main(["inspect", str(cnk), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == told["bytes_header"] + told["bytes_extensions"] + told["bytes_payload"] == len(bitstream)
    assert (told["codec_digest"], told["quality"]) == (bitstream.codec_digest.hex(), 3)
    assert (told["width"], told["height"], told["original_width"], told["original_height"]) == (256, 256, 451, 300)
    assert (told["decodes"], told["profile"], told["problem"]) == (True, "small", None)


@pytest.mark.parametrize("quality", [1, 4])
def test_the_parts_of_the_payload_add_up_to_it(encoder: Encoder, photo: Photo, quality: int) -> None:
    inspection = inspect(encoder.encode(photo, quality))
    assert inspection.z_bits is not None
    assert inspection.y_bits is not None
    assert 0 < inspection.z_bits < inspection.y_bits
    assert inspection.z_bits + inspection.y_bits == pytest.approx(8 * inspection.payload, abs=24)


def test_an_escaped_symbol_is_counted_with_its_sixteen_bits(encoder: Encoder, photo: Photo) -> None:
    codec = encoder.codec(3)
    y = codec.analyse(photo).clone()
    y[0, 0, 0, 0] = 3000.0  # far outside every table
    inspection = inspect(codec.encode(photo, "d1", 3, y))
    assert inspection.z_bits is not None
    assert inspection.y_bits is not None
    assert inspection.z_bits + inspection.y_bits == pytest.approx(8 * inspection.payload, abs=24)


def test_a_codec_that_is_not_here_is_told_and_no_failure(cnk: Path, bitstream: Bitstream, capsys: Printed) -> None:
    cnk.write_bytes(bytes(replace(bitstream, codec_digest=bytes(4))))
    assert main(["inspect", str(cnk)]) == 0
    printed = capsys.readouterr().out
    digest = bitstream.codec_digest.hex()
    assert re.search(
        rf"^decodes +no: .* codec 00000000, .* not on this machine: that of profile 'small' is {digest}", printed, re.M
    )
    assert "payload" in printed
    assert "\n  z" not in printed
    assert main(["inspect", str(cnk), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["decodes"], told["profile"], told["z_bits"]) == (False, None, None)
    assert "00000000" in told["problem"]


def test_a_quality_that_no_profile_has_is_told_and_no_failure(bitstream: Bitstream) -> None:
    assert "no profile has a codec of that quality here" in inspect(replace(bitstream, quality=15)).problem


def test_a_photo_over_the_decoders_limit_is_told_and_no_failure(bitstream: Bitstream) -> None:
    huge = inspect(replace(bitstream, height=255 * 64, width=255 * 64))
    assert "16320x16320 pixels; the limit is" in huge.problem


def test_extensions_are_listed_and_counted(encoder: Encoder, photo: Photo, cnk: Path, capsys: Printed) -> None:
    codec = encoder.codec(3)
    (coded,) = codec.write(codec.hyper(codec.analyse(photo), 3))
    size = (photo.height, photo.width)
    unsealed = Bitstream(
        "d1", 3, codec.digest_bytes, *size, (451, 300), 0, coded.payload, (Extension(7, b"seven"), Extension(9, b""))
    )
    cnk.write_bytes(bytes(replace(unsealed, check=unsealed.seal(coded.check))))
    assert main(["inspect", str(cnk)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^extensions +12 B: type 7 of 5 B, type 9 of 0 B$", printed, re.M)
    assert "yes, with profile small" in printed


def test_a_damaged_bitstream_is_refused_wherever_it_is_damaged(cnk: Path, tmp_path: Path, capsys: Printed) -> None:
    whole = cnk.read_bytes()
    for place in (0, 8, 12, 17, len(whole) // 2, len(whole) - 1):  # version, size of the photo, check value, payload
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        cnk.write_bytes(bytes(damaged))
        fails(capsys, BadBitstream, "inspect", cnk)
        fails(capsys, BadBitstream, "decode", cnk, "-o", tmp_path / "cat.png")
    cnk.write_bytes(whole[:-20])
    fails(capsys, BadBitstream, "inspect", cnk)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.cnk"]


# --- decode ----------------------------------------------------------------------------------------------------------


def test_decode_writes_the_picture_and_prints_one_line(
    cnk: Path, tmp_path: Path, photo: Photo, bitstream: Bitstream, capsys: Printed
) -> None:
    assert main(["decode", str(cnk), "-o", str(tmp_path / "out.png")]) == 0
    assert capsys.readouterr() == (
        f"256x256 pixels from {len(bitstream):,} B, quality 3; the photo was 451x300\n",
        "",
    )
    pixels = load_photo(tmp_path / "out.png").pixels
    assert np.array_equal(pixels, reconstruct(bitstream).pixels)
    error = np.mean((pixels.astype(float) - photo.pixels) ** 2)
    assert 10 * np.log10(255**2 / error) > 25  # dB


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "webp", "bmp"])
def test_the_suffix_chooses_the_format(cnk: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"out.{suffix}"
    assert main(["decode", str(cnk), "-o", str(out), "--profile", "small"]) == 0
    with Image.open(out) as picture:
        assert (picture.size, picture.mode) == ((256, 256), "RGB")
        assert picture.format == {"jpg": "JPEG"}.get(suffix, suffix.upper())


def test_a_better_quality_gives_a_better_picture(encoder: Encoder, photo: Photo) -> None:
    errors = [
        np.mean((reconstruct(encoder.encode(photo, quality)).pixels.astype(float) - photo.pixels) ** 2)
        for quality in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)


def test_d2_has_a_picture_and_d3_has_none(
    encoder: Encoder, photo: Photo, cnk: Path, tmp_path: Path, capsys: Printed
) -> None:
    out = tmp_path / "out.png"
    cnk.write_bytes(bytes(encoder.codec(3).encode(photo, "d2", 3)))
    assert main(["decode", str(cnk), "-o", str(out)]) == 0
    capsys.readouterr()
    out.unlink()
    cnk.write_bytes(bytes(encoder.codec(3).encode(photo, "d3", 3)))
    assert "trained for machines only, there is no picture" in fails(capsys, BadInput, "decode", cnk, "-o", out)
    assert not out.exists()
    assert main(["inspect", str(cnk)]) == 0


def test_a_codec_that_is_not_here_is_a_mismatch(
    cnk: Path, tmp_path: Path, bitstream: Bitstream, capsys: Printed
) -> None:
    cnk.write_bytes(bytes(replace(bitstream, codec_digest=bytes(4))))
    line = fails(capsys, ProfileMismatch, "decode", cnk, "-o", tmp_path / "out.png")
    assert (
        f"by codec 00000000, which is not on this machine: that of profile 'small' is {bitstream.codec_digest.hex()}"
        in line
    )


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["-o", "{folder}/out.xyz"], 2, "no picture format that can be written: name it .png"),
        (["-o", "{folder}/out"], 2, "no picture format"),
        (["-o", "{cnk}"], 2, "no picture format"),
        (["-o", "{folder}/no/out.png"], 2, "cannot be written: No such file or directory"),
        (["-o", "{folder}/folder.png"], 2, "is no file that could be replaced"),
        (["-o", "{folder}/out.png", "--profile", "huge"], 7, "no profile named 'huge'"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_no_file(
    cnk: Path, tmp_path: Path, capsys: Printed, arguments: list[str], code: int, complaint: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    given = [argument.format(cnk=cnk, folder=tmp_path) for argument in arguments]
    assert main(["decode", str(cnk), *given]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert complaint in err
    assert sorted(tmp_path.iterdir()) == before


def test_decode_never_replaces_what_it_reads(cnk: Path, tmp_path: Path, capsys: Printed) -> None:
    misnamed = cnk.rename(tmp_path / "cat.png")
    before = misnamed.read_bytes()
    assert "is the file that is read" in fails(capsys, BadInput, "decode", misnamed, "-o", misnamed)
    assert misnamed.read_bytes() == before


# --- files that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind", "complaint"),
    [
        (b"", BadBitstream, "is empty: 0 bytes"),
        (b"\x10\x12", BadBitstream, "2 bytes are too few"),
        (b"JFIF" * 100, BadBitstream, "not a comneck bitstream"),
        (bytes(MAX_FILE_BYTES + 1), TooLarge, "larger than 1,048,576 bytes"),
    ],
)
def test_a_hostile_file_is_refused_by_type(
    tmp_path: Path, capsys: Printed, content: bytes, kind: type[ComneckError], complaint: str
) -> None:
    path = tmp_path / "bad.cnk"
    path.write_bytes(content)
    for line in (
        fails(capsys, kind, "inspect", path),
        fails(capsys, kind, "decode", path, "-o", tmp_path / "out.png"),
        fails(capsys, kind, "send", path, "what?"),
    ):
        assert complaint in line
        assert "bad.cnk" in line


def test_a_folder_and_nothing_are_refused_by_name(tmp_path: Path, capsys: Printed) -> None:
    (tmp_path / "folder.cnk").mkdir()
    for name, complaint in (("folder.cnk", "is a folder; give one .cnk file"), ("nothing.cnk", "does not exist")):
        for command in (["inspect"], ["decode", "-o", tmp_path / "out.png"], ["send", "--", "what?"]):
            arguments = [*command[:1], tmp_path / name, *command[1:]]
            assert complaint in fails(capsys, BadInput, *arguments)


def test_a_bitstream_is_known_by_its_suffix() -> None:
    assert is_stored("a/b.cnk")
    assert is_stored(Path("b.CNK"))
    assert not any(map(is_stored, ["cnk", "b.cnk.png", Path("b"), b"b.cnk"]))


def test_another_profiles_trouble_is_told_and_does_not_hide_the_codec(
    bitstream: Bitstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMNECK_HOME", str(tmp_path))
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "aaa.toml").write_text("name = 1")
    assert find_codec(bitstream).profile == "small"
    with pytest.raises(ProfileMismatch, match=r"'small' is \w+; profile 'aaa': .*aaa\.toml cannot be read"):
        find_codec(replace(bitstream, codec_digest=bytes(4)))
