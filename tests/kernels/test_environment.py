"""The facts behind ``levi-fast env``."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from levi_fast.environment import ENVIRONMENT_VARIABLES, environment_report, render, source_digest
from levi_fast.kernels import native

ROOT = Path(__file__).resolve().parents[2]


def shown(report: dict) -> str:
    text = io.StringIO()
    Console(file=text, width=400).print(render(report))
    return text.getvalue()


def test_report_is_json_and_everything_in_it_is_shown() -> None:
    report = json.loads(json.dumps(environment_report()))
    text = shown(report)
    assert report["versions"]["torch"] in text
    for op, by_device in report["ops"].items():
        assert op in text
        for row in by_device.values():
            assert all(reason in text for reason in row["others"].values())
    for name, entry in report["environment_variables"].items():
        assert name in text and entry["meaning"] in text
    if report["native"]["loaded"]:
        assert report["native"]["flags"] in text  # brackets in it are no markup


def test_problems_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = native.NativeStatus(None, None, ("/somewhere/liblevi_fast.so: not there",))
    monkeypatch.setattr(native, "load", lambda: missing)
    report = environment_report()
    assert not report["native"]["loaded"]
    assert "/somewhere/liblevi_fast.so: not there" in shown(report)
    assert report["problems"] == [missing.reason]


def test_every_variable_that_is_read_is_documented() -> None:
    files = [*ROOT.glob("levi_fast/**/*.py"), *ROOT.glob("kernels/**/*.py"), ROOT / "setup.py"]
    read = {
        name
        for file in files
        for name in re.findall(r"""environ(?:\.get\(|\[)["'](\w+)["']""", file.read_text(encoding="utf-8"))
    }
    for file in ROOT.glob("csrc/**/*.cpp"):
        read |= set(re.findall(r'getenv\("(\w+)"\)', file.read_text(encoding="utf-8")))
    assert {"LEVI_FAST_CPU_ISA", "LEVI_FAST_NO_NATIVE"} <= read
    assert read <= set(ENVIRONMENT_VARIABLES)


@pytest.mark.native
@pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no sources beside the package")
def test_the_library_in_use_is_built_from_these_sources() -> None:
    info = native.load().build_info
    assert info is not None
    assert info.source_digest == source_digest(ROOT)
