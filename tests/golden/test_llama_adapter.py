"""LLaMA-Adapter v1 against the original's outputs: connector, gated attention in a whole small LLaMA, sampling."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from cloud_server.backends import gated_attention
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
def test_a_small_llama_with_adapters_writes_the_originals_logits_step_by_step(golden) -> None:
    case = golden("llama_adapter_v1_tiny_llm")
    weights = case.weights()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=50,
        rms_norm_eps=1e-6,
        attn_implementation=gated_attention.NAME,
    )
    llm = LlamaForCausalLM(config).eval()
    llm.load_state_dict(from_meta(weights, heads=4))
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


def from_meta(weights: dict[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Meta's LLaMA layout to transformers': names, and the order in which rotary pairs lie."""

    def pairs_to_halves(weight: Tensor) -> Tensor:
        rows, columns = weight.shape
        return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)

    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    converted = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    for name, value in weights.items():
        if name.startswith("layers.") and not name.endswith("gate"):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            rotary = part in ("attention.wq", "attention.wk")
            converted[f"model.layers.{layer}.{names[part]}.weight"] = pairs_to_halves(value) if rotary else value
    return converted
