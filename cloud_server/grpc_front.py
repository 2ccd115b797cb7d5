"""gRPC: the service of proto/comneck/v1 over the engine, with standard health and reflection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cloud_server.fronts import GRACE, Answering, address, foreseen, listener
from cloud_server.settings import ServerSettings
from shared.errors import BadInput, ComneckError
from shared.wire import convert
from shared.wire.comneck.v1 import comneck_pb2 as pb
from shared.wire.comneck.v1 import comneck_pb2_grpc as pb_grpc
from shared.wire.errors import to_status

SERVICE: str = pb.DESCRIPTOR.services_by_name["ComneckService"].full_name


class GrpcFront:
    """Listens from ``start`` to ``stop``."""

    def __init__(self, engine: Answering, settings: ServerSettings) -> None:
        self._settings = settings
        self._server = grpc.aio.server(
            interceptors=[_Errors()],
            options=[
                ("grpc.max_receive_message_length", settings.max_request_bytes),
                ("grpc.so_reuseport", 0),  # else a second server takes the same port and half of the requests
            ],
        )
        self._health = health.aio.HealthServicer()
        pb_grpc.add_ComneckServiceServicer_to_server(_Service(engine), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> int:
        """Returns the port. The engine's models are loaded by now: health says so."""
        host, port = self._settings.host, self._settings.grpc_port
        listener(host, port, "--grpc-port").close()  # gRPC, where it cannot listen, says why to stderr only
        port = self._server.add_insecure_port(address(host, port))
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        return port

    async def stop(self) -> None:
        await self._health.enter_graceful_shutdown()
        await self._server.stop(GRACE)


class _Service(pb_grpc.ComneckServiceServicer):
    def __init__(self, engine: Answering) -> None:
        self._engine = engine

    async def GetProfile(self, request: pb.GetProfileRequest, context: Any) -> pb.GetProfileResponse:
        return convert.profile_to_wire(self._engine.server_profile())

    async def Answer(self, request: pb.AnswerRequest, context: Any) -> pb.AnswerResponse:
        answer = await self._engine.answer(convert.conversation_from_wire(request.conversation))
        return pb.AnswerResponse(answer=convert.answer_to_wire(answer))

    async def AnswerStream(
        self, request: pb.AnswerStreamRequest, context: Any
    ) -> AsyncIterator[pb.AnswerStreamResponse]:
        async with aclosing(self._engine.stream(convert.conversation_from_wire(request.conversation))) as events:
            async for event in events:
                if isinstance(event, str):
                    yield pb.AnswerStreamResponse(text=event)
                else:
                    yield pb.AnswerStreamResponse(answer=convert.answer_to_wire(event))


class _Errors(grpc.aio.ServerInterceptor):
    """Turns errors into statuses, those of unreadable messages included, which gRPC itself would call INTERNAL."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(f"/{SERVICE}/"):
            return handler

        def parsed(request: bytes) -> Any:
            try:
                return handler.request_deserializer(request)
            except DecodeError as problem:
                raise BadInput(f"the request is no message of {SERVICE}: {problem}") from problem

        async def unary(request: bytes, context: Any) -> Any:
            try:
                with foreseen():
                    return await handler.unary_unary(parsed(request), context)
            except ComneckError as problem:
                await context.abort(*to_status(problem))

        async def stream(request: bytes, context: Any) -> AsyncIterator[Any]:
            try:
                with foreseen():
                    async with aclosing(handler.unary_stream(parsed(request), context)) as responses:
                        async for response in responses:
                            yield response
            except ComneckError as problem:
                await context.abort(*to_status(problem))

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)
