"""How large each value of an entropy path gets, measured without a photo: on drawn pictures.

Dead leaves, discs of every size that hide one another, have the statistics of photographs (Lee, Mumford & Huang, IJCV
2001): on the shipped codec their largest activations are within a tenth of those of photos, channel by channel in the
median. A range that turns out too small costs bits where it is exceeded, and nothing else: both sides cut off alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from shared.codecs.interface import Pass, Ranges

PICTURES = 4
SIDE = 256
LEAVES = 1000
SMALLEST, LARGEST = 3, 110  # radii in pixels; the number of leaves falls with the cube of the radius
ROUGHNESS = (0, 0, 5, 15, 40)  # standard deviation of a leaf's noise


@torch.no_grad()
def measured_ranges(network: Any, medians: Tensor, gains: Iterable[Tensor]) -> Ranges:
    """The least and largest output of every layer of ``network``'s entropy path on drawn pictures.

    Args:
        network: an interface.Network in double precision: machines differ in the last bits of what they compute, and
            those must not decide anything.
        medians: (N,) of z.
        gains: (M,) of y, one for each quality.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(module: nn.Module, _: Any, out: Any) -> None:
        if not isinstance(out, Tensor):
            return
        # Pictures have their channels second; a linear layer has them last, whatever else there is.
        channels = -1 if isinstance(module, nn.Linear) or out.ndim != 4 else 1
        rows = out.movedim(channels, -1).flatten(0, -2)
        least, most = rows.amin(0), rows.amax(0)
        if module in seen:
            least, most = torch.minimum(least, seen[module][0]), torch.maximum(most, seen[module][1])
        seen[module] = least, most

    pixels = np.stack([dead_leaves(seed) for seed in range(PICTURES)])
    y = network.g_a(torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255)
    hooks = [module.register_forward_hook(watch) for module in network.modules()]
    for gain in gains:
        scaled = y * gain.double()[:, None, None]

        def quantise(step: Pass, scaled: Tensor = scaled) -> Tensor:
            return (scaled[:, step.channels] - step.mean).round() + step.mean

        offset = medians[:, None, None]
        network.walk((network.h_a(scaled) - offset).round() + offset, quantise)
    for hook in hooks:
        hook.remove()
    return seen.__getitem__


@cache
def dead_leaves(seed: int) -> npt.NDArray[np.uint8]:
    """A picture of shaded, rough discs that hide one another, (SIDE, SIDE, 3)."""
    random = np.random.default_rng(seed)
    picture = np.full((SIDE, SIDE, 3), 128.0)
    for _ in range(LEAVES):
        radius = SMALLEST / np.sqrt(random.uniform((SMALLEST / LARGEST) ** 2, 1))
        row, column = random.uniform(-20, SIDE + 20, 2)
        colour, slope, rough = random.uniform(0, 255, 3), random.normal(0, 0.5, 2), random.choice(ROUGHNESS)
        span = [np.arange(max(0, int(c - radius)), min(SIDE, int(c + radius) + 1)) for c in (row, column)]
        down, right = np.meshgrid(*span, indexing="ij")
        inside = (down - row) ** 2 + (right - column) ** 2 < radius**2
        down, right = down[inside], right[inside]
        shade = slope[0] * (down - row) + slope[1] * (right - column)
        picture[down, right] = colour + shade[:, None] + rough * random.normal(size=(len(shade), 1))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
