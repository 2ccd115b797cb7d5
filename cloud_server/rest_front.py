"""REST: the same engine behind JSON and raw bytes, described by an OpenAPI page at /docs that needs no internet.

An answer streams as server-sent events: proxies pass them on unbuffered, and clients of language models read them
already. ``text`` events carry {"text": ...}, the last one, ``answer``, the whole answer; a ``problem`` event ends a
stream that failed after its first text. Errors are RFC 9457 problems of type ``urn:comneck:error:<name>``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloud_server.fronts import GRACE, Answering, foreseen, listener
from cloud_server.settings import ServerSettings
from shared.bitstream import Bitstream
from shared.conversation import Answer, Box, Conversation, Generation, ServerProfile, Task
from shared.errors import BadInput, ComneckError, ServerFailed, TooLarge, all_errors

PROBLEM_TYPE = "application/problem+json"
EVENTS_TYPE = "text/event-stream"

WHO = "Who is to answer; the server's default where left out."
WHAT = "What kind of answer is wanted; by default a choice if there are choices, else what the backend is made for."
STREAM = "Answer as server-sent events."


class RestFront:
    """Listens from ``start`` to ``stop``."""

    def __init__(self, engine: Answering, settings: ServerSettings) -> None:
        self._settings = settings
        self._server = _Uvicorn(
            uvicorn.Config(
                build_app(engine, settings.max_request_bytes),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=int(GRACE),
            )
        )
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Returns the port."""
        taken = listener(self._settings.host, self._settings.http_port, "--http-port")
        self._running = asyncio.create_task(self._server.serve(sockets=[taken]))
        while not self._server.started:
            await asyncio.sleep(0.005)
        return int(taken.getsockname()[1])

    async def stop(self) -> None:
        self._server.should_exit = True
        if self._running:
            await self._running


class _Uvicorn(uvicorn.Server):
    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()  # signals are the process's: cloud_server/server.py


class _Closed(BaseModel):
    """A misspelt field is an error. Bytes are base64."""

    model_config = ConfigDict(extra="forbid", val_json_bytes="base64")


class TextPart(_Closed):
    text: str = Field(description="A question, an instruction.")


class BitstreamPart(_Closed):
    bitstream: bytes = Field(description="An encoded photo in base64: a comneck bitstream, never pixels.")


class GenerationOptions(_Closed):
    max_tokens: int = Field(default=Generation.max_tokens, ge=1, lt=2**32, description="Most tokens to write.")
    temperature: float = Field(
        default=Generation.temperature,
        ge=0,
        allow_inf_nan=False,
        description="0 always takes the likeliest token; above it, tokens are drawn.",
    )
    top_p: float = Field(
        default=Generation.top_p,
        gt=0,
        le=1,
        description="Draw from the likeliest tokens that together have this probability.",
    )
    seed: int = Field(
        default=Generation.seed, ge=0, lt=2**32, description="Of the draw: the same seed, the same answer."
    )

    def generation(self) -> Generation:
        return Generation(self.max_tokens, self.temperature, self.top_p, self.seed)


class AnswerRequest(_Closed):
    """A conversation: text and photos in the order in which they are meant."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "parts": [{"bitstream": "ARI0nqzzBAQCgAHgQxk0Kg...="}, {"text": "describe this"}],
                    "generation": {"max_tokens": 32},
                    "stream": False,
                }
            ]
        }
    )
    parts: list[TextPart | BitstreamPart] = Field(min_length=1)
    backend: str = Field(default="", description=WHO)
    task: Task | None = Field(
        default=None,
        description=f"{WHAT} For `label`, parts are examples, each a bitstream and "
        "then its label, and last the bitstream to be labelled.",
    )
    choices: list[str] = Field(default=[], description="For the task `choice`, what may be chosen.")
    generation: GenerationOptions = GenerationOptions()
    stream: bool = Field(default=False, description=STREAM)


class RawOptions(GenerationOptions):
    """What goes beside one bitstream, in the query."""

    prompt: str = Field(description="What to say about the photo.", examples=["describe this"])
    backend: str = Field(default="", description=WHO)
    task: Task | None = Field(default=None, description=WHAT)
    choices: list[str] = Field(default=[], description="For the task `choice`, what may be chosen; repeat it.")
    stream: bool = Field(default=False, description=STREAM)


class TimingsBody(BaseModel):
    """Where the server's time went, in milliseconds."""

    queue: float
    decode: float
    vision: float
    generation: float


class AnswerBody(BaseModel):
    """A finished answer."""

    text: str
    finish: str = Field(description='"stop": the model ended by itself; "length": max_tokens ended it.')
    tokens: int
    backend: str
    profile: str
    timings_ms: TimingsBody
    model_digests: dict[str, str] = Field(description="SHA-256 of each model that took part, by role.")
    task: Task = Field(description="What kind of answer it is.")
    choice: int | None = Field(description="Of the task `choice`, which one, from 0; null where the text names none.")
    box: Box | None = Field(
        description="Of the task `box`, in pixels of the upright original photo; null where the text has none."
    )

    @classmethod
    def of(cls, answer: Answer) -> AnswerBody:
        return cls(
            text=answer.text,
            finish=answer.finish,
            tokens=answer.tokens,
            backend=answer.backend,
            profile=answer.profile,
            timings_ms=TimingsBody(**asdict(answer.timings)),
            model_digests=answer.digests,
            task=answer.task,
            choice=answer.choice,
            box=answer.box,
        )


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(examples=["urn:comneck:error:bad-bitstream"])
    title: str
    status: int
    detail: str


