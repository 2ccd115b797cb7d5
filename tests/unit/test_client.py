from __future__ import annotations

import asyncio
import inspect
import io
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scripted import CODEC_DIGEST, SETTINGS, RunningServer, ScriptedEncoder, ScriptedEngine, running

import comneck
import edge_client
from edge_client import AsyncClient, Client, Encoder, Reply
from shared.bitstream import Bitstream
from shared.conversation import Generation
from shared.errors import (
    BadInput,
    DeadlineExceeded,
    ProfileMismatch,
    PromptTooLong,
    ServerFailed,
    ServerUnavailable,
    TooLarge,
    UnreadableImage,
    all_errors,
)
from shared.images import load_photo

Ask = Callable[..., Reply]


def ask_sync(address: str, *args: Any, timeout: float = 5, **options: Any) -> Reply:
    with Client(address, timeout=timeout) as client:
        return client.ask(*args, **options)


def ask_async(address: str, *args: Any, timeout: float = 5, **options: Any) -> Reply:
    async def asked() -> Reply:
        async with AsyncClient(address, timeout=timeout) as client:
            return await client.ask(*args, **options)

    return asyncio.run(asked())


@pytest.fixture(params=[ask_sync, ask_async])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Every promise holds for both clients."""
    return request.param  # type: ignore[no-any-return]


def classify_sync(address: str, *args: Any, **options: Any) -> Reply:
    with Client(address, timeout=5) as client:
        return client.classify(*args, **options)


def classify_async(address: str, *args: Any, **options: Any) -> Reply:
    async def classified() -> Reply:
        async with AsyncClient(address, timeout=5) as client:
            return await client.classify(*args, **options)

    return asyncio.run(classified())


@pytest.fixture(params=[classify_sync, classify_async])
def classify(request: pytest.FixtureRequest) -> Ask:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def encoder(bitstream: Bitstream, monkeypatch: pytest.MonkeyPatch) -> ScriptedEncoder:
    encoder = ScriptedEncoder(bitstream)
    monkeypatch.setattr(Encoder, "for_server", lambda server: encoder)
    return encoder


@pytest.fixture
def png() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_bitstream_is_asked_about_as_it_is(server: RunningServer, bitstream: Bitstream, ask: Ask) -> None:
    reply = ask(server.grpc, bitstream, "what?", backend="other", generation=Generation(max_tokens=9, seed=1))
    assert reply.text == "a dog runs"
    (asked,) = server.engine.asked
    assert (asked.parts, asked.backend) == ((bitstream, "what?"), "other")
    assert asked.generation == Generation(max_tokens=9, seed=1)


def test_text_is_handed_over_as_it_is_written(server: RunningServer, bitstream: Bitstream, ask: Ask) -> None:
    pieces: list[str] = []
    reply = ask(server.grpc, bitstream, "what?", on_text=pieces.append)
    assert pieces == ["a dog", " runs"]
    assert reply.text == "a dog runs"


def test_several_photos_go_before_the_prompt(server: RunningServer, bitstream: Bitstream, ask: Ask) -> None:
    ask(server.grpc, [bitstream, bitstream], "which?")
    assert server.engine.asked[0].parts == (bitstream, bitstream, "which?")


@pytest.mark.usefixtures("encoder")
def test_a_photo_is_taken_as_path_bytes_or_pixels(server: RunningServer, ask: Ask, png: bytes, tmp_path: Path) -> None:
    path = tmp_path / "noise.png"
    path.write_bytes(png)
    receipts = [ask(server.grpc, source, "what?").receipt for source in (path, str(path), png, load_photo(png))]
    assert len({receipt.bytes_jpeg75 for receipt in receipts}) == 1


@pytest.mark.usefixtures("encoder")
def test_the_receipt_adds_up(server: RunningServer, bitstream: Bitstream, ask: Ask, png: bytes) -> None:
    receipt = ask(server.grpc, png, "what?").receipt
    assert receipt.bytes_payload == len(bytes(bitstream)) == 528
    assert 528 + len("what?") < receipt.bytes_wire < 600
    assert receipt.bpp == 8 * 528 / 256**2
    assert 10_000 < receipt.bytes_jpeg75 < 60_000
    assert receipt.encode > 0
    assert 0 <= receipt.network < 1000


def test_a_bitstream_has_no_jpeg_to_compare_with(server: RunningServer, bitstream: Bitstream, ask: Ask) -> None:
    assert ask(server.grpc, bitstream, "what?").receipt.bytes_jpeg75 is None


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_an_error_of_the_server_arrives_as_it_was_raised(
    server: RunningServer, bitstream: Bitstream, ask: Ask, kind: type[Exception]
) -> None:
    server.engine.failure = kind("why it failed: é")
    with pytest.raises(kind, match=r"^why it failed: é$") as caught:
        ask(server.grpc, bitstream, "what?")
    assert type(caught.value) is kind


def test_an_error_in_the_middle_of_an_answer_arrives_too(server: RunningServer, bitstream: Bitstream, ask: Ask) -> None:
    server.engine.failure, server.engine.fails_at = PromptTooLong("no more"), 1
    pieces: list[str] = []
    with pytest.raises(PromptTooLong, match="no more"):
        ask(server.grpc, bitstream, "what?", on_text=pieces.append)
    assert pieces == ["a dog"]


def test_a_server_that_is_down_is_named_soon(free_port: int, bitstream: Bitstream, ask: Ask) -> None:
    start = time.monotonic()
    with pytest.raises(ServerUnavailable, match=f"127.0.0.1:{free_port}; `cloud-server serve`"):
        ask(f"127.0.0.1:{free_port}", bitstream, "what?")
    assert time.monotonic() - start < 4


def test_a_port_where_something_else_listens_is_no_server(
    server: RunningServer, bitstream: Bitstream, ask: Ask
) -> None:
    with pytest.raises(ServerUnavailable):
        ask(server.http.removeprefix("http://"), bitstream, "what?")


def test_a_port_that_takes_connections_and_says_nothing_is_given_up(bitstream: Bitstream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        start = time.monotonic()
        with pytest.raises((ServerUnavailable, DeadlineExceeded)):
            ask_sync(f"127.0.0.1:{mute.getsockname()[1]}", bitstream, "what?", timeout=1)
        assert time.monotonic() - start < 3


def test_a_slow_server_exceeds_the_deadline(server: RunningServer, bitstream: Bitstream, ask: Ask) -> None:
    server.engine.pause = 30
    with pytest.raises(DeadlineExceeded, match=server.grpc):
        ask(server.grpc, bitstream, "what?", timeout=0.3)


def test_a_restarted_server_is_found_again(bitstream: Bitstream, free_port: int) -> None:
    settings = replace(SETTINGS, grpc_port=free_port)
    with Client(f"127.0.0.1:{free_port}", timeout=5) as client:
        with running(ScriptedEngine(), settings):
            assert client.ask(bitstream, "what?").text
        with pytest.raises(ServerUnavailable):
            client.ask(bitstream, "what?")
        with running(ScriptedEngine(), settings):
            time.sleep(0.5)  # one backoff of the channel
            assert client.ask(bitstream, "what?").text


def test_a_damaged_photo_is_refused_before_anything_is_sent(
    server: RunningServer, encoder: ScriptedEncoder, ask: Ask, png: bytes
) -> None:
    with pytest.raises(UnreadableImage):
        ask(server.grpc, png[:500], "what?")
    assert not server.engine.asked


def test_too_many_photos_are_refused_before_they_are_encoded(
    server: RunningServer, bitstream: Bitstream, ask: Ask
) -> None:
    with pytest.raises(TooLarge, match=r"5 photos; .* takes at most 4"):
        ask(server.grpc, [bitstream] * 5, "what?")
    assert not server.engine.asked


def test_a_request_over_the_limit_is_refused_before_it_is_sent(
    server: RunningServer, bitstream: Bitstream, ask: Ask
) -> None:
    with pytest.raises(TooLarge, match=r"takes at most 4,096: send fewer photos or a shorter prompt"):
        ask(server.grpc, bitstream, "x" * 4096)
    assert not server.engine.asked


@pytest.mark.parametrize("address", ["", "localhost", "http://127.0.0.1:1", "127.0.0.1:x", "127.0.0.1:0", ":50051"])
def test_an_address_that_is_none_is_bad_input(address: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(BadInput, match="no HOST:PORT"):
            kind(address)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_without_meaning_is_bad_input(timeout: float) -> None:
    with pytest.raises(BadInput, match="timeout"):
        Client(timeout=timeout)


def test_quality_and_size_reach_the_encoder(
    server: RunningServer, encoder: ScriptedEncoder, ask: Ask, png: bytes
) -> None:
    receipt = ask(server.grpc, [png, png], "which?", quality=1, max_bytes=900).receipt
    assert encoder.asked == [(1, 900)] * 2
    assert receipt.qualities == (2, 2)  # those of the bitstreams, whatever was asked for
    ask(server.grpc, png, "what?")
    assert encoder.asked[-1] == (None, None)


def test_a_stored_bitstream_is_sent_as_it_is(
    server: RunningServer, bitstream: Bitstream, ask: Ask, tmp_path: Path
) -> None:
    path = tmp_path / "photo.CNK"
    path.write_bytes(bytes(bitstream))
    for source in (path, str(path)):
        assert ask(server.grpc, source, "what?").receipt.bytes_jpeg75 is None
    assert [asked.parts for asked in server.engine.asked] == [(bitstream, "what?")] * 2


def test_a_quality_for_what_is_encoded_already_is_refused(
    server: RunningServer, bitstream: Bitstream, ask: Ask
) -> None:
    for options in ({"quality": 2}, {"max_bytes": 900}):
        with pytest.raises(BadInput, match="nothing is left to encode"):
            ask(server.grpc, bitstream, "what?", **options)
    assert not server.engine.asked


@pytest.mark.parametrize("change", [{"codec_digest": bytes(4)}, {"quality": 3}])
def test_a_bitstream_that_the_server_does_not_decode_is_refused_before_it_is_sent(
    server: RunningServer, bitstream: Bitstream, ask: Ask, change: dict[str, Any]
) -> None:
    with pytest.raises(
        ProfileMismatch, match=rf"runs profile 'small' and decodes quality 1, 2 by codec {CODEC_DIGEST}"
    ):
        ask(server.grpc, replace(bitstream, **change), "what?")
    assert not server.engine.asked


def test_after_a_mismatch_the_server_is_asked_for_its_profile_again(
    server: RunningServer, bitstream: Bitstream
) -> None:
    with Client(server.grpc, timeout=5) as client:
        before = client.profile()
        with pytest.raises(ProfileMismatch):
            client.ask(replace(bitstream, quality=3), "what?")
        assert client.profile() is not before


def test_a_replaced_server_is_asked_for_its_profile_again(server: RunningServer, bitstream: Bitstream) -> None:
    with Client(server.grpc, timeout=5) as client:
        before = client.profile()
        assert client.profile() is before
        server.engine.failure = ProfileMismatch("another codec")
        with pytest.raises(ProfileMismatch):
            client.ask(bitstream, "what?")
        assert client.profile() is not before


def test_examples_and_the_photo_go_as_bitstreams_of_their_own_in_one_request(
    server: RunningServer, bitstream: Bitstream, classify: Ask
) -> None:
    a, b, photo = (replace(bitstream, check=number) for number in range(3))
    for examples in ({" cat": a, "sea_horse\n": b}, [("cat", a), ("sea_horse", b)]):
        reply = classify(server.grpc, photo, examples)
        assert reply.text == "a dog runs"
        assert reply.receipt.bytes_payload == 3 * 528
    for asked in server.engine.asked:
        assert asked.parts == (a, "cat", b, "sea_horse", photo)
        assert asked.task == "label"


@pytest.mark.usefixtures("encoder")
def test_examples_are_taken_in_every_form_that_photos_are(
    server: RunningServer, bitstream: Bitstream, classify: Ask, png: bytes, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "b.cnk").write_bytes(bytes(bitstream))
    reply = classify(server.grpc, png, {"cat": tmp_path / "a.png", "dog": str(tmp_path / "b.cnk")}, quality=1)
    assert server.engine.asked[0].parts == (bitstream, "cat", bitstream, "dog", bitstream)
    assert reply.receipt.bytes_jpeg75 is None  # one of them was no picture


def test_a_label_is_asked_of_who_gives_labels(server: RunningServer, bitstream: Bitstream, classify: Ask) -> None:
    with pytest.raises(BadInput, match="backend 'other' answers with box or choice or text, not with label: ask few"):
        classify(server.grpc, bitstream, {"cat": bitstream, "dog": bitstream}, backend="other")
    assert not server.engine.asked


def test_closing_a_stream_early_ends_the_generation(server: RunningServer, bitstream: Bitstream) -> None:
    server.engine.pieces, server.engine.pause = ("word ",) * 1000, 0.01
    with Client(server.grpc, timeout=30) as client, closing(client.stream(bitstream, "what?")) as events:
        assert next(events) == "word "
    assert server.engine.ended.wait(2)

    async def leave() -> None:
        async with AsyncClient(server.grpc, timeout=30) as client:
            events = client.stream(bitstream, "what?")
            assert await anext(events) == "word "
            await events.aclose()

    asyncio.run(leave())
    assert server.engine.ended.wait(2)


def test_one_client_serves_many_at_once(server: RunningServer, bitstream: Bitstream) -> None:
    server.engine.pause = 0.02
    with Client(server.grpc, timeout=10) as client, ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda n: client.ask(bitstream, f"question {n}"), range(16)))
    assert {reply.text for reply in replies} == {"a dog runs"}

    async def many() -> list[Reply]:
        async with AsyncClient(server.grpc, timeout=10) as client:
            return await asyncio.gather(*(client.ask(bitstream, f"question {n}") for n in range(16)))

    assert {reply.text for reply in asyncio.run(many())} == {"a dog runs"}


def test_sync_and_async_offer_the_same() -> None:
    def methods(kind: type) -> Iterator[tuple[str, str, str | None]]:
        for name, member in inspect.getmembers(kind, inspect.isfunction):
            if not name.startswith("_"):
                parameters = list(inspect.signature(member).parameters.values())
                yield name, str(parameters), member.__doc__

    assert list(methods(Client)) == list(methods(AsyncClient))


def test_the_package_offers_what_it_says() -> None:
    for name in edge_client.__all__:
        assert getattr(edge_client, name)
    with pytest.raises(AttributeError):
        edge_client.Nothing  # noqa: B018


def test_the_sdk_offers_what_it_says() -> None:
    for name in comneck.__all__:
        assert getattr(comneck, name)
    with pytest.raises(AttributeError):
        comneck.Nothing  # noqa: B018


def test_a_stream_cut_by_the_server_is_a_failure(
    server: RunningServer, bitstream: Bitstream, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloud_server import grpc_front

    async def nothing(self: object, request: object, context: object) -> Any:
        if False:
            yield

    monkeypatch.setattr(grpc_front._Service, "AnswerStream", nothing)
    with running(ScriptedEngine()) as cut, pytest.raises(ServerFailed, match="without its last message"):
        ask(cut.grpc, bitstream, "what?", on_text=print)
