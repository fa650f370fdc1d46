"""Small backbones with random weights, one per architecture family; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

TEXT = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def bert(**overrides: Any) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**{**TEXT, "num_hidden_layers": 3, "max_position_embeddings": 32, **overrides}))


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=32)
    return DistilBertModel(config)


def t5_encoder() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2))


def t5() -> nn.Module:
    from transformers import T5Config, T5Model

    return T5Model(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**TEXT, num_hidden_layers=3, num_key_value_heads=1, max_position_embeddings=32))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4
    )
    return ViTModel(config)


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=2
    )
    return SwinModel(config)


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextModel

    return ConvNextModel(ConvNextConfig(hidden_sizes=[8, 12, 16], depths=[1, 1, 1], num_stages=3, image_size=32))


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "bert": bert,
    "distilbert": distilbert,
    "t5_encoder": t5_encoder,
    "t5": t5,
    "gpt2": gpt2,
    "llama": llama,
    "vit": vit,
    "swin": swin,
    "convnext": convnext,
}


@pytest.fixture
def build_backbone() -> Callable[..., nn.Module]:
    """``build_backbone(name, **config)``: a random-weight backbone, the same one at every call."""

    def build(name: str, **overrides: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return BUILDERS[name](**overrides).eval()

    return build


@pytest.fixture
def inputs_for() -> Callable[[str], dict[str, torch.Tensor]]:
    """``inputs_for(name)``: a batch of three for that backbone; texts padded on the right."""

    def make(name: str) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        if name in ("vit", "swin", "convnext"):
            size = 16 if name == "vit" else 32
            return {"pixel_values": torch.randn(3, 3, size, size, generator=generator)}
        mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] + [0] * 6])
        ids = torch.randint(1, 50, (3, 7), generator=generator) * mask
        return {"input_ids": ids, "attention_mask": mask}

    return make


class MeanEmbedding(nn.Module):
    """A user's own task model: the mean of learned token embeddings."""

    def __init__(self, vocab_size: int = 50, view_width: int = 6) -> None:
        super().__init__()
        self.view_width = view_width
        self.embedding = nn.Embedding(vocab_size, view_width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        kept = attention_mask[..., None].float()
        return (self.embedding(input_ids) * kept).sum(1) / kept.sum(1)


@pytest.fixture
def own_task_model() -> Callable[..., nn.Module]:
    return MeanEmbedding
