from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageColor
from scripted import CODEC_DIGEST, RunningServer, ScriptedEncoder

from edge_client.cli import main
from edge_client.encoder import Encoder
from edge_client.overlay import COLOUR
from shared.bitstream import Bitstream
from shared.conversation import Box
from shared.errors import ComneckError, NothingFound, PromptTooLong, all_errors

BOX = {"left": 1, "top": 2, "right": 3, "bottom": 4}


@pytest.fixture
def encoder(bitstream: Bitstream, monkeypatch: pytest.MonkeyPatch) -> ScriptedEncoder:
    encoder = ScriptedEncoder(bitstream)
    monkeypatch.setattr(Encoder, "for_server", lambda server: encoder)
    return encoder


@pytest.fixture
def photo(tmp_path: Path, encoder: ScriptedEncoder) -> str:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").save(path)
    return str(path)


def test_send_prints_the_answer_then_one_line_of_receipt(
    server: RunningServer, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["send", photo, "describe this", "--server", server.grpc]) == 0
    out, err = capsys.readouterr()
    answer, receipt = out.splitlines()
    assert (answer, err) == ("a dog runs", "")
    assert re.fullmatch(
        r"528 B sent \(\d+ B on the wire\), 0\.064 bpp, quality 2, \d+\.\dx smaller than JPEG 75 \([\d,]+ B\) \| "
        r"encode \d+ ms, network \d+ ms, queue 1 ms, decode\+neck 2 ms, vision 3 ms, generation 4 ms",
        receipt,
    )


def test_send_json_prints_one_object(server: RunningServer, photo: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["send", photo, "what?", "--server", server.grpc, "--backend", "other", "--max-tokens", "9", "--json"]
    assert main(arguments) == 0
    reply = json.loads(capsys.readouterr().out)
    assert (reply["answer"], reply["finish"], reply["backend"], reply["profile"]) == (
        "a dog runs",
        "stop",
        "other",
        "small",
    )
    assert (reply["task"], reply["choice"], reply["box"]) == ("box", None, BOX)
    assert (reply["bytes_payload"], reply["bpp"], reply["quality"]) == (528, 0.0645, 2)
    assert reply["bytes_wire"] > 528
    assert reply["bytes_jpeg75"] > 528
    assert set(reply["timings_ms"]) == {"load", "encode", "network", "queue", "decode", "vision", "generation"}
    assert reply["model_digests"] == {"codec": "c0dec", "llm": "11a"}
    assert server.engine.asked[0].generation.max_tokens == 9


def test_quality_and_size_reach_the_encoder(server: RunningServer, photo: str, encoder: ScriptedEncoder) -> None:
    assert main(["send", photo, "what?", "--server", server.grpc, "--quality", "1", "--max-bytes", "900"]) == 0
    assert encoder.asked == [(1, 900)]


def test_classify_prints_the_label_then_one_line_of_receipt(
    server: RunningServer, photo: str, bitstream: Bitstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.engine.pieces = ("sea horse",)
    (tmp_path / "b=1.cnk").write_bytes(bytes(bitstream))
    examples = ["--example", f"cat={photo}", "--example", f" sea horse ={tmp_path}/b=1.cnk"]
    assert main(["classify", photo, *examples, "--server", server.grpc]) == 0
    label, receipt = capsys.readouterr().out.splitlines()
    assert label == "sea horse"
    assert re.match(r"1,584 B sent \([\d,]+ B on the wire\), 0\.064 bpp, quality 2 \| encode", receipt)
    (asked,) = server.engine.asked
    assert asked.parts == (bitstream, "cat", bitstream, "sea horse", bitstream)
    assert main(["classify", photo, *examples, "--server", server.grpc, "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert (reply["answer"], reply["task"], reply["bytes_payload"]) == ("sea horse", "label", 1584)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{photo}", "--example", "{photo}"], "is no LABEL=IMAGE such as cat=cat.jpg"),
        (["{photo}", "--example", "cat=nothing.png"], "nothing.png does not exist"),
        (["nothing.png", "--example", "cat={photo}"], "nothing.png does not exist"),
        (["{photo}", "--example", "cat={photo}", "--backend", "other"], "not with label: ask few"),
    ],
)
def test_what_cannot_be_classified_is_one_line_before_anything_is_sent(
    server: RunningServer, photo: str, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    given = ["--server", server.grpc, *(argument.format(photo=photo) for argument in arguments)]
    assert main(["classify", *given]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), server.engine.asked) == ("", 1, [])
    assert complaint in err


