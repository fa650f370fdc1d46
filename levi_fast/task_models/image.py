"""Images: a small convolutional net, trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .base import TaskModel, require_fraction, require_int, require_shape

MIN_IMAGE_SIZE = 8


class ImageTaskModel(TaskModel):
    """Residual 3x3 convolutions in three halving stages, global average, linear.

    GroupNorm, not BatchNorm: nothing depends on the other images of the batch, so batches of one, gradient
    accumulation and data-parallel training all compute the same thing.

    Args:
        channels: of the images.
        widths: channels of each stage, multiples of 8; each stage halves height and width.
        view_width: V, the output width.
        max_size: larger images are first averaged down to ``max_size`` along each longer side, which keeps
            the small net small beside a backbone that wants 224 pixels.
        dropout: before the last linear layer.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    type_name = "image"

    def __init__(
        self,
        channels: int = 3,
        widths: Sequence[int] = (32, 64, 128),
        view_width: int = 64,
        max_size: int = 64,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(view_width, channels=channels, widths=list(widths), max_size=max_size, dropout=dropout)
        self.channels = require_int("channels", channels)
        self.max_size = require_int("max_size", max_size, minimum=MIN_IMAGE_SIZE)
        if not widths:
            raise ValueError("widths: expected at least one stage, got none")
        for stage, width in enumerate(widths):
            if require_int(f"widths[{stage}]", width) % 8:
                raise ValueError(f"widths[{stage}]: expected a multiple of 8, got {width}")
        require_fraction("dropout", dropout)
        self.stem = nn.Conv2d(channels, widths[0], kernel_size=3, padding=1)
        ins = [widths[0], *widths[:-1]]
        self.stages = nn.ModuleList(ResidualStage(a, b) for a, b in zip(ins, widths, strict=True))
        self.norm = nn.GroupNorm(widths[-1] // 8, widths[-1])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], view_width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the view.

        Args:
            pixel_values: ``[B, channels, height, width]`` float, normalised as for the backbone; both sides
                >= 8.

        Returns:
            ``[B, V]``.

        Raises:
            ValueError: the shape does not fit or the image is too small.
        """
        height, width = require_shape("pixel_values", pixel_values, None, self.channels, None, None).shape[2:]
        if min(height, width) < MIN_IMAGE_SIZE:
            raise ValueError(f"pixel_values: expected both sides >= {MIN_IMAGE_SIZE}, got {height} x {width}")
        hidden = pixel_values.to(self.stem.weight.dtype)
        if max(height, width) > self.max_size:
            hidden = F.adaptive_avg_pool2d(hidden, (min(height, self.max_size), min(width, self.max_size)))
        hidden = self.stem(hidden)
        for stage in self.stages:
            hidden = stage(hidden)
        return self.head(self.dropout(F.gelu(self.norm(hidden)).mean(dim=(2, 3))))


class ResidualStage(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions, the first with stride 2."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(in_width // 8, in_width)
        self.conv1 = nn.Conv2d(in_width, out_width, kernel_size=3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(out_width // 8, out_width)
        self.conv2 = nn.Conv2d(out_width, out_width, kernel_size=3, padding=1)
        self.shortcut = nn.Conv2d(in_width, out_width, kernel_size=1)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[B, in_width, h, w]`` -> ``[B, out_width, ceil(h / 2), ceil(w / 2)]``."""
        # ceil_mode averages over the pixels that exist, so odd sides need no padding.
        shortcut = self.shortcut(F.avg_pool2d(hidden, 2, ceil_mode=True))
        hidden = self.conv1(F.gelu(self.norm1(hidden)))
        return shortcut + self.conv2(F.gelu(self.norm2(hidden)))
