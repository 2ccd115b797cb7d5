"""The border between our own objects (shared/conversation.py) and messages: protobuf goes no further than here.

What comes in is checked for shape only; sizes and ranges are the engine's to judge.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Literal

from shared.bitstream import Bitstream
from shared.conversation import Answer, Box, Conversation, Generation, Part, ServerProfile, Task, Timings
from shared.errors import BadBitstream, BadInput, ServerFailed
from shared.wire.comneck.v1 import comneck_pb2 as pb

_FINISHES: dict[pb.FinishReason, Literal["stop", "length"]] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}
_REASONS = {finish: reason for reason, finish in _FINISHES.items()}
_TASKS: dict[pb.Task, Task] = {
    pb.TASK_TEXT: "text",
    pb.TASK_CHOICE: "choice",
    pb.TASK_BOX: "box",
    pb.TASK_LABEL: "label",
}
_TASK_NUMBERS = {task: number for number, task in _TASKS.items()}


def conversation_to_wire(conversation: Conversation) -> pb.Conversation:
    """
    Raises:
        BadInput: text or numbers that a message cannot hold.
    """
    generation = conversation.generation
    try:
        return pb.Conversation(
            parts=[pb.Part(text=p) if isinstance(p, str) else pb.Part(bitstream=bytes(p)) for p in conversation.parts],
            backend=conversation.backend,
            generation=pb.GenerationOptions(
                max_tokens=generation.max_tokens,
                temperature=generation.temperature,
                top_p=generation.top_p,
                seed=generation.seed,
            ),
            task=_TASK_NUMBERS[conversation.task] if conversation.task else pb.TASK_UNSPECIFIED,
            choices=conversation.choices,
        )
    except UnicodeEncodeError as problem:
        raise BadInput(f"the text is not valid Unicode at character {problem.start}") from problem
    except ValueError as problem:
        raise BadInput(f"a generation option is out of range: {problem}") from problem


def conversation_from_wire(message: pb.Conversation) -> Conversation:
    """
    Raises:
        BadInput: no parts, an empty one, an unknown task, or numbers that are none.
        BadBitstream: a part that is no bitstream.
    """
    if not message.parts:
        raise BadInput("the conversation has no parts: send text and bitstreams")
    defaults, sent = Generation(), message.generation
    generation = Generation(
        max_tokens=sent.max_tokens if sent.HasField("max_tokens") else defaults.max_tokens,
        temperature=sent.temperature if sent.HasField("temperature") else defaults.temperature,
        top_p=sent.top_p if sent.HasField("top_p") else defaults.top_p,
        seed=sent.seed if sent.HasField("seed") else defaults.seed,
    )
    for name in ("temperature", "top_p"):
        value = getattr(generation, name)
        if not math.isfinite(value):
            raise BadInput(f"{name} is {value}; send a finite number")
    if message.task and message.task not in _TASKS:
        raise BadInput(f"task {message.task} is not known here; known are {', '.join(_TASKS.values())}")
    parts = tuple(_part_from_wire(number, part) for number, part in enumerate(message.parts, 1))
    return Conversation(parts, message.backend, generation, _TASKS.get(message.task), tuple(message.choices))


def _part_from_wire(number: int, part: pb.Part) -> Part:
    match part.WhichOneof("content"):
        case "text":
            return part.text
        case "bitstream":
            try:
                return Bitstream.parse(part.bitstream)
            except BadBitstream as problem:
                raise BadBitstream(f"part {number}: {problem}") from problem
        case _:
            raise BadInput(f"part {number} is neither text nor a bitstream")


def answer_to_wire(answer: Answer) -> pb.Answer:
    timings = answer.timings
    return pb.Answer(
        text=answer.text,
        finish_reason=_REASONS[answer.finish],
        tokens=answer.tokens,
        backend=answer.backend,
        profile=answer.profile,
        timings=pb.Timings(
            queue_ms=timings.queue,
            decode_ms=timings.decode,
            vision_ms=timings.vision,
            generation_ms=timings.generation,
        ),
        digests=answer.digests,
        task=_TASK_NUMBERS[answer.task],
        choice=answer.choice,
        box=pb.Box(**asdict(answer.box)) if answer.box else None,
    )


def answer_from_wire(message: pb.Answer) -> Answer:
    """
    Raises:
        ServerFailed: it does not say why it ended or what it is, so it is none.
    """
    if message.finish_reason not in _FINISHES:
        raise ServerFailed(f"the answer ended for an unknown reason, {message.finish_reason}; update this client")
    if message.task not in _TASKS:
        raise ServerFailed(f"the answer is of an unknown task, {message.task}; update this client")
    timings, box = message.timings, message.box
    return Answer(
        text=message.text,
        finish=_FINISHES[message.finish_reason],
        tokens=message.tokens,
        backend=message.backend,
        profile=message.profile,
        timings=Timings(timings.queue_ms, timings.decode_ms, timings.vision_ms, timings.generation_ms),
        digests=dict(message.digests),
        task=_TASKS[message.task],
        choice=message.choice if message.HasField("choice") else None,
        box=Box(box.left, box.top, box.right, box.bottom) if message.HasField("box") else None,
    )


def profile_to_wire(profile: ServerProfile) -> pb.GetProfileResponse:
    return pb.GetProfileResponse(
        profile=profile.profile,
        qualities=[
            pb.Quality(quality=quality, codec_digest=bytes.fromhex(digest))
            for quality, digest in profile.qualities.items()
        ],
        scenario=profile.scenario,
        quality=profile.quality,
        backends=[
            pb.Backend(name=name, tasks=[_TASK_NUMBERS[task] for task in tasks])
            for name, tasks in profile.backends.items()
        ],
        max_request_bytes=profile.max_request_bytes,
        max_images=profile.max_images,
        max_tokens=profile.max_tokens,
        version=profile.version,
    )


def profile_from_wire(message: pb.GetProfileResponse) -> ServerProfile:
    return ServerProfile(
        profile=message.profile,
        qualities={one.quality: one.codec_digest.hex() for one in message.qualities},
        scenario=message.scenario,
        quality=message.quality,
        backends={
            backend.name: tuple(_TASKS[task] for task in backend.tasks if task in _TASKS)
            for backend in message.backends
        },
        max_request_bytes=message.max_request_bytes,
        max_images=message.max_images,
        max_tokens=message.max_tokens,
        version=message.version,
    )
