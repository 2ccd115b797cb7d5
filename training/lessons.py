"""How each backend's connector is taught: what it is built of, what it reads of CLIP, what is asked, and the loss."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cloud_server.backends import honeybee, llama_adapter, shikra
from cloud_server.backends.language_model import LanguageModel
from cloud_server.backends.prompts import prompt_format
from cloud_server.vision.clip import ClipTower, VisionNeeds
from shared.errors import BadInput
from shared.images import Placement, Preparation
from training.features import Half, TeacherFeatures
from training.loop import Losses
from training.photos import Entry, Thing, in_pixels
from training.samples import Sample

LOOKED_AT = 400  # photos, for what is set from the features' statistics


@dataclass(frozen=True)
class Setting:
    """What a lesson takes place in.

    Attributes:
        features: of CLIP, of all training photos, in the order of ``entries``.
        llm: in bfloat16.
        prompt: name of the profile's prompt format.
        answer_tokens: at which an answer is cut.
    """

    tower: ClipTower
    features: TeacherFeatures
    llm: LanguageModel
    entries: Sequence[Entry]
    preparation: Preparation
    prompt: str
    answer_tokens: int


class Lesson(ABC):
    """One backend's connector being taught.

    Args:
        sizes: of the connector, where they are not the lesson's own.
    """

    shares: ClassVar[Mapping[str, float]]
    sizes: ClassVar[dict[str, int]]
    connector: nn.Module

    def __init__(self, setting: Setting, sizes: Mapping[str, int]) -> None:
        if unknown := sizes.keys() - self.sizes.keys():
            raise BadInput(f"no size named {', '.join(unknown)}; there are {', '.join(self.sizes)}")
        self.setting = setting
        self.connector = self.build({**self.sizes, **sizes})

    @abstractmethod
    def build(self, sizes: Mapping[str, int]) -> nn.Module:
        """The connector before its first step."""

    @abstractmethod
    def read(self, photos: Sequence[int]) -> Tensor:
        """What the backend reads of photos, (B, 1 + patches, D)."""

    @abstractmethod
    def losses(self, features: Tensor, samples: Sequence[Sequence[Sample]]) -> Losses:
        """Of a batch: the features of each photo, and its exchanges."""

    def entries(self) -> list[Entry]:
        """The photos as exchanges are drawn from them."""
        return list(self.setting.entries)

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """For the optimiser."""
        return [{"params": list(self.connector.parameters()), "lr": rate}]

    def answer(self, sample: Sample) -> list[int]:
        """Tokens of what is to be said, its end included."""
        tokenizer = self.setting.llm.tokenizer
        return [*tokenizer.encode(sample.answer), tokenizer.eos][: self.setting.answer_tokens]

    def looked_at(self, stored: Half) -> Tensor:
        """Features (photos, 1 + patches, D) of some photos from all over the set."""
        which = np.linspace(0, len(stored) - 1, min(LOOKED_AT, len(stored))).astype(int)
        return torch.from_numpy(stored[which]).float()


class LlamaAdapterLesson(Lesson):
    """Captions most of the time, then names of things, then questions."""

    shares: ClassVar = {"captions": 0.8, "labels": 0.13, "questions": 0.07}
    sizes: ClassVar = {"width": 384, "heads": 8, "blocks": 2, "length": 16, "adapted_layers": 24}
    connector: llama_adapter.Connector

    @torch.no_grad()
    def build(self, sizes: Mapping[str, int]) -> llama_adapter.Connector:
        """What sets photos apart is what the connector shows from the first step on.

        CLIP's tokens have a large part in common, which a random projection and LayerNorm would pass on as the signal:
        visual tokens would then differ between photos by an eighth of their size. ``clip_proj`` becomes the whitening
        projection onto the features' principal axes; the queries start small beside what they attend to, and the
        visual tokens at the size of the language model's own normalised states.
        """
        setting = self.setting
        llm = setting.llm.model.config
        connector = llama_adapter.Connector(
            clip_width=setting.tower.spec.projection,
            llm_width=llm.hidden_size,
            llm_layers=llm.num_hidden_layers,
            llm_heads=llm.num_attention_heads,
            **sizes,
        )
        features = setting.tower.project(self.looked_at(setting.features.last)).flatten(0, 1)
        whitening, mean = whiten(features, sizes["width"])
        connector.clip_proj.weight.copy_(whitening)
        connector.clip_proj.bias.copy_(-whitening @ mean)
        nn.init.normal_(connector.visual_query.weight, std=0.02)
        nn.init.normal_(connector.cap_adapter_query.weight, std=0.1)
        nn.init.constant_(connector.visual_proj_norm.weight, 0.3)
        return connector

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """The gates start closed, and open twenty times as fast as the rest learns."""
        gates = [self.connector.cap_gate]
        others = [p for name, p in self.connector.named_parameters() if name != "cap_gate"]
        return [{"params": others, "lr": rate}, {"params": gates, "lr": 20 * rate}]

    @torch.no_grad()
    def read(self, photos: Sequence[int]) -> Tensor:
        tokens = torch.from_numpy(self.setting.features.last[list(photos)]).float()
        return self.setting.tower.project(tokens)

    def losses(self, features: Tensor, samples: Sequence[Sequence[Sample]]) -> Losses:
        llm = self.setting.llm
        format = prompt_format(self.setting.prompt)
        exchanges = [
            (format(llm.tokenizer, sample.prompt), self.answer(sample)) for group in samples for sample in group
        ]
        longest = max(len(prompt) + len(answer) - 1 for prompt, answer in exchanges)
        tokens = torch.full((len(exchanges), longest), llm.tokenizer.eos)  # on the right, causal attention ignores it
        targets = torch.full((len(exchanges), longest), -100)
        for i, (prompt, answer) in enumerate(exchanges):
            row = prompt + answer[:-1]
            tokens[i, : len(row)] = torch.tensor(row)
            targets[i, len(prompt) - 1 : len(row)] = torch.tensor(answer)
        visual = self.connector(features).repeat_interleave(len(samples[0]), 0)
        adapters = self.connector.adapters(visual, llm.model.model.layers)
        hidden = llm.model.model(tokens, adapters=adapters, use_cache=False).last_hidden_state
        loss = cross_entropy(llm, hidden, targets)
        return {"loss": loss, "gate": self.connector.cap_gate.tanh().abs().mean()}


class PrefixLesson(Lesson):
    """Visual tokens stand in the text. A photo's exchanges share what is before and do not see each other."""

    needs: VisionNeeds
    connector: Any  # (B, 1 + patches, D) -> visual tokens, with a ``low_rank`` that may be None

    @abstractmethod
    def frame(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Tokens before the visual ones, the same in all exchanges of a photo, and after them as far as the answer."""

    def read(self, photos: Sequence[int]) -> Tensor:
        return torch.from_numpy(self.stored[list(photos)]).float()

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """The language model's changes, which start from something that works, learn half as fast."""
        changes = list(self.connector.low_rank.parameters()) if self.connector.low_rank else []
        others = [each for name, each in self.connector.named_parameters() if not name.startswith("low_rank.")]
        return [{"params": others, "lr": rate}, {"params": changes, "lr": rate / 2}]

    @property
    def stored(self) -> Half:
        """Features of the block that is read."""
        return {-1: self.setting.features.last, -2: self.setting.features.penultimate}[self.needs.last_block]

    def losses(self, features: Tensor, samples: Sequence[Sequence[Sample]]) -> Losses:
        rows = [self._row(own, group) for own, group in zip(self.connector(features), samples, strict=True)]
        embeddings, targets, turns, places = (
            pad_sequence([row[part] for row in rows], batch_first=True, padding_value=value)
            for part, value in enumerate((0.0, -100, len(samples[0]), 0))
        )
        longest = targets.shape[1]
        causal = torch.ones(longest, longest, dtype=torch.bool).tril()
        mask = causal & ((turns[:, None] == turns[:, :, None]) | (turns[:, None] == -1))
        llm, low_rank = self.setting.llm, self.connector.low_rank
        with low_rank.applied() if low_rank else nullcontext():
            hidden = llm.model.model(
                inputs_embeds=embeddings, attention_mask=mask[:, None], position_ids=places, use_cache=False
            ).last_hidden_state
        return {"loss": cross_entropy(llm, hidden, targets)}

    def _row(self, visual: Tensor, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One photo's visual tokens (Q, D) and exchanges as one sequence.

        Returns:
            embeddings (T, D); targets (T,), -100 where nothing is asked; of which exchange each token is, -1 for those
            of all; its place in the text.
        """
        llm = self.setting.llm
        before = self.frame(samples[0])[0]
        head = len(before) + len(visual)
        tokens: list[int] = []
        targets, turns, places = [-100] * head, [-1] * head, list(range(head))
        for turn, sample in enumerate(samples):
            after, answer = self.frame(sample)[1], self.answer(sample)
            tokens += after + answer[:-1]
            targets += [-100] * (len(after) - 1) + answer
            length = len(after) + len(answer) - 1
            turns += [turn] * length
            places += range(head, head + length)
        embeddings = torch.cat([llm.embed(before), visual.to(llm.model.dtype), llm.embed(tokens)])
        return embeddings, torch.tensor(targets), torch.tensor(turns), torch.tensor(places)


class HoneybeeLesson(PrefixLesson):
    """Answers of a few words to questions about what is there, and captions, from which most is learnt."""

    shares: ClassVar = {
        "captions": 0.3,
        "names": 0.25,
        "things": 0.2,
        "questions": 0.12,
        "counts": 0.06,
        "presence": 0.07,
    }
    sizes: ClassVar = {"queries": 64, "hidden": 384, "depth": 2, "rank": 16}
    needs = VisionNeeds(last_block=-2)

    @torch.no_grad()
    def build(self, sizes: Mapping[str, int]) -> honeybee.Connector:
        """The features' mean at each position is taken out, and visual tokens start at the size of words."""
        setting, sizes = self.setting, dict(sizes)
        rank = sizes.pop("rank")
        spec = setting.tower.spec
        abstractor = {"width": spec.width, "grid": spec.grid, "llm_width": setting.llm.width, **sizes}
        connector = honeybee.Connector(setting.llm.model, abstractor, self.needs.last_block, rank)
        features = self.looked_at(self.stored)
        connector.abstractor.pos_emb.copy_(-features[:, 1:].mean(0, keepdim=True))
        last: Any = connector.abstractor.readout[-1]
        match_words(connector, last, features[:32], setting.llm)
        return connector

    def frame(self, sample: Sample) -> tuple[list[int], list[int]]:
        tokenizer = self.setting.llm.tokenizer
        return honeybee.tokens_before(tokenizer), honeybee.tokens_after(tokenizer, sample.prompt)


class ShikraLesson(PrefixLesson):
    """Where things are, as far as the preparation leaves them in the picture."""

    shares: ClassVar = {"phrases": 1.0}
    sizes: ClassVar = {"join": 2, "rank": 16}
    needs = VisionNeeds(last_block=-2)

    @torch.no_grad()
    def build(self, sizes: Mapping[str, int]) -> shikra.Connector:
        """The projector starts as the whitening projection, and visual tokens at the size of words."""
        llm = self.setting.llm
        connector = shikra.Connector(llm.model, self.setting.tower.spec.width, **sizes)
        features = self.looked_at(self.stored)
        whitening, mean = whiten(connector.joined(features).flatten(0, 1), llm.width)
        connector.mm_projector.weight.copy_(whitening)
        connector.mm_projector.bias.copy_(-whitening @ mean)
        match_words(connector, connector.mm_projector, features[:32], llm)
        return connector

    def entries(self) -> list[Entry]:
        """The photos with those things that are at least half in the picture."""
        return [
            replace(entry, things=tuple(thing for thing in entry.things if self._shown(thing, entry)))
            for entry in self.setting.entries
        ]

    def frame(self, sample: Sample) -> tuple[list[int], list[int]]:
        tokenizer, format = self.setting.llm.tokenizer, prompt_format(self.setting.prompt)
        return shikra.tokens_around(tokenizer, format, sample.task, sample.prompt)

    def answer(self, sample: Sample) -> list[int]:
        """Corners to a hundredth of the picture: the form has room for a third digit, but it teaches nothing."""
        assert sample.thing
        entry, preparation = self.setting.entries[sample.photo], self.setting.preparation
        text = shikra.box_text(in_pixels(sample.thing.box, entry.size), entry.size, preparation)
        text = re.sub(r"\d\.\d+", lambda number: f"{round(float(number[0]), 2):.3f}", text)
        return super().answer(replace(sample, answer=text))

    def _shown(self, thing: Thing, entry: Entry) -> bool:
        box, preparation = in_pixels(thing.box, entry.size), self.setting.preparation
        placement = Placement.of(entry.size, preparation)
        share = 1.0
        corners = placement.to_prepared(box.left, box.top), placement.to_prepared(box.right, box.bottom)
        for first, last, limit in zip(*corners, (preparation.width, preparation.height), strict=True):
            share *= max(0.0, min(last, limit) - max(first, 0.0)) / max(last - first, 1e-9)
        return share >= 0.5


LESSONS: dict[str, Callable[[Setting, Mapping[str, int]], Lesson]] = {
    "llama-adapter": LlamaAdapterLesson,
    "honeybee": HoneybeeLesson,
    "shikra": ShikraLesson,
}


def cross_entropy(llm: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Hidden states (B, T, D) and the token to be predicted at each place (B, T), -100 where none is -> ()."""
    asked = targets >= 0
    return F.cross_entropy(llm.model.lm_head(hidden[asked]).float(), targets[asked])


def whiten(features: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """Features (n, D) -> the whitening projection onto as many principal axes (axes, D), and the mean (D,)."""
    mean = features.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov(features.T))  # ascending
    return (directions[:, -axes:] / variances[-axes:].clamp(min=1e-6).sqrt()).T, mean


def match_words(connector: nn.Module, last: nn.Linear, features: Tensor, llm: LanguageModel) -> None:
    """Scales a connector's last layer such that what differs between its visual tokens is as large as between words."""
    words = llm.model.get_input_embeddings().weight.float()
    visual = connector(features).flatten(0, 1)
    last.weight.mul_(float(words.std(0).norm() / visual.std(0).norm()))
    last.bias.copy_(words.mean(0) - (visual.mean(0) - last.bias) * float(words.std(0).norm() / visual.std(0).norm()))
