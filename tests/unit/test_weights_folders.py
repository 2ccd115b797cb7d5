"""Checkpoints as they are published: every layout gives the same tensors and the same language model; what is damaged
or hostile is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cloud_server.backends import language_model
from cloud_server.backends.language_model import LanguageModel, load_model
from shared.errors import BadInput, WeightsUnavailable
from shared.weights.folders import TensorFolder, from_meta

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=40,
    rms_norm_eps=1e-6,
)
META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}
PARAMS = {"dim": 32, "multiple_of": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "norm_eps": 1e-6}


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(torch.arange(20)[None]).logits


def to_meta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By Meta's names; of each head's rows, those that are rotated together lie side by side."""
    tensors = {"rope.freqs": torch.ones(4)}
    for name, value in state.items():
        for ours, theirs in META.items():
            name = name.replace(ours, theirs)
        if "attention.wq" in name or "attention.wk" in name:
            halves = value.view(-1, 2, 4, 32)  # heads, halves, pairs
            value = torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(value.shape)
        tensors[name.removeprefix("model.")] = value
    return tensors


def write(folder: Path, layout: str, state: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    if layout == "meta":
        torch.save(to_meta(state), folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(PARAMS))
        return folder
    kind, parts = layout.split(", ")
    name, suffix = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}[kind]
    shards = [[*state]] if parts == "whole" else [[*state][::2], [*state][1::2]]
    places = {}
    for number, names in enumerate(shards, start=1):
        file = f"{name}-{number:05}-of-{len(shards):05}.{suffix}" if len(shards) > 1 else f"{name}.{suffix}"
        tensors = {each: state[each] for each in names}
        save_file(tensors, folder / file) if kind == "safetensors" else torch.save(tensors, folder / file)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        (folder / f"{name}.{suffix}.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder


LAYOUTS = ["safetensors, whole", "safetensors, shards", "bin, whole", "bin, shards", "meta"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors_and_logits(tmp_path: Path, llama: Any, layout: str) -> None:
    state = llama.state_dict()
    folder = TensorFolder(write(tmp_path, layout, state))
    assert {*folder} - {"rope.freqs"} == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(folder[name], tensor, atol=0, rtol=0)
        spec = folder.specs[name]
        assert (spec.shape, spec.dtype, spec.device.type) == (tensor.shape, torch.float32, "meta")
    loaded = load_model(tmp_path, CPU, torch.float32)
    torch.testing.assert_close(logits(loaded), logits(llama), atol=1e-5, rtol=1e-5)


def test_a_file_by_itself_is_read_by_its_own_names(tmp_path: Path) -> None:
    tensors = {"layers.0.attention.wq.weight": torch.rand(8, 4), "bias": torch.rand(3).half()}
    torch.save(tensors, tmp_path / "consolidated.pth")
    save_file(tensors, tmp_path / "b.safetensors")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("consolidated.pth", "b.safetensors", "old.pth"):
        folder = TensorFolder(tmp_path / name)
        assert folder.keys() == tensors.keys()
        assert all(torch.equal(folder[name], tensors[name]) for name in tensors)
        assert torch.equal(folder.part("layers.0.")["attention.wq.weight"], tensors["layers.0.attention.wq.weight"])


def test_what_llama_does_not_have_keeps_its_name() -> None:
    assert from_meta("layers.31.attention.wk.weight") == "model.layers.31.self_attn.k_proj.weight"
    for name in ("layers.2.attention.cap_gate", "rope.freqs", "cap_adapter_query.weight", "norm.bias"):
        assert from_meta(name) == name


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no way to see what is mapped")
@pytest.mark.parametrize("layout", ["safetensors, whole", "bin, whole"])
def test_a_model_in_the_type_on_the_disk_is_mapped_and_in_another_copied(
    tmp_path: Path, llama: Any, layout: str
) -> None:
    write(tmp_path, layout, {name: value.half() for name, value in llama.state_dict().items()})
    model = load_model(tmp_path, CPU, torch.float32)
    assert model.dtype == torch.float32
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    model = load_model(tmp_path, CPU, torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert str(tmp_path) in Path("/proc/self/maps").read_text()


def test_a_language_model_among_other_parts_is_loaded_by_its_prefix(tmp_path: Path, llama: Any) -> None:
    state = {f"language_model.{name}": value for name, value in llama.state_dict().items()}
    write(tmp_path, "safetensors, whole", {**state, "abstractor.pos_emb": torch.rand(3)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mllm", "text_config": CONFIG.to_dict()}))
    loaded = load_model(tmp_path, CPU, torch.float32, "language_model.")
    torch.testing.assert_close(logits(loaded), logits(llama), atol=1e-5, rtol=1e-5)
    with pytest.raises(WeightsUnavailable, match="holds no language model"):
        load_model(tmp_path, CPU, torch.float32)


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**{**CONFIG.to_dict(), "tie_word_embeddings": True})
    tied = LlamaForCausalLM(config).eval()
    state = {name: value for name, value in tied.state_dict().items() if name != "lm_head.weight"}
    write(tmp_path, "safetensors, whole", state)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    loaded = load_model(tmp_path, CPU, torch.float32)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(logits(loaded), logits(tied), atol=1e-5, rtol=1e-5)


def test_backends_share_a_model_of_one_folder_device_and_type(tmp_path: Path, monkeypatch, llama: Any) -> None:
    monkeypatch.setattr(language_model, "load_tokenizer", lambda folder: None)
    write(tmp_path, "safetensors, whole", llama.state_dict())
    first = LanguageModel.load(tmp_path, CPU)
    assert LanguageModel.load(tmp_path, CPU, "float32") is first
    assert LanguageModel.load(tmp_path, CPU, "bfloat16") is not first


# --- what cannot be loaded -----------------------------------------------------------------------------------------


def test_too_little_memory_is_said_with_what_is_needed_before_anything_is_read(
    tmp_path: Path, monkeypatch, llama: Any
) -> None:
    write(tmp_path, "safetensors, whole", llama.state_dict())
    monkeypatch.setattr(
        language_model, "free_memory", lambda device: 4 * sum(p.numel() for p in llama.parameters()) - 1
    )
    monkeypatch.setattr(TensorFolder, "__getitem__", lambda self, name: pytest.fail(f"{name} is read"))
    with pytest.raises(
        WeightsUnavailable, match=r"takes 0\.0 GB of memory in float32, and cpu has 0\.0 GB free: in float"
    ):
        load_model(tmp_path, CPU, torch.float32)


def test_tensors_that_the_configuration_does_not_mean_are_listed(tmp_path: Path, llama: Any) -> None:
    state = dict(llama.state_dict())
    del state["model.norm.weight"]
    state["lm_head.weight"] = torch.zeros(41, 32)
    with pytest.raises(WeightsUnavailable) as caught:
        load_model(write(tmp_path, "bin, whole", state), CPU, torch.float32)
    assert "lm_head.weight is (41, 32) instead of (40, 32); model.norm.weight is missing" in str(caught.value)


@pytest.mark.parametrize("config", ["{}", "[]", "nonsense", '{"model_type": "llama", "num_attention_heads": 0}', None])
def test_a_configuration_that_makes_no_sense_is_one_clear_line(tmp_path: Path, llama: Any, config: str | None) -> None:
    write(tmp_path, "safetensors, whole", llama.state_dict())
    (tmp_path / "config.json").unlink() if config is None else (tmp_path / "config.json").write_text(config)
    with pytest.raises(WeightsUnavailable, match="holds no language model that can be read") as caught:
        load_model(tmp_path, CPU, torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"n_heads": 0}, "describes no LLaMA"),
        ({"n_heads": 5}, "describes no LLaMA"),
        ({"dim": "wide"}, "describes no LLaMA"),
        ({"norm_eps": None}, "describes no LLaMA"),
        (None, "does not exist"),
    ],
)
def test_metas_parameters_must_be_there_and_make_sense(
    tmp_path: Path, llama: Any, params: dict[str, Any] | None, reason: str
) -> None:
    write(tmp_path, "meta", llama.state_dict())
    path = tmp_path / "params.json"
    path.unlink() if params is None else path.write_text(json.dumps(PARAMS | params))
    with pytest.raises(BadInput, match=reason):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, llama: Any, layout: str, kept: float) -> None:
    path = TensorFolder(write(tmp_path, layout, llama.state_dict())).files[-1]
    os.truncate(path, int(kept * path.stat().st_size))
    with pytest.raises(BadInput, match=f"{path.name} cannot be read as") as caught:
        TensorFolder(tmp_path)
    assert "\n" not in str(caught.value)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ({"a": torch.zeros(3), "b": Command("touch ran")}, "to read it would run"),
        ([torch.zeros(3)], "is no dictionary of tensors"),
        ({"a": torch.zeros(3), "epoch": 3}, "is no dictionary of tensors"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "a claims more than"),
        ({"a": torch.zeros(3, device="meta")}, "a is no dense tensor"),
        ({"a": torch.eye(3).to_sparse()}, "a is no dense tensor"),
    ],
)
def test_a_pickle_with_anything_but_tensors_is_refused_and_never_run(
    tmp_path: Path, monkeypatch, contents: Any, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(contents, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match=reason):
        TensorFolder(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_is_named(tmp_path: Path, llama: Any) -> None:
    write(tmp_path, "safetensors, shards", llama.state_dict())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match=r"is incomplete: it has no model-00002-of-00002\.safetensors"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {"a": 3}}', '{"weight_map": {}}', "["])
def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match=r"model\.safetensors\.index\.json"):
        TensorFolder(tmp_path)


def test_an_index_leads_nowhere_but_into_its_folder(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"a": "../secret.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match=r"it has no secret\.safetensors"):
        TensorFolder(tmp_path / "model")


def test_a_model_in_several_consolidated_files_is_refused(tmp_path: Path, llama: Any) -> None:
    write(tmp_path, "meta", llama.state_dict())
    (tmp_path / "consolidated.01.pth").write_bytes((tmp_path / "consolidated.00.pth").read_bytes())
    with pytest.raises(BadInput, match="has 2 consolidated files"):
        TensorFolder(tmp_path)


def test_an_empty_folder_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no checkpoint"):
        TensorFolder(tmp_path)
    with pytest.raises(BadInput, match="does not exist"):
        TensorFolder(tmp_path / "nowhere")
