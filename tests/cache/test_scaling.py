"""The cost model against what was measured, its units, and that docs/scaling.md shows what it says."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from levi_fast import DataError
from levi_fast.cache.scaling import DEVICES, SIZES, Cluster, decimal_bytes, duration, plan, tables

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "cache_cpu.json").read_text())
HERE = Cluster(1, 1, "cpu")


def measured(name: str) -> tuple[int, int, float]:
    """Texts, padded tokens a text, and the median build's seconds."""
    found = RESULTS[name]["measured"]
    return found["texts"], round(found["tokens_with_padding"] / found["texts"]), statistics.median(
        found["seconds"]["build"]
    )  # fmt: skip


def test_predicts_a_build_that_it_was_not_fitted_to() -> None:
    texts, tokens, seconds = measured("build_256_texts")
    predicted = plan(texts, tokens, SIZES["MiniLM"], HERE, dtype="float32").compute_seconds
    assert 1 / 1.25 < predicted / seconds < 1.25


def test_the_constant_is_the_measured_one() -> None:
    texts, tokens, seconds = measured("build_1024_texts")
    predicted = plan(texts, tokens, SIZES["MiniLM"], HERE, dtype="float32").compute_seconds
    assert predicted == pytest.approx(seconds, rel=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_predicts_the_bytes_on_disk(dtype: str) -> None:
    stored = RESULTS["dtypes"]["measured"][dtype]["bytes_per_text"]
    assert plan(1, 128, SIZES["MiniLM"], HERE, dtype=dtype).cache_bytes == pytest.approx(stored, rel=0.02)


@given(
    examples=st.integers(1, 10**9),
    tokens=st.integers(1, 4096),
    name=st.sampled_from(["1B", "8B"]),
    nodes=st.integers(1, 64),
    more=st.integers(2, 5),
)
def test_monotonic(examples: int, tokens: int, name: str, nodes: int, more: int) -> None:
    size = SIZES[name]
    one = plan(examples, tokens, size, Cluster(nodes, 8, "H100"), taps=2)
    assert plan(examples * more, tokens, size, Cluster(nodes, 8, "H100"), taps=2).seconds > one.seconds
    assert (
        plan(examples, tokens * more, size, Cluster(nodes, 8, "H100"), taps=2).compute_seconds > one.compute_seconds
    )
    assert plan(examples, tokens, size, Cluster(nodes * more, 8, "H100"), taps=2).seconds < one.seconds
    assert plan(examples, tokens, size, Cluster(nodes, 8, "H100"), taps=2 * more).cache_bytes > one.cache_bytes
    assert plan(examples, tokens, size, Cluster(nodes, 8, "A100"), taps=2).compute_seconds > one.compute_seconds
    assert plan(examples, tokens, SIZES["70B"], Cluster(nodes, 8, "H100"), taps=2).seconds > one.seconds
    assert one.seconds == max(one.compute_seconds, one.write_seconds)
    assert one.device_hours == pytest.approx(one.seconds * nodes * 8 / 3600)


def test_units() -> None:
    found = plan(10**6, 1, SIZES["8B"], Cluster(1, 1, "H100"), taps=1, utilisation=1.0)
    flop = 10**6 * (2 * 6.98e9 + 4 * 32 * 4096)
    assert found.compute_seconds == pytest.approx(flop / 989e12)
    assert found.cache_bytes == 10**6 * (4096 * 2 + 24)
    assert found.network_bytes_per_second <= 1e9
    assert (decimal_bytes(1.5e12), decimal_bytes(999), decimal_bytes(1e3)) == ("1.5 TB", "999 B", "1 kB")
    assert (duration(5400), duration(30), duration(200_000), duration(120)) == ("1.5 h", "30 s", "2.3 d", "2 min")


def test_refusals() -> None:
    for text in ("8", "0x8", "1x8:TPU", "x", "1x-1", "9999999x1"):
        with pytest.raises(DataError, match="--cluster"):
            Cluster.parse(text)
    with pytest.raises(DataError, match="needs 3 devices, got 1"):
        plan(10, 10, SIZES["70B"], Cluster(1, 1, "H100"))
    for options in ({"taps": 99}, {"dtype": "int4"}, {"utilisation": 0.0}, {"utilisation": float("nan")}):
        with pytest.raises(DataError, match=f"--{next(iter(options))}"):
            plan(10, 10, SIZES["1B"], Cluster(1, 1, "H100"), **options)  # type: ignore[arg-type]


def test_the_document_shows_what_the_model_says() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert tables() in text, "run `levi-fast cache plan --tables` and put what it prints into docs/scaling.md"
    assert "not measured" in text
    assert all(device.measured or "data sheet" in device.source for device in DEVICES.values())
