"""V2L-Tokenizer, labels from a few examples (Zhu et al., CVPR 2024): a photo becomes the words that lie nearest to it.

    CLS, projected (D,) -> Codebook -> 21 words -> examples, question as text -> frozen language model -> a label

Neither pictures nor anything trained enters the language model: it reads words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cloud_server.backends import Backend, Piece, Question
from cloud_server.backends.language_model import LanguageModel
from cloud_server.generation import whole
from cloud_server.vision.clip import VisionNeeds
from shared.conversation import Conversation, Generation
from shared.errors import BadInput, UnknownName, WeightsUnavailable
from shared.profiles import BackendSpec, Profile
from shared.weights.codebook import Codebook
from shared.weights.store import digest_of, ensure

Examples = Sequence[tuple[str, str]]
"""Of each, its photo's words and its label."""
Decoding = Literal["likeliest", "union"]


@dataclass(frozen=True)
class Layout:
    """The text that examples are written in. Every segment is tokenised by itself, as published.

    Attributes:
        opening: whether the labels are listed before the first example.
        photo, output: before a photo's words, and between them and the label.
        label: before a label's text; a blank where the tokenizer takes one into the word.
        end: after a label.
        comma: between two words of a photo.
    """

    opening: bool
    photo: str
    output: str
    label: str = ""
    end: str = ""
    comma: str = ""

    def before(self, examples: Examples) -> list[str]:
        """What stands before the words of the photo to be labelled, in segments.

        With that photo as the last of its own examples the label is given away. So do ComNeck's evaluation and, until
        it was corrected in April 2024, V2L-Tokenizer's; its accuracy rises from about 91 to 99 %. Which of the two
        ComNeck's published figures are of is not known. A server cannot do it: it does not know the label.
        """
        texts = []
        if self.opening:
            names = " or ".join(f"['{name}'" for name in sorted({label for _, label in examples}))  # brackets: sic
            texts.append(f"For each of the following input output pairs, output is one of {names}]\n")
        for words, label in examples:
            texts += [self.photo, words, self.output, self.label + label, self.end]
        return [text for text in (*texts, self.photo) if text]

    def after(self, words: str) -> list[str]:
        """The words of the photo to be labelled and what stands behind them, in segments."""
        return [text for text in (words, self.output) if text]


LAYOUTS = {
    "plain": Layout(opening=True, photo="###\nInput: < ", output=" >\nOutput: "),  # as published
    # What a model of 135 M parameters reads better: words apart from each other, and little else.
    "list": Layout(opening=False, photo="\nInput: ", output="\nOutput:", label=" ", end="\n", comma=", "),
}


def nearest(codebook: Codebook, features: Tensor) -> tuple[Tensor, Tensor]:
    """Of photos' projected CLS (B, D), squared distances to the nearest words, ascending, and which words: (B, count).

    Features are normalised, the codebook is not: as published.
    """
    z = F.normalize(features.float(), dim=-1)
    if codebook.centre is not None:
        z = F.normalize(z - codebook.centre, dim=-1)
    e = codebook.places
    distances = z.square().sum(-1, keepdim=True) + e.square().sum(-1) - 2 * z @ e.T  # (B, n)
    found = distances.topk(codebook.count, largest=False)
    return found.values, found.indices