def test_a_stored_bitstream_is_sent_as_it_is(
    server: RunningServer, bitstream: Bitstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "photo.cnk"
    path.write_bytes(bytes(bitstream))
    assert main(["send", str(path), "what?", "--server", server.grpc]) == 0
    assert server.engine.asked[0].images == (bitstream,)
    assert "528 B sent" in capsys.readouterr().out
    for flag in ("--quality", "--max-bytes"):
        assert main(["send", str(path), "what?", "--server", server.grpc, flag, "2"]) == 2
        assert "nothing is left to encode" in capsys.readouterr().err


def test_choices_are_asked_and_the_one_chosen_is_told(
    server: RunningServer, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["send", photo, "what?", "--server", server.grpc, "--choice", "a cat", "--choice", "a dog"]) == 0
    (asked,) = server.engine.asked
    assert (asked.task, asked.choices) == ("choice", ("a cat", "a dog"))
    assert capsys.readouterr().out.splitlines()[:2] == ["a dog runs", "choice: a dog"]


def test_a_box_is_told_in_the_photos_pixels(
    server: RunningServer, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.engine.box = Box(10.4, 20.6, 30, 400)
    assert main(["send", photo, "the dog", "--server", server.grpc, "--task", "box"]) == 0
    assert server.engine.asked[0].task == "box"
    assert capsys.readouterr().out.splitlines()[1] == "box: left 10, top 21, right 30, bottom 400"
    server.engine.box = None
    assert main(["send", photo, "the dog", "--server", server.grpc, "--task", "box"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "box: none"


def test_an_overlay_asks_for_a_box_and_shows_it_on_the_upright_photo(
    server: RunningServer, encoder: ScriptedEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "photo.png", tmp_path / "out.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: to be turned by 90 degrees
    Image.new("RGB", (300, 200), "teal").save(source, exif=exif)
    server.engine.box = Box(50, 100, 150, 250)
    assert main(["send", str(source), "where is it?", "--server", server.grpc, "--overlay", str(out)]) == 0
    assert server.engine.asked[0].task == "box"
    assert "box: left 50, top 100, right 150, bottom 250\n" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.size == (200, 300)
        drawn = picture.getpixel((50, 200)), picture.getpixel((100, 200))
    assert drawn == (ImageColor.getrgb(COLOUR), (0, 128, 128))


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_an_answer_without_a_box_is_printed_and_draws_nothing(
    server: RunningServer, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: list[str]
) -> None:
    server.engine.box = None
    out = tmp_path / "out.png"
    arguments = ["send", photo, "where is it?", "--server", server.grpc, "--overlay", str(out), *flag]
    assert main(arguments) == NothingFound.exit_code
    said, err = capsys.readouterr()
    assert "a dog runs" in said
    assert err == f"edge-client: the answer holds no box, so {out} is not written: ask in other words\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{photo}", "--overlay", "{folder}/out.txt"], "ends in no picture format"),
        (["{photo}", "--overlay", "{folder}/out"], "ends in no picture format"),
        (["{photo}", "--overlay", "{photo}"], "is the file that is read"),
        (["{photo}", "--overlay", "{folder}/no/out.png"], "cannot be written"),
        (["{folder}/photo.cnk", "--overlay", "{folder}/out.png"], "is a bitstream, which no box can be drawn on"),
        (["{photo}", "--overlay", "{folder}/out.png", "--task", "text"], "the answer is to be a text"),
        (["{photo}", "--overlay", "{folder}/out.png", "--choice", "a"], "the answer is to be a choice"),
    ],
)
def test_an_overlay_that_cannot_be_is_refused_before_anything_is_sent(
    server: RunningServer,
    photo: str,
    bitstream: Bitstream,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    (tmp_path / "photo.cnk").write_bytes(bytes(bitstream))
    before = sorted(tmp_path.iterdir())
    image, *flags = (argument.format(photo=photo, folder=tmp_path) for argument in arguments)
    assert main(["send", image, "where is it?", "--server", server.grpc, *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), server.engine.asked) == ("", 1, [])
    assert complaint in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_every_error_is_one_line_and_its_own_exit_code(
    server: RunningServer, photo: str, capsys: pytest.CaptureFixture[str], kind: type[ComneckError]
) -> None:
    server.engine.failure = kind("why it failed")
    assert main(["send", photo, "what?", "--server", server.grpc]) == kind.exit_code
    assert capsys.readouterr() == ("", "edge-client: why it failed\n")


def test_exit_codes_are_distinct_and_all_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    codes = [kind.exit_code for kind in all_errors()]
    assert len(set(codes)) == len(codes)
    with pytest.raises(SystemExit, match="0"):
        main(["send", "--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{code}  \w", out, re.MULTILINE) for code in [0, *codes, 130])


def test_an_error_in_the_middle_of_an_answer_gets_a_line_of_its_own(
    server: RunningServer, photo: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.engine.failure, server.engine.fails_at = PromptTooLong("no more"), 1
    assert main(["send", photo, "what?", "--server", server.grpc]) == PromptTooLong.exit_code
    assert capsys.readouterr() == ("a dog\n", "edge-client: no more\n")


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["{photo}", "  "], 2, "the prompt is empty"),
        (["{folder}", "what?"], 2, "is a folder"),
        (["{folder}/nothing.png", "what?"], 2, "does not exist"),
        (["{photo}", "what?", "--server", "nowhere"], 2, "no HOST:PORT"),
        (["{photo}", "what?", "--timeout", "0"], 2, "timeout"),
        (["{photo}", "what?", "--server", "127.0.0.1:9"], 10, "no comneck server answers at 127.0.0.1:9"),
        (["{photo}", "what?", "--max-tokens", "-3"], 2, "out of range"),
        (["{text}", "what?"], 3, "no picture"),
        (["{text}.cnk", "what?"], 2, "does not exist"),
        (["{cut}", "what?"], 4, "too few for a bitstream"),
    ],
)
def test_bad_input_is_one_line(
    server: RunningServer,
    photo: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    complaint: str,
) -> None:
    (tmp_path / "text.txt").write_text("no picture at all")
    (tmp_path / "cut.cnk").write_bytes(b"\x10\x12")
    places = {"photo": photo, "folder": tmp_path, "text": tmp_path / "text.txt", "cut": tmp_path / "cut.cnk"}
    given = ["--server", server.grpc, *(argument.format(**places) for argument in arguments)]
    assert main(["send", *given]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert complaint in err


@pytest.mark.parametrize("arguments", [[], ["send"], ["send", "a.png", "what?", "--max-tokens", "many"], ["sned"]])
def test_wrong_usage_is_one_line_that_points_to_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--help" in err


def test_a_failure_that_no_one_foresaw_is_one_line_unless_debugging(
    photo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.images.load_photo", lambda source: 1 / 0)
    assert main(["send", photo, "what?"]) == 1
    assert capsys.readouterr().err == (
        "edge-client: unexpected ZeroDivisionError: division by zero (COMNECK_DEBUG=1 shows where)\n"
    )
    monkeypatch.setenv("COMNECK_DEBUG", "1")
    assert main(["send", photo, "what?"]) == 1
    assert "Traceback" in capsys.readouterr().err


SEND = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
sys.path.insert(0, {str(Path(__file__).parent)!r})
from edge_client.encoder import Encoder
from edge_client.cli import main
from scripted import ScriptedEncoder
from shared.bitstream import Bitstream
photo = Bitstream("d1", 2, bytes.fromhex({CODEC_DIGEST!r}), 256, 256, (1, 1), 0, bytes(500))
Encoder.for_server = lambda server: ScriptedEncoder(photo)
sys.exit(main())
"""


def test_ctrl_c_ends_with_130_and_no_traceback(server: RunningServer, photo: str) -> None:
    server.engine.pieces, server.engine.pause = ("word ",) * 10_000, 0.01
    command = [sys.executable, "-c", SEND, "send", photo, "what?", "--server", server.grpc]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.read(5) == b"word "
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, b"")
    assert server.engine.ended.wait(2)


def test_a_reader_that_leaves_ends_it_quietly(server: RunningServer, photo: str) -> None:
    server.engine.pieces, server.engine.pause = ("word ",) * 10_000, 0.001
    command = [sys.executable, "-c", SEND, "send", photo, "what?", "--server", server.grpc]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == b""
    assert process.wait(10) == 141
