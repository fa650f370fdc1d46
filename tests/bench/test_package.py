"""levi-fast bench package: imports in fresh interpreters, sizes, and a build from tracked files alone."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from levi_fast.bench import package
from levi_fast.bench.package import (
    PackageOptions,
    bench_package,
    build_figures,
    import_seconds,
    in_turn,
    package_sizes,
    summary,
)
from levi_fast.cli import main
from levi_fast.errors import DataError


def test_the_command_writes_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Light modules in place of torch and transformers, in the same relation.
    peers = {"torch, transformers": "import json", "torch, transformers, levi_fast": "import json, levi_fast"}
    monkeypatch.setattr(package, "IMPORTS", peers)
    monkeypatch.setattr(package, "RATIOS", {name: package.RATIOS[name] for name in package.TARGET})
    output = tmp_path / "package.json"
    with pytest.raises(SystemExit) as ended:
        main(["bench", "package", "--rounds", "2", "--output", str(output)])
    assert ended.value.code == 0
    document = json.loads(output.read_text())
    assert set(document["imports"]["statements"]) == set(peers)
    (ratio,) = document["imports"]["ratios"].values()
    assert ratio["target"] == 1.15 and ratio["reached"] == (ratio["median"] <= 1.15)
    assert document["help"]["rounds"] == 2 and document["help"]["seconds"]["median"] > 0
    assert document["sizes"]["files"] > 100 and "build" not in document
    assert document["measured_on"]["versions"]["torch"]
    shown = capsys.readouterr().out
    assert "1.15" in shown and "levi-fast --help" in shown


def test_an_import_is_timed_without_the_interpreters_start() -> None:
    assert import_seconds("time.sleep(0.05)") > 0.05
    start = time.perf_counter()
    assert import_seconds("pass") < (time.perf_counter() - start) / 2
    with pytest.raises(DataError, match="no_such_module"):
        import_seconds("import no_such_module")


def test_the_first_round_is_not_kept_and_the_order_alternates() -> None:
    called: list[str] = []

    def call(name: str) -> float:
        called.append(name)
        return float(len(called))

    times = in_turn({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=2)
    assert called == ["b", "a", "a", "b", "b", "a"]
    assert times == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


@pytest.mark.parametrize(("slow", "reached"), [(1.1, True), (1.2, False)])
def test_a_slow_import_misses_the_target(slow: float, reached: bool) -> None:
    (name,) = package.TARGET
    over, under = package.RATIOS[name]
    found = summary({over: [slow] * 7, under: [1.0] * 7}, {name: (over, under)})["ratios"][name]
    assert found["median"] == slow and found["interval"] == [slow, slow] and found["reached"] is reached


def test_sizes_leave_out_compiled_python(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").mkdir()
    for name, size in (("a.py", 10), ("lib.so", 100), ("__pycache__/a.pyc", 1000)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert package_sizes(tmp_path) == {"package_bytes": 110, "files": 2, "native_bytes": {"lib.so": 100}}


def test_a_wheel_is_built_from_tracked_files(tmp_path: Path) -> None:
    setup = (
        "from setuptools import setup\nopen('two.py')\nsetup(name='tiny', version='1', py_modules=['one', 'two'])\n"
    )
    (tmp_path / "setup.py").write_text(setup)
    (tmp_path / "one.py").write_text("")
    (tmp_path / "two.py").write_text("")
    with pytest.raises(DataError, match="--build: expected levi_fast to run from a git checkout"):
        build_figures(tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "setup.py", "one.py"], cwd=tmp_path, check=True)
    with pytest.raises(DataError, match=r"No such file.*two"):  # not tracked, so not in the copy that is built
        build_figures(tmp_path)
    subprocess.run(["git", "add", "two.py"], cwd=tmp_path, check=True)
    found = build_figures(tmp_path)
    assert found["wheel"] == "tiny-1-py3-none-any.whl" and found["wheel_bytes"] > 300
    assert found["native_build_seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".git") == ["one.py", "setup.py", "two.py"]


def test_build_outside_a_checkout_fails_before_any_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "CHECKOUT", tmp_path)
    monkeypatch.setattr(package, "in_turn", lambda *_: pytest.fail("timed first"))
    with pytest.raises(DataError, match="--build"):
        bench_package(PackageOptions(build=True), None)
    options: Any = {"rounds": 0}
    with pytest.raises(DataError, match="rounds"):
        PackageOptions(**options)
