"""What a cache holds, and how it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from levi_fast import ActivationCache, DataError, LeviConfig, get_levi_model
from levi_fast.cache.shards import decode, encode, tap_of_column
from levi_fast.data.encoded import EncodedDataset
from levi_fast.training.features import precompute_unique_taps

SMALL = {"batch_size": 4, "batches_per_shard": 2}
Texts = Callable[..., EncodedDataset]


def direct(backbone: torch.nn.Module, data: EncodedDataset) -> Tensor:
    """Taps of every row without a cache."""
    reader = get_levi_model(backbone, LeviConfig(num_labels=2))
    taps, which = precompute_unique_taps(reader, data, batch_size=4)
    return taps[which]


class TestContent:
    def test_float32_is_what_the_backbone_gives_bit_for_bit(
        self, tmp_path: Path, backbone: torch.nn.Module, texts: Texts
    ) -> None:
        data = {"train": texts(30), "ood new": texts(9, seed=1)}
        cache = ActivationCache.build(tmp_path / "c", backbone, data, **SMALL)
        assert sorted(cache) == sorted(data) and cache.layers == [0, 1, 2] and cache.widths == [16, 16, 16]
        for name, dataset in data.items():
            taps = cache[name]
            assert len(taps.rows) == len(dataset)
            assert torch.equal(taps[taps.rows], direct(backbone, dataset))
            assert torch.equal(taps.load()[taps.rows], direct(backbone, dataset))
        assert cache.verify() == []

    @pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
    def test_smaller_dtypes_are_as_close_as_they_can_be(
        self, tmp_path: Path, backbone: torch.nn.Module, texts: Texts, dtype: str
    ) -> None:
        exact = direct(backbone, texts())
        taps = ActivationCache.build(tmp_path / "c", backbone, texts(), dtype=dtype, **SMALL)["data"]
        found = taps[taps.rows]
        assert found.dtype == torch.float32
        if dtype == "bfloat16":
            assert torch.equal(found, exact.bfloat16().float())
        else:
            step = exact.view(-1, 3, 16).abs().amax(2, keepdim=True) / 127
            assert ((found - exact).view(-1, 3, 16).abs() <= step * 0.501).all()
            assert not torch.equal(found, exact)

    def test_distinct_texts_cross_the_backbone_and_the_disk_once(
        self, tmp_path: Path, counting: Callable[..., Any], texts: Texts
    ) -> None:
        data = texts(30, repeats=15)
        distinct = len(data.unique_inputs()[0])
        extractor = counting()
        taps = ActivationCache.build(tmp_path / "c", extractor, data, **SMALL)["data"]
        assert len(taps) == distinct <= 15 and extractor.batches == -(-distinct // 4)
        assert torch.equal(taps.rows[15:], taps.rows[:15])
        stored = sum(
            len(safetensors.torch.load_file(file)["taps"]) for file in (tmp_path / "c").glob("shard-*.safetensors")
        )
        assert stored == distinct

    def test_no_pickle_and_a_readable_manifest(self, tmp_path: Path, backbone: torch.nn.Module, texts: Texts) -> None:
        ActivationCache.build(tmp_path / "c", backbone, texts(), **SMALL)
        names = {path.name for path in (tmp_path / "c").iterdir()}
        assert {Path(name).suffix for name in names} == {".json", ".safetensors"}  # no lock, record or temporary
        manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
        assert manifest["complete"] is True and manifest["key"]["taps"] == [0, 1, 2]
        assert str(tmp_path) not in json.dumps(manifest)

    def test_the_order_of_the_data_sets_does_not_matter(
        self, tmp_path: Path, backbone: torch.nn.Module, texts: Texts, read_folder: Callable[[Path], Any]
    ) -> None:
        data = {"b": texts(9, seed=1), "a": texts(12)}
        ActivationCache.build(tmp_path / "one", backbone, data, **SMALL)
        ActivationCache.build(tmp_path / "two", backbone, dict(reversed(data.items())), **SMALL)
        assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")


class TestReading:
    def test_rows_from_any_shards_in_any_order(self, tmp_path: Path, backbone: torch.nn.Module, texts: Texts) -> None:
        taps = ActivationCache.build(tmp_path / "c", backbone, texts(60), **SMALL)["data"]
        whole = taps.load()
        assert taps.shape == whole.shape == (len(taps), 48)
        order = torch.randperm(len(taps), generator=torch.Generator().manual_seed(0)).repeat(2)
        assert torch.equal(taps[order], whole[order])
        assert taps[order[:0]].shape == (0, 48)
        assert torch.equal(torch.cat(list(taps.chunks())), whole)

    def test_columns_of_some_layers(self, tmp_path: Path, backbone: torch.nn.Module, texts: Texts) -> None:
        taps = ActivationCache.build(tmp_path / "c", backbone, texts(), **SMALL)["data"]
        some = taps.select([0, 2])
        assert some.layers == [0, 2] and some.widths == [16, 16] and some.shape == (len(taps), 32)
        rows = torch.tensor([3, 1, 20])
        assert torch.equal(some[rows], torch.cat([taps[rows][:, :16], taps[rows][:, 32:]], 1))
        assert torch.equal(some.load(), some[torch.arange(len(taps))])
        with pytest.raises(ValueError, match=r"expected some of \[0, 1, 2\], got \[5\]"):
            taps.select([5])

    def test_little_is_kept_mapped(self, tmp_path: Path, backbone: torch.nn.Module, texts: Texts) -> None:
        ActivationCache.build(tmp_path / "c", backbone, texts(60), **SMALL)
        taps = ActivationCache.open(tmp_path / "c", resident_bytes=2 * 8 * 48 * 4)["data"]  # two shards or so
        whole = taps.load()
        for row in range(len(taps)):
            assert torch.equal(taps[torch.tensor([row])], whole[row : row + 1])
            assert len(taps.mapped._open) <= 2

    @pytest.mark.parametrize("protocol", ["memory", "file"])
    def test_addresses(self, tmp_path: Path, backbone: torch.nn.Module, texts: Texts, protocol: str) -> None:
        import fsspec

        here = ActivationCache.build(tmp_path / "c", backbone, texts(), dtype="int8", **SMALL)
        address = f"file://{tmp_path}/c"
        if protocol == "memory":
            address = "memory://some/where"
            fsspec.filesystem("memory").put(f"{tmp_path}/c/", "/some/where/", recursive=True)
        there = ActivationCache.open(address)
        assert there.verify() == []
        assert torch.equal(there["data"].load(), here["data"].load())
        assert torch.equal(there["data"][there["data"].rows], here["data"][here["data"].rows])

    def test_an_address_without_a_cache(self) -> None:
        with pytest.raises(DataError, match=r"memory://nothing/here holds no manifest\.json; build it first"):
            ActivationCache.open("memory://nothing/here")
        with pytest.raises(DataError, match="nosuch"):
            ActivationCache.open("nosuch://nothing/here")

    def test_addresses_are_for_reading(self, backbone: torch.nn.Module, texts: Texts) -> None:
        with pytest.raises(DataError, match="addresses are for reading"):
            ActivationCache.build("memory://x", backbone, texts())


class TestEstimate:
    def test_it_comes_before_the_first_batch_and_costs_nothing(
        self, tmp_path: Path, counting: Callable[..., Any], texts: Texts
    ) -> None:
        said: list[Any] = []
        extractor = counting()
        data = texts(60)
        ActivationCache.build(
            tmp_path / "c", extractor, data, on_estimate=said.append, progress=lambda *s: said.append(s), **SMALL
        )
        estimate, *steps = said
        distinct = len(data.unique_inputs()[0])
        assert estimate.rows == 60 and estimate.entries == estimate.entries_left == distinct
        size = sum(file.stat().st_size for file in (tmp_path / "c").glob("shard-*.safetensors"))
        assert estimate.bytes == estimate.bytes_left == distinct * 48 * 4 and size < estimate.bytes + 200 * 10
        assert 0 < estimate.seconds < 60
        assert steps[-1] == (distinct, distinct) and steps == sorted(steps)
        assert extractor.batches == len(steps) == -(-distinct // 4)  # the timed batches were not run again

    def test_without_building(self, backbone: torch.nn.Module, texts: Texts) -> None:
        estimate = ActivationCache.estimate(backbone, {"a": texts(30), "b": texts(30, 1)}, dtype="bfloat16", **SMALL)
        assert estimate.rows == 60 and estimate.entries < 60 and estimate.seconds > 0
        assert estimate.entries * 48 * 2 < estimate.bytes < estimate.entries * 48 * 2 + 4000
        assert "60 rows" in str(estimate) and "KiB" in str(estimate)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"dtype": "float16"}, "dtype: expected one of float32, bfloat16, int8, got 'float16'"),
            ({"batch_size": 0}, "batch_size: expected a whole number of at least 1, got 0"),
            ({"batches_per_shard": True}, "batches_per_shard: expected a whole number"),
            ({"taps": [7]}, "7 is out of range for a backbone of 3 layers"),
            ({"pooling": "max"}, "pooling: expected one of"),
            ({"preprocessor": 3}, "preprocessor: expected a transformers tokenizer"),
            ({"views": 2}, "its rows are not drawn at random"),
        ],
    )
    def test_out_of_range(
        self, tmp_path: Path, backbone: torch.nn.Module, texts: Texts, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            ActivationCache.build(tmp_path / "c", backbone, texts(), **arguments)
        assert not (tmp_path / "c").exists()

    def test_data_without_text_or_rows(self, tmp_path: Path, backbone: torch.nn.Module) -> None:
        with pytest.raises(DataError, match="data 'data': its rows have no text"):
            ActivationCache.build(tmp_path, backbone, EncodedDataset("d", labels=torch.zeros(3)))
        with pytest.raises(DataError, match="data 'a': expected at least one row"):
            ActivationCache.build(tmp_path, backbone, {"a": []})
        with pytest.raises(DataError, match="expected at least one data set"):
            ActivationCache.build(tmp_path, backbone, {})


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 5),
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 9),
)
def test_int8_is_within_half_a_step_whatever_the_scale(
    count: int, widths: list[int], exponent: int, seed: int
) -> None:
    taps = torch.randn(count, sum(widths), generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    taps[:, : widths[0]] *= torch.arange(count)[:, None] > 0  # a tap of zeros
    stored = encode(taps, "int8", widths)
    assert stored["taps"].dtype == torch.int8 and list(stored["scales"].shape) == [count, len(widths)]
    columns = tap_of_column(widths)
    error = (decode(stored, columns) - taps).abs()
    assert (error <= stored["scales"][:, columns] * 0.501).all()


def test_int8_refuses_what_is_not_finite() -> None:
    with pytest.raises(DataError, match="not finite"):
        encode(torch.tensor([[1.0, float("nan")]]), "int8", [2])
