"""Fetched files become installed files: one converter for each layout in which a base model is published.

    fetched/ (as its publisher wrote it) -> converter(fetched, installed) -> installed/ (the one layout that we load)

Whatever source an artefact came from, it lies in the cache the same way. A catalogue names a converter as
``module:function``; it takes the folder with the source's files and an empty folder to fill, and reads data only:
nothing that is fetched is ever executed.

What a user brings is converted here as well, by ``comneck weights import``.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import BadInput, WeightsUnavailable
from shared.weights.folders import TensorFolder
from shared.weights.models import LLAMA_ADAPTER, NEEDLESS

if TYPE_CHECKING:
    from torch import Tensor

Tensors = dict[str, "Tensor"]

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SHARD = 1 << 29  # bytes of tensors in one file of those that we write in several

_LAYER_PARTS = {  # of a CLIP block, Hugging Face's name -> OpenAI's
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def clip_from_hub(fetched: Path, installed: Path) -> None:
    """openai/clip-vit-* on the Hub -> ``model.safetensors`` with the image tower in OpenAI's layout and float16."""
    import torch

    _save_clip(torch.load(fetched / "pytorch_model.bin", map_location="cpu", weights_only=True), installed)


def clip_from_int8_onnx(fetched: Path, installed: Path) -> None:
    """An int8 ONNX export of CLIP's image tower -> ``model.safetensors`` in OpenAI's layout and float16."""
    (path,) = fetched.glob("*.onnx")
    _save_clip(read_int8_onnx(path), installed)


def language_model_from_gguf(fetched: Path, installed: Path) -> None:
    """A GGUF file, dequantised once -> a Hugging Face folder in float16: model, configuration and tokenizer."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (path,) = fetched.glob("*.gguf")
    where = {"gguf_file": path.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        fetched, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True), **where
    )
    model.save_pretrained(installed)
    tokenizer = AutoTokenizer.from_pretrained(fetched, **where)
    if _gguf_text(path, "tokenizer.ggml.pre") == "smollm":
        # transformers reads every byte-level BPE as GPT-2's; SmolLM's cuts off each digit first
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(installed)


def shikra_from_delta(base: Path, delta: Path, made: Path, shard: int = SHARD) -> None:
    """LLaMA-7B and what Shikra's authors publish -> a Hugging Face folder in float16, with the delta's tokenizer.

    Tensors that both have are added, in float16. Rows that LLaMA has not (the embeddings of new tokens) and tensors
    that it has not (the projector) are the delta's. At any time no more than a shard of each is in memory.

    Raises:
        BadInput: a sum is not finite: one of the two is not what it should be.
    """
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    specs = {name: spec for name, spec in TensorFolder(delta).specs.items() if not name.endswith(NEEDLESS)}
    sizes = {name: 2 * spec.numel() for name, spec in specs.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if sum(sizes[other] for other in shards[-1]) + size > shard and shards[-1]:
            shards.append([])
        shards[-1].append(name)
    places = {}
    with tqdm(desc="adding", total=sum(sizes.values()), unit="B", unit_scale=True, disable=None) as bar:
        for number, names in enumerate(shards, start=1):
            theirs, llama = TensorFolder(delta), TensorFolder(base)  # anew: what was mapped before is let go
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for name in names:
                tensors[name] = theirs[name].to(torch.float16, copy=True)
                if name in llama:
                    rows = llama[name].to(torch.float16)
                    tensors[name][: len(rows)] += rows
                if not tensors[name].isfinite().all():
                    raise BadInput(f"{name} of {base} and {delta} adds up to values that are not finite")
                places[name] = file
                bar.update(sizes[name])
            save_file(tensors, made / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
    (made / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = TensorFolder(delta).config | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
    }
    (made / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (delta / name).is_file():
            shutil.copyfile(delta / name, made / name)


def llama_adapter_from_published(path: Path, made: Path) -> None:
    """LLaMA-Adapter's captioning release -> our connector, a safetensors file in float32.

    Raises:
        BadInput: a value is not finite.
    """
    import torch

    from shared.weights.digest import save_tensors

    published = TensorFolder(path)
    names = [name for name in published if name.startswith(("clip_proj", "visual_", "cap_adapter_query"))]
    first = LLAMA_ADAPTER["llm_layers"] - LLAMA_ADAPTER["adapted_layers"]
    gates = [published[f"layers.{i}.attention.cap_gate"] for i in range(first, LLAMA_ADAPTER["llm_layers"])]
    tensors = {name: published[name] for name in names} | {"cap_gate": torch.stack(gates)}
    save_tensors(made, tensors, "float32", {"config": json.dumps(LLAMA_ADAPTER | {"heads": 16})})


def read_int8_onnx(path: Path) -> Tensors:
    """Reads the weights of a network that ONNX Runtime quantised dynamically, back in floating point.

    A linear layer is a MatMulInteger node there, named after the module (``/visual_projection/MatMul_quant``). Its
    weight (in, out) is int8 with a zero point and a scale for each output; it returns here as the module's own
    ``<module>.weight`` (out, in). All other initialisers keep their names and values.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    tensors = {name: torch.tensor(array) for name, array in arrays.items() if not name.startswith("onnx::")}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            _, quantized, _, zero_point = node.input
            scale = arrays[quantized.removesuffix("_quantized") + "_scale"]
            weight = (arrays[quantized].astype("float32") - arrays[zero_point].astype("float32")) * scale
            module = node.name.removesuffix("/MatMul_quant").strip("/").replace("/", ".")
            tensors[f"{module}.weight"] = torch.from_numpy(weight.T.copy())
    return tensors


def openai_clip_layout(tensors: Tensors) -> Tensors:
    """Names and shapes a CLIP image tower as OpenAI (and open_clip's VisionTransformer) has it.

    Args:
        tensors: by the names of transformers' ``CLIPVisionModelWithProjection``.

    Raises:
        WeightsUnavailable: a tensor is missing.
    """
    import torch

    def take(name: str) -> Tensor:
        if name not in tensors:
            raise WeightsUnavailable(f"no CLIP image tower: the file has no tensor {name}")
        return tensors[name]

    prefix = "vision_model."
    renamed = {
        "class_embedding": take(f"{prefix}embeddings.class_embedding"),
        "positional_embedding": take(f"{prefix}embeddings.position_embedding.weight"),
        "proj": take("visual_projection.weight").T.contiguous(),  # OpenAI multiplies from the right
        "conv1.weight": take(f"{prefix}embeddings.patch_embedding.weight"),
    }
    for kind in ("weight", "bias"):
        renamed[f"ln_pre.{kind}"] = take(f"{prefix}pre_layrnorm.{kind}")  # transformers' own spelling
        renamed[f"ln_post.{kind}"] = take(f"{prefix}post_layernorm.{kind}")
    layers = {int(found[1]) for name in tensors if (found := re.match(r"vision_model\.encoder\.layers\.(\d+)\.", name))}
    for layer in sorted(layers):
        old, new = f"{prefix}encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            parts = [take(f"{old}.self_attn.{part}_proj.{kind}") for part in "qkv"]
            renamed[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
            for theirs, ours in _LAYER_PARTS.items():
                renamed[f"{new}.{ours}.{kind}"] = take(f"{old}.{theirs}.{kind}")
    return renamed


def _save_clip(tensors: Tensors, installed: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tower = {name: tensor.to(torch.float16) for name, tensor in openai_clip_layout(tensors).items()}
    save_file(tower, installed / "model.safetensors", metadata={"format": "pt"})


def _gguf_text(path: Path, name: str) -> str:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field(name)
    return str(field.contents()) if field else ""
