from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from scripted import CODEC_DIGEST, SETTINGS, RunningServer

from shared.bitstream import Bitstream
from shared.errors import PromptTooLong, UnknownName
from shared.wire.comneck.v1 import comneck_pb2 as pb
from shared.wire.comneck.v1 import comneck_pb2_grpc as pb_grpc
from shared.wire.errors import ERROR_KEY

SERVICE = "comneck.v1.ComneckService"


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


@pytest.fixture
def stub(channel: grpc.Channel) -> pb_grpc.ComneckServiceStub:
    return pb_grpc.ComneckServiceStub(channel)


def conversation(*parts: str | Bitstream) -> pb.Conversation:
    return pb.Conversation(
        parts=[pb.Part(text=p) if isinstance(p, str) else pb.Part(bitstream=bytes(p)) for p in parts]
    )


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, str | None]:
    """Status, message and our name of the error that a call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    problem: Any = caught.value
    return problem.code(), problem.details(), dict(problem.trailing_metadata()).get(ERROR_KEY)


def test_the_profile_tells_what_to_encode(stub: pb_grpc.ComneckServiceStub) -> None:
    profile = stub.GetProfile(pb.GetProfileRequest(), timeout=5)
    assert (profile.profile, profile.quality) == ("small", 2)
    assert {one.quality: one.codec_digest.hex() for one in profile.qualities} == {1: CODEC_DIGEST, 2: CODEC_DIGEST}
    assert profile.max_request_bytes == SETTINGS.max_request_bytes


def test_a_conversation_reaches_the_engine_whole(
    server: RunningServer, stub: pb_grpc.ComneckServiceStub, bitstream: Bitstream
) -> None:
    response = stub.Answer(
        pb.AnswerRequest(conversation=conversation(bitstream, "what is this?", bitstream)), timeout=5
    )
    assert response.answer.text == "a dog runs"
    assert response.answer.finish_reason == pb.FINISH_REASON_STOP
    assert server.engine.asked[0].parts == (bitstream, "what is this?", bitstream)


def test_a_stream_ends_with_the_whole_answer(stub: pb_grpc.ComneckServiceStub, bitstream: Bitstream) -> None:
    *pieces, last = stub.AnswerStream(pb.AnswerStreamRequest(conversation=conversation(bitstream, "what?")), timeout=5)
    assert [piece.text for piece in pieces] == ["a dog", " runs"]
    assert last.answer.text == "a dog runs"


def test_an_error_of_ours_keeps_its_status_and_its_name(
    server: RunningServer, stub: pb_grpc.ComneckServiceStub
) -> None:
    server.engine.failure = PromptTooLong("the prompt has 9,000 tokens; the limit is 2,048")
    request = pb.AnswerRequest(conversation=conversation("what?"))
    assert refusal(lambda: stub.Answer(request, timeout=5)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the prompt has 9,000 tokens; the limit is 2,048",
        "prompt-too-long",
    )


def test_an_error_after_the_first_piece_ends_the_stream_with_its_status(
    server: RunningServer, stub: pb_grpc.ComneckServiceStub
) -> None:
    server.engine.failure, server.engine.fails_at = UnknownName("gone"), 1
    pieces = stub.AnswerStream(pb.AnswerStreamRequest(conversation=conversation("what?")), timeout=5)
    assert next(pieces).text == "a dog"
    assert refusal(lambda: next(pieces)) == (grpc.StatusCode.NOT_FOUND, "gone", "unknown-name")


@pytest.mark.parametrize("method", ["Answer", "AnswerStream"])
def test_an_unforeseen_failure_tells_an_id_and_keeps_its_traceback_for_the_log(
    server: RunningServer, stub: pb_grpc.ComneckServiceStub, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    server.engine.failure = ZeroDivisionError("secret detail")
    request = pb.AnswerStreamRequest(conversation=conversation("what?"))
    call = stub.AnswerStream if method == "AnswerStream" else stub.Answer
    with caplog.at_level(logging.ERROR):
        status, message, name = refusal(lambda: list(call(request, timeout=5)))
    assert (status, name) == (grpc.StatusCode.INTERNAL, "server-failed")
    assert "secret" not in message
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.getMessage().split()[1] in message
    server.engine.failure = None
    assert stub.Answer(pb.AnswerRequest(conversation=conversation("still there?")), timeout=5).answer.text


def test_bytes_that_are_no_message_are_bad_input(channel: grpc.Channel) -> None:
    for call in (channel.unary_unary(f"/{SERVICE}/Answer"), channel.unary_stream(f"/{SERVICE}/AnswerStream")):
        status, _, name = refusal(lambda call=call: list(call(b"\xff\xff\xff", timeout=5)))  # type: ignore[misc]
        assert (status, name) == (grpc.StatusCode.INVALID_ARGUMENT, "bad-input")


def test_a_message_over_the_limit_is_refused_before_it_is_read(
    server: RunningServer, stub: pb_grpc.ComneckServiceStub
) -> None:
    request = pb.AnswerRequest(conversation=conversation("x" * SETTINGS.max_request_bytes))
    status, message, _ = refusal(lambda: stub.Answer(request, timeout=5))
    assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(SETTINGS.max_request_bytes) in message
    assert not server.engine.asked


def test_a_message_that_quotes_a_large_request_still_arrives(
    server: RunningServer, stub: pb_grpc.ComneckServiceStub
) -> None:
    server.engine.failure = UnknownName("no backend named " + "é" * 60_000)
    status, message, _ = refusal(lambda: stub.Answer(pb.AnswerRequest(conversation=conversation("what?")), timeout=5))
    assert status is grpc.StatusCode.NOT_FOUND
    assert message.startswith("no backend named éé")


def test_a_client_that_leaves_ends_the_generation(server: RunningServer, stub: pb_grpc.ComneckServiceStub) -> None:
    server.engine.pieces, server.engine.pause = ("word ",) * 1000, 0.01
    call = stub.AnswerStream(pb.AnswerStreamRequest(conversation=conversation("what?")), timeout=30)
    next(call)
    call.cancel()
    assert server.engine.ended.wait(2)


def test_a_deadline_ends_the_generation(server: RunningServer, stub: pb_grpc.ComneckServiceStub) -> None:
    server.engine.pause = 30
    start = time.monotonic()
    status, _, _ = refusal(lambda: stub.Answer(pb.AnswerRequest(conversation=conversation("what?")), timeout=0.2))
    assert status is grpc.StatusCode.DEADLINE_EXCEEDED
    assert server.engine.ended.wait(2)
    assert time.monotonic() - start < 2


def test_health_is_serving(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_service(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (response,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    assert SERVICE in [service.name for service in response.list_services_response.service]