def build_app(engine: Answering, max_request_bytes: int) -> FastAPI:
    """The ASGI application."""
    profile = engine.server_profile()
    app = FastAPIOffline(
        title="comneck",
        version=profile.version,
        description="Questions about photos that arrive as bitstreams of a few hundred bytes.",
        redoc_url=None,
    )
    app.add_middleware(_BodyLimit, limit=max_request_bytes)

    @app.exception_handler(ComneckError)
    async def refused(request: Request, problem: ComneckError) -> Response:
        return _refusal(_problem(problem))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, problem: RequestValidationError) -> Response:
        flaws = [f"{'.'.join(map(str, flaw['loc']))}: {flaw['msg']}" for flaw in problem.errors()]
        return _refusal(_problem(BadInput("; ".join(flaws[:3]))))

    @app.exception_handler(HTTPException)
    async def no_such_page(request: Request, problem: HTTPException) -> Response:
        title = HTTPStatus(problem.status_code).phrase
        detail = f"{request.method} {request.url.path}: {problem.detail}"
        body = Problem(type="about:blank", title=title, status=problem.status_code, detail=detail)
        return _refusal(body, problem.headers)

    @app.get("/healthz", summary="Tells that the models are loaded and requests are taken")
    async def healthz() -> dict[str, str]:
        return {"status": "serving"}

    @app.get("/v1/profile", summary="Tells what this server expects, so that a client encodes accordingly")
    async def get_profile() -> ServerProfile:
        return engine.server_profile()

    @app.post("/v1/answer", summary="Answers a conversation", response_model=AnswerBody, responses=_responses())
    async def post_answer(request: Request, body: AnswerRequest) -> Response:
        parts = tuple(p.text if isinstance(p, TextPart) else Bitstream.parse(p.bitstream) for p in body.parts)
        conversation = Conversation(parts, body.backend, body.generation.generation(), body.task, tuple(body.choices))
        return await _respond(engine, request, conversation, body.stream)

    @app.post(
        "/v1/answer/raw",
        summary="Answers a question about one photo",
        response_model=AnswerBody,
        responses=_responses(),
    )
    async def post_raw(
        request: Request,
        options: Annotated[RawOptions, Query()],
        bitstream: Annotated[bytes, Body(media_type="application/octet-stream", description="One bitstream.")],
    ) -> Response:
        parts = (Bitstream.parse(bitstream), options.prompt)
        conversation = Conversation(parts, options.backend, options.generation(), options.task, tuple(options.choices))
        return await _respond(engine, request, conversation, options.stream)

    return app


async def _respond(engine: Answering, request: Request, conversation: Conversation, stream: bool) -> Response:
    if not stream:
        return await _while_connected(request, engine, conversation)
    events = _events(engine, conversation)
    first = await anext(events)  # what fails before there is text is an ordinary problem, with its own status

    async def all_events() -> AsyncGenerator[str, None]:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    return StreamingResponse(all_events(), media_type=EVENTS_TYPE, headers={"Cache-Control": "no-store"})


async def _while_connected(request: Request, engine: Answering, conversation: Conversation) -> Response:
    """The answer as JSON; a client that leaves ends the generation."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(engine.answer(conversation)), asyncio.create_task(gone())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return Response(status_code=HTTPStatus.REQUEST_TIMEOUT)  # no one reads it
        with foreseen():
            return JSONResponse(AnswerBody.of(answering.result()).model_dump())
    finally:
        answering.cancel()
        leaving.cancel()


async def _events(engine: Answering, conversation: Conversation) -> AsyncGenerator[str, None]:
    begun = False
    try:
        with foreseen():
            async with aclosing(engine.stream(conversation)) as events:
                async for event in events:
                    if isinstance(event, str):
                        yield _event("text", {"text": event})
                    else:
                        yield _event("answer", AnswerBody.of(event).model_dump())
                    begun = True
    except ComneckError as problem:
        if not begun:
            raise
        yield _event("problem", _problem(problem).model_dump())


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _problem(problem: ComneckError) -> Problem:
    return Problem(
        type=f"urn:comneck:error:{problem.slug()}",
        title=problem.title,
        status=problem.http_status,
        detail=str(problem),
    )


def _refusal(problem: Problem, headers: Any = None) -> Response:
    return JSONResponse(problem.model_dump(), problem.status, headers, media_type=PROBLEM_TYPE)


def _responses() -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI page: what an answer looks like as a stream, and the problems there may be instead."""
    titles: dict[int | str, list[str]] = {}
    for kind in sorted(all_errors(), key=lambda kind: kind.http_status):
        if kind.http_status <= ServerFailed.http_status:  # those above are a client's to raise
            titles.setdefault(kind.http_status, []).append(kind.title)
    problem = {PROBLEM_TYPE: {"schema": Problem.model_json_schema()}}
    stream = _event("text", {"text": "A dog"}) + _event("text", {"text": " runs"}) + "event: answer\ndata: {...}\n\n"
    return {
        200: {"description": "The answer.", "content": {EVENTS_TYPE: {"example": stream}}},
        **{status: {"description": ", ".join(names), "content": problem} for status, names in titles.items()},
    }


class _BodyLimit:
    """Refuses a request as soon as its body is known to be over the limit, before the rest of it is read."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(declared) if declared.isdigit() else 0
        body = b""
        more = True
        while more and size <= self.limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            size = max(size, len(body))
        if size > self.limit:
            problem = TooLarge(f"the request has {size:,} bytes or more; this server takes at most {self.limit:,}")
            return await _refusal(_problem(problem))(scope, receive, send)

        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        return await self.app(scope, replay, send)
