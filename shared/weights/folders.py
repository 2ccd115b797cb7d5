"""Tensors of published checkpoints, in whichever layout they lie, memory-mapped: what is not used is never read.

    model.safetensors, or its shards and model.safetensors.index.json    Hugging Face
    pytorch_model.bin, or its shards and pytorch_model.bin.index.json    Hugging Face, until 2023
    consolidated.00.pth and params.json                                  Meta
    a file by itself                                                     safetensors, or what torch.save wrote

All are read as data; nothing in a file is ever executed.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import BadInput
from shared.files import read_file

if TYPE_CHECKING:
    from torch import Tensor

Entry = tuple["Tensor", Callable[[], "Tensor"]]  # on the meta device, and what gives it
CONFIG_LIMIT = 1 << 26  # bytes of a JSON file; a tokenizer's is the largest, a few MB
SAFETENSORS = {  # its names of types -> torch's
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
FROM_META = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class TensorFolder(Mapping[str, "Tensor"]):
    """A checkpoint's tensors by Hugging Face's names, on the CPU, mapped from its files.

        tensors = TensorFolder(Path("llama/7B"))
        tensors.specs["lm_head.weight"].shape  # nothing is read yet
        tensors["lm_head.weight"]

    Those that Meta orders otherwise (q_proj and k_proj) are copied when they are asked for. Files stay mapped while
    the object or a tensor of theirs is in use. A file in PyTorch's format of before 1.6 is read whole.

    Args:
        path: a folder, or a file by itself.

    Attributes:
        files: that hold the tensors.
        specs: all tensors on the meta device: names, shapes and types without values.

    Raises:
        BadInput: there is no checkpoint, a part of it is missing, or it is damaged or holds anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _find(path)
        self.specs: dict[str, Tensor] = {}
        self._read: dict[str, Callable[[], Tensor]] = {}
        meta = path.is_dir() and self.files[0].name.startswith("consolidated.")
        for file in self.files:
            for name, (spec, read) in (_open_safetensors if file.suffix == ".safetensors" else _open_pickle)(file):
                name = from_meta(name) if meta else name
                self.specs[name], self._read[name] = spec, read
        self._head = self.config["head_dim"] if meta else 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._read[name]()
        return _pairs_to_halves(tensor, self._head) if self._head and name.endswith(ROTATED) else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, without that beginning."""
        return {name.removeprefix(prefix): self[name] for name in self if name.startswith(prefix)}

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says; of Meta's layout, params.json and the tensors' shapes in config.json's words.

        Raises:
            BadInput: there is no such file, or it makes no sense.
        """
        params = self.path / "params.json"
        if not params.is_file():
            return read_json(self.path / "config.json")
        given = read_json(params)
        try:
            width, heads, layers = (int(given[name]) for name in ("dim", "n_heads", "n_layers"))
            if min(width, heads, layers) < 1 or width % (2 * heads):
                raise ValueError(f"dim {width}, n_heads {heads}, n_layers {layers}")
            return {
                "model_type": "llama",
                "hidden_size": width,
                "head_dim": width // heads,
                "num_attention_heads": heads,
                "num_key_value_heads": int(given.get("n_kv_heads") or heads),
                "num_hidden_layers": layers,
                "rms_norm_eps": float(given["norm_eps"]),
                "vocab_size": len(self.specs["model.embed_tokens.weight"]),
                "intermediate_size": len(self.specs["model.layers.0.mlp.gate_proj.weight"]),
                "max_position_embeddings": 2048,  # it is not told; LLaMA has so many and LLaMA 2 twice as many
                "rope_parameters": {"rope_type": "default", "rope_theta": float(given.get("rope_theta") or 10000)},
            }
        except (KeyError, TypeError, ValueError) as problem:
            raise BadInput(f"{params} describes no LLaMA: {problem!r}") from problem

    def language_config(self, prefix: str = "") -> dict[str, Any]:
        """The language model's part of ``config``, where its tensors have that prefix.

        Raises:
            BadInput: as ``config``, or it has no such part.
        """
        config = self.config
        if not prefix:
            return config
        if not isinstance(config.get("text_config"), dict):
            raise BadInput(f"{self.path / 'config.json'} has no text_config, which describes its language model")
        return dict(config["text_config"])


