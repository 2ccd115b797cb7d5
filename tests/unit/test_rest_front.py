from __future__ import annotations

import base64
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from scripted import CODEC_DIGEST, SETTINGS, RunningServer

from shared.bitstream import Bitstream
from shared.conversation import Generation
from shared.errors import BadInput, PromptTooLong, all_errors

QUESTION: dict[str, Any] = {"parts": [{"text": "what is this?"}]}


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http, timeout=5, trust_env=False) as client:
        yield client


def problem(response: httpx.Response) -> tuple[int, str, str]:
    """Status, type and detail of an RFC 9457 problem."""
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "detail"}
    assert body["status"] == response.status_code
    return response.status_code, body["type"], body["detail"]


def events(response: httpx.Response) -> list[tuple[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in response.text.rstrip("\n").split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def test_healthz_says_that_it_serves(http: httpx.Client) -> None:
    assert http.get("/healthz").json() == {"status": "serving"}


def test_the_profile_tells_what_to_encode(http: httpx.Client) -> None:
    profile = http.get("/v1/profile").json()
    assert (profile["profile"], profile["quality"]) == ("small", 2)
    assert profile["qualities"] == {"1": CODEC_DIGEST, "2": CODEC_DIGEST}
    assert profile["backends"] == {"llama-adapter": ["text"], "other": ["box", "choice", "text"], "few": ["label"]}


def test_a_conversation_reaches_the_engine_whole(
    server: RunningServer, http: httpx.Client, bitstream: Bitstream
) -> None:
    encoded = base64.b64encode(bytes(bitstream)).decode()
    response = http.post(
        "/v1/answer",
        json={
            "parts": [{"bitstream": encoded}, {"text": "and"}, {"bitstream": encoded}],
            "backend": "other",
            "task": "choice",
            "choices": ["a dog", "a cat"],
            "generation": {"max_tokens": 7, "seed": 2},
        },
    )
    assert response.json() == {
        "text": "a dog runs",
        "finish": "stop",
        "tokens": 2,
        "backend": "other",
        "profile": "small",
        "timings_ms": {"queue": 1, "decode": 2, "vision": 3, "generation": 4},
        "model_digests": {"codec": "c0dec", "llm": "11a"},
        "task": "choice",
        "choice": 1,
        "box": {"left": 1, "top": 2, "right": 3, "bottom": 4},
    }
    (asked,) = server.engine.asked
    assert asked.parts == (bitstream, "and", bitstream)
    assert (asked.task, asked.choices) == ("choice", ("a dog", "a cat"))
    assert asked.generation == Generation(max_tokens=7, seed=2)


def test_raw_bytes_ask_the_same(server: RunningServer, http: httpx.Client, bitstream: Bitstream) -> None:
    response = http.post(
        "/v1/answer/raw",
        params={"prompt": "what is this?", "backend": "other", "max_tokens": 5},
        content=bytes(bitstream),
        headers={"content-type": "application/octet-stream"},
    )
    assert response.json()["text"] == "a dog runs"
    (asked,) = server.engine.asked
    assert (asked.parts, asked.backend) == ((bitstream, "what is this?"), "other")
    assert asked.generation == Generation(max_tokens=5)


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "application/vnd.comneck"])
def test_raw_bytes_are_taken_under_any_name(http: httpx.Client, bitstream: Bitstream, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = http.post("/v1/answer/raw", params={"prompt": "?"}, content=bytes(bitstream), headers=headers)
    assert response.json()["text"] == "a dog runs"


def test_a_stream_is_events_that_end_with_the_whole_answer(http: httpx.Client) -> None:
    *pieces, last = events(http.post("/v1/answer", json={**QUESTION, "stream": True}))
    assert pieces == [("text", {"text": "a dog"}), ("text", {"text": " runs"})]
    assert last[0] == "answer"
    assert last[1] == http.post("/v1/answer", json=QUESTION).json()


def test_raw_bytes_can_be_answered_as_a_stream(http: httpx.Client, bitstream: Bitstream) -> None:
    params: dict[str, Any] = {"prompt": "what?", "stream": True}
    assert events(http.post("/v1/answer/raw", params=params, content=bytes(bitstream)))[-1][0] == "answer"


def test_an_error_before_the_first_text_is_a_problem_even_of_a_stream(
    server: RunningServer, http: httpx.Client
) -> None:
    server.engine.failure = PromptTooLong("9,000 tokens; the limit is 2,048")
    expected = (422, "urn:comneck:error:prompt-too-long", "9,000 tokens; the limit is 2,048")
    assert problem(http.post("/v1/answer", json=QUESTION)) == expected
    assert problem(http.post("/v1/answer", json={**QUESTION, "stream": True})) == expected


def test_an_error_after_the_first_text_is_the_last_event(server: RunningServer, http: httpx.Client) -> None:
    server.engine.failure, server.engine.fails_at = BadInput("no more"), 1
    first, last = events(http.post("/v1/answer", json={**QUESTION, "stream": True}))
    assert first == ("text", {"text": "a dog"})
    assert last[0] == "problem"
    assert (last[1]["type"], last[1]["detail"]) == ("urn:comneck:error:bad-input", "no more")


def test_every_error_has_its_own_status(server: RunningServer, http: httpx.Client) -> None:
    for kind in all_errors():
        server.engine.failure = kind("why")
        expected = (kind.http_status, f"urn:comneck:error:{kind.slug()}", "why")
        assert problem(http.post("/v1/answer", json=QUESTION)) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_an_unforeseen_failure_tells_an_id_and_keeps_its_traceback_for_the_log(
    server: RunningServer, http: httpx.Client, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    server.engine.failure = ZeroDivisionError("secret detail")
    with caplog.at_level(logging.ERROR):
        status, kind, detail = problem(http.post("/v1/answer", json={**QUESTION, "stream": stream}))
    assert (status, kind) == (500, "urn:comneck:error:server-failed")
    assert "secret" not in detail
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.getMessage().split()[1] in detail


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({}, "body.parts: Field required"),
        ({"parts": []}, "body.parts: List should have at least 1 item"),
        ({"parts": [{"text": "a"}], "promt": "b"}, "body.promt: Extra inputs are not permitted"),
        ({"parts": [{"txt": "a"}]}, "body.parts.0"),
        ({"parts": [{"text": "a", "bitstream": ""}]}, "body.parts.0"),
        ({"parts": [{"bitstream": "###"}]}, "valid base64"),
        ({"parts": [{"text": "a"}], "generation": {"temperature": -1}}, "body.generation.temperature"),
        ({"parts": [{"text": "a"}], "generation": {"top_p": 0}}, "body.generation.top_p"),
        ({"parts": [{"text": "a"}], "generation": {"seed": 2**32}}, "body.generation.seed"),
    ],
)
def test_a_request_without_meaning_says_where(http: httpx.Client, body: dict[str, Any], complaint: str) -> None:
    status, kind, detail = problem(http.post("/v1/answer", json=body))
    assert (status, kind) == (400, "urn:comneck:error:bad-input")
    assert complaint in detail


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"parts": [{"text": "a"}], "generation": {"top_p": NaN}}'])
def test_a_body_that_is_no_json_is_bad_input(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/answer", content=body, headers={"content-type": "application/json"})
    assert problem(response)[:2] == (400, "urn:comneck:error:bad-input")


@pytest.mark.parametrize("body", [b"\x00", b"JFIF" * 100])
def test_bytes_that_are_no_bitstream_are_refused(http: httpx.Client, body: bytes) -> None:
    for response in (
        http.post("/v1/answer/raw", params={"prompt": "?"}, content=body),
        http.post("/v1/answer", json={"parts": [{"bitstream": base64.b64encode(body).decode()}]}),
    ):
        assert problem(response)[:2] == (422, "urn:comneck:error:bad-bitstream")


def test_raw_bytes_without_a_prompt_are_bad_input(http: httpx.Client, bitstream: Bitstream) -> None:
    status, _, detail = problem(http.post("/v1/answer/raw", content=bytes(bitstream)))
    assert (status, detail) == (400, "query.prompt: Field required")


def test_a_body_over_the_limit_is_refused(server: RunningServer, http: httpx.Client) -> None:
    body = b"x" * (SETTINGS.max_request_bytes + 1)
    response = http.post("/v1/answer/raw", params={"prompt": "?"}, content=body)
    status, kind, detail = problem(response)
    assert (status, kind) == (413, "urn:comneck:error:too-large")
    assert f"{SETTINGS.max_request_bytes:,}" in detail
    assert not server.engine.asked


def test_a_body_that_does_not_tell_its_length_is_refused_at_the_limit(server: RunningServer) -> None:
    host, port = server.http.removeprefix("http://").split(":")
    head = b"POST /v1/answer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%b\r\n" % (SETTINGS.max_request_bytes + 1, b"x" * (SETTINGS.max_request_bytes + 1))
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head + chunk)  # and never the last chunk
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_at_the_limit_is_taken(http: httpx.Client) -> None:
    body = json.dumps(QUESTION).encode()
    body += b" " * (SETTINGS.max_request_bytes - len(body))
    response = http.post("/v1/answer", content=body, headers={"content-type": "application/json"})
    assert response.json()["text"] == "a dog runs"


