"""The SDK: asks a comneck server about photos.

Client and AsyncClient offer the same. What needs no waiting is in _Session, which both share: making a request, reading
an answer, naming an error. They add the calls and nothing else, so there is little that could drift.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from time import perf_counter
from typing import Any, Self, TypedDict, Unpack

import grpc

from edge_client.encoder import Encoder, jpeg_size
from edge_client.stored import is_stored, read_bitstream
from shared.bitstream import Bitstream
from shared.conversation import Answer, Conversation, Generation, Part, ServerProfile, Task
from shared.errors import BadInput, ProfileMismatch, ServerFailed, TooLarge
from shared.images import Photo
from shared.wire import GRPC_PORT, convert
from shared.wire.comneck.v1 import comneck_pb2 as pb
from shared.wire.comneck.v1 import comneck_pb2_grpc as pb_grpc
from shared.wire.errors import from_status

ImageSource = str | Path | bytes | Photo | Bitstream
"""A path of a picture or of a stored bitstream (.cnk), the bytes of a picture file, pixels, or a bitstream."""

Examples = Mapping[str, ImageSource] | Sequence[tuple[str, ImageSource]]
"""A photo for each label."""

DEFAULT_SERVER = f"127.0.0.1:{GRPC_PORT}"
PROFILE_TIMEOUT = 10.0  # seconds; the server answers that one without its models

NO_END = "{} ended the answer without its last message"

_SERVICE = pb.DESCRIPTOR.services_by_name["ComneckService"].full_name
_CHANNEL_OPTIONS = [
    ("grpc.min_reconnect_backoff_ms", 3000),  # how long one attempt to connect may take, too
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5000),
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        # Not AnswerStream: its first pieces may have been shown.
                        "name": [{"service": _SERVICE, "method": method} for method in ("GetProfile", "Answer")],
                        "retryPolicy": {
                            "maxAttempts": 3,
                            "initialBackoff": "0.2s",
                            "maxBackoff": "1s",
                            "backoffMultiplier": 2,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                ]
            }
        ),
    ),
]


class Options(TypedDict, total=False):
    """What a question may say beyond photo and prompt.

    Attributes:
        backend: who is to answer; the server's default where left out.
        generation: how the answer is written.
        quality: that photos are encoded at, 1 to 15; the server's default where left out.
        max_bytes: of each bitstream; the best quality that fits is taken, up to ``quality`` if that is given.
        task: what kind of answer is wanted; what the backend is made for where left out.
        choices: for the task ``choice``, what may be chosen.
    """

    backend: str
    generation: Generation
    quality: int | None
    max_bytes: int | None
    task: Task | None
    choices: Sequence[str]


@dataclass(frozen=True)
class Receipt:
    """What a question cost.

    Attributes:
        bytes_payload: of the bitstreams.
        bytes_wire: of the request message: bitstreams, text and options.
        pixels: of the codec's inputs.
        qualities: of the bitstreams.
        bytes_jpeg75: of the same prepared photos as JPEG of quality 75; None where a bitstream was given.
        load: loading the codec, in milliseconds; 0 once it is loaded.
        encode: preparing and encoding, in milliseconds.
        network: round trip without the server's own times, in milliseconds.
    """

    bytes_payload: int
    bytes_wire: int
    pixels: int
    qualities: tuple[int, ...]
    bytes_jpeg75: int | None
    load: float
    encode: float
    network: float

    @property
    def bpp(self) -> float:
        """Bits per pixel of the codec's input; 0 without photos."""
        return 8 * self.bytes_payload / self.pixels if self.pixels else 0.0


@dataclass(frozen=True)
class Reply:
    """An answer and what it cost."""

    answer: Answer
    receipt: Receipt

    @property
    def text(self) -> str:
        return self.answer.text


