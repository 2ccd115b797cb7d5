"""A photo in, an answer out, through real processes, sockets and models."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from edge_client.client import Client
from edge_client.encoder import Encoder
from shared.errors import BadBitstream, BadInput, ProfileMismatch, PromptTooLong, TooLarge, UnknownName
from shared.profiles import get_profile
from tests.e2e.conftest import COMMANDS, PHOTOS, Edge, Server, edge_client

pytestmark = pytest.mark.e2e
OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("small")


def test_send_prints_the_answer_and_one_line_of_receipt(edge: Edge, cat: Path) -> None:
    done = edge(cat, "describe this")
    assert done.returncode == 0, done.stderr
    answer, receipt = done.stdout.strip().splitlines()
    assert len(answer.split()) >= 3
    assert re.match(
        r"[\d,]+ B sent \([\d,]+ B on the wire\), 0\.\d+ bpp, quality 3, [\d.]+x smaller than JPEG 75 \([\d,]+ B\) \| ",
        receipt,
    )
    for stage in ("encode", "network", "decode+neck", "vision", "generation"):
        assert re.search(rf"{re.escape(stage)} [\d,]+ ms", receipt)


def test_json_holds_the_same_as_one_object(edge: Edge, cat: Path, encoder: Encoder) -> None:
    done = edge(cat, "what animal is this?", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["profile"] == "small"
    assert said["backend"] == "llama-adapter"
    assert said["bytes_payload"] == len(encoder.encode(cat))
    assert said["bytes_payload"] < said["bytes_wire"] < said["bytes_payload"] + 60
    assert said["bpp"] == pytest.approx(8 * said["bytes_payload"] / 256**2, abs=1e-4)
    assert set(said["model_digests"]) == {"codec", "neck", "clip", "llm", "connector"}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in said["model_digests"].values())
    assert said["timings_ms"]["generation"] > 0
    assert said["answer"].strip()


def test_a_choice_is_one_of_those_given_and_the_backend_is_found(edge: Edge, cat: Path) -> None:
    choices = ("a cat", "a car", "a bridge", "a pizza")
    done = edge(cat, "what is this?", *(part for choice in choices for part in ("--choice", choice)), "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["backend"], said["task"]) == ("honeybee", "choice")
    assert said["answer"] == choices[said["choice"]] == "a cat"


def test_a_photo_is_labelled_by_examples(server: Server) -> None:
    examples = (("motorcycle", "motorcycle_right.png"), ("cup", "coffee.png"), ("rocket", "rocket.jpg"))
    shown = [part for label, name in examples for part in ("--example", f"{label}={PHOTOS / name}")]
    done = edge_client("classify", PHOTOS / "motorcycle_left.png", *shown, "--server", server.grpc)
    assert done.returncode == 0, done.stderr
    label, receipt = done.stdout.strip().splitlines()
    assert label == "motorcycle"
    assert re.match(r"[\d,]+ B sent", receipt)


def test_a_second_question_about_a_photo_costs_no_vision(server: Server, encoder: Encoder, cat: Path) -> None:
    bitstream = encoder.encode(cat, quality=2)
    with Client(server.grpc) as client:
        first = client.ask(bitstream, "describe this")
        second = client.ask(bitstream, "what is this?", choices=["a cat", "a dog"])
        again = client.ask(bitstream, "describe this")
    assert again.text == first.text
    for cached in (second, again):
        assert cached.answer.timings.decode < first.answer.timings.decode / 5
        assert cached.answer.timings.vision < first.answer.timings.vision / 5


def test_a_better_quality_costs_more_and_all_stay_under_half_a_bit_per_pixel(encoder: Encoder) -> None:
    bpps = {quality: [] for quality in (1, 2, 3, 4)}
    for name in ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg"):
        sizes = {quality: encoder.encode(PHOTOS / name, quality) for quality in bpps}
        assert sorted(map(len, sizes.values())) == [len(sizes[quality]) for quality in bpps]
        for quality, bitstream in sizes.items():
            assert bitstream.bpp == 8 * len(bytes(bitstream)) / 256**2
            bpps[quality].append(bitstream.bpp)
    means = [float(np.mean(values)) for values in bpps.values()]
    assert means[0] < 0.1
    assert all(better > 1.3 * worse for worse, better in pairwise(means))
    assert means[-1] < 0.3


def test_what_is_encoded_inspected_and_decoded_gets_the_photos_answer(
    edge: Edge, cat: Path, tmp_path: Path, encoder: Encoder
) -> None:
    cnk, png = tmp_path / "cat.cnk", tmp_path / "cat.png"
    encoded = edge_client("encode", cat, "-o", cnk)
    assert encoded.returncode == 0, encoded.stderr
    assert encoded.stdout.startswith(f"{cnk.stat().st_size:,} B, 0.")
    inspected = edge_client("inspect", cnk, "--json")
    assert inspected.returncode == 0, inspected.stderr
    told = json.loads(inspected.stdout)
    assert (told["bytes"], told["decodes"], told["profile"]) == (cnk.stat().st_size, True, "small")
    assert told["codec_digest"] == encoder.codec(told["quality"]).digest_bytes.hex()
    decoded = edge_client("decode", cnk, "-o", png)
    assert decoded.returncode == 0, decoded.stderr
    with Image.open(png) as picture:
        assert picture.size == (256, 256)
    stored, photo = (edge(image, "describe this", "--json") for image in (cnk, cat))
    assert (stored.returncode, photo.returncode) == (0, 0), stored.stderr + photo.stderr
    assert json.loads(stored.stdout)["answer"] == json.loads(photo.stdout)["answer"]
    assert json.loads(stored.stdout)["bytes_payload"] == cnk.stat().st_size
    assert [done.stderr for done in (encoded, inspected, decoded, stored, photo)] == [""] * 5


def test_every_quality_is_answered(edge: Edge, cat: Path) -> None:
    said = [
        json.loads(edge(cat, "describe this", "--quality", str(quality), "--json").stdout) for quality in range(1, 5)
    ]
    assert [one["quality"] for one in said] == [1, 2, 3, 4]
    sizes = [one["bytes_payload"] for one in said]
    assert sizes == sorted(set(sizes))
    assert all(one["answer"].strip() for one in said)


def test_max_bytes_bounds_what_is_sent(edge: Edge, cat: Path, encoder: Encoder) -> None:
    sizes = {quality: len(encoder.encode(cat, quality)) for quality in (1, 2, 3, 4)}
    done = edge(cat, "describe this", "--max-bytes", str(sizes[3] - 1), "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["quality"], said["bytes_payload"]) == (2, sizes[2])
    done = edge(cat, "describe this", "--max-bytes", "50")
    assert done.returncode == 6
    assert f"the smallest is quality 1 with {sizes[1]:,} bytes" in done.stderr


def test_photos_of_several_qualities_reach_the_same_server_at_once(server: Server, cat: Path) -> None:
    with Client(server.grpc) as client, ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(lambda quality: client.ask(cat, "describe this", quality=quality), (1, 2, 3, 4)))
        assert [reply.receipt.qualities for reply in replies] == [(1,), (2,), (3,), (4,)]
        alone = [client.ask(cat, "describe this", quality=quality).text for quality in (1, 2, 3, 4)]
    assert [reply.text for reply in replies] == alone


def test_grpc_and_rest_give_the_same_answer(server: Server, cat: Path, encoder: Encoder) -> None:
    bitstream = encoder.encode(cat)
    with Client(server.grpc) as client:
        whole = client.ask(bitstream, "describe this").text
        pieces: list[str] = []
        assert client.ask(bitstream, "describe this", on_text=pieces.append).text == whole
        assert "".join(pieces) == whole
        assert len(pieces) > 3
    raw = httpx.post(
        f"{server.http}/v1/answer/raw",
        params={"prompt": "describe this"},
        content=bytes(bitstream),
        headers=OCTETS,
        timeout=60,
    )
    assert raw.status_code == 200, raw.text
    assert raw.json()["text"] == whole


def test_different_photos_get_different_answers(server: Server) -> None:
    with Client(server.grpc) as client:
        answers = {
            client.ask(PHOTOS / name, "describe this").text for name in ("chelsea.png", "coffee.png", "rocket.jpg")
        }
    assert len(answers) == 3


def test_one_seed_draws_one_answer(edge: Edge, cat: Path) -> None:
    drawn = [edge(cat, "describe this", "--temperature", "1", "--seed", "5", "--json") for _ in range(2)]
    first, second = (json.loads(done.stdout)["answer"] for done in drawn)
    assert first == second


def test_the_openapi_page_and_its_schema_are_served(server: Server) -> None:
    assert httpx.get(f"{server.http}/docs").status_code == 200
    paths = httpx.get(f"{server.http}/openapi.json").json()["paths"]
    assert {"/v1/answer", "/v1/answer/raw", "/v1/profile"} <= set(paths)


def test_the_server_says_that_it_serves(server: Server) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        status = stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
    assert status == health_pb2.HealthCheckResponse.SERVING


def picture(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("text.png", b"hello", 3),
        ("empty.png", b"", 3),
        ("cut.png", (PHOTOS / "chelsea.png").read_bytes()[:5000], 3),
        ("dot.png", png((1, 1)), 3),
        ("strip.png", png((20000, 1)), 3),
    ],
)
def test_a_bad_picture_is_one_line_and_its_exit_code(
    edge: Edge, tmp_path: Path, name: str, content: bytes, code: int
) -> None:
    done = edge(picture(tmp_path / name, content), "describe this")
    assert done.returncode == code
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert name in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["{cat}", "  "], 2, "empty"),
        (["{folder}", "describe this"], 2, "folder"),
        (["{cat}", "describe this", "--backend", "gpt"], 7, "llama-adapter"),
        (["{cat}", "why " * 9000], 5, "context"),
        (["{cat}", "describe this", "--max-tokens", "100000"], 2, "max_tokens"),
        (["{cat}", "why " * 20000], 6, "bytes"),
    ],
)
def test_a_request_that_cannot_be_answered_says_why_in_one_line(
    edge: Edge, cat: Path, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    done = edge(*(text.format(cat=cat, folder=tmp_path) for text in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    assert len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr


def test_no_server_is_said_within_seconds_with_what_to_do(edge: Edge, cat: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        done = edge(cat, "describe this", "--server", address, timeout=20)
    assert done.returncode == 10
    assert address in done.stderr
    assert "cloud-server serve" in done.stderr


def test_a_server_that_is_too_slow_is_given_up(edge: Edge, cat: Path) -> None:
    done = edge(cat, "describe this", "--timeout", "0.05", "--max-tokens", "200")
    assert done.returncode == 11
    assert len(done.stderr.strip().splitlines()) == 1


def test_hostile_requests_are_refused_by_type_and_the_server_keeps_serving(
    server: Server, cat: Path, encoder: Encoder
) -> None:
    good = encoder.encode(cat)
    damaged = bytearray(good.payload)
    damaged[len(damaged) // 2] ^= 255
    with Client(server.grpc) as client:
        for bitstream, problem in (
            (replace(good, codec_digest=b"none"), ProfileMismatch),
            (replace(good, quality=15), ProfileMismatch),
            (replace(good, payload=bytes(damaged)), BadBitstream),
            (replace(good, payload=good.payload[:-40]), BadBitstream),
            (replace(good, quality=good.quality - 1), BadBitstream),
            (replace(good, height=64, width=64), ProfileMismatch),
            (replace(good, height=255 * 64, width=255 * 64), ProfileMismatch),
        ):
            with pytest.raises(problem):
                client.ask(bitstream, "describe this")
            refused = httpx.post(
                f"{server.http}/v1/answer/raw", params={"prompt": "hi"}, content=bytes(bitstream), headers=OCTETS
            )
            assert refused.json()["type"] == f"urn:comneck:error:{problem.slug()}"  # without the client's own check
        with pytest.raises(UnknownName):
            client.ask(good, "describe this", backend="gpt")
        with pytest.raises(PromptTooLong):
            client.ask(good, "why " * 9000)
        with pytest.raises(BadInput):
            client.ask([good, good], "which is larger?")
        with pytest.raises(TooLarge):
            client.ask([good] * 20, "which is larger?")
        assert client.ask(good, "describe this").text
    refused = httpx.post(
        f"{server.http}/v1/answer/raw", params={"prompt": "hi"}, content=b"no bitstream", headers=OCTETS
    )
    assert refused.status_code == 422
    assert refused.headers["content-type"] == "application/problem+json"
    assert server.process.poll() is None


def test_many_at_once_get_what_one_alone_gets(server: Server, cat: Path, encoder: Encoder) -> None:
    bitstream = encoder.encode(cat)
    with Client(server.grpc) as client:
        alone = client.ask(bitstream, "describe this").text
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: client.ask(bitstream, "describe this").text, range(6)))
    assert answers == [alone] * 6


def test_stopping_in_the_middle_of_an_answer_ends_its_generation(server: Server, cat: Path, encoder: Encoder) -> None:
    bitstream = encoder.encode(cat)
    with Client(server.grpc) as client:
        stream = client.stream(bitstream, "describe this")
        assert isinstance(next(stream), str)
        stream.close()
        assert client.ask(bitstream, "describe this").answer.timings.queue < 2000


def test_the_shipped_weights_are_what_the_catalogue_says() -> None:
    from shared.weights.store import Store

    store = Store()
    for name in get_profile("small").server_artefacts():
        store.verify(name)


def test_a_missing_profile_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [COMMANDS / "cloud-server", "serve", "--profile", "huge"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 7
    assert "small" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
