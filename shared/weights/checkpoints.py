"""Published checkpoints, read as data: which codec is in one, of which sizes, and whether all of it is there.

    d1_2.pth.tar -> read_checkpoint -> Checkpoint: a codec and, where there is one, the neck that was trained for it

Known are the releases of ComNeck (ELIC and a neck), and bare codecs: ELIC as VincentChandelier's code or CompressAI's
writes it, TIC as TransTIC's. Sizes are told by the tensors; what a file calls itself counts for nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

from shared.errors import BadInput
from shared.weights.folders import load_pickle

if TYPE_CHECKING:
    from torch import Tensor

    from shared.codecs.interface import Network

Tensors = dict[str, "Tensor"]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Checkpoint:
    """What ``read_checkpoint`` gives, all of it in float32.

    Attributes:
        network: the codec.
        bottleneck: state of CompressAI's EntropyBottleneck for z.
        neck: by the names of cloud_server.vision.neck.TransformNeck; empty where the file has none.
    """

    network: Network
    bottleneck: Tensors
    neck: Tensors


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint that torch.save wrote; nothing in it is ever executed.

    Raises:
        BadInput: it cannot be read as tensors and plain values, holds no codec that we know, or its tensors are not
            exactly those of one: the message lists every tensor, by our name, that is missing, too many or misshapen,
            or that has a value which is not finite.
    """
    from shared.codecs.artefact import check_tensors

    content = load_pickle(path)
    if not isinstance(content, Mapping):
        raise BadInput(f"{path.name} is no checkpoint: it holds a {type(content).__name__} instead of a dictionary")
    bare = "state_dict" not in content
    codec = _state_dict(path, "it" if bare else "its state_dict", content if bare else content["state_dict"])
    neck = {} if bare else _state_dict(path, "its adapter", content.get("adapter") or {})
    # A tensor may claim any shape over a few bytes; networks are built of these shapes.
    size = sum(tensor.numel() * tensor.element_size() for tensor in [*codec.values(), *neck.values()])
    if size > path.stat().st_size:
        raise BadInput(f"{path.name} is damaged: its tensors claim {size:,} bytes, it has {path.stat().st_size:,}")

    family, config, tensors, expected = _recognise(path, codec)
    if neck:
        tensors |= {f"adapter.{name}": tensor for name, tensor in neck.items()}
        expected |= {f"adapter.{name}": shape for name, shape in _neck_shapes(neck, config["M"]).items()}
    check_tensors(f"{path.name}, read as {family} N={config['N']} M={config['M']},", expected, tensors)
    tensors = _finite(path, tensors)
    bottleneck, neck = _take(tensors, "bottleneck."), _take(tensors, "adapter.")
    network = _network(family, config)
    network.load_state_dict(tensors)
    return Checkpoint(network.eval().requires_grad_(False), bottleneck, neck)