def from_meta(name: str) -> str:
    """Meta's name of a LLaMA's tensor as Hugging Face has it; what LLaMA has not keeps its name."""
    parts = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name)
    if not parts or parts[2] not in FROM_META:
        return name
    return f"{'model.' if parts[1] else ''}{parts[1] or ''}{FROM_META[parts[2]]}.weight"


def _pairs_to_halves(weight: Tensor, head: int) -> Tensor:
    """Meta rotates rows 2i and 2i + 1 of a head together, Hugging Face rows i and i + head / 2: (heads head, D)."""
    return weight.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).reshape(weight.shape)


def load_pickle(path: Path) -> Any:
    """What torch.save wrote, mapped where the format allows it; nothing in it is ever executed.

    Raises:
        BadInput: it cannot be read as tensors and plain values.
    """
    import torch

    if not path.is_file():
        raise BadInput(f"{path} is no file: give the checkpoint as it was downloaded")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as problem:  # its text advises to read the file as code
        if found := re.search(r"GLOBAL ([\w.]+)", str(problem)):
            reason = f"is refused: to read it would run {found[1]}, and a checkpoint is read as data only"
        else:
            reason = "cannot be read as a checkpoint of PyTorch: it is another kind of file, or damaged"
        raise BadInput(f"{path.name} {reason}") from problem
    except Exception as problem:  # whatever damage makes a reader of archives and pickles stumble over
        if isinstance(problem, OSError) and problem.filename:
            raise BadInput(f"{path} cannot be read: {problem.strerror}") from problem
        raise BadInput(
            f"{path.name} cannot be read as a checkpoint of PyTorch ({type(problem).__name__}): it is another kind of "
            "file, or damaged; download it again"
        ) from problem


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file with an object in it.

    Raises:
        BadInput: no such file, or something else in it.
    """
    try:
        content = json.loads(read_file(path, CONFIG_LIMIT, "a JSON file", "it is no file of a checkpoint"))
    except (ValueError, RecursionError) as problem:
        raise BadInput(f"{path} is no JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds a {type(content).__name__} instead of an object")
    return content


def differences(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with tensors that should have these names and shapes, a phrase each."""
    wrong = [f"{name} is missing" for name in expected if name not in given]
    wrong += [f"{name} is not known" for name in given if name not in expected]
    wrong += [
        f"{name} is {tuple(given[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != tuple(shape)
    ]
    return sorted(wrong)


def listed(phrases: list[str], most: int = 20) -> str:
    """Phrases as one line, which says how many it leaves out."""
    rest = len(phrases) - most
    return "; ".join([*phrases[:most], f"and {rest} more"] if rest > 0 else phrases)


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"{path} does not exist: give the folder of the checkpoint as it was downloaded")
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{name}.index.json"
        if (path / name).is_file():
            return [path / name]
        if index.is_file():
            return _shards(index)
    parts = sorted(path.glob("consolidated.*.pth"))
    if len(parts) > 1:
        raise BadInput(f"{path} has {len(parts)} consolidated files, each a part of every tensor; only one can be read")
    if not parts:
        raise BadInput(f"{path} holds no checkpoint: no model.safetensors, pytorch_model.bin or consolidated.00.pth")
    return parts


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise BadInput(f"{index} does not tell where the tensors lie")
    files = [index.with_name(Path(name).name) for name in sorted({*places.values()})]
    if missing := [file.name for file in files if not file.is_file()]:
        raise BadInput(f"{index.parent} is incomplete: it has no {listed(missing)}, which {index.name} names")
    return files


def _open_safetensors(path: Path) -> Iterator[tuple[str, Entry]]:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            part = file.get_slice(name)
            spec = torch.empty(part.get_shape(), dtype=getattr(torch, SAFETENSORS[part.get_dtype()]), device="meta")
            yield name, (spec, partial(file.get_tensor, name))
    except (OSError, SafetensorError, KeyError) as problem:
        raise BadInput(f"{path} cannot be read as safetensors, download it again: {problem!r}") from problem


def _open_pickle(path: Path) -> Iterator[tuple[str, Entry]]:
    import torch

    content = load_pickle(path)
    if not isinstance(content, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise BadInput(f"{path.name} is no dictionary of tensors")
    size = path.stat().st_size
    for name, tensor in content.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise BadInput(f"{path.name}: {name} is no dense tensor")
        if tensor.numel() * tensor.element_size() > size:
            raise BadInput(f"{path.name} is damaged: {name} claims more than its {size:,} bytes")
        yield str(name), (tensor.to("meta"), tensor.detach)
