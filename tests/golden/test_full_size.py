"""Published models at their full size: the lists of their tensors, and checkpoints loaded from the disk.

Language models' files are sparse: they have the size of real ones, hold zeros and take next to no place.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from cloud_server.backends import honeybee, language_model, llama_adapter, llava, shikra
from cloud_server.backends.language_model import LanguageModel, load_model
from shared.weights import importing
from shared.weights.catalogue import catalogue
from shared.weights.codebook import Codebook
from shared.weights.digest import load_tensors, read_metadata
from shared.weights.folders import TensorFolder
from shared.weights.models import LLAMA_ADAPTER, MODELS, Shapes, c_abstractor, check, llama
from shared.weights.store import Store

CPU = torch.device("cpu")
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
ABSTRACTOR = {"width": 1024, "grid": 16, "queries": 144, "llm_width": 4096, "hidden": 1024}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COMNECK_HOME", str(tmp_path / "home"))
    catalogue.cache_clear()
    yield
    catalogue.cache_clear()


def shapes(module: nn.Module, prefix: str = "") -> Shapes:
    return {f"{prefix}{name}": tuple(value.shape) for name, value in module.state_dict().items()}


def clip(image: int, prefix: str) -> Shapes:
    """transformers' CLIP by the names that its checkpoints have."""
    return shapes(CLIPVisionModel(CLIPVisionConfig(**VIT_L, patch_size=14, image_size=image)), f"{prefix}vision_model.")


# --- what a checkpoint must hold -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-7b", "llama-2-7b"])
def test_llamas_tensors_are_those_of_transformers_llama(name: str) -> None:
    with torch.device("meta"):
        assert MODELS[name].shapes == shapes(LlamaForCausalLM(LlamaConfig()))


def test_honeybees_tensors_are_a_llamas_a_c_abstractors_and_clips() -> None:
    with torch.device("meta"):
        model = shapes(LlamaForCausalLM(LlamaConfig()), "language_model.")
        model |= shapes(honeybee.CAbstractor(**ABSTRACTOR), "abstractor.")
        model |= clip(224, "vision_model.")
    assert MODELS["honeybee-7b"].shapes == model


def test_shikras_tensors_are_a_llamas_of_three_more_tokens_and_a_projector() -> None:
    with torch.device("meta"):
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=32003))
        projector = shikra.Connector(llm, clip_width=1024).mm_projector
        assert MODELS["shikra-7b"].shapes == shapes(llm) | shapes(projector, "model.mm_projector.")


def test_llavas_tensors_are_those_of_transformers_llava() -> None:
    text, vision = LlamaConfig(vocab_size=32064), CLIPVisionConfig(**VIT_L, patch_size=14, image_size=336)
    with torch.device("meta"):
        model = shapes(LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)))
    published = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    for ours, theirs in published.items():
        model = {name.replace(ours, theirs): shape for name, shape in model.items()}
    assert MODELS["llava-1.5-7b"].shapes == model


def test_llama_adapters_tensors_are_its_connectors_with_a_gate_in_each_layer() -> None:
    with torch.device("meta"):
        connector = shapes(llama_adapter.Connector(**LLAMA_ADAPTER, heads=16))
    layers, *gate = connector.pop("cap_gate")
    connector |= {f"layers.{i}.attention.cap_gate": tuple(gate) for i in range(32 - layers, 32)}
    assert MODELS["llama-adapter-caption-vit-l"].shapes == connector


@pytest.mark.golden
def test_connectors_tensors_are_those_of_the_original_code(golden: Any) -> None:
    def original(case: str) -> Shapes:
        return {spec["name"]: tuple(spec["shape"]) for spec in golden(case).case["tensors"]}

    assert c_abstractor() == original("honeybee_cabstractor")
    assert original("llama_adapter_v1_connector").items() <= MODELS["llama-adapter-caption-vit-l"].shapes.items()


