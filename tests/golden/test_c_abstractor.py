"""Honeybee's C-Abstractor against the original's outputs."""

from __future__ import annotations

import pytest
import torch

from cloud_server.backends.honeybee import CAbstractor

pytestmark = pytest.mark.golden


@torch.inference_mode()
def test_the_c_abstractor_reproduces_the_originals_tokens_and_what_is_between(golden) -> None:
    case = golden("honeybee_cabstractor")
    abstractor = CAbstractor(width=1024, grid=16, queries=144, llm_width=4096, hidden=1024).eval()
    abstractor.load_state_dict(case.weights())
    between = {}
    for number, name in enumerate(("stage1", "pool", "stage2")):
        abstractor.net[number].register_forward_hook(
            lambda module, given, output, name=name: between.update({name: output})
        )
    tokens = case.input("vision_tokens_without_cls")
    cls = torch.full_like(tokens[:, :1], torch.nan)  # is not read
    case.check("tokens", abstractor(torch.cat([cls, tokens], 1)))
    for name, output in between.items():
        case.check(f"after_{name}_sample0_ch0to63", output[0, :64])
