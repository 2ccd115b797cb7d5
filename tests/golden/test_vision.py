"""The neck and CLIP of the paper's profile against the authors' outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cloud_server.vision.clip import MEAN, STD, ClipTower, VisionNeeds
from cloud_server.vision.neck import TransformNeck
from shared.profiles import get_profile

pytestmark = pytest.mark.golden


@torch.inference_mode()
def test_the_neck_reproduces_the_authors_tokens(golden) -> None:
    case = golden("comneck_neck")
    clip = get_profile("vit-l-14").clip
    neck = TransformNeck(channels=320, grid=clip.grid, width=clip.width, heads=clip.heads).eval()
    neck.load_state_dict(case.weights())
    tokens = neck(case.input("y_hat"))
    case.check("tokens", tokens)
    case.check("tokens_cls", tokens[:, 0])
    case.check("tokens_last", tokens[:, -1])


def test_the_neck_has_the_papers_number_of_parameters() -> None:
    neck = TransformNeck(channels=320, grid=16, width=1024, heads=16)
    assert sum(parameter.numel() for parameter in neck.parameters()) == 13_191_168


@torch.inference_mode()
def test_clip_reproduces_the_authors_features_from_pixels_and_from_block_2(golden) -> None:
    case = golden("clip_vitl14_tail")
    tower = ClipTower(get_profile("vit-l-14").clip).eval()
    tower.visual.load_state_dict(case.weights("visual."))
    normalised = case.input("image_already_normalised")
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    tokens = tower.embed(normalised * std + mean)
    case.check("image_after_ln_pre", tokens)
    tokens = tower.blocks(tokens, 0, 1)
    case.check("image_after_block1", tokens)
    case.check("image_cls_proj_single", seen(tower, tokens, VisionNeeds(project=True))[:, 0])

    tokens = case.input("tokens_into_block2")
    case.check("after_block2", tower.blocks(tokens, 2, 2))
    case.check("after_block22", seen(tower, tokens, VisionNeeds(last_block=-2)))
    last = seen(tower, tokens, VisionNeeds())
    case.check("after_block23", last)
    case.check("proj_single_ln_post", seen(tower, tokens, VisionNeeds(project=True)))
    case.check("proj_double_ln_post", seen(tower, tokens, VisionNeeds(project=True, ln_post_times=2)))


def seen(tower: ClipTower, tokens: Tensor, needs: VisionNeeds) -> Tensor:
    """What a backend reads of photos whose tokens (B, 1 + patches, D) enter block 2."""
    sights = [{1: one} for one in tokens]
    tower.see(sights, needs.last_block)
    return torch.stack([tower.read(sight, needs) for sight in sights])
