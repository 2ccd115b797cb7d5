"""Exact layers: integers that do not depend on how they are computed, and are near what was trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shared.codecs.exact import (
    ANCHOR_TAPS,
    KERNELS,
    LIMIT,
    ExactConv,
    Float32,
    Kernel,
    Range,
    anchor_taps,
    best_kernel,
    conv_taps,
    deconv_phases,
    depth_to_space,
    proves_itself,
    quantise,
    quantise_to,
    square,
)
from shared.errors import BadInput

CPU = torch.device("cpu")


def random_layer(given: Range = "unsigned", range: Range = "signed", taps=None, channels: int = 24) -> ExactConv:
    layer = ExactConv(channels, 16, taps or square(3), given, range)
    source = torch.Generator().manual_seed(3)
    layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape, generator=source))
    layer.bias.copy_(torch.randint(-(2**20), 2**20, (16,), generator=source))
    layer.shift.copy_(torch.randint(6, 14, (16,), generator=source))
    layer.check()
    return layer


def random_input(given: Range, shape: tuple[int, ...], size: int = LIMIT) -> Tensor:
    source = torch.Generator().manual_seed(4)
    low = 0 if given == "unsigned" else -size
    x = torch.randint(low, size + 1, shape, generator=source, dtype=torch.int16)
    return torch.where(torch.rand(shape, generator=source) < 0.9, x.clamp(-100, 200), x)  # few need two digits


def by_definition(layer: ExactConv, x: Tensor) -> np.ndarray:
    """One position and one output at a time, in Python's own integers."""
    height, width, channels = x.shape
    weight = layer.weight.view(len(layer.taps), channels, -1).numpy().astype(object)
    values = x.numpy().astype(object)
    out = np.zeros((height, width, weight.shape[2]), object)
    for row in range(height):
        for column in range(width):
            for tap, (down, right) in enumerate(layer.taps):
                if 0 <= row + down < height and 0 <= column + right < width:
                    out[row, column] += values[row + down, column + right] @ weight[tap]
    shifted = [
        (sums + int(b)) >> int(s) for sums, b, s in zip(np.moveaxis(out, 2, 0), layer.bias, layer.shift, strict=True)
    ]
    low, high = {"unsigned": (0, LIMIT), "signed": (-LIMIT, LIMIT), "full": (-(2**31), 2**31 - 1)}[layer.range]
    return np.clip(np.stack(shifted, 2), low, high).astype(np.int64)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("given", ["unsigned", "signed"])
@pytest.mark.parametrize("range", ["unsigned", "signed", "full"])
def test_every_kernel_computes_the_definition(kernel: Kernel, given: Range, range: Range) -> None:
    layer = random_layer(given, range)
    layer.use(kernel)
    x = random_input(given, (2, 5, 7, 24))
    out = layer(x)
    for photo, wanted in zip(out, x, strict=True):
        np.testing.assert_array_equal(photo.view(5, 7, -1), by_definition(layer, wanted))


def test_the_positions_of_a_pass_get_what_all_positions_get() -> None:
    layer = random_layer("signed", "signed", ANCHOR_TAPS)
    x = random_input("signed", (1, 6, 5, 24))
    everywhere = layer(x)
    anchors = [r * 5 + c for r in range(6) for c in range(5) if (r + c) % 2 == 0]
    rest = [r * 5 + c for r in range(6) for c in range(5) if (r + c) % 2]
    assert torch.equal(layer(x, "anchors"), everywhere[:, anchors])
    assert torch.equal(layer(x, "rest"), everywhere[:, rest])


def test_absent_channels_count_as_zeros() -> None:
    layer = random_layer("signed", "full", ((0, 0),))
    x = random_input("signed", (2, 9, 24))
    x[..., :10] = 0
    assert torch.equal(layer.pointwise(x[..., 10:].contiguous(), absent=10), layer.pointwise(x))


def test_large_pictures_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer()
    x = random_input("unsigned", (2, 6, 6, 24))
    whole = layer(x)
    monkeypatch.setattr("shared.codecs.exact.PATCH_ELEMENTS", 9 * 24 * 5)
    assert torch.equal(layer(x), whole)


