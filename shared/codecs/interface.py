"""What a codec is made of: the classes that every family of codecs derives from.

A family is a network in floating point, which training optimises and whose g_a, h_a and g_s run as they are, and its
entropy path in integers, which both sides of a bitstream compute alike. Both walk y the same way: pass by pass, each
giving the mean and scale that the next symbols are coded under, and taking what came of them.

A family is registered under a name in ``shared.codecs`` as a function from an artefact's configuration to a Network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

SCALE_UNIT = 2**-10  # of integer scales


@dataclass(frozen=True)
class Pass:
    """Symbols of y that are coded at once, in floating point.

    Attributes:
        channels: which of y's.
        mask: (h, w), true where this pass codes.
        mean, scale: (B, G, h, w), the Gaussian that each symbol is coded under.
    """

    channels: slice
    mask: Tensor
    mean: Tensor
    scale: Tensor


@dataclass(frozen=True)
class ExactPass:
    """Symbols of y that are coded at once, in integers.

    Attributes:
        channels: which of y's.
        at: (n,) flat positions that this pass codes, in raster order.
        mean: (B, n, G) int32 in units of 1 / exact.ONE.
        scale: (B, n, G) int32 in units of SCALE_UNIT.
    """

    channels: slice
    at: Tensor
    mean: Tensor
    scale: Tensor


Code = Callable[[Pass], Tensor]
"""Asked at each pass for the values (B, G, h, w) that y_hat takes there; those outside the mask do not matter."""

ExactCode = Callable[[ExactPass], Tensor]
"""Asked at each pass for its symbols, (B, n, G) int32."""

Ranges = Callable[[nn.Module], tuple[Tensor, Tensor]]
"""The least and the largest output of a module of the network to be expected, (C,) each."""


class EntropyPath(nn.Module, ABC):
    """From z's symbols to y's tables and means, in integers. Buffers are all its state.

    Attributes:
        medians: (N,) int32 in units of 1 / exact.ONE: what was subtracted from z before rounding.
    """

    medians: Tensor

    @abstractmethod
    def derive(self, network: Any, medians: Tensor, ranges: Ranges) -> None:
        """Sets the integers from a trained network.

        Args:
            medians: (N,) as trained.

        Raises:
            BadInput: weights that 8 and 32 bits cannot hold.
        """

    @abstractmethod
    def walk(self, z: Tensor, code: ExactCode) -> Tensor:
        """z's symbols (B, h/4, w/4, N) int32 -> y_hat (B, h w, M) int32 in units of 1 / exact.ONE."""


class Network(nn.Module, ABC):
    """A codec in floating point, without its probability model of z.

    pixels (B, 3, H, W) in 0..1 -> g_a -> y (B, M, H/16, W/16) -> h_a -> z (B, N, H/64, W/64);  H, W multiples of stride

    Attributes:
        family: the name it is registered under.
        stride: what a picture's sides must be multiples of.
        N, M: channels of z, of y.
        g_a, h_a, g_s: analysis, hyper-analysis and synthesis transform (y_hat -> pixels, about 0..1).
    """

    family: str
    stride: int
    N: int
    M: int
    g_a: nn.Module
    h_a: nn.Module
    g_s: nn.Module

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Its sizes, as JSON holds them: what the family's function is called with."""

    @abstractmethod
    def walk(self, z_hat: Tensor, code: Code) -> Tensor:
        """Codes y pass by pass: z_hat (B, N, h/4, w/4) -> y_hat (B, M, h, w)."""

    @abstractmethod
    def entropy_path(self) -> EntropyPath:
        """Its integer form, of these sizes and still empty."""