def _state_dict(path: Path, part: str, content: Any) -> Tensors:
    """The tensors of a checkpoint's part, without the prefixes of those who wrapped the network to train it."""
    import torch

    if not isinstance(content, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise BadInput(f"{path.name} is no checkpoint of a codec: {part} is no dictionary of tensors")
    tensors = {re.sub(r"^(module\.|base_coder\.)+", "", str(name)): tensor for name, tensor in content.items()}
    if len(tensors) < len(content):
        twice = len(content) - len(tensors)
        raise BadInput(f"{path.name}: {part} has {twice} tensors twice, with a prefix and without")
    return tensors


def _recognise(path: Path, state: Tensors) -> tuple[str, dict[str, Any], Tensors, Shapes]:
    """The family and sizes that most tensors agree with, the tensors by our names, and the shapes they should have."""
    from compressai.entropy_models import EntropyBottleneck

    best: tuple[int, tuple[str, dict[str, Any], Tensors, Shapes]] | None = None
    for family, config, tensors in _readings(state):
        bottleneck = EntropyBottleneck(config["N"], filters=(3, 3, 3, 3))
        expected = {name: tuple(value.shape) for name, value in _network(family, config, "meta").state_dict().items()}
        expected |= {f"bottleneck.{name}": tuple(value.shape) for name, value in bottleneck.named_parameters()}
        wrong = len(expected.items() ^ {name: tuple(value.shape) for name, value in tensors.items()}.items())
        if best is None or wrong < best[0]:
            best = wrong, (family, config, tensors, expected)
        if not wrong:
            break
    if best is None:
        some = ", ".join([*state][:3]) or "none"
        raise BadInput(
            f"{path.name} holds no ELIC and no TIC codec, and only these are known; its tensors are {some} ..."
        )
    return best[1]


def _readings(state: Tensors) -> Iterator[tuple[str, dict[str, Any], Tensors]]:
    """What a state_dict may be: a family, its sizes, and the tensors by our names."""
    from shared.codecs import elic, tic

    tensors = elic.from_published(state)
    if config := _elic_sizes(tensors):
        yield "elic-chandelier", config, tensors
        yield "elic-official", config, tensors
    tensors = tic.from_published(state)
    if config := _tic_sizes(tensors):
        yield "tic", config, tensors


def _elic_sizes(tensors: Tensors) -> dict[str, Any] | None:
    N = _agreed(tensors, *((f"{name}.bias", 0) for name in ("g_a.0", "g_a.4", "g_a.9", "h_a.2", "h_a.4", "h_s.0")))
    M = _agreed(tensors, ("g_a.13.bias", 0), ("h_a.0.weight", 1), ("g_s.1.weight", 0))
    sizes = (_agreed(tensors, (f"spatial_context.{k}.weight", 1), (f"aggregation.{k}.4.bias", 0, 2)) for k in count())
    groups = list(takewhile(bool, sizes))
    if min(N, M) < 2 or not groups:
        return None
    groups[-1] = M - sum(groups[:-1])
    return {"N": N, "M": M, "groups": groups} if groups[-1] > 0 else None


def _tic_sizes(tensors: Tensors) -> dict[str, Any] | None:
    N = _agreed(tensors, *((f"{name}.bias", 0) for name in ("g_a.0", "g_a.2", "g_a.4", "h_a.0", "h_a.2", "h_s.1")))
    M = _agreed(tensors, ("g_a.6.bias", 0), ("h_a.0.weight", 1), ("g_s.1.weight", 0))
    depths, heads, hidden = [], [], 0
    for group in ("g_a.1", "g_a.3", "g_a.5", "g_a.7", "h_a.1", "h_a.3"):
        names = (f"{group}.blocks.{i}" for i in count())
        blocks = list(takewhile(lambda block: f"{block}.norm1.bias" in tensors, names))
        depths.append(len(blocks))
        heads.append(_agreed(tensors, *((f"{block}.attn.relative_position_bias_table", 1) for block in blocks)))
        hidden = hidden or _agreed(tensors, *((f"{block}.mlp.fc1.bias", 0) for block in blocks))
    widths = (N, N, N, M, N, N)
    if min(N, M, hidden, *heads) < 1 or any(width % each for width, each in zip(widths, heads, strict=True)):
        return None
    return {"N": N, "M": M, "depths": depths, "heads": heads, "mlp_ratio": hidden // N}


def _agreed(tensors: Tensors, *places: tuple[str, int] | tuple[str, int, int]) -> int:
    """The size that most of the places (name, dimension, what to divide by) have; 0 where none is there.

    One missing or misshapen tensor is then found among the others, and does not make all of them wrong.
    """
    sizes = [
        tensors[name].shape[dimension] // (divisor[0] if divisor else 1)
        for name, dimension, *divisor in places
        if name in tensors and tensors[name].ndim > dimension
    ]
    return mode(sizes) if sizes else 0


def _neck_shapes(tensors: Tensors, channels: int) -> Shapes:
    """What a neck from latents of so many channels has, its width and grid as these tensors tell."""
    D = _agreed(tensors, ("class_embedding", 0), ("ln_pre.weight", 0), ("ln_pre.bias", 0), ("trans_latent_dim.bias", 0))
    grid = math.isqrt(max(_agreed(tensors, ("positional_embedding", 0)) - 1, 0))
    block = "transformer.resblocks.0"
    linear = {
        "trans_latent_dim": (D, channels),
        f"{block}.attn.out_proj": (D, D),
        f"{block}.mlp.c_fc": (4 * D, D),
        f"{block}.mlp.c_proj": (D, 4 * D),
    }
    shapes: Shapes = {
        "class_embedding": (D,),
        "positional_embedding": (grid * grid + 1, D),
        f"{block}.attn.in_proj_weight": (3 * D, D),
        f"{block}.attn.in_proj_bias": (3 * D,),
    }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("ln_pre", f"{block}.ln_1", f"{block}.ln_2"):
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    return shapes


def _finite(path: Path, tensors: Tensors) -> Tensors:
    """The tensors in float32."""
    import torch

    wrong = [
        name
        for name, tensor in tensors.items()
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.device.type != "cpu"
    ]
    if wrong:
        raise BadInput(f"{path.name}: {', '.join(wrong)} are not dense tensors of a floating-point type")
    # A copy: what is checked is what is used, whatever becomes of the file that they are mapped from.
    floats = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in tensors.items()}
    if wrong := [name for name, tensor in floats.items() if not tensor.isfinite().all()]:
        raise BadInput(f"{path.name}: {', '.join(wrong)} have values that are not finite: its training has diverged")
    return floats


def _network(family: str, config: dict[str, Any], device: str = "cpu") -> Any:
    import torch

    from shared.codecs import codecs

    with torch.device(device):
        return codecs.get(family)(config)


def _take(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
