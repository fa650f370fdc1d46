"""levi-fast bench kernels: rows that a reader can judge, and no time for a wrong result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from levi_fast.bench import ensemble, kernels, pooling, small_calls
from levi_fast.bench.errors import WrongResultError
from levi_fast.bench.kernels import KernelOptions, bench_kernels
from levi_fast.bench.timing import Rates, compared, interval_of_median
from levi_fast.cli import main
from levi_fast.errors import DataError

TINY = (2, 8, 4, 8, 3, 5)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ensemble, pooling):
        monkeypatch.setattr(module, "COLD_BYTES", 2**16)
    monkeypatch.setattr(ensemble, "CASES", [TINY])
    monkeypatch.setattr(kernels, "HEAD_STEP_CASES", [TINY])
    monkeypatch.setattr(pooling, "CASES", [(2, 8, 8), (2, 4, 4)])
    monkeypatch.setattr(small_calls, "LOSS_CASES", [(2, 4, 3)])
    monkeypatch.setattr(Rates, "gemm", lambda *_: 100.0)
    monkeypatch.setattr(Rates, "read", lambda *_: 10.0)


def test_the_command_writes_every_op_with_all_that_a_figure_is_judged_by(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "kernels.json"
    arguments = ["--seconds", "0.001", "--output", str(output), "--plots", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "kernels", "--device", "cpu", *arguments])
    assert ended.value.code == 0
    document = json.loads(output.read_text())
    assert document["measured_on"]["versions"]["torch"] == torch.__version__
    assert document["measured_on"]["cpu"]["threads"] == torch.get_num_threads()
    assert document["settings"]["dtypes"] == ["float32", "bfloat16"]
    assert {part: len(document[part]) for part in ("ensemble", "pooling", "loss", "head-step")} == {
        "ensemble": 4, "pooling": 10, "loss": 2, "head-step": 2,
    }  # fmt: skip
    for row in (*document["ensemble"], *document["pooling"], *document["loss"], *document["head-step"]):
        assert row["median_us"]["ours"] > 0 and row["rounds"] >= 7
        for found in row["peer_over_ours"].values():
            assert found["interval"][0] <= found["median"] <= found["interval"][1]
    assert set(document["ensemble"][0]["peer_over_ours"]) == {"eager", "hand-batched", "grouped-mm", "products"}
    for row in document["ensemble"]:  # no peer: it computes less
        assert row["best_peer"] != "products" and row["products_fraction"] > 0
    assert document["call_overhead_us"]["ensemble_module"] > document["call_overhead_us"]["aten_addmm"]
    shown = capsys.readouterr().out
    assert "ensemble: time of each peer over ours" in shown and "hand-batched" in shown.replace("…", "")
    for chart in ("ratios", "roofline"):
        assert "<svg" in (tmp_path / f"kernels-{chart}.svg").read_text()


def test_rows_of_another_run_stay(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    for dtype in ("float32", "bfloat16", "float32"):
        bench_kernels(KernelOptions(ops=("loss",), dtypes=(dtype,), seconds=0.001), output)
    assert [row["dtype"] for row in json.loads(output.read_text())["loss"]] == ["float32", "bfloat16"]


def test_a_wrong_result_is_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ensemble.levi_fast.LayerwiseEnsemble.forward

    def wrong(self: Any, *arguments: Any, **named: Any) -> Any:
        found = forward(self, *arguments, **named)
        return found._replace(layer_logits=found.layer_logits * 1.01)

    monkeypatch.setattr(ensemble.levi_fast.LayerwiseEnsemble, "forward", wrong)
    with pytest.raises(WrongResultError, match="layerwise_ensemble"):
        bench_kernels(KernelOptions(ops=("ensemble",), seconds=0.001), None)
    monkeypatch.setattr(pooling, "masked_mean_pool", lambda hidden, mask: hidden.mean(1))
    with pytest.raises(WrongResultError, match="masked_mean_pool"):
        bench_kernels(KernelOptions(ops=("pooling",), seconds=0.001), None)
    monkeypatch.setattr(small_calls.functional, "layerwise_loss", lambda y, *_: y.float().sum())
    with pytest.raises(WrongResultError, match="layerwise_loss"):
        bench_kernels(KernelOptions(ops=("loss",), seconds=0.001), None)


@pytest.mark.parametrize("form", [ensemble.HandBatched, ensemble.GroupedProduct])
def test_peers_compute_the_same(form: Any) -> None:
    layers, width, view_width, hidden, outputs, batch = TINY
    torch.manual_seed(0)
    peer = form([width] * layers, view_width, outputs, hidden_width=hidden, view_dropout=0.0)
    spec = ensemble.reference.LayerwiseEnsemble([width] * layers, view_width, outputs, hidden_width=hidden)
    spec.load_state_dict(peer.state_dict())
    taps, view = torch.randn(layers, batch, width), torch.randn(batch, view_width)
    torch.testing.assert_close(peer(taps, view), spec.eval()(taps, view).layer_logits)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ops": ("gemm",)}, "ops: expected some of pooling, ensemble"),
        ({"dtypes": ("float8",)}, "dtypes: expected some of float32"),
        ({"peers": ("jax",)}, "peers: expected some of eager"),
        ({"cases": (1,)}, "cases: expected numbers from 0 to 0; got 1"),
        ({"seconds": 0.0}, "seconds: expected a number above 0"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        KernelOptions(**options)


def test_a_gpu_that_is_not_there(capsys: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as ended:
        main(["bench", "kernels", "--device", "cuda"])
    assert ended.value.code == 2 and "torch sees no CUDA device" in capsys.readouterr().err


def test_the_interval_of_a_median_covers_it_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        low, high = interval_of_median(torch.rand(25, generator=generator).tolist())
        covered += low <= 0.5 <= high
    assert 0.94 <= covered / 400 <= 0.995
    assert interval_of_median([3.0, 1.0]) == [1.0, 3.0]


def test_a_floor_is_no_peer() -> None:
    found = compared({"ours": [2.0, 2.0], "floor": [1.0, 1.0], "peer": [3.0, 5.0]}, also=("floor",))
    assert found["best_peer"] == "peer" and found["best_peer_over_ours"] == 2.0
    assert "best_peer" not in compared({"ours": [1.0]})