def test_float32_splits_sums_that_would_reach_2_to_the_24() -> None:
    weight = torch.full((5600, 2), 127, dtype=torch.int8)
    parts = Float32().prepare(weight)
    assert len(parts) > 1
    assert all(255 * float(part.abs().sum(0).max()) < 2**24 for part in parts)


def test_a_kernel_that_rounds_is_found_out_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsplit:
        name = "float32 without parts"

        def prepare(self, weight: Tensor) -> list[Tensor]:
            return [weight.float()]

        def multiply(self, x: Tensor, prepared: list[Tensor]) -> Tensor:
            return (x.float() @ prepared[0]).int()

    class Saturating(Unsplit):
        """What 8-bit products give where pairs are added in 16 bits, as on a CPU without VNNI."""

        def multiply(self, x: Tensor, prepared: list[Tensor]) -> Tensor:
            products = x.int()[:, :, None] * prepared[0].int()[None]
            padded = torch.nn.functional.pad(products, (0, 0, 0, products.shape[1] % 2))
            return padded.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1).sum(1, dtype=torch.int32)

    assert not proves_itself(Unsplit(), CPU)
    assert not proves_itself(Saturating(), CPU)
    assert all(proves_itself(kernel, CPU) for kernel in KERNELS)
    monkeypatch.setattr("shared.codecs.exact.KERNELS", (Unsplit(), Saturating(), *KERNELS))
    best_kernel.cache_clear()
    try:
        assert best_kernel(CPU) in KERNELS
    finally:
        best_kernel.cache_clear()


def test_a_convolution_is_near_the_one_it_was_made_from() -> None:
    torch.manual_seed(0)
    trained = nn.Conv2d(12, 8, 3, padding=1)
    x = torch.rand(1, 12, 6, 9) * 3
    unit = torch.full((12,), 3 / 255, dtype=torch.float64)
    wanted = trained(x)
    layer = ExactConv(12, 8, square(3), "unsigned", "signed")
    reached = wanted.amin((0, 2, 3)), wanted.amax((0, 2, 3))
    units = quantise(layer, conv_taps(trained.weight), trained.bias, unit, reached)
    integers = (x.permute(0, 2, 3, 1).double() / unit).round().to(torch.int16)
    values = layer(integers).double() * units
    difference = values - wanted.permute(0, 2, 3, 1).flatten(1, 2)
    assert difference.abs().max() < 0.02 * wanted.abs().max()
    full = ExactConv(12, 8, square(3), "unsigned", "full")
    quantise_to(full, conv_taps(trained.weight), trained.bias, unit, torch.full((8,), 2**-10))
    difference = full(integers) * 2**-10 - wanted.permute(0, 2, 3, 1).flatten(1, 2)
    assert difference.abs().max() < 0.02 * wanted.abs().max()


def test_a_deconvolution_is_its_four_phases() -> None:
    torch.manual_seed(0)
    trained = nn.ConvTranspose2d(6, 4, 5, stride=2, padding=2, output_padding=1, bias=False)
    x = torch.randn(2, 6, 3, 5)
    phases = deconv_phases(trained.weight).view(16, 3, 3, 6).permute(0, 3, 1, 2)
    out = torch.nn.functional.conv2d(x, phases, padding=1).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(depth_to_space(out, 3, 5).permute(0, 3, 1, 2), trained(x))


def test_anchor_taps_are_the_weights_at_odd_distance() -> None:
    weight = torch.arange(25.0).view(1, 1, 5, 5)
    assert anchor_taps(weight).flatten().tolist() == [float(i) for i in range(25) if i % 2]
    assert len(ANCHOR_TAPS) == 12


def test_weights_that_could_leave_32_bits_are_refused() -> None:
    layer = ExactConv(8192, 1, square(3), "signed", "full")
    layer.weight.fill_(127)
    with pytest.raises(BadInput, match="32 bits"):
        layer.check()


def test_a_layer_too_large_for_32_bits_gets_coarser_weights_instead() -> None:
    layer = ExactConv(2000, 1, square(3), "signed", "signed")
    weight = torch.ones(1, 9, 2000)
    quantise(layer, weight, torch.zeros(1), torch.full((2000,), 1 / 128), (torch.tensor([-1.0]), torch.tensor([1.0])))
    assert 0 < int(layer.weight.max()) < 127
