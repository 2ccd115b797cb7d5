"""Honeybee (Cha et al., CVPR 2024) with its C-Abstractor: visual tokens in the text, for questions with choices.

CLIP tokens (B, 1 + g^2, D) -> without CLS -> CAbstractor -> (B, Q, llm width), which stand in the place of <image>
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from timm.layers.norm import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

from cloud_server.backends import Backend, Found, Piece, Question
from cloud_server.backends.connector import load_connector
from cloud_server.backends.language_model import LanguageModel
from cloud_server.backends.low_rank import LowRank
from cloud_server.backends.tokenizer import Tokenizer
from cloud_server.vision.clip import VisionNeeds
from shared.conversation import Conversation, Generation
from shared.errors import BadInput, WeightsUnavailable
from shared.profiles import BackendSpec, Profile
from shared.weights.folders import TensorFolder, differences, listed
from shared.weights.store import digest_of, ensure

IMAGE, HUMAN, AI = "<image>", "\nHuman: ", "\nAI: "
OPENING = f"The following is a conversation between a curious human and AI assistant.{HUMAN}{IMAGE}"
ABSTRACTOR = "abstractor."  # how its tensors' names begin in the published model's folder
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Splitting = Literal["roles", "image"]
Scoring = Literal["letters", "texts"]


class CAbstractor(nn.Module):
    """Convolutions that keep neighbours together while there are made fewer of them (section 3.2).

        (B, g^2, D) + positions -> RegStage -> average pooling to sqrt(Q) a side -> RegStage -> two linear layers

    Parameter names are those of the published checkpoint.

    Args:
        width: D of CLIP.
        grid: g, patches a side.
        queries: Q, a square number (144 as published).
        llm_width: of the language model.
        hidden: channels of the convolutions (1024 as published).
        depth: bottlenecks of each stage (3 as published).
    """

    def __init__(self, width: int, grid: int, queries: int, llm_width: int, hidden: int, depth: int = 3) -> None:
        super().__init__()
        self.config = {
            "width": width,
            "grid": grid,
            "queries": queries,
            "llm_width": llm_width,
            "hidden": hidden,
            "depth": depth,
        }
        self.grid = grid
        stage = partial(RegStage, depth, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d)
        self.pos_emb = nn.Parameter(torch.randn(1, grid * grid, width) * 0.02)
        self.net = nn.Sequential(
            stage(in_chs=width, out_chs=hidden),
            nn.AdaptiveAvgPool2d(math.isqrt(queries)),
            stage(in_chs=hidden, out_chs=hidden),
        )
        self.readout = nn.Sequential(nn.Linear(hidden, llm_width), nn.SiLU(), nn.Linear(llm_width, llm_width))

    def forward(self, features: Tensor) -> Tensor:
        """CLIP tokens (B, 1 + g^2, D), CLS first -> (B, Q, llm_width)."""
        x = features[:, 1:] + self.pos_emb
        x = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return self.readout(self.net(x).flatten(2).transpose(1, 2))


class Connector(nn.Module):
    """What Honeybee adds to CLIP and a language model: the abstractor and, where the model is shared, its changes.

    Args:
        abstractor: its sizes.
        last_block: of CLIP that it reads, as in VisionNeeds.
        rank: of the language model's changes; 0: it has none, for its weights are Honeybee's own.
    """

    def __init__(self, llm: Any, abstractor: dict[str, int], last_block: int, rank: int = 0) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"abstractor": abstractor, "last_block": last_block, "rank": rank}
        self.abstractor = CAbstractor(**abstractor)
        self.low_rank = LowRank(llm, rank) if rank else None

    @classmethod
    def published(cls, llm: Any, tensors: TensorFolder) -> Connector:
        """Honeybee's own: the abstractor lies in the language model's folder, and config.json tells what it reads.

        Raises:
            WeightsUnavailable: the folder is another model's, or has another projector than a C-Abstractor.
        """
        config = tensors.config
        told = config.get("projector_config") or config.get("visual_projector_config") or {}  # today's name, and old
        queries = told.get("num_queries") or config.get("num_query_tokens") or 0
        kind, ends = told.get("projector_type", "none"), told.get("num_eos_tokens", 0)
        own = tensors.part(ABSTRACTOR)
        if not str(kind).startswith("c-abs") or ends or math.isqrt(queries) ** 2 != queries or "pos_emb" not in own:
            raise WeightsUnavailable(
                f"{tensors.path} is no Honeybee with a C-Abstractor: its projector is {kind}, of {queries} tokens and "
                f"{ends} to end them, and {len(own)} tensors are named {ABSTRACTOR}*"
            )
        positions, width = own["pos_emb"].shape[1:]
        grid = math.isqrt(positions)
        own["pos_emb"] = own["pos_emb"][:, positions - grid * grid :]  # old checkpoints have one for CLS, first
        sizes = {
            "width": width,
            "grid": grid,
            "queries": queries,
            "llm_width": llm.config.hidden_size,
            "hidden": len(own["readout.0.weight"][0]),
            "depth": len({name.split(".")[2] for name in own if name.startswith("net.0.")}),
        }
        connector = cls(llm, sizes, told.get("feature_layer_index", -1))
        expected = {name: tuple(value.shape) for name, value in connector.abstractor.state_dict().items()}
        if wrong := differences(expected, own):
            raise WeightsUnavailable(f"{tensors.path} does not hold what its configuration says: {listed(wrong)}")
        connector.abstractor.load_state_dict(own)
        return connector

    def forward(self, features: Tensor) -> Tensor:
        """CLIP tokens (B, 1 + g^2, D), CLS first -> visual tokens (B, Q, llm width)."""
        return self.abstractor(features)


def tokens_before(tokenizer: Tokenizer, splitting: Splitting = "roles") -> list[int]:
    """What stands before the visual tokens."""
    opening = OPENING.removesuffix(IMAGE)
    return [*([] if tokenizer.bos is None else [tokenizer.bos]), *_encode(tokenizer, opening, splitting)]


def tokens_after(
    tokenizer: Tokenizer, prompt: str, choices: Sequence[str] = (), splitting: Splitting = "roles"
) -> list[int]:
    """What stands after the visual tokens: the question, and the choices by letter where there are any."""
    asked = f"{HUMAN}{prompt}"
    if choices:
        options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices, strict=False))
        asked = f"{HUMAN}Answer with the option's letter from the given choices directly. {prompt}\n"
        asked += f"There are several options:\n{options}"
    return _encode(tokenizer, asked + AI, splitting)


def _encode(tokenizer: Tokenizer, text: str, splitting: Splitting) -> list[int]:
    """Each chunk by itself, as it was tokenised in training; the released weights' code split less than today's."""
    chunks = re.split(f"({re.escape(HUMAN)}|{re.escape(AI)})", text) if splitting == "roles" else [text]
    return [token for chunk in chunks if chunk for token in tokenizer.encode(chunk)]


class Honeybee(Backend):
    """Questions about a photo, with choices or without.

    Args:
        connector: what it sees with.
        scoring: how a choice is made. ``letters`` writes a letter, as Honeybee is trained to; ``texts`` takes the
            choice that is the likeliest answer, which small models, who do not know letters, can do.
        splitting: where texts are split before they are tokenised: at ``roles`` and the image, or at the ``image``
            alone, as the code did when the published weights were released.
    """

    tasks = ("choice", "text")

    def __init__(
        self,
        connector: Connector,
        llm: LanguageModel,
        digests: dict[str, str],
        scoring: Scoring = "letters",
        splitting: Splitting = "roles",
    ) -> None:
        self.connector, self.llm, self.digests = connector, llm, digests
        self.needs = VisionNeeds(last_block=connector.config["last_block"])
        self.scoring, self.splitting = scoring, splitting

    @classmethod
    def load(cls, spec: BackendSpec, profile: Profile, device: torch.device) -> Honeybee:
        folder = ensure(spec.llm)
        if spec.connector:
            llm = LanguageModel.load(folder, device, spec.dtype)
            connector = load_connector(spec.connector, partial(Connector, llm.model))
        else:
            llm = LanguageModel.load(folder, device, spec.dtype, "language_model.")
            connector = Connector.published(llm.model, TensorFolder(folder))
        return cls(
            connector.eval().requires_grad_(False).to(device, llm.model.dtype),
            llm,
            {role: digest_of(name) for role, name in (("llm", spec.llm), ("connector", spec.connector)) if name},
            **spec.options,
        )

    def check(self, conversation: Conversation) -> None:
        super().check(conversation)
        if len(conversation.images) != 1:
            raise BadInput(f"{len(conversation.images)} photos; Honeybee answers about one")
        if len(conversation.choices) > len(LETTERS):
            raise BadInput(f"{len(conversation.choices)} choices; there are at most {len(LETTERS)}, a letter each")

    def write(self, questions: Sequence[Question], generation: Generation) -> Iterator[Piece]:
        with torch.inference_mode():
            visual = self.connector(torch.stack([photo for each in questions for photo in each.photos]).to(self.dtype))
        with self.connector.low_rank.applied() if self.connector.low_rank else nullcontext():
            if self.scoring == "texts" and all(question.choices for question in questions):
                best = [self._likeliest(*each) for each in zip(questions, visual, strict=True)]
                yield Piece(tuple(best), tuple("stop" for _ in best))
                return
            prompts = [self._prompt(question, own) for question, own in zip(questions, visual, strict=True)]
            yield from self.llm.write(prompts, generation)

    def find(self, text: str, question: Question) -> Found:
        """A choice by its letter alone, as published (case and blanks do not matter), or by its whole text."""
        said = text.strip().lower()
        names = LETTERS[: len(question.choices)] if self.scoring == "letters" else question.choices
        return Found(choice=next((i for i, name in enumerate(names) if name.strip().lower() == said), None))

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.model.dtype

    def _prompt(self, question: Question, visual: Tensor) -> Tensor:
        """Embeddings (T, D) of a question around its visual tokens (Q, D)."""
        tokenizer, choices = self.llm.tokenizer, question.choices if self.scoring == "letters" else ()
        before = tokens_before(tokenizer, self.splitting)
        after = tokens_after(tokenizer, question.prompt, choices, self.splitting)
        return torch.cat([self.llm.embed(before), visual, self.llm.embed(after)])

    def _likeliest(self, question: Question, visual: Tensor) -> str:
        tokenizer = self.llm.tokenizer
        endings = [[*tokenizer.encode(choice), tokenizer.eos] for choice in question.choices]
        scores = self.llm.likelihoods(self._prompt(question, visual), endings)
        return question.choices[int(scores.argmax())]
