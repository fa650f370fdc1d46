"""How wide a backbone's taps are, before any data is seen."""

from __future__ import annotations

from typing import Any

import torch

from levi_fast.offloading import input_device
from levi_fast.taps import TapExtractor


def measure_widths(extractor: TapExtractor) -> list[int]:
    """D_l of every tap: the config's hidden size where all layers share it, else measured with one tiny input.

    Raises:
        ValueError: if the config does not tell and no dummy input is known for the backbone.
    """
    config: Any = getattr(extractor.runner, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    staged = any(getattr(config, name, None) is not None for name in ("depths", "hidden_sizes", "embed_dims"))
    hidden_size = getattr(text, "hidden_size", None)
    if isinstance(hidden_size, int) and not staged:
        return [hidden_size] * len(extractor.layers)
    return [tap.shape[1] for tap in extractor(**dummy_inputs(extractor))]


def dummy_inputs(extractor: TapExtractor) -> dict[str, torch.Tensor]:
    """The smallest inputs that a backbone runs on: ``pixel_values`` [1, 3, H, W] or ``input_ids`` [1, 4], all zero.

    Raises:
        ValueError: it takes neither.
    """
    config: Any = getattr(extractor.runner, "config", None)
    dtype, device = next(extractor.backbone.parameters(), torch.empty(0)).dtype, input_device(extractor.backbone)
    if extractor.accepts("pixel_values"):
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", None) or 3
        pixels = torch.zeros(1, channels, height, width, dtype=dtype, device=device)
        return {"pixel_values": pixels}
    if extractor.accepts("input_ids"):
        return {"input_ids": torch.zeros(1, 4, dtype=torch.int64, device=device)}
    raise ValueError(
        f"backbone: the widths of {type(extractor.backbone).__name__}'s layers cannot be told from its config; "
        "give its config a hidden_size"
    )
