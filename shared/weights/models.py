"""The published models that can be imported: every tensor that each must hold, and whether a checkpoint holds it.

shapes   by Hugging Face's names, computed from the models' sizes; the tests hold them to the models themselves
check    a checkpoint against them, its configuration and its tokenizer; no tensor's values are read
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared.errors import BadInput
from shared.weights.folders import TensorFolder, differences, read_json

Shapes = dict[str, tuple[int, ...]]

LLAMA_TOKENS = 32000  # of the tokenizer that all these models have from LLaMA; a checkpoint may add some
LLAMA_ADAPTER = {
    "clip_width": 768,
    "width": 512,
    "blocks": 2,
    "length": 10,
    "llm_width": 4096,
    "llm_layers": 32,
    "llm_heads": 32,
    "adapted_layers": 30,
}
NEEDLESS = ("rotary_emb.inv_freq", "rope.freqs", "embeddings.position_ids")  # old checkpoints' tables, made anew


def _linear(name: str, into: int, out: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _with(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def llama(
    prefix: str = "", tokens: int = LLAMA_TOKENS, width: int = 4096, hidden: int = 11008, layers: int = 32
) -> Shapes:
    """A LLaMA with its head: LLaMA-7B, Vicuna-7B and LLaMA-2-7B by default."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (tokens, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (tokens, width),
    }
    for layer in (f"model.layers.{i}" for i in range(layers)):
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{layer}.mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (width, hidden)}
        shapes |= {f"{layer}.{norm}_layernorm.weight": (width,) for norm in ("input", "post_attention")}
    return _with(prefix, shapes)


def clip_vision(
    prefix: str, image: int, patch: int = 14, width: int = 1024, hidden: int = 4096, layers: int = 24
) -> Shapes:
    """CLIP's image tower as transformers has it, without a projection: ViT-L/14 by default."""
    shapes: Shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": ((image // patch) ** 2 + 1, width),
        **_norm("pre_layrnorm", width),  # transformers' own spelling
        **_norm("post_layernorm", width),
    }
    for layer in (f"encoder.layers.{i}" for i in range(layers)):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{part}", width, width)
        shapes |= _linear(f"{layer}.mlp.fc1", width, hidden) | _linear(f"{layer}.mlp.fc2", hidden, width)
        shapes |= _norm(f"{layer}.layer_norm1", width) | _norm(f"{layer}.layer_norm2", width)
    return _with(prefix, shapes)


