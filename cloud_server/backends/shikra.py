"""Shikra (Chen et al., 2023): patches are words of the language model, and places in a photo are digits it writes.

CLIP tokens (B, 1 + g^2, D), of the last block but one -> Connector -> (B, 2 + Q, llm width) in the place of <image>

"In the given <image>, could you find and tell me the coordinates of the dog?" -> "Answer: [0.156,0.203,0.469,0.438] ."
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloud_server.backends import Backend, Found, Piece, Question
from cloud_server.backends.connector import load_connector
from cloud_server.backends.language_model import LanguageModel
from cloud_server.backends.low_rank import LowRank
from cloud_server.backends.prompts import Format, prompt_format
from cloud_server.backends.tokenizer import Tokenizer
from cloud_server.vision.clip import VisionNeeds
from shared.conversation import Box, Conversation, Generation, Task
from shared.errors import BadInput, WeightsUnavailable
from shared.images import Placement, Preparation
from shared.profiles import BackendSpec, Profile
from shared.weights.folders import TensorFolder
from shared.weights.store import digest_of, ensure

IM_START, IM_END = 32001, 32002  # tokens of the published model; 32000, <im_patch>, only held the patches' places
PROJECTOR = "model.mm_projector."  # its tensors in the published model's folder
BEFORE, AFTER = "In the given ", ", could you find and tell me the coordinates of {}?"  # the sixth, from 0, of 54
ASKING = re.compile(
    r"^(?:(?:can|could|would) you )?(?:please )?(?:where(?: is| are|['\u2019]s)|find|locate|show me|point to)\b",
    re.IGNORECASE,
)
ONE = r"\d(?:\.\d*)?(?:,\d(?:\.\d*)?){3}"
GROUP = re.compile(rf"\[{ONE}(?:;{ONE})*\]")


class Connector(nn.Module):
    """CLIP's patches as words of the language model, between those that begin and end a photo.

    Args:
        llm: a LlamaForCausalLM; it is not part of this module.
        clip_width: D of CLIP.
        join: so many patches a side become one word (1 as published).
        rank: of the language model's changes; 0: it has none, for its weights are Shikra's own.
    """

    def __init__(self, llm: Any, clip_width: int, join: int = 1, rank: int = 0) -> None:
        super().__init__()
        self.config = {"clip_width": clip_width, "join": join, "rank": rank}
        self.join = join
        llm_width = llm.config.hidden_size
        self.mm_projector = nn.Linear(clip_width * join**2, llm_width)
        self.ends = nn.Parameter(torch.randn(2, llm_width) * 0.02)
        self.low_rank = LowRank(llm, rank) if rank else None

    @classmethod
    def published(cls, llm: LanguageModel, folder: Path) -> Connector:
        """Shikra's own: the projector lies in the language model's folder, the ends are two of its embeddings.

        Raises:
            WeightsUnavailable: the folder is another model's.
        """
        embeddings = llm.model.get_input_embeddings().weight
        stored = TensorFolder(folder)
        projector = {name: stored[PROJECTOR + name] for name in ("weight", "bias") if PROJECTOR + name in stored}
        if len(embeddings) <= IM_END or len(projector) < 2:
            raise WeightsUnavailable(
                f"{folder} is no Shikra: it has {len(embeddings)} tokens and of {PROJECTOR}* "
                f"{' and '.join(projector) or 'nothing'}; Shikra has {IM_END + 1}, weight and bias. "
                "`comneck weights import shikra` makes one"
            )
        connector = cls(llm.model, clip_width=projector["weight"].shape[1])
        connector.load_state_dict(
            {
                **{f"mm_projector.{name}": tensor for name, tensor in projector.items()},
                "ends": embeddings[[IM_START, IM_END]],
            }
        )
        return connector

    def forward(self, features: Tensor) -> Tensor:
        """CLIP tokens (B, 1 + g^2, D), CLS first -> visual tokens (B, 2 + Q, llm width), Q = g^2 / join^2."""
        ends = self.ends.expand(len(features), -1, -1)
        return torch.cat([ends[:, :1], self.mm_projector(self.joined(features)), ends[:, 1:]], 1)

    def joined(self, features: Tensor) -> Tensor:
        """CLIP tokens -> what the projector reads, (B, Q, D join^2)."""
        side = math.isqrt(features.shape[1] - 1)
        patches = features[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (B, D, g, g)
        return F.pixel_unshuffle(patches, self.join).flatten(2).transpose(1, 2)


def tokens_around(tokenizer: Tokenizer, format: Format, task: Task, text: str) -> tuple[list[int], list[int]]:
    """Tokens before and after the visual ones.

    Args:
        task: for ``box`` it is asked where that is which ``text`` names or asks for; else the text follows the photo.
    """
    if task == "box":
        return format.around(tokenizer, BEFORE, AFTER.format(expression(text)))
    return format.around(tokenizer, "", text)


def prompt_embeddings(llm: LanguageModel, format: Format, visual: Tensor | None, task: Task, text: str) -> Tensor:
    """What the language model reads, (T, D), around the visual tokens (2 + Q, D) of a photo, if there is one."""
    if visual is None:
        return llm.embed(format(llm.tokenizer, text))
    before, after = tokens_around(llm.tokenizer, format, task, text)
    return torch.cat([llm.embed(before), visual.to(llm.model.dtype), llm.embed(after)])


def expression(text: str) -> str:
    """What a text asks to be found: "the dog" of "Where is the dog?", "the red car" of "find the red car".

    A few ways to ask are known (ASKING). Any other text is an expression already, but for its blanks and last stop.
    """
    return ASKING.sub("", " ".join(text.split())).strip(" ?!.")


def box_text(box: Box, size: tuple[int, int], preparation: Preparation) -> str:
    """The answer that says where a box lies in a photo of ``size`` (width, height): what training teaches to write."""
    placement = Placement.of(size, preparation)
    numbers = [
        round(length / limit, 9)  # what lies halfway between two numbers stays there
        for corner in ((box.left, box.top), (box.right, box.bottom))
        for length, limit in zip(placement.to_prepared(*corner), (preparation.width, preparation.height), strict=True)
    ]
    return f"Answer: [{','.join(f'{min(max(0.0, number), 1.0):.3f}' for number in numbers)}] ."


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """The box that a text holds, as fractions of the prepared picture; None unless there is exactly one.

    Its corners are as they are written, in whatever order.
    """
    groups = GROUP.findall(text)
    if len(groups) != 1 or ";" in groups[0]:
        return None
    left, top, right, bottom = map(float, groups[0][1:-1].split(","))
    return left, top, right, bottom


class Shikra(Backend):
    """Says where in a photo something is, or talks about the photo."""

    needs = VisionNeeds(last_block=-2)
    tasks = ("box", "text")

    def __init__(self, connector: Connector, llm: LanguageModel, prompt: str, digests: dict[str, str]) -> None:
        self.connector = connector
        self.llm = llm
        self.format = prompt_format(prompt)
        self.digests = digests

    @classmethod
    def load(cls, spec: BackendSpec, profile: Profile, device: torch.device) -> Shikra:
        folder = ensure(spec.llm)
        llm = LanguageModel.load(folder, device, spec.dtype)
        digests = {"llm": digest_of(spec.llm)}
        if spec.connector:
            connector = load_connector(spec.connector, partial(Connector, llm.model))
            digests["connector"] = digest_of(spec.connector)
        else:
            connector = Connector.published(llm, folder)
        return cls(connector.eval().requires_grad_(False).to(device, llm.model.dtype), llm, spec.prompt, digests)

    def check(self, conversation: Conversation) -> None:
        super().check(conversation)
        if (conversation.task or self.tasks[0]) == "box" and not expression(conversation.prompt):
            raise BadInput('the prompt names nothing to be found: say what, "where is the dog?" for instance')

    def write(self, questions: Sequence[Question], generation: Generation) -> Iterator[Piece]:
        seen: Iterator[Tensor] = iter(())
        if photos := [photo for question in questions for photo in question.photos]:
            with torch.inference_mode():
                seen = iter(self.connector(torch.stack(photos).to(self.llm.model.dtype)))
        prompts = [
            prompt_embeddings(self.llm, self.format, next(seen) if each.photos else None, each.task, each.prompt)
            for each in questions
        ]
        with self.connector.low_rank.applied() if self.connector.low_rank else nullcontext():
            yield from self.llm.write(prompts, generation)

    def find(self, text: str, question: Question) -> Found:
        """The box, where one was asked for."""
        return Found(box=parse_box(text) if question.task == "box" else None)
