"""Tensors in files: how we store the weights that we train, and the digest that names them.

A file is safetensors, readable by anyone, with one convention on top. A tensor may be stored as int8, row by row:

    <name>         int8     (R, ...)    round(w / scale), from -127 to 127
    <name>.scale   float32  (R,)        max |w| of the row / 127, 1 for a row of zeros

and means ``<name> * <name>.scale``, row r by scale r. An int8 tensor without a scale beside it is just that. Everything
else is stored as it is or in float16. Metadata is safetensors' own map of strings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from shared.errors import BadInput, WeightsUnavailable

if TYPE_CHECKING:
    from torch import Tensor

Storage = Literal["float16", "int8", "float32"]

MIN_INT8_ELEMENTS = 4096  # a tensor of no more than these stays in float16: there is nothing to save


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a safetensors file on the CPU; those stored as int8 return in float32.

    Raises:
        WeightsUnavailable: no such file, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise WeightsUnavailable(f"{path} cannot be read as safetensors: {problem}") from problem
    scales = {name: f"{name}.scale" for name in stored if _is_int8(name, stored)}
    tensors = {name: tensor for name, tensor in stored.items() if name not in scales.values()}
    for name, scale in scales.items():
        tensors[name] = stored[name].float() * _by_row(stored[scale], stored[name])
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The map of strings that was stored with the tensors.

    Raises:
        WeightsUnavailable: no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as problem:
        raise WeightsUnavailable(f"{path} cannot be read as safetensors: {problem}") from problem


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], storage: Storage = "float16", metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to a safetensors file.

    Args:
        storage: of tensors with a floating-point type. ``int8`` is for those with two or more dimensions and more than
            MIN_INT8_ELEMENTS elements; the others are then stored in float16. Integers are stored as they are.

    Raises:
        BadInput: values that ``storage`` cannot hold, or a name that the int8 storage needs for itself.
    """
    import torch
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        if not value.is_floating_point():
            stored[name] = value.clone().contiguous()
            continue
        if storage == "int8" and value.ndim >= 2 and value.numel() > MIN_INT8_ELEMENTS:
            if f"{name}.scale" in tensors:
                raise BadInput(f"{name}.scale is the name of the scales of {name} in int8: rename that tensor")
            stored[name], stored[f"{name}.scale"] = _to_int8(value)
        else:
            stored[name] = value.to(torch.float32 if storage == "float32" else torch.float16, copy=True).contiguous()
        if not (value.isfinite().all() and stored[name].isfinite().all()):
            raise BadInput(f"{name} has values that are not finite in {storage}, the largest is {value.abs().max():g}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and _is_int8(name, stored):
            raise BadInput(f"{name}.scale would be read as the scales of the int8 tensor {name}: rename one of them")
    save_file(stored, path, metadata=dict(metadata or {}))


def tensors_digest(tensors: Path | Mapping[str, Tensor]) -> str:
    """Names weights: SHA-256, in hex, over name, type, shape and bytes (little-endian) of the tensors, by sorted name.

    It depends on what the tensors are, not on how a file lays them out: the digest of a file is that of what
    ``load_tensors`` reads from it. Metadata has no part in it.

    Raises:
        WeightsUnavailable: no such file, or a damaged one.
    """
    import torch

    tensors = load_tensors(tensors) if isinstance(tensors, Path) else tensors
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{kind}\0{','.join(map(str, tensor.shape))}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(R, ...) -> int8 (R, ...) and scales (R,)."""
    import torch

    weight = weight.float()
    scale = weight.abs().flatten(1).amax(dim=1) / 127  # (R,)
    scale[scale == 0] = 1
    return (weight / _by_row(scale, weight)).round().to(torch.int8), scale


def _by_row(scale: Tensor, weight: Tensor) -> Tensor:
    """(R,) -> (R, 1, ...), as many dimensions as the weight has."""
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def _is_int8(name: str, stored: Mapping[str, Tensor]) -> bool:
    """Whether ``name`` is stored as int8 by the convention above."""
    import torch

    tensor, scale = stored[name], stored.get(f"{name}.scale")
    return (
        tensor.dtype == torch.int8
        and tensor.ndim >= 1
        and scale is not None
        and scale.dtype == torch.float32
        and scale.shape == tensor.shape[:1]
    )