def c_abstractor(prefix: str = "", width: int = 1024, grid: int = 16, llm_width: int = 4096, depth: int = 3) -> Shapes:
    """Honeybee's C-Abstractor, whatever the number of its visual tokens."""
    shapes: Shapes = {"pos_emb": (1, grid * grid, width)}
    for block in (f"net.{stage}.b{i}" for stage in (0, 2) for i in range(1, depth + 1)):
        kernels = {"conv1": (width, width, 1, 1), "conv2": (width, 1, 3, 3), "conv3": (width, width, 1, 1)}
        for name, kernel in kernels.items():
            shapes |= {f"{block}.{name}.conv.weight": kernel, **_norm(f"{block}.{name}.bn", width)}
        for name, (into, out) in {"fc1": (width, width // 4), "fc2": (width // 4, width)}.items():
            shapes |= {f"{block}.se.{name}.weight": (out, into, 1, 1), f"{block}.se.{name}.bias": (out,)}
    shapes |= _linear("readout.0", width, llm_width) | _linear("readout.2", llm_width, llm_width)
    return _with(prefix, shapes)


def llama_adapter(
    clip_width: int,
    width: int,
    blocks: int,
    length: int,
    llm_width: int,
    llm_layers: int,
    llm_heads: int,
    adapted_layers: int,
) -> Shapes:
    """LLaMA-Adapter for captions, LLaMA itself apart."""
    shapes: Shapes = {
        **_linear("clip_proj", clip_width, width),
        **_norm("clip_proj_norm", width),
        "visual_query.weight": (length, width),
        **_linear("visual_proj", width, llm_width),
        **_norm("visual_proj_norm", llm_width),
        "cap_adapter_query.weight": (adapted_layers * length, llm_width),
    }
    for block in (f"visual_blocks.{i}" for i in range(blocks)):
        shapes |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        shapes |= _linear(f"{block}.attn.qkv", width, 3 * width) | _linear(f"{block}.attn.proj", width, width)
        shapes |= _linear(f"{block}.mlp.fc1", width, 4 * width) | _linear(f"{block}.mlp.fc2", 4 * width, width)
    for layer in range(llm_layers - adapted_layers, llm_layers):
        shapes[f"layers.{layer}.attention.cap_gate"] = (1, llm_heads, 1, 1)
    return shapes


@dataclass(frozen=True)
class PublishedModel:
    """A model whose weights a user brings; shared.weights.catalogue.RECIPES says from where.

    Attributes:
        name: of the artefact that it becomes.
        shapes: of all its tensors.
        others: another shape that is as good, by name.
        needless: ends of the names of tensors that it may have besides.
        prefix: of the language model's tensors; None where there is no language model.
        config: what the language model's configuration must say where it says anything: what shapes do not tell.
    """

    name: str
    kind: Literal["llm", "connector"]
    summary: str
    licence: str
    shapes: Shapes
    others: Shapes = field(default_factory=dict)
    needless: tuple[str, ...] = NEEDLESS
    prefix: str | None = ""
    config: Mapping[str, float] = field(default_factory=dict)


_LLAMA = "LLaMA licence (Meta, non-commercial)"
_LLAMA_2 = "LLaMA 2 Community License"
_HEADS = {"num_attention_heads": 32}

MODELS = {
    model.name: model
    for model in (
        PublishedModel(
            name="llama-7b",
            kind="llm",
            summary="LLaMA-7B",
            licence=_LLAMA,
            shapes=llama(),
            config={**_HEADS, "rms_norm_eps": 1e-6},
        ),
        PublishedModel(
            name="llama-2-7b",
            kind="llm",
            summary="LLaMA-2-7B",
            licence=_LLAMA_2,
            shapes=llama(),
            config={**_HEADS, "rms_norm_eps": 1e-5},
        ),
        PublishedModel(
            name="honeybee-7b",
            kind="llm",
            summary="Honeybee 7B-C-Abs-M144",
            licence=f"CC BY-NC 4.0; {_LLAMA_2}",
            shapes={
                **llama("language_model."),
                **c_abstractor("abstractor."),
                **clip_vision("vision_model.vision_model.", image=224),
            },
            others={"abstractor.pos_emb": (1, 257, 1024)},  # with CLS, whose position is not used
            prefix="language_model.",
            config=_HEADS,
        ),
        PublishedModel(
            name="shikra-7b",
            kind="llm",
            summary="Shikra-7B",
            licence=f"CC BY-NC 4.0; {_LLAMA}",
            shapes=llama(tokens=32003) | _linear("model.mm_projector", 1024, 4096),
            config=_HEADS,
        ),
        PublishedModel(
            name="llava-1.5-7b",
            kind="llm",
            summary="LLaVA-1.5-7B",
            licence=_LLAMA_2,
            shapes={
                **llama("language_model.", tokens=32064),
                **clip_vision("vision_tower.vision_model.", image=336),
                **_linear("multi_modal_projector.linear_1", 1024, 4096),
                **_linear("multi_modal_projector.linear_2", 4096, 4096),
            },
            prefix="language_model.",
            config=_HEADS,
        ),
        PublishedModel(
            name="llama-adapter-caption-vit-l",
            kind="connector",
            summary="LLaMA-Adapter v1 for captions, from CLIP ViT-L/14 to LLaMA-7B",
            licence="GPL-3.0",
            shapes=llama_adapter(**LLAMA_ADAPTER),
            needless=("adapter_query.weight", ".attention.gate"),  # of the other release, for instructions
            prefix=None,
        ),
    )
}


@dataclass(frozen=True)
class Report:
    """What ``check`` found.

    Attributes:
        tensors: that were found.
        parameters: of the model.
        size: bytes of their files.
        tokens: of the tokenizer; None where none is wanted or to be read.
        problems: all that is wrong, a phrase each.
    """

    model: PublishedModel
    tensors: int
    parameters: int
    size: int
    tokens: int | None
    problems: list[str]


def check(model: PublishedModel, path: Path, tokenizer: bool = True) -> Report:
    """Holds a checkpoint against what the model must have, without reading its tensors' values.

    Args:
        tokenizer: whether it must have one.

    Raises:
        BadInput: it cannot be read at all.
    """
    folder = TensorFolder(path)
    given = {
        name: spec for name, spec in folder.specs.items() if name in model.shapes or not name.endswith(model.needless)
    }
    expected = model.shapes | {
        name: shape for name, shape in model.others.items() if name in given and tuple(given[name].shape) == shape
    }
    problems = differences(expected, given)
    problems += [
        f"{name} is of {str(spec.dtype).removeprefix('torch.')}, no floating-point type"
        for name, spec in given.items()
        if name in expected and not spec.is_floating_point()
    ]
    tokens = None
    if model.prefix is not None:
        problems += _check_config(model, folder)
    if model.prefix is not None and tokenizer:
        try:
            tokens = count_tokens(path)
            rows = model.shapes[f"{model.prefix}model.embed_tokens.weight"][0]
            if not LLAMA_TOKENS <= tokens <= rows:
                several = f"{LLAMA_TOKENS:,} to {rows:,}" if rows > LLAMA_TOKENS else f"{rows:,}"
                problems.append(f"the tokenizer has {tokens:,} tokens instead of {several}: it is another model's")
        except BadInput as problem:
            problems.append(str(problem))
    return Report(
        model=model,
        tensors=len(folder),
        parameters=sum(map(math.prod, expected.values())),
        size=sum(file.stat().st_size for file in folder.files),
        tokens=tokens,
        problems=problems,
    )


def count_tokens(folder: Path) -> int:
    """How many embeddings a folder's tokenizer needs: one more than its last token.

    Raises:
        BadInput: there is no tokenizer, or it cannot be read.
    """
    try:
        if (path := folder / "tokenizer.model").is_file():
            from sentencepiece import SentencePieceProcessor

            tokens = SentencePieceProcessor(model_file=str(path)).vocab_size()
            path = folder / "added_tokens.json"
            last = list(read_json(path).values()) if path.is_file() else []
        elif (path := folder / "tokenizer.json").is_file():
            content: Any = read_json(path)
            tokens = len(content["model"]["vocab"])
            last = [token["id"] for token in content.get("added_tokens") or []]
        else:
            raise BadInput(
                f"there is no tokenizer in {folder}: put the tokenizer.model that came with the language model beside "
                "its weights"
            )
        return max([tokens, *(int(token) + 1 for token in last)])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as problem:  # RuntimeError: sentencepiece's
        raise BadInput(f"{path} describes no tokenizer: it is another kind of file, or damaged") from problem


def _check_config(model: PublishedModel, folder: TensorFolder) -> list[str]:
    try:
        config = folder.language_config(model.prefix or "")
    except BadInput as problem:
        return [str(problem)]
    return [
        f"its configuration has {name} {config[name]} instead of {wanted:g}"
        for name, wanted in model.config.items()
        if name in config
        and not (isinstance(config[name], int | float) and math.isclose(config[name], wanted, rel_tol=1e-3))
    ]
