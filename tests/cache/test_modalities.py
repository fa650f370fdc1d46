"""Images and other tensors; data sets that augment at random; memory while reading."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from levi_fast import ActivationCache, DataError, TapExtractor

SMALL = {"batch_size": 4, "batches_per_shard": 2}


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    with torch.random.fork_rng():
        torch.manual_seed(7)
        size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        return ViTModel(ViTConfig(**size, image_size=16, patch_size=4)).eval()


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinModel

    with torch.random.fork_rng():
        torch.manual_seed(7)
        depths: dict[str, Any] = {"depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 2}
        return SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, **depths)).eval()


class Images:
    """Images as mappings; ``augment`` draws a flip and noise from a global generator of one's choice."""

    def __init__(self, count: int = 10, size: int = 16, augment: str | None = None) -> None:
        self.pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
        self.augment, self.own = augment, np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        draw: dict[str | None, Callable[[], float]] = {
            None: lambda: 0.0,
            "torch": lambda: float(torch.rand(())),
            "numpy": lambda: float(np.random.rand()),
            "python": lambda: random.random(),
            "own": lambda: float(self.own.random()),
        }
        return {"pixel_values": self.pixels[row] + draw[self.augment](), "label": "a word", "name": f"{row}.jpg"}


class TestModalities:
    @pytest.mark.parametrize(("build", "size", "widths"), [(vit, 16, [16] * 3), (swin, 32, [16, 32, 32])])
    def test_images(self, tmp_path: Path, build: Callable[[], nn.Module], size: int, widths: list[int]) -> None:
        backbone, images = build(), Images(size=size)
        for dtype in ("float32", "int8"):
            cache = ActivationCache.build(tmp_path / dtype, backbone, images, dtype=dtype, **SMALL)
            assert cache.widths == widths
            taps = cache["data"]
            direct = torch.cat(list(TapExtractor(backbone)(pixel_values=images.pixels)), dim=1)
            tolerance = 1e-5 if dtype == "float32" else 0.05
            torch.testing.assert_close(taps[taps.rows], direct, rtol=tolerance, atol=tolerance)
        some = cache["data"].select([0, 2])
        assert some.shape == (10, widths[0] + widths[2])

    def test_lists_of_token_ids_are_padded(self, tmp_path: Path, backbone: nn.Module) -> None:
        rows = [{"input_ids": [2, *[5] * length, 3], "label": length} for length in (4, 1, 9, 4)]
        taps = ActivationCache.build(tmp_path / "c", backbone, rows, **SMALL)["data"]
        assert len(taps) == 3 and taps.rows[0] == taps.rows[3]
        extractor = TapExtractor(backbone)
        for place, row in enumerate(rows):
            alone = extractor(input_ids=torch.tensor([row["input_ids"]]))
            assert isinstance(alone, Tensor)
            torch.testing.assert_close(taps[taps.rows[place : place + 1]], alone.transpose(0, 1).reshape(1, -1))

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([(torch.zeros(3), 1)], "row 1 of data 'data': expected a mapping of input names to tensors, got tuple"),
            ([{"label": 1}], r"row 1 of data 'data': the backbone takes none of \['label'\]"),
            ([{"pixel_values": "a.jpg"}], "row 1 of data 'data': expected a tensor in 'pixel_values', got str"),
            (
                [{"pixel_values": torch.zeros(3, 16, 16)}, {"pixel_values": torch.zeros(3, 16, 8)}],
                "expected 'pixel_values' of one shape in all rows",
            ),
            ({"a": 3}, "data 'a': expected a data set with len"),
        ],
    )
    def test_rows_that_cannot_be_used(self, tmp_path: Path, rows: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            ActivationCache.build(tmp_path / "c", vit(), rows, **SMALL)


class TestRandomAugmentation:
    @pytest.mark.parametrize("augment", ["torch", "numpy", "python"])
    def test_it_is_refused_unless_views_are_asked_for(self, tmp_path: Path, augment: str) -> None:
        with pytest.raises(DataError, match=r"data 'data': its rows are drawn at random .* views=k"):
            ActivationCache.build(tmp_path / "c", vit(), Images(augment=augment), **SMALL)
        taps = ActivationCache.build(tmp_path / "c", vit(), Images(augment=augment), views=3, **SMALL)["data"]
        assert taps.rows.shape == (3, 10) and len(taps) == 30
        views = [taps[rows] for rows in taps.rows]
        assert not torch.allclose(views[0], views[1]) and not torch.allclose(views[1], views[2])

    def test_the_draws_are_fixed_and_disturb_nobody(self, tmp_path: Path, read_folder: Callable[[Path], Any]) -> None:
        for name, state in (("one", 0), ("two", 99)):
            torch.manual_seed(state)
            random.seed(state)
            expected = torch.rand(1, generator=torch.Generator().manual_seed(state))
            ActivationCache.build(tmp_path / name, vit(), Images(augment="torch"), views=2, **SMALL)
            assert torch.equal(torch.rand(1), expected)
        assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")
        other = ActivationCache.build(
            tmp_path / "three", vit(), Images(augment="torch"), views=2, view_seed=1, **SMALL
        )
        assert not torch.allclose(other["data"].load(), ActivationCache.open(tmp_path / "one")["data"].load())
        with pytest.raises(DataError, match="views: 2 in the cache, 3 now"):
            ActivationCache.build(tmp_path / "one", vit(), Images(augment="torch"), views=3, **SMALL)

    def test_a_data_set_may_say_so_itself(self, tmp_path: Path) -> None:
        images = Images()
        images.is_random = True  # type: ignore[attr-defined]
        with pytest.raises(DataError, match="drawn at random"):
            ActivationCache.build(tmp_path / "c", vit(), images, **SMALL)

    def test_draws_that_no_seed_fixes_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"row \d+ of data 'data', view \d: came out differently"):
            ActivationCache.build(tmp_path / "c", vit(), Images(augment="own"), views=2, **SMALL)


MEMORY = """
import sys, torch
from levi_fast import ActivationCache

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

limit = 24 * 2**20
taps = ActivationCache.open(sys.argv[1], resident_bytes=limit)["data"]
generator = torch.Generator().manual_seed(0)
taps[torch.randint(len(taps), (32,), generator=generator)]
before = top = resident()
for step in range(600):
    taps[torch.randint(len(taps), (32,), generator=generator)]
    top = max(top, resident())
for chunk in taps.chunks():
    chunk.sum()
    top = max(top, resident())
print(top - before)
"""


class Wide(nn.Module):
    """A stand-in for a backbone whose taps are wide, so that a few rows make a large cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 4096)])

        class config:
            hidden_size = 4096
            num_hidden_layers = 1
            to_dict = staticmethod(lambda: {})

        self.config = config

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        return self.layers[0](inputs_embeds)


def test_memory_stays_flat_while_a_large_cache_is_read(tmp_path: Path) -> None:
    """Shuffled batches and then all shards of 160 MiB, in a process that may keep 24 MiB of them."""
    rows = [{"inputs_embeds": torch.full((1, 1), float(row))} for row in range(10240)]
    cache = ActivationCache.build(tmp_path / "c", Wide(), rows, batch_size=128, batches_per_shard=8)
    size = sum(file.stat().st_size for file in (tmp_path / "c").glob("shard-*"))
    assert size > 160 * 2**20 and len(cache.manifest.parts["data"].shards) == 10
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "c")], capture_output=True, text=True, timeout=120, check=True
    )
    assert float(ran.stdout) < 64, f"{ran.stdout} MiB more"  # the limit, one batch or shard beyond it, allocator