def union_table(labels: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Which tokens may stand at each place of an answer: those that any label has there, (longest label, vocabulary).

    This is the published rule. A text that begins as one label and ends as another passes it.
    """
    table = torch.zeros(max(map(len, labels)), vocabulary, dtype=torch.bool)
    for label in labels:
        table[range(len(label)), label] = True
    return table


class V2lTokenizer(Backend):
    """Labels a photo as in examples, each a photo and its label.

    Args:
        decoding: ``likeliest`` takes the label that the photo's words make likelier than no words do, as a whole; that
            takes out how much the language model likes a label to begin with (Zhao et al., 2021), and the answer is
            always one of the labels. ``union`` writes token by token under ``union_table``, as published; the answer
            may be none of the labels.
        ln_post_times: 1 as published, 2 as in ComNeck's evaluation.
    """

    tasks = ("label",)
    max_images = 16

    def __init__(
        self,
        codebook: Codebook,
        llm: LanguageModel,
        layout: Layout,
        digests: dict[str, str],
        decoding: Decoding = "likeliest",
        ln_post_times: int = 1,
    ) -> None:
        if decoding not in get_args(Decoding):
            raise UnknownName(f"no decoding named {decoding!r}; there are: {', '.join(get_args(Decoding))}")
        self.codebook, self.llm, self.layout, self.digests = codebook, llm, layout, digests
        self.decoding = decoding
        self.needs = VisionNeeds(project=True, ln_post_times=ln_post_times)

    @classmethod
    def load(cls, spec: BackendSpec, profile: Profile, device: torch.device) -> V2lTokenizer:
        if spec.prompt not in LAYOUTS:
            raise UnknownName(f"no layout named {spec.prompt!r} for examples; there are: {', '.join(LAYOUTS)}")
        codebook = Codebook.load(ensure(spec.connector)).to(device)
        if codebook.places.shape[1] != profile.clip.projection:
            raise WeightsUnavailable(
                f"{spec.connector} has words in {codebook.places.shape[1]} dimensions, CLIP of profile "
                f"{profile.name!r} has {profile.clip.projection}: it is another CLIP's codebook"
            )
        return cls(
            codebook,
            LanguageModel.load(ensure(spec.llm), device, spec.dtype),
            LAYOUTS[spec.prompt],
            {"llm": digest_of(spec.llm), "connector": digest_of(spec.connector)},
            **spec.options,
        )

    def check(self, conversation: Conversation) -> None:
        photos, labels = conversation.parts[::2], [part for part in conversation.parts[1::2] if isinstance(part, str)]
        if len(photos) != len(conversation.images) or len(photos) != len(labels) + 1:
            raise BadInput("a photo is labelled by examples: each a photo and then its label, and last comes the photo")
        if not all(label.strip() for label in labels):
            raise BadInput("an example's label is empty: name what its photo shows")
        if repeated := [label for label, count in Counter(labels).items() if count > 1]:
            raise BadInput(f"two examples have the label {repeated[0]!r}: give one of each label")
        if len(labels) < 2:
            raise BadInput("with fewer than two labels there is nothing to choose: give an example of another")

    def write(self, questions: Sequence[Question], generation: Generation) -> Iterator[Piece]:
        """A label comes in one piece. ``generation`` says how ``union`` writes; the likeliest label is what it is."""
        shown = [self._show(question) for question in questions]
        if self.decoding == "likeliest":
            labels = [self._likeliest(examples, words) for examples, words in shown]
            yield Piece(tuple(labels), tuple("stop" for _ in labels))
            return
        prompts = [
            self.llm.embed(self._before(examples) + self._tokens(self.layout.after(words))) for examples, words in shown
        ]
        tables = pad_sequence([self._union(examples) for examples, _ in shown])  # (longest label, B, vocabulary)
        tables = torch.cat([tables, torch.zeros_like(tables[:1])])
        texts, finished = whole(self.llm.write(prompts, generation, lambda n: tables[n]))
        yield Piece(tuple(text.strip() for text in texts), tuple(finished))

    def describe(self, photos: Sequence[Tensor]) -> list[str]:
        """The words of each photo (1 + patches, D), nearest first."""
        _, indices = nearest(self.codebook, torch.stack([photo[0] for photo in photos]))
        return [self.layout.comma.join(self.codebook.words[i] for i in row) for row in indices.tolist()]

    def _show(self, question: Question) -> tuple[Examples, str]:
        """A question in words: its examples, and the photo to be labelled."""
        *words, last = self.describe(question.photos)
        labels = [part for part in question.parts if isinstance(part, str)]
        return list(zip(words, labels, strict=True)), last

    def _tokens(self, segments: Sequence[str]) -> list[int]:
        return [token for segment in segments for token in self.llm.tokenizer.encode(segment)]

    def _before(self, examples: Examples) -> list[int]:
        bos = self.llm.tokenizer.bos
        return [*([] if bos is None else [bos]), *self._tokens(self.layout.before(examples))]

    def _likeliest(self, examples: Examples, words: str) -> str:
        labels = [label for _, label in examples]
        endings = [self.llm.tokenizer.encode(self.layout.label + label) for label in labels]
        past = self.llm.read(self.llm.embed(self._before(examples)))
        with_words, without = (
            self.llm.likelihoods(self.llm.embed(self._tokens(self.layout.after(shown))), endings, past)
            for shown in (words, "")
        )
        return labels[int((with_words - without).argmax())]

    def _union(self, examples: Examples) -> Tensor:
        tokenizer = self.llm.tokenizer
        endings = [[*tokenizer.encode(self.layout.label + label), tokenizer.eos] for _, label in examples]
        return union_table(endings, self.llm.model.config.vocab_size)