# --- language models on the disk -----------------------------------------------------------------------------------


def write_sparse(path: Path, sizes: Shapes) -> None:
    """A safetensors file of float16 zeros."""
    header, end = {}, 0
    for name, shape in sizes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        out.truncate(8 + len(head) + end)


def random(sizes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: (0.02 * torch.randn(shape, generator=generator)).half() for name, shape in sizes.items()}


def write_folder(folder: Path, sizes: Shapes, dense: Mapping[str, Tensor] | None = None, **config: Any) -> Path:
    """A Hugging Face folder of zeros and ``dense`` tensors, in a shard each, with a tokenizer of 32,000 tokens."""
    folder.mkdir()
    dense = dense or {}
    sparse = {name: shape for name, shape in sizes.items() if name not in dense}
    write_sparse(folder / "sparse.safetensors", sparse)
    save_file({**dense}, folder / "dense.safetensors")
    places = dict.fromkeys(sparse, "sparse.safetensors") | dict.fromkeys(dense, "dense.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1e-6, **config}))
    vocabulary = {str(token): token for token in range(32000)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    return folder


def resident() -> int:
    """Megabytes of this process that are in memory, those of mapped files included."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


def honeybees(llm: LanguageModel, tensors: TensorFolder) -> nn.Module:
    return honeybee.Connector.published(llm.model, tensors).abstractor


def shikras(llm: LanguageModel, tensors: TensorFolder) -> nn.Module:
    connector = shikra.Connector.published(llm, tensors.path)
    assert connector.ends.shape == (2, 4096)
    return connector.mm_projector


def llavas(llm: LanguageModel, tensors: TensorFolder) -> nn.Module:
    return llava.read_projector(LlavaConfig.from_dict(tensors.config), tensors)


HONEYBEE = {
    "text_config": {"model_type": "llama"},
    "visual_projector_config": {"projector_type": "c-abs", "num_eos_tokens": 0, "feature_layer_index": -1},
    "num_query_tokens": 144,
}
LLAVA = {
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 32064},
    "vision_config": {"model_type": "clip_vision_model", **VIT_L, "patch_size": 14, "image_size": 336},
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no way to see how much memory is taken")
@pytest.mark.parametrize(
    ("name", "config", "prefix", "part", "load"),
    [
        ("honeybee-7b", HONEYBEE, "language_model.", "abstractor.", honeybees),
        ("shikra-7b", {"vocab_size": 32003}, "", "model.mm_projector.", shikras),
        ("llava-1.5-7b", LLAVA, "language_model.", "multi_modal_projector.", llavas),
    ],
)
def test_a_full_size_checkpoint_is_checked_and_its_parts_are_loaded_without_reading_the_rest(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    config: dict[str, Any],
    prefix: str,
    part: str,
    load: Callable[[LanguageModel, TensorFolder], nn.Module],
) -> None:
    model = MODELS[name]
    connector = random({name: shape for name, shape in model.shapes.items() if name.startswith(part)})
    folder = write_folder(tmp_path / "model", model.shapes, connector, **config)
    monkeypatch.setattr(language_model, "free_memory", lambda device: 1 << 36)
    before = resident()
    report = check(model, folder)
    assert (report.problems, report.tokens, report.tensors) == ([], 32000, len(model.shapes))
    assert 13.4e9 < report.size < 14.5e9
    llm = LanguageModel(load_model(folder, CPU, torch.float16, prefix), tokenizer=None)
    assert sum(map(torch.numel, llm.model.parameters())) == sum(map(prod, llama(tokens=llm.model.vocab_size).values()))
    assert {parameter.dtype for parameter in llm.model.parameters()} == {torch.float16}
    loaded = load(llm, TensorFolder(folder))
    assert loaded.state_dict().keys() == {name.removeprefix(part) for name in connector}
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, connector[part + key].to(value.dtype))
    assert resident() - before < 500, "megabytes"


def test_a_full_size_llama_in_metas_layout_is_checked_without_being_read(tmp_path: Path) -> None:
    sizes: Shapes = {"tok_embeddings.weight": (32000, 4096), "norm.weight": (4096,), "output.weight": (32000, 4096)}
    for layer in (f"layers.{i}" for i in range(32)):
        sizes |= {f"{layer}.attention.{part}.weight": (4096, 4096) for part in ("wq", "wk", "wv", "wo")}
        sizes |= {f"{layer}.feed_forward.{part}.weight": (11008, 4096) for part in ("w1", "w3")}
        sizes |= {f"{layer}.feed_forward.w2.weight": (4096, 11008)}
        sizes |= {f"{layer}.{norm}.weight": (4096,) for norm in ("attention_norm", "ffn_norm")}
    sizes["rope.freqs"] = (64,)
    (tmp_path / "params.json").write_text(
        json.dumps({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6, "vocab_size": -1})
    )
    with torch.serialization.skip_data():
        torch.save(
            {name: torch.empty(shape, dtype=torch.float16) for name, shape in sizes.items()},
            tmp_path / "consolidated.00.pth",
        )
    assert check(MODELS["llama-7b"], tmp_path, tokenizer=False).problems == []
    (problem,) = check(MODELS["llama-2-7b"], tmp_path, tokenizer=False).problems
    assert problem == "its configuration has rms_norm_eps 1e-06 instead of 1e-05"


SHIKRA = """
import sys
from pathlib import Path
import numpy, safetensors.torch, torch, tqdm
from shared.weights.convert import shikra_from_delta

def megabytes(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) // 1024

before = megabytes("VmRSS")
shikra_from_delta(*map(Path, sys.argv[1:]), shard=1 << 23)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no way to see how much memory is taken")
def test_shikra_is_made_in_a_fraction_of_the_memory_that_it_takes(tmp_path: Path) -> None:
    sizes = {f"model.layers.{i}.weight": (1024, 2048) for i in range(64)}  # 4 MB each
    folders = [write_folder(tmp_path / name, sizes) for name in ("base", "delta")]
    (tmp_path / "made").mkdir()
    command = [sys.executable, "-c", SHIKRA, *map(str, folders), str(tmp_path / "made")]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert sum(path.stat().st_size for path in (tmp_path / "made").glob("*.safetensors")) > 268e6
    assert int(run.stdout) < 100, "megabytes, of 268 for each of the three"


# --- connectors on the disk ----------------------------------------------------------------------------------------


@torch.inference_mode()
def test_llama_adapters_release_is_imported_and_loads(tmp_path: Path) -> None:
    tensors = random(MODELS["llama-adapter-caption-vit-l"].shapes)
    torch.save(tensors, tmp_path / "caption.pth")
    name = importing.import_llama_adapter(tmp_path / "caption.pth")
    path = Store().path(name)
    connector = llama_adapter.Connector(**json.loads(read_metadata(path)["config"])).eval()
    connector.load_state_dict(load_tensors(path))
    assert torch.equal(connector.cap_gate[29], tensors["layers.31.attention.cap_gate"].float())
    assert connector(torch.randn(1, 257, 768)).shape == (1, 10, 4096)


def test_v2ls_codebook_is_imported_and_loads(tmp_path: Path) -> None:
    words, places = [f"word {i}" for i in range(11908)], random({"codebook": (11908, 768)})["codebook"].float()
    np.save(tmp_path / "global_vocabulary.npy", np.array(words, dtype=object))
    torch.save(places, tmp_path / "global_codebook_embedding.pth")
    name = importing.import_v2l(tmp_path / "global_vocabulary.npy", tmp_path / "global_codebook_embedding.pth")
    codebook = Codebook.load(Store().path(name))
    assert (len(codebook.words), codebook.words[-1]) == (11908, "word 11907")
    assert torch.equal(codebook.places, places)