@dataclass(frozen=True)
class _Draft:
    """A request ready to go, and the part of its receipt that is known by then."""

    request: pb.AnswerRequest
    bitstreams: tuple[Bitstream, ...]
    bytes_jpeg75: int | None
    load: float
    encode: float

    @property
    def stream_request(self) -> pb.AnswerStreamRequest:
        return pb.AnswerStreamRequest(conversation=self.request.conversation)

    def event(self, response: pb.AnswerStreamResponse, sent: float) -> str | Reply:
        return self.reply(response.answer, sent) if response.HasField("answer") else response.text

    def reply(self, message: pb.Answer, sent: float) -> Reply:
        """``sent``: what perf_counter() said when the request left."""
        round_trip = 1000 * (perf_counter() - sent)
        answer = convert.answer_from_wire(message)
        times = answer.timings
        receipt = Receipt(
            bytes_payload=sum(map(len, self.bitstreams)),
            bytes_wire=self.request.ByteSize(),
            pixels=sum(bitstream.pixels for bitstream in self.bitstreams),
            qualities=tuple(bitstream.quality for bitstream in self.bitstreams),
            bytes_jpeg75=self.bytes_jpeg75,
            load=self.load,
            encode=self.encode,
            network=max(0.0, round_trip - times.queue - times.decode - times.vision - times.generation),
        )
        return Reply(answer, receipt)


class _Session:
    """What both clients know and do without waiting for a server.

    Args:
        server: HOST:PORT of its gRPC front.
        timeout: seconds that an answer may take.
    """

    def __init__(self, server: str = DEFAULT_SERVER, *, timeout: float = 60.0) -> None:
        host, _, port = server.rpartition(":")
        if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise BadInput(f"the server {server!r} is no HOST:PORT such as {DEFAULT_SERVER}")
        if not timeout > 0:
            raise BadInput(f"the timeout is {timeout:g} s; it must be more than 0")
        self.server = server
        self.timeout = timeout
        self._profile: ServerProfile | None = None
        self._encoder: Encoder | None = None
        self._loading = threading.Lock()
        self._profile_timeout = min(timeout, PROFILE_TIMEOUT)

    @contextmanager
    def _naming_errors(self) -> Generator[None]:
        try:
            yield
        except grpc.RpcError as problem:
            error = from_status(problem, self.server)
            if isinstance(error, ProfileMismatch):
                self._forget()
            raise error from problem

    def _forget(self) -> None:
        """The server may have been replaced: it is asked anew next time."""
        self._profile = self._encoder = None

    def _draft(
        self,
        server: ServerProfile,
        images: ImageSource | Sequence[ImageSource],
        prompt: str | Sequence[str],
        options: Options,
    ) -> _Draft:
        """Encodes, and refuses what the server would refuse for its size or its codec.

        A prompt goes after all photos; several texts are labels, each after its photo.
        """
        backend, _ = server.backend_for(options.get("backend", ""), options.get("task"), options.get("choices", ()))
        sources = [images] if isinstance(images, ImageSource) else list(images)
        if len(sources) > server.max_images:
            raise TooLarge(f"{len(sources)} photos; {self.server} takes at most {server.max_images} in one request")
        try:
            start = perf_counter()
            encoder = self._encoder_for(server, sources, options)
            loaded = perf_counter()
            bitstreams: list[Bitstream] = []
            photos: list[Photo] = []
            for source in sources:
                if isinstance(source, Bitstream):
                    bitstreams.append(source)
                elif is_stored(source):
                    bitstreams.append(read_bitstream(source))
                elif encoder:
                    photos.append(encoder.prepare(source, backend))
                    bitstreams.append(encoder.encode(photos[-1], options.get("quality"), options.get("max_bytes")))
            encoded = perf_counter()
            self._check(server, bitstreams)
        except ProfileMismatch:
            self._forget()
            raise
        conversation = Conversation(
            parts=(*bitstreams, prompt) if isinstance(prompt, str) else tuple(_alternating(bitstreams, prompt)),
            backend=options.get("backend", ""),  # not who was found: a name costs bytes, and the server finds the same
            generation=options.get("generation", Generation()),
            task=options.get("task"),
            choices=tuple(options.get("choices", ())),
        )
        request = pb.AnswerRequest(conversation=convert.conversation_to_wire(conversation))
        if request.ByteSize() > server.max_request_bytes:
            raise TooLarge(
                f"the request has {request.ByteSize():,} bytes; {self.server} takes at most "
                f"{server.max_request_bytes:,}: send fewer photos or a shorter prompt"
            )
        return _Draft(
            request=request,
            bitstreams=tuple(bitstreams),
            bytes_jpeg75=sum(map(jpeg_size, photos)) if photos and len(photos) == len(sources) else None,
            load=1000 * (loaded - start),
            encode=1000 * (encoded - loaded),
        )

    def _draft_label(self, server: ServerProfile, image: ImageSource, examples: Examples, options: Options) -> _Draft:
        pairs = list(examples.items() if isinstance(examples, Mapping) else examples)
        photos = [*(photo for _, photo in pairs), image]
        return self._draft(server, photos, [label.strip() for label, _ in pairs], {**options, "task": "label"})

    def _encoder_for(self, server: ServerProfile, sources: Sequence[ImageSource], options: Options) -> Encoder | None:
        """The encoder with its codec loaded; None where everything is encoded already."""
        quality, max_bytes = options.get("quality"), options.get("max_bytes")
        if all(isinstance(source, Bitstream) or is_stored(source) for source in sources):
            if quality is not None or max_bytes is not None:
                raise BadInput("nothing is left to encode, so quality and size are settled: leave them out")
            return None
        with self._loading:
            if self._encoder is None:
                self._encoder = Encoder.for_server(server)
            encoder = self._encoder
        encoder.load(quality, max_bytes)
        return encoder

    def _check(self, server: ServerProfile, bitstreams: Sequence[Bitstream]) -> None:
        """Raises ProfileMismatch for what the server does not decode."""
        for bitstream in bitstreams:
            digest = bitstream.codec_digest.hex()
            if server.qualities.get(bitstream.quality) != digest:
                raise ProfileMismatch(
                    f"the bitstream is of quality {bitstream.quality} by codec {digest}; {self.server} runs profile "
                    f"{server.profile!r} and decodes {server.offer}: encode with that profile"
                )


