"""How we store tensors, and the digest that names them."""

import hashlib
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import BadInput, WeightsUnavailable
from shared.weights.digest import load_tensors, read_metadata, save_tensors, tensors_digest


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "conv.weight": torch.randn(32, 16, 3, 3, generator=generator) * torch.logspace(-3, 3, 32)[:, None, None, None],
        "conv.bias": torch.randn(32, generator=generator),
        "small.weight": torch.randn(8, 8, generator=generator),
        "table": torch.arange(10_000, dtype=torch.int32).reshape(100, 100),
        "scalar": torch.tensor(3.5),
        "zeros": torch.zeros(100, 100),
    }


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_tensors_come_back_in_the_type_they_are_stored_in(tmp_path: Path, tensors, storage):
    save_tensors(tmp_path / "file", tensors, storage)
    loaded = load_tensors(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        dtype = getattr(torch, storage) if tensor.is_floating_point() else tensor.dtype
        assert torch.equal(loaded[name], tensor.to(dtype))


def test_int8_keeps_each_weight_within_half_a_step_of_its_row(tmp_path: Path, tensors):
    save_tensors(tmp_path / "file", tensors, "int8")
    loaded = load_tensors(tmp_path / "file")
    weight = tensors["conv.weight"]
    step = weight.abs().flatten(1).amax(1)[:, None, None, None] / 127
    assert ((loaded["conv.weight"] - weight).abs() <= step * 0.5001).all()
    assert torch.equal(loaded["zeros"], tensors["zeros"])
    assert torch.equal(loaded["table"], tensors["table"])


def test_int8_is_for_large_matrices_only(tmp_path: Path, tensors):
    save_tensors(tmp_path / "file", tensors, "int8")
    stored = load_file(tmp_path / "file")
    assert stored["conv.weight"].dtype == torch.int8
    assert stored["conv.weight.scale"].shape == (32,)
    assert stored["small.weight"].dtype == stored["conv.bias"].dtype == torch.float16
    assert load_tensors(tmp_path / "file").keys() == tensors.keys()


def test_an_int8_tensor_without_scales_is_left_alone(tmp_path: Path):
    save_file({"w": torch.ones(2, 2, dtype=torch.int8), "w.scale": torch.ones(3)}, tmp_path / "file")
    loaded = load_tensors(tmp_path / "file")
    assert loaded["w"].dtype == torch.int8
    assert "w.scale" in loaded


def test_tensors_that_share_memory_or_are_views_can_be_stored(tmp_path: Path):
    weight = torch.randn(4, 6)
    save_tensors(tmp_path / "file", {"a": weight, "b": weight.T, "c": weight[1:]}, "float32")
    assert torch.equal(load_tensors(tmp_path / "file")["b"], weight.T)


def test_metadata_comes_back(tmp_path: Path, tensors):
    metadata = {"codec": "elic", "note": "Größe 16 px"}
    save_tensors(tmp_path / "file", tensors, metadata=metadata)
    assert read_metadata(tmp_path / "file") == metadata
    save_tensors(tmp_path / "file", tensors)
    assert read_metadata(tmp_path / "file") == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_that_the_storage_cannot_hold_are_refused(tmp_path: Path, value: float):
    with pytest.raises(BadInput, match="layer has values that are not finite in float16"):
        save_tensors(tmp_path / "file", {"layer": torch.tensor([1.0, value])}, "float16")


def test_a_name_that_would_be_read_as_scales_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match=r"w\.scale"):
        save_tensors(tmp_path / "file", {"w": torch.randn(100, 100), "w.scale": torch.ones(100)}, "int8")
    whole = {"w": torch.ones(2, 2, dtype=torch.int8), "w.scale": torch.ones(2)}
    with pytest.raises(BadInput, match=r"w\.scale"):
        save_tensors(tmp_path / "file", whole, "float32")


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_the_digest_of_a_file_is_that_of_its_tensors_in_any_order_and_layout(tmp_path: Path, tensors, storage):
    save_tensors(tmp_path / "one", tensors, storage, {"made": "today"})
    save_tensors(tmp_path / "two", dict(reversed(tensors.items())), storage, {"made": "tomorrow"})
    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()
    loaded = load_tensors(tmp_path / "one")
    strided = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in loaded.items()}
    digests = map(tensors_digest, (tmp_path / "one", tmp_path / "two", loaded, strided))
    assert len(set(digests)) == 1


def test_the_digest_changes_with_value_name_type_and_shape():
    base = torch.arange(6, dtype=torch.float32)
    changed = base.clone()
    changed.view(torch.int32)[3] ^= 1
    variants = [
        {"a": base},
        {"a": changed},
        {"b": base},
        {"a": base.view(torch.int32)},
        {"a": base.view(2, 3)},
        {"a": base.view(3, 2)},
        {"a": base[:3], "b": base[3:]},
        {},
    ]
    assert len({tensors_digest(variant) for variant in variants}) == len(variants)


def test_the_digest_never_changes_between_releases():
    # a bitstream names its codec by it: a change here makes all that were ever written unreadable
    tensors = {"b": torch.tensor([[1, -2]], dtype=torch.int16), "a": torch.tensor(0.5), "c": torch.empty(0, 3)}
    spelled_out = (
        b"a\0float32\0\0" + struct.pack("<f", 0.5),
        b"b\0int16\x001,2\0" + struct.pack("<hh", 1, -2),
        b"c\0float32\x000,3\0",
    )
    assert tensors_digest(tensors) == hashlib.sha256(b"".join(spelled_out)).hexdigest()


@pytest.mark.parametrize("content", [None, b"", b"\x08\0\0\0\0\0\0\0notjson!", b"{}"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: bytes | None):
    path = tmp_path / "file.safetensors"
    if content is not None:
        path.write_bytes(content)
    for read in (load_tensors, read_metadata, tensors_digest):
        with pytest.raises(WeightsUnavailable, match=r"file\.safetensors cannot be read") as caught:
            read(path)
        assert "\n" not in str(caught.value)
