"""TIC's network, on small sizes with random weights."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from shared.codecs.interface import Pass
from shared.codecs.tic import SwinGroup, Tic, TicConfig, WindowAttention, build, from_published
from shared.errors import BadInput

TINY = TicConfig(N=8, M=16, depths=(2, 2, 2, 2, 2, 2), heads=(2, 2, 2, 4, 4, 4))


@pytest.fixture(scope="module")
def tic() -> Tic:
    torch.manual_seed(0)
    return Tic(TINY).eval()


@torch.inference_mode()
def test_a_rectangular_picture_keeps_its_shape_on_the_way_there_and_back(tic: Tic) -> None:
    y = tic.g_a(torch.rand(2, 3, 256, 512))
    assert y.shape == (2, 16, 16, 32)
    z = tic.h_a(y)
    assert z.shape == (2, 8, 4, 8)
    mean, scale = tic.h_s(z)
    assert mean.shape == scale.shape == y.shape
    assert tic.g_s(y).shape == (2, 3, 256, 512)


@torch.inference_mode()
def test_y_is_coded_in_one_pass_under_the_means_and_scales_of_h_s(tic: Tic) -> None:
    z_hat = torch.randn(1, 8, 4, 8)
    passes: list[Pass] = []

    def code(step: Pass) -> Tensor:
        passes.append(step)
        return step.mean + 1

    y_hat = tic.walk(z_hat, code)
    mean, scale = tic.h_s(z_hat)
    (only,) = passes
    assert only.channels == slice(0, 16)
    assert only.mask.shape == (16, 32)
    assert only.mask.all()
    torch.testing.assert_close(only.mean, mean)
    torch.testing.assert_close(only.scale, scale)
    torch.testing.assert_close(y_hat, mean + 1)


@pytest.mark.parametrize("size", [(8, 12), (4, 8), (4, 4)])
@pytest.mark.parametrize("shift", [0, 2])
@torch.inference_mode()
def test_window_attention_is_what_its_definition_says(size: tuple[int, int], shift: int) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(width=6, heads=2, window=4, shift=shift)
    attention.relative_position_bias_table.normal_()
    x = torch.randn(2, *size, 6)
    torch.testing.assert_close(attention(x), attention_by_position(attention, x), atol=1e-5, rtol=1e-5)


def attention_by_position(attention: WindowAttention, x: Tensor) -> Tensor:
    """The same without rolling: windows of a grid that is moved down and right by ``shift`` and cut at the edges."""
    window, shift, heads = attention.window, attention.shift, attention.heads
    size = x.shape[-1] // heads
    places = [(row, column) for row in range(x.shape[1]) for column in range(x.shape[2])]
    out = torch.zeros_like(x)
    for batch in range(len(x)):
        query, key, value = attention.qkv(x[batch]).unflatten(-1, (3, heads, size)).unbind(2)
        for row, column in places:
            home = (row - shift) // window, (column - shift) // window
            near = [(r, c) for r, c in places if ((r - shift) // window, (c - shift) // window) == home]
            for head in range(heads):
                logits = torch.stack(
                    [
                        query[row, column, head] @ key[r, c, head] / size**0.5
                        + attention.relative_position_bias_table[
                            (row - r + window - 1) * (2 * window - 1) + column - c + window - 1, head
                        ]
                        for r, c in near
                    ]
                )
                values = torch.stack([value[r, c, head] for r, c in near])
                out[batch, row, column, head * size : (head + 1) * size] = logits.softmax(0) @ values
    return attention.proj(out)


def test_every_second_block_of_a_group_is_shifted_unless_the_group_is_not() -> None:
    for shifted, shifts in ((True, [0, 4, 0, 4]), (False, [0, 0, 0, 0])):
        group = SwinGroup(width=8, depth=4, heads=2, window=8, shifted=shifted, mlp_ratio=2)
        assert [block.attn.shift for block in group.blocks] == shifts


def test_the_windows_of_the_last_hyper_group_are_never_shifted(tic: Tic) -> None:
    for group in (tic.h_a[3], tic.h_s[0]):
        assert [block.attn.shift for block in group.blocks] == [0, 0]
    assert [block.attn.shift for block in tic.h_a[1].blocks] == [0, 2]


@pytest.mark.parametrize("size", [(128, 128), (256, 384), (200, 256), (256, 255), (0, 256)])
def test_a_picture_that_does_not_fit_the_windows_is_refused(tic: Tic, size: tuple[int, int]) -> None:
    with pytest.raises(BadInput, match=f"multiples of 256 pixels, not {size[1]}x{size[0]}"):
        tic.g_a(torch.rand(1, 3, *size))


def test_latents_that_do_not_fit_the_windows_are_refused(tic: Tic) -> None:
    with pytest.raises(BadInput, match=r"2x2 latents .* windows of 4x4.* multiples of 256 pixels"):
        tic.h_a(torch.rand(1, 16, 8, 8))
    with pytest.raises(BadInput, match=r"4x2 latents .* windows of 4x4"):
        tic.h_s(torch.rand(1, 8, 2, 4))
    with pytest.raises(BadInput, match=r"16x12 latents .* windows of 8x8"):
        tic.g_s(torch.rand(1, 16, 12, 16))


def test_every_parameter_learns_even_after_inference() -> None:
    tic = Tic(TINY)
    pixels = torch.rand(1, 3, 256, 256)
    with torch.inference_mode():
        tic.g_a(pixels)
    y = tic.g_a(pixels)
    mean, scale = tic.h_s(tic.h_a(y))
    (tic.g_s(y).square().sum() + mean.square().sum() + scale.square().sum()).backward()
    for name, parameter in tic.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_codec_is_rebuilt_from_its_description(tic: Tic) -> None:
    again = build(json.loads(json.dumps(tic.describe())))
    assert again.config == TINY
    again.load_state_dict(tic.state_dict())


def test_published_tensors_get_our_names_and_buffers_are_left_out() -> None:
    names = {
        "g_a0.weight": "g_a.0.weight",
        "g_s6.residual_group.blocks.1.attn.qkv.bias": "g_s.6.blocks.1.attn.qkv.bias",
        "h_a3.residual_group.blocks.0.mlp.fc1.weight": "h_a.3.blocks.0.mlp.fc1.weight",
        "entropy_bottleneck._matrix0": "bottleneck.matrices.0",
        "entropy_bottleneck._bias4": "bottleneck.biases.4",
        "entropy_bottleneck._factor3": "bottleneck.factors.3",
        "entropy_bottleneck.quantiles": "bottleneck.quantiles",
    }
    buffers = (
        "g_a1.residual_group.blocks.1.attn_mask",
        "g_a1.residual_group.blocks.1.attn.relative_position_index",
        "entropy_bottleneck._quantized_cdf",
        "entropy_bottleneck.likelihood_lower_bound.bound",
        "gaussian_conditional.scale_table",
    )
    state = {name: torch.tensor(i) for i, name in enumerate((*names, *buffers))}
    assert from_published(state) == {ours: state[theirs] for theirs, ours in names.items()}