def _alternating(photos: Sequence[Bitstream], labels: Sequence[str]) -> Iterator[Part]:
    """Each photo and its label, and last the photo that has none."""
    for photo, label in zip_longest(photos, labels):
        yield photo
        if label is not None:
            yield label


class Client(_Session):
    """Asks a server; one channel for all questions, safe to use from several threads.

    ::

        with Client("127.0.0.1:50051") as client:
            reply = client.ask("img.png", "what animal is this?")
            print(reply.text, reply.receipt.bytes_payload)
    """

    def __init__(self, server: str = DEFAULT_SERVER, *, timeout: float = 60.0) -> None:
        super().__init__(server, timeout=timeout)
        self._channel = grpc.insecure_channel(self.server, _CHANNEL_OPTIONS)
        self._stub = pb_grpc.ComneckServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def profile(self) -> ServerProfile:
        """What the server expects; asked for once."""
        if self._profile is None:
            with self._naming_errors():
                response = self._stub.GetProfile(pb.GetProfileRequest(), timeout=self._profile_timeout)
            self._profile = convert.profile_from_wire(response)
        return self._profile

    def ask(
        self,
        images: ImageSource | Sequence[ImageSource],
        prompt: str,
        *,
        on_text: Callable[[str], object] | None = None,
        **options: Unpack[Options],
    ) -> Reply:
        """Asks about one photo or several. ``on_text`` is called with each piece of the answer as it is written.

        Raises:
            ComneckError: the subclass says what; the server's own errors arrive as they were raised there.
        """
        if on_text is None:
            return self._answer(self._draft(self.profile(), images, prompt, options))
        for event in self.stream(images, prompt, **options):
            if isinstance(event, Reply):
                return event
            on_text(event)
        raise ServerFailed(NO_END.format(self.server))

    def stream(
        self, images: ImageSource | Sequence[ImageSource], prompt: str, **options: Unpack[Options]
    ) -> Generator[str | Reply]:
        """The answer's pieces as they are written, then the reply. Closing it early ends the generation."""
        draft = self._draft(self.profile(), images, prompt, options)
        sent = perf_counter()
        with self._naming_errors():
            call = self._stub.AnswerStream(draft.stream_request, timeout=self.timeout)
            try:
                for response in call:
                    yield draft.event(response, sent)
            finally:
                call.cancel()

    def classify(self, image: ImageSource, examples: Examples, **options: Unpack[Options]) -> Reply:
        """Labels a photo as in examples, a photo of each label: ``{"cat": "a.jpg", "dog": "b.jpg"}``, or pairs.

        Every photo goes as a bitstream of its own, all in one request; the text of the reply is the label. Blanks at a
        label's ends do not count.

        Raises:
            ComneckError: as ``ask``; BadInput where there are not two labels, or one is empty or given twice.
        """
        return self._answer(self._draft_label(self.profile(), image, examples, options))

    def _answer(self, draft: _Draft) -> Reply:
        sent = perf_counter()
        with self._naming_errors():
            response = self._stub.Answer(draft.request, timeout=self.timeout)
        return draft.reply(response.answer, sent)


