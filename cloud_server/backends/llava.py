"""LLaVA-1.5 (Liu et al., CVPR 2024) by transformers' own classes: CLIP's tokens, projected, in the place of <image>.

CLIP tokens (1 + patches, D) -> without CLS -> multi_modal_projector -> (patches, llm width), amid the prompt's text

The checkpoint's own vision tower is not loaded: what it would see comes through the neck and our CLIP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from cloud_server.backends import Backend, Piece, Question
from cloud_server.backends.language_model import LanguageModel
from cloud_server.backends.prompts import prompt_format
from cloud_server.vision.clip import VisionNeeds
from shared.conversation import Generation
from shared.errors import BadInput, WeightsUnavailable
from shared.profiles import BackendSpec, ClipSpec, Profile
from shared.weights.folders import TensorFolder, differences, listed
from shared.weights.store import digest_of, ensure

LANGUAGE_MODEL, PROJECTOR = "language_model.", "multi_modal_projector."  # how their tensors' names begin


class Llava(Backend):
    """Free text about a photo.

    Args:
        prompt: name of the format. ``vicuna-v1.1`` is what the authors trained and measured with; transformers' chat
            template for this model is the same without its first two sentences.
    """

    def __init__(
        self,
        config: LlavaConfig,
        projector: LlavaMultiModalProjector,
        llm: LanguageModel,
        prompt: str,
        digests: dict[str, str],
    ) -> None:
        self.needs = VisionNeeds(last_block=last_block(config))
        self.first = {"default": 1, "full": 0}[config.vision_feature_select_strategy]  # token 0 is CLS
        self.projector = projector.eval().requires_grad_(False).to(llm.model.device, llm.model.dtype)
        self.llm = llm
        self.format = prompt_format(prompt)
        self.digests = digests

    @classmethod
    def load(cls, spec: BackendSpec, profile: Profile, device: torch.device) -> Llava:
        """Reads a folder in the layout of llava-hf/llava-1.5-7b-hf.

        Raises:
            BadInput: it is no LLaVA, or one for another CLIP than the profile's.
            WeightsUnavailable: as LanguageModel.load; tensors of the projector are missing or of another shape.
        """
        folder = ensure(spec.llm)
        tensors = TensorFolder(folder)
        if (kind := tensors.config.get("model_type")) != LlavaConfig.model_type:
            raise BadInput(f"{spec.llm} is no llava: its config.json has model_type {kind!r}")
        config = LlavaConfig.from_dict(tensors.config)
        check_clip(spec.llm, config, profile.clip)
        return cls(
            config,
            read_projector(config, tensors),
            LanguageModel.load(folder, device, spec.dtype, LANGUAGE_MODEL),
            spec.prompt,
            {"llm": digest_of(spec.llm)},
        )

    def write(self, questions: Sequence[Question], generation: Generation) -> Iterator[Piece]:
        yield from self.llm.write([self.embed(question) for question in questions], generation)

    @torch.inference_mode()
    def project(self, photo: Tensor) -> Tensor:
        """CLIP tokens (1 + patches, D) -> visual tokens (patches, llm width)."""
        return self.projector(photo[self.first :].to(self.llm.model.dtype))

    @torch.inference_mode()
    def embed(self, question: Question) -> Tensor:
        """The prompt (T, D). The texts before and after the photo are tokenised each by itself, as in training."""
        tokenizer = self.llm.tokenizer
        if not question.photos:
            return self.llm.embed(self.format(tokenizer, question.prompt))
        before = [*([] if tokenizer.bos is None else [tokenizer.bos]), *tokenizer.encode(self.format.before)]
        after = tokenizer.encode(f"\n{question.prompt}{self.format.after}")
        return torch.cat([self.llm.embed(before), *map(self.project, question.photos), self.llm.embed(after)])


def read_projector(config: LlavaConfig, tensors: TensorFolder) -> LlavaMultiModalProjector:
    """Raises WeightsUnavailable where its tensors are missing or of another shape."""
    projector = LlavaMultiModalProjector(config)
    expected = {f"{PROJECTOR}{name}": tuple(value.shape) for name, value in projector.state_dict().items()}
    if wrong := differences(expected, {name: tensors.specs[name] for name in expected if name in tensors.specs}):
        raise WeightsUnavailable(f"{tensors.path} does not hold what its configuration says: {listed(wrong)}")
    projector.load_state_dict({name.removeprefix(PROJECTOR): tensors[name] for name in expected})
    return projector


def last_block(config: LlavaConfig) -> int:
    """The block of CLIP, from 0, that ``vision_feature_layer`` means.

    transformers counts what lies between the blocks: 0 enters the first, -1 leaves the last.

    Raises:
        BadInput: it means no block, or several.
    """
    vision: Any = config.vision_config
    layer, layers = config.vision_feature_layer, vision.num_hidden_layers
    if not isinstance(layer, int) or not -layers <= layer <= layers or layer == 0:
        raise BadInput(f"vision_feature_layer is {layer}, which is not one of CLIP's {layers} blocks")
    return layer % (layers + 1) - 1


def check_clip(name: str, config: LlavaConfig, clip: ClipSpec) -> None:
    """Raises BadInput where LLaVA of that name is made for other tokens than the profile's CLIP gives."""
    vision: Any = config.vision_config
    wanted = (vision.num_hidden_layers, vision.hidden_size, vision.image_size // vision.patch_size)
    given = (clip.layers, clip.width, clip.grid)
    if wanted != given:
        told = ["{} blocks of {} channels, {} patches a side".format(*sizes) for sizes in (wanted, given)]
        raise BadInput(f"{name} reads a CLIP of {told[0]}; {clip.weights} has {told[1]}: name it in another profile")
    if last_block(config) < clip.entry_block:
        raise BadInput(f"{name} reads block {last_block(config)} of CLIP; the neck's tokens enter {clip.entry_block}")
