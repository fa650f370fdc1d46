"""Launch configurations: heuristics within their bounds, and the nearest tuned shape of the right device alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import pytest
import torch

from levi_fast.kernels import launch_configs
from levi_fast.kernels.launch_configs import (
    DeviceTraits,
    LossConfig,
    PoolConfig,
    ProductConfig,
    RowConfig,
    device_slug,
    device_traits,
    tuned_or,
)

CHIP = DeviceTraits("NVIDIA H200", 132)
HEURISTIC = ProductConfig(64, 64, 64, 1, 8, 4, 4)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(launch_configs, "CONFIG_FOLDER", tmp_path)
    yield tmp_path
    launch_configs._tuned.cache_clear()
    launch_configs._nearest.cache_clear()


def write(folder: Path, *entries: tuple[str, dict[str, int], ProductConfig]) -> None:
    launch_configs._tuned.cache_clear()
    launch_configs._nearest.cache_clear()
    rows = [{"kernel": k, "dtype": "float16", "shape": shape, "config": asdict(c)} for k, shape, c in entries]
    (folder / "nvidia-h200.json").write_text(json.dumps({"entries": rows}))


def find(chip: DeviceTraits = CHIP, dtype: torch.dtype = torch.float16, **shape: int) -> ProductConfig:
    return tuned_or(HEURISTIC, chip, "first_product", dtype, **shape)


def test_the_nearest_tuned_shape_serves_and_a_far_one_does_not(folder: Path) -> None:
    small, large = replace(HEURISTIC, block_m=16), replace(HEURISTIC, block_m=128)
    write(folder, ("first_product", {"B": 16, "D": 384}, small), ("first_product", {"B": 1024, "D": 384}, large))
    assert find(B=16, D=384) == small
    assert find(B=40, D=400) == small
    assert find(B=600, D=384) == large
    assert find(B=65536, D=384) == HEURISTIC
    assert find(B=16, D=4096) == HEURISTIC


def test_no_other_kernel_dtype_device_or_set_of_dimensions_is_served(folder: Path) -> None:
    write(folder, ("output", {"B": 16}, replace(HEURISTIC, block_m=16)))
    assert find(B=16) == HEURISTIC
    write(folder, ("first_product", {"B": 16}, replace(HEURISTIC, block_m=16)))
    assert find(B=16) != HEURISTIC
    assert find(dtype=torch.float32, B=16) == HEURISTIC
    assert find(chip=DeviceTraits("NVIDIA A100", 108), B=16) == HEURISTIC
    assert find(B=16, D=16) == HEURISTIC


def test_an_entry_with_other_fields_says_so(folder: Path) -> None:
    write(folder, ("first_product", {"B": 16}, HEURISTIC))
    file = folder / "nvidia-h200.json"
    file.write_text(file.read_text().replace("block_m", "block_x"))
    with pytest.raises(TypeError, match=r"nvidia-h200.json: first_product expects the fields .*'block_m'"):
        find(B=16)


def test_a_trial_sees_what_is_asked_and_sets_it_while_it_lasts() -> None:
    other = replace(HEURISTIC, block_m=32)
    with launch_configs.trial(first_product=other) as seen:
        assert find(B=16) == other
        with launch_configs.trial():
            assert find(B=8) == HEURISTIC
        assert seen.asked == {"first_product": ("float16", {"B": 16}, HEURISTIC)}
    assert find(B=16) == HEURISTIC


@pytest.mark.parametrize("hip", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("batch", [1, 16, 33, 1024, 65536])
@pytest.mark.parametrize(("layers", "n", "k"), [(1, 1, 1), (6, 128, 448), (32, 512, 4352), (12, 1000, 256)])
def test_product_tiles_are_what_a_product_of_tiles_takes(
    hip: bool, itemsize: int, batch: int, layers: int, n: int, k: int
) -> None:
    config = ProductConfig.from_tile_heuristic(replace(CHIP, hip=hip), layers, batch, n, k, itemsize)
    for block in (config.block_m, config.block_n, config.block_k):
        assert 16 <= block <= 128
        assert block & (block - 1) == 0
    assert 1 <= config.splits <= 64
    if config.splits > 1:  # every part has at least two steps
        assert config.splits * 2 * config.block_k <= k + 2 * config.block_k


def test_few_examples_split_the_sum_until_the_chip_is_full_and_many_do_not() -> None:
    few = ProductConfig.from_tile_heuristic(CHIP, 6, 16, 128, 4096, 2)
    programs = 6 * -(-128 // few.block_n) * few.splits
    assert programs >= CHIP.multiprocessors
    assert ProductConfig.from_tile_heuristic(CHIP, 6, 65536, 128, 448, 2).splits == 1
    assert PoolConfig.from_bandwidth_heuristic(CHIP, 1, 4096, 384, 2, False).splits > 8
    assert PoolConfig.from_bandwidth_heuristic(CHIP, 4096, 128, 384, 2, False).splits == 1


def test_row_and_loss_tiles_stay_within_registers() -> None:
    for rows in (1, 100, 1_000_000):
        for width in (1, 3, 384, 5000, 50_000):
            row = RowConfig.from_row_heuristic(CHIP, rows, width)
            loss = LossConfig.from_class_heuristic(CHIP, rows, width)
            assert row.rows * row.block <= 2048 and loss.rows * loss.block <= 2048


def test_configurations_are_frozen_and_devices_have_plain_names() -> None:
    with pytest.raises(FrozenInstanceError):
        HEURISTIC.block_m = 1  # type: ignore[misc]
    assert device_slug("AMD Instinct MI300X (OAM)") == "amd-instinct-mi300x-oam"
    assert device_traits(torch.device("cpu")).name == "interpreter"
