"""LLaMA-Adapter v1 against the original's outputs: connector, gated attention in a whole small LLaMA, sampling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from cloud_server.backends.language_model import load_model
from cloud_server.backends.llama_adapter import Connector
from cloud_server.generation import nucleus_probabilities

pytestmark = pytest.mark.golden


@torch.inference_mode()
def test_the_connector_reproduces_the_originals_visual_tokens(golden) -> None:
    case = golden("llama_adapter_v1_connector")
    connector = Connector(
        clip_width=768,
        width=512,
        heads=16,
        blocks=2,
        length=10,
        llm_width=4096,
        llm_layers=32,
        llm_heads=32,
        adapted_layers=30,
    ).eval()
    result = connector.load_state_dict(case.weights(), strict=False)
    assert result.missing_keys == ["cap_gate", "cap_adapter_query.weight"]
    assert not result.unexpected_keys
    case.check("visual_tokens", connector(case.input("clip_tokens")))


@torch.inference_mode()
def test_a_small_llama_in_metas_layout_with_adapters_writes_the_originals_logits(golden, tmp_path: Path) -> None:
    case = golden("llama_adapter_v1_tiny_llm")
    weights = case.weights()
    llama = {name: value for name, value in weights.items() if not name.endswith(("gate", "adapter_query.weight"))}
    torch.save(llama, tmp_path / "consolidated.00.pth")
    params = {"dim": 64, "multiple_of": 256, "n_heads": 4, "n_layers": 4, "norm_eps": 1e-6, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(params))
    llm = load_model(tmp_path, torch.device("cpu"), torch.float32)
    connector = Connector(
        clip_width=8, width=8, heads=1, blocks=1, length=10, llm_width=64, llm_layers=4, llm_heads=4, adapted_layers=3
    )
    connector.cap_adapter_query.weight.copy_(weights["cap_adapter_query.weight"])
    connector.cap_gate.copy_(torch.stack([weights[f"layers.{i}.attention.cap_gate"] for i in (1, 2, 3)]))

    tokens = case.input("token_ids")
    adapters = connector.adapters(case.input("visual_tokens"), llm.model.layers)
    cache = DynamicCache()
    steps = [llm(tokens[:, :12], past_key_values=cache, adapters=adapters).logits[:, -1]]
    for i in (12, 13, 14):
        steps.append(llm(tokens[:, i : i + 1], past_key_values=cache, adapters=adapters).logits[:, -1])
    case.check("logits_steps", torch.stack(steps, 1))


def test_the_nucleus_is_the_originals(golden) -> None:
    case = golden("llama_adapter_v1_sampling")
    ours = nucleus_probabilities(case.input("logits"), temperature=0.1, top_p=0.75)
    torch.testing.assert_close(ours, torch.from_numpy(case.arrays["nucleus_probabilities"]), atol=1e-5, rtol=1e-4)
