"""Converters: what publishers wrote -> what we load."""

import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

from shared.errors import WeightsUnavailable
from shared.weights.convert import clip_from_hub, clip_from_int8_onnx, openai_clip_layout, read_int8_onnx

WIDTH, LAYERS = 8, 2


def hub_clip() -> dict[str, torch.Tensor]:
    """The image tower of a tiny CLIP, by transformers' names."""
    shapes = {
        "vision_model.embeddings.class_embedding": (WIDTH,),
        "vision_model.embeddings.position_embedding.weight": (5, WIDTH),
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, 4, 4),
        "visual_projection.weight": (6, WIDTH),
    }
    linear = {f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for layer in range(LAYERS):
        prefix = f"vision_model.encoder.layers.{layer}"
        norms += [f"{prefix}.layer_norm1", f"{prefix}.layer_norm2"]
        for name, shape in linear.items():
            shapes |= {f"{prefix}.{name}.weight": shape, f"{prefix}.{name}.bias": shape[:1]}
    for norm in norms:
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_every_tensor_of_the_image_tower_gets_openais_name_and_shape():
    theirs = hub_clip()
    ours = openai_clip_layout(theirs)
    assert sum(map(torch.numel, ours.values())) == sum(map(torch.numel, theirs.values()))
    assert ours["proj"].shape == (WIDTH, 6)
    first = "vision_model.encoder.layers.1.self_attn"
    queries, keys, values = ours["transformer.resblocks.1.attn.in_proj_weight"].split(WIDTH)
    assert torch.equal(queries, theirs[f"{first}.q_proj.weight"])
    assert torch.equal(keys, theirs[f"{first}.k_proj.weight"])
    assert torch.equal(values, theirs[f"{first}.v_proj.weight"])
    assert torch.equal(ours["ln_pre.bias"], theirs["vision_model.pre_layrnorm.bias"])
    assert torch.equal(ours["transformer.resblocks.0.mlp.c_proj.weight"], theirs[f"{first[:-11]}0.mlp.fc2.weight"])


def test_a_missing_tensor_is_named():
    tensors = hub_clip()
    del tensors["vision_model.encoder.layers.1.mlp.fc1.bias"]
    with pytest.raises(WeightsUnavailable, match=r"layers\.1\.mlp\.fc1\.bias"):
        openai_clip_layout(tensors)


def test_a_checkpoint_of_the_hub_is_installed_without_its_text_tower(tmp_path: Path):
    (fetched, installed) = folders(tmp_path)
    tensors = hub_clip()
    torch.save({**tensors, "text_model.final_layer_norm.weight": torch.ones(4)}, fetched / "pytorch_model.bin")
    clip_from_hub(fetched, installed)
    saved = load_file(installed / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float16}
    assert torch.equal(saved["conv1.weight"], tensors["vision_model.embeddings.patch_embedding.weight"].half())
    assert not any("text" in name for name in saved)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_checkpoint_that_carries_code_is_not_executed(tmp_path: Path):
    (fetched, installed) = folders(tmp_path)
    torch.save({"vision_model": Trap(tmp_path / "sprung")}, fetched / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        clip_from_hub(fetched, installed)
    assert not (tmp_path / "sprung").exists()


def test_int8_weights_come_back_within_half_a_step_transposed_and_named_after_their_module(tmp_path: Path):
    (fetched, installed) = folders(tmp_path)
    tensors = hub_clip()
    steps = write_int8_onnx(fetched / "clip.int8.onnx", tensors)
    read = read_int8_onnx(fetched / "clip.int8.onnx")
    assert read.keys() == tensors.keys()
    assert len(steps) == 6 * LAYERS + 1
    for name, tensor in tensors.items():
        tolerance = torch.from_numpy(steps[name])[:, None] * 0.501 if name in steps else torch.zeros(())
        assert ((read[name] - tensor).abs() <= tolerance).all(), name
    clip_from_int8_onnx(fetched, installed)
    assert load_file(installed / "model.safetensors").keys() == openai_clip_layout(tensors).keys()


def folders(root: Path) -> tuple[Path, Path]:
    (root / "fetched").mkdir()
    (root / "installed").mkdir()
    return root / "fetched", root / "installed"


def write_int8_onnx(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Writes the tensors as ONNX Runtime's dynamic quantisation does; returns the step of each quantised output."""
    initialisers, nodes, steps = [], [], {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if tensor.ndim != 2 or "embedding" in name:
            initialisers.append(numpy_helper.from_array(tensor.numpy(), name))
            continue
        weight = tensor.numpy().T  # (in, out)
        low, high = weight.min(0).clip(max=0), weight.max(0).clip(min=0)  # zero is always in the range
        scale = (high - low) / 250
        zero_point = np.rint(-126 - low / scale).astype(np.int8)
        quantized = np.rint(weight / scale + zero_point).astype(np.int8)
        key = f"onnx::MatMul_{number}"
        for part, array in {"quantized": quantized, "scale": scale, "zero_point": zero_point}.items():
            initialisers.append(numpy_helper.from_array(array, f"{key}_{part}"))
        inputs = [f"x_{number}", f"{key}_quantized", f"x_{number}_zero_point", f"{key}_zero_point"]
        module = name.removesuffix(".weight").replace(".", "/").replace("layers/", "layers.")
        nodes.append(helper.make_node("MatMulInteger", inputs, [f"y_{number}"], name=f"/{module}/MatMul_quant"))
        steps[name] = scale
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph(nodes, "clip", [], [output], initialisers)), path)
    return steps
