"""The backbones that steps are timed on: published sizes, built from configs with random weights, no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from levi_fast.backbones import DEFAULT_BACKBONE, load_backbone, packaged_folder
from levi_fast.config import LeviConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_LABELS = 2


@dataclass(frozen=True)
class Backbone:
    """One architecture and the batch it is timed on unless the user says otherwise.

    Args:
        build: the model, in the default dtype and on the default device of the call.
        batch, length: examples and tokens; of an image model the length is the side in pixels.
        dtype: of the weights.
        vocabulary: token ids; None for an image model.
        final_norm: the last of transformers' hidden states has passed the model's closing norm, and is no longer
            what the last layer put out.
        packaged: hub id whose weights an installed package may carry.
    """

    build: Callable[[], nn.Module]
    batch: int
    length: int
    dtype: str = "float32"
    vocabulary: int | None = 30522
    final_norm: bool = False
    packaged: str | None = None

    @property
    def weights(self) -> str:
        """``real`` where an installed package carries them, else ``random``."""
        return "real" if self.packaged is not None and packaged_folder(self.packaged) else "random"

    def config(self) -> LeviConfig:
        """LEVI with the modality's default task model, classifying."""
        text = {"type": "text", "vocab_size": self.vocabulary}
        fields: dict[str, Any] = {"num_labels": NUM_LABELS, "problem_type": "single_label_classification"}
        return LeviConfig(task_model={"type": "image"} if self.vocabulary is None else text, **fields)

    def load(self, dtype: torch.dtype, device: str) -> nn.Module:
        """The model in eval mode; random weights are made in ``dtype`` on ``device``, without a float32 copy."""
        if self.packaged is not None and self.weights == "real":
            return load_backbone(self.packaged, dtype=dtype).to(device)
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return self.build().eval()
        finally:
            torch.set_default_dtype(before)

    def size(self) -> Size:
        """Counted on the meta device: no memory is asked for."""
        with torch.device("meta"):
            model = self.build()
        config: Any = model.config
        longest = config.image_size if self.vocabulary is None else getattr(config, "max_position_embeddings", None)
        parameters = sum(p.numel() for p in model.parameters())
        return Size(parameters, config.num_hidden_layers, config.hidden_size, longest)

    def batches(self, count: int, batch: int, length: int, device: str) -> list[dict[str, Tensor]]:
        """Random inputs with labels; no position is padding, so every contender computes all of them.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, T], or ``pixel_values`` [B, 3, side, side], and ``labels`` [B].
        """
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(count):
            labels = torch.randint(NUM_LABELS, (batch,), generator=generator)
            if self.vocabulary is None:
                inputs = {"pixel_values": torch.randn(batch, 3, length, length, generator=generator)}
            else:
                ids = torch.randint(5, self.vocabulary, (batch, length), generator=generator)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found.append({name: value.to(device) for name, value in {**inputs, "labels": labels}.items()})
        return found

    def positions(self, length: int) -> int:
        """How many hidden states a layer puts out for one example."""
        return length if self.vocabulary is not None else (length // 16) ** 2 + 1


@dataclass(frozen=True)
class Size:
    """Parameters, layers, width of the hidden states, and the longest input (the only one of an image model)."""

    parameters: int
    layers: int
    width: int
    longest: int | None


def bert(layers: int, width: int, heads: int, vocabulary: int = 30522) -> nn.Module:
    """A BERT with four times the width inside."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(), add_pooling_layer=False)  # its defaults are ViT-B/16 at 224 pixels


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, use_cache=False,
    )  # fmt: skip
    return LlamaModel(config)


BACKBONES: dict[str, Backbone] = {
    "minilm": Backbone(lambda: bert(6, 384, 12), 32, 64, packaged=DEFAULT_BACKBONE),
    "bert-base": Backbone(lambda: bert(12, 768, 12), 8, 64),
    "vit-b16": Backbone(_vit, 4, 224, vocabulary=None),
    "t5-base": Backbone(_t5, 8, 64, vocabulary=32128, final_norm=True),
    "llama-1b": Backbone(_llama, 1, 64, "bfloat16", vocabulary=128256, final_norm=True),
    "tiny": Backbone(lambda: bert(2, 32, 4, 1000), 4, 16, vocabulary=1000),
}
DEFAULT = tuple(name for name in BACKBONES if name != "tiny")  # that one is for trying things out
