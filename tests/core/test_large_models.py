"""What large backbones need: half precision, fewer bits by torchao, weights that are on disk until a layer runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from levi_fast import LeviConfig, LeviModel, get_levi_model

Build = Callable[..., nn.Module]


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 50, (6, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(6) % 3}


def model_of(backbone: nn.Module) -> LeviModel:
    torch.manual_seed(0)
    spec = {
        "type": "text",
        "vocab_size": 50,
        "embedding_dim": 8,
        "view_width": 6,
        "dropout": 0.0,
        "token_dropout": 0.0,
    }
    config = LeviConfig(hidden_width=8, num_labels=3, view_dropout=0.0, task_model=spec)
    return get_levi_model(backbone, config).train()


def losses(model: LeviModel, dtype: torch.dtype | None = None) -> list[float]:
    """Of ten steps; with a dtype under autocast, with float16's scaler."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    found = []
    for _ in range(10):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = model(**batch()).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_as_float32_does(build_backbone: Build, dtype: torch.dtype) -> None:
    exact, half = losses(model_of(build_backbone("bert"))), losses(model_of(build_backbone("bert")), dtype)
    assert half != exact and half[-1] < 0.9 * half[0]
    torch.testing.assert_close(torch.tensor(half), torch.tensor(exact), rtol=0.05, atol=0.02)


def test_the_backbone_is_taken_as_it_is_not_copied(build_backbone: Build) -> None:
    backbone = build_backbone("bert")
    places = [parameter.data_ptr() for parameter in backbone.parameters()]
    model = model_of(backbone)
    assert model.backbone is backbone and [p.data_ptr() for p in model.backbone.parameters()] == places


def test_a_backbone_quantised_by_torchao_serves(build_backbone: Build) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    plain, backbone = build_backbone("bert"), build_backbone("bert")
    quantize_(backbone, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8)))
    model = model_of(backbone)
    assert model.config.backbone_fingerprint != model_of(plain).config.backbone_fingerprint
    found = losses(model)
    assert found[-1] < 0.9 * found[0]