class AsyncClient(_Session):
    """Client for asyncio: the same methods, awaited. Photos are encoded in a thread.

    ::

        async with AsyncClient("127.0.0.1:50051") as client:
            async for event in client.stream("img.png", "describe this"):
                ...
    """

    @cached_property
    def _channel(self) -> grpc.aio.Channel:  # made where a loop runs, which need not be where the client is made
        return grpc.aio.insecure_channel(self.server, _CHANNEL_OPTIONS)

    @cached_property
    def _stub(self) -> Any:
        return pb_grpc.ComneckServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def profile(self) -> ServerProfile:
        """What the server expects; asked for once."""
        if self._profile is None:
            with self._naming_errors():
                response = await self._stub.GetProfile(pb.GetProfileRequest(), timeout=self._profile_timeout)
            self._profile = convert.profile_from_wire(response)
        return self._profile

    async def ask(
        self,
        images: ImageSource | Sequence[ImageSource],
        prompt: str,
        *,
        on_text: Callable[[str], object] | None = None,
        **options: Unpack[Options],
    ) -> Reply:
        """Asks about one photo or several. ``on_text`` is called with each piece of the answer as it is written.

        Raises:
            ComneckError: the subclass says what; the server's own errors arrive as they were raised there.
        """
        if on_text is None:
            return await self._answer(
                await asyncio.to_thread(self._draft, await self.profile(), images, prompt, options)
            )
        async for event in self.stream(images, prompt, **options):
            if isinstance(event, Reply):
                return event
            on_text(event)
        raise ServerFailed(NO_END.format(self.server))

    async def stream(
        self, images: ImageSource | Sequence[ImageSource], prompt: str, **options: Unpack[Options]
    ) -> AsyncGenerator[str | Reply]:
        """The answer's pieces as they are written, then the reply. Closing it early ends the generation."""
        draft = await asyncio.to_thread(self._draft, await self.profile(), images, prompt, options)
        sent = perf_counter()
        with self._naming_errors():
            call = self._stub.AnswerStream(draft.stream_request, timeout=self.timeout)
            try:
                async for response in call:
                    yield draft.event(response, sent)
            finally:
                call.cancel()

    async def classify(self, image: ImageSource, examples: Examples, **options: Unpack[Options]) -> Reply:
        """Labels a photo as in examples, a photo of each label: ``{"cat": "a.jpg", "dog": "b.jpg"}``, or pairs.

        Every photo goes as a bitstream of its own, all in one request; the text of the reply is the label. Blanks at a
        label's ends do not count.

        Raises:
            ComneckError: as ``ask``; BadInput where there are not two labels, or one is empty or given twice.
        """
        draft = await asyncio.to_thread(self._draft_label, await self.profile(), image, examples, options)
        return await self._answer(draft)

    async def _answer(self, draft: _Draft) -> Reply:
        sent = perf_counter()
        with self._naming_errors():
            response = await self._stub.Answer(draft.request, timeout=self.timeout)
        return draft.reply(response.answer, sent)
