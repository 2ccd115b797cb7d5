from __future__ import annotations

import math
from typing import get_args

import pytest

from shared.bitstream import Bitstream
from shared.conversation import Answer, Box, Conversation, Generation, ServerProfile, Task, Timings
from shared.errors import BadBitstream, BadInput, ServerFailed, all_errors
from shared.wire import convert
from shared.wire.comneck.v1 import comneck_pb2 as pb
from shared.wire.errors import MAX_MESSAGE, to_status


def test_a_conversation_arrives_as_it_was_sent(bitstream: Bitstream) -> None:
    sent = Conversation(
        ("what", bitstream, "is this?", bitstream),
        "other",
        Generation(max_tokens=7, temperature=0.5, top_p=1, seed=3),
        "choice",
        ("a dog", "a cat"),
    )
    message = pb.Conversation.FromString(convert.conversation_to_wire(sent).SerializeToString())
    assert convert.conversation_from_wire(message) == sent


def test_options_left_out_have_the_defaults() -> None:
    message = pb.Conversation(parts=[pb.Part(text="hi")], generation=pb.GenerationOptions(seed=4))
    assert convert.conversation_from_wire(message).generation == Generation(seed=4)


def test_a_zero_that_is_sent_is_a_zero() -> None:
    message = pb.Conversation(parts=[pb.Part(text="hi")], generation=pb.GenerationOptions(max_tokens=0))
    assert convert.conversation_from_wire(message).generation.max_tokens == 0


@pytest.mark.parametrize("task", get_args(Task))
@pytest.mark.parametrize(("choice", "box"), [(None, None), (0, None), (3, Box(0, 1.5, 2, 30))])
def test_an_answer_arrives_as_it_was_given(task: Task, choice: int | None, box: Box | None) -> None:
    given = Answer(
        "a dog", "length", 2, "llama-adapter", "small", Timings(1, 2, 3, 4), {"codec": "c0"}, task, choice, box
    )
    assert convert.answer_from_wire(convert.answer_to_wire(given)) == given


def test_a_profile_arrives_as_it_was_told() -> None:
    backends = {"llama-adapter": ("text",), "other": ("box", "text")}
    told = ServerProfile("small", {2: "349eaab3", 4: "00c0ffee"}, "d1", 2, backends, 65536, 8, 256, "0.1.0")
    assert convert.profile_from_wire(convert.profile_to_wire(told)) == told


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (pb.Conversation(), "no parts"),
        (pb.Conversation(parts=[pb.Part(text="a"), pb.Part()]), "part 2 is neither"),
        (
            pb.Conversation(parts=[pb.Part(text="a")], generation=pb.GenerationOptions(temperature=math.nan)),
            "temperature is nan",
        ),
        (pb.Conversation(parts=[pb.Part(text="a")], generation=pb.GenerationOptions(top_p=math.inf)), "top_p is inf"),
        (pb.Conversation(parts=[pb.Part(text="a")], task=17), "task 17 is not known here; known are text, choice"),
    ],
)
def test_a_conversation_without_meaning_is_refused(message: pb.Conversation, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        convert.conversation_from_wire(message)


def test_a_part_that_is_no_bitstream_is_named(bitstream: Bitstream) -> None:
    message = pb.Conversation(parts=[pb.Part(bitstream=bytes(bitstream)), pb.Part(bitstream=b"JFIF" * 9)])
    with pytest.raises(BadBitstream, match="part 2: not a comneck bitstream"):
        convert.conversation_from_wire(message)


@pytest.mark.parametrize(
    ("conversation", "complaint"),
    [
        (Conversation(("a \udcff",)), "not valid Unicode at character 2"),
        (Conversation(("a",), generation=Generation(max_tokens=-1)), "out of range"),
        (Conversation(("a",), generation=Generation(seed=2**32)), "out of range"),
    ],
)
def test_what_no_message_can_hold_is_bad_input(conversation: Conversation, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        convert.conversation_to_wire(conversation)


def test_an_answer_without_an_end_is_none() -> None:
    with pytest.raises(ServerFailed, match="unknown reason, 0"):
        convert.answer_from_wire(pb.Answer(text="a dog"))


def test_every_error_has_a_status_and_a_name_of_its_own() -> None:
    statuses = [to_status(kind("why")) for kind in all_errors()]
    names = [metadata[0][1] for _, _, metadata in statuses]
    assert len(set(names)) == len(names)
    assert all(message == "why" for _, message, _ in statuses)


def test_a_message_that_quotes_its_request_is_cut() -> None:
    _, message, _ = to_status(BadInput("x" * 60_000))
    assert len(message) < MAX_MESSAGE + 10