def test_a_page_that_is_not_there_is_a_problem_too(http: httpx.Client) -> None:
    assert problem(http.get("/nowhere")) == (404, "about:blank", "GET /nowhere: Not Found")
    response = http.get("/v1/answer")
    assert problem(response)[0] == 405
    assert response.headers["allow"] == "POST"


def test_a_client_that_leaves_ends_the_generation(server: RunningServer, http: httpx.Client) -> None:
    server.engine.pieces, server.engine.pause = ("word ",) * 1000, 0.01
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/answer", json=QUESTION, timeout=0.2)
    assert server.engine.ended.wait(2)


def test_a_client_that_leaves_a_stream_ends_the_generation(server: RunningServer, http: httpx.Client) -> None:
    server.engine.pieces, server.engine.pause = ("word ",) * 1000, 0.01
    with http.stream("POST", "/v1/answer", json={**QUESTION, "stream": True}) as response:
        next(response.iter_raw())
    assert server.engine.ended.wait(2)


def test_the_docs_page_needs_no_internet(http: httpx.Client) -> None:
    page = http.get("/docs").text
    assert "http://" not in page
    assert "https://" not in page
    script = page.split('src="')[1].split('"')[0]
    assert len(http.get(script).content) > 100_000


def test_the_openapi_page_describes_every_route_and_problem(http: httpx.Client) -> None:
    schema = http.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/healthz", "/v1/profile", "/v1/answer", "/v1/answer/raw"}
    responses = schema["paths"]["/v1/answer/raw"]["post"]["responses"]
    assert "application/problem+json" in responses["413"]["content"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert schema["components"]["schemas"]["AnswerRequest"]["examples"]
