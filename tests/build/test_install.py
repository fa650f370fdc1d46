"""Real installations: wheel and editable, native and pure, used from inside and outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no checkout around the tests"),
]
ASK = """
import torch
from levi_fast.functional import masked_mean_pool
from levi_fast.kernels import backend_report, native
masked_mean_pool(torch.ones(2, 3, 4))
print(backend_report()["masked_mean_pool"]["cpu"].serves, native.load().path, native.load().causes)
"""


def environment(**extra: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LEVI_FAST_", "PYTHON"))}
    return {**inherited, "OMP_NUM_THREADS": "1", **extra}


def run(*command: str | Path, cwd: Path, **extra: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment(**extra), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree without anything built."""
    target = tmp_path_factory.mktemp("copy") / "checkout"
    top = {".venv", ".git", "build", "dist", "tests", "benchmarks", "demo-output"}
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")

    def ignore(folder: str, names: list[str]) -> set[str]:
        return ignored(folder, names) | (top & set(names) if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, target, symlinks=True, ignore=ignore)
    return target


@pytest.fixture
def fresh_python(tmp_path: Path) -> Path:
    """A new virtual environment that sees this one's packages, but not its levi_fast."""
    folder = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # A plain path line: the .pth files over there, an editable levi_fast's among them, are not read.
    (site / "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def build_wheel(checkout: Path, folder: Path, **extra: str) -> Path:
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        checkout,
        cwd=folder,
        **extra,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(python: Path, *what: str | Path, **extra: str) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation"]
    run(*pip, *what, cwd=python.parent, **extra)


def test_native_wheel(checkout: Path, fresh_python: Path, tmp_path: Path) -> None:
    wheel = build_wheel(checkout, tmp_path)
    assert not wheel.name.endswith("none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "levi_fast/liblevi_fast.so" in names
    assert any(re.fullmatch(r"levi_fast/_build_info\..*so", name) for name in names)
    check_contents(wheel)
    assert not list((checkout / "levi_fast").glob("*.so")), "a wheel must not build into the checkout"
    install(fresh_python, wheel)
    site = next((fresh_python.parent.parent / "lib").glob("python*/site-packages"))
    for cwd in (tmp_path, checkout):
        answer = run(fresh_python, "-c", ASK, cwd=cwd)
        assert answer.startswith(f"cpp {site / 'levi_fast' / 'liblevi_fast.so'}"), cwd


def test_native_editable(checkout: Path, fresh_python: Path, tmp_path: Path) -> None:
    install(fresh_python, "-e", checkout)
    try:
        for cwd in (tmp_path, checkout):
            answer = run(fresh_python, "-c", ASK, cwd=cwd)
            assert answer.startswith(f"cpp {checkout / 'levi_fast' / 'liblevi_fast.so'}"), cwd
    finally:
        for library in (checkout / "levi_fast").glob("*.so"):
            library.unlink()


def test_pure_wheel(checkout: Path, fresh_python: Path, tmp_path: Path) -> None:
    wheel = build_wheel(checkout, tmp_path, LEVI_FAST_NO_NATIVE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    check_contents(wheel)
    install(fresh_python, wheel)
    for cwd in (tmp_path, checkout):
        assert run(fresh_python, "-W", "ignore", "-c", ASK, cwd=cwd).startswith("eager None"), cwd


def test_pure_editable(checkout: Path, fresh_python: Path, tmp_path: Path) -> None:
    install(fresh_python, "-e", checkout, LEVI_FAST_NO_NATIVE="1")
    for cwd in (tmp_path, checkout):
        assert run(fresh_python, "-W", "ignore", "-c", ASK, cwd=cwd).startswith("eager None"), cwd


def check_contents(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    sources = {
        f"levi_fast/{path.relative_to(ROOT / 'levi_fast').as_posix()}" for path in ROOT.glob("levi_fast/**/*.py")
    }
    sources |= {
        f"levi_fast/kernels/{path.relative_to(ROOT / 'kernels').as_posix()}" for path in ROOT.glob("kernels/**/*.py")
    }
    assert sources <= set(names)
    assert "levi_fast/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "levi_fast",
        next(n for n in names if ".dist-info" in n).split("/")[0],
    }
    (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "License-File: LICENSE\n" in metadata
    (licence,) = (archive.read(name).decode() for name in names if name.endswith("/licenses/LICENSE"))
    assert "Apache License" in licence and "TERMS AND CONDITIONS" in licence
    (entry,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "levi-fast = levi_fast.cli:main" in entry


def failing_build(checkout: Path, **extra: str) -> str:
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env=environment(**extra),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert not list((checkout / "levi_fast").glob("*.so")), "nothing may be half built"
    return done.stdout + done.stderr


def test_no_compiler_is_told_with_the_way_out(checkout: Path, tmp_path: Path) -> None:
    message = failing_build(checkout, PATH=str(tmp_path), CXX="")
    assert "a C++17 compiler" in message
    assert "set LEVI_FAST_NO_NATIVE=1 to install the pure-Python package" in message
    message = failing_build(checkout, CXX="no-such-compiler")
    assert "the C++ compiler named by CXX='no-such-compiler'" in message


def test_no_build_tools_are_told_together(checkout: Path, tmp_path: Path) -> None:
    """Without cmake, ninja, pybind11 and torch: a Python that sees setuptools alone."""
    import setuptools

    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        source = Path(setuptools.__file__).parent.parent / name
        (alone / name).symlink_to(source)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    done = subprocess.run(
        [str(python), "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env=environment(PATH=str(tmp_path), PYTHONPATH=str(alone)),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    for missing in (
        "cmake >= 3.24",
        "ninja",
        "a C++17 compiler",
        "torch >= 2.11",
        "pybind11",
        "LEVI_FAST_NO_NATIVE=1",
    ):
        assert missing in done.stderr, done.stderr


def test_a_failing_compiler_leaves_nothing_behind(checkout: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho broken on purpose >&2\nexit 1\n")
    broken.chmod(0o755)
    shutil.rmtree(checkout / "build", ignore_errors=True)
    assert "Set LEVI_FAST_NO_NATIVE=1 to install the pure-Python package" in failing_build(checkout, CXX=str(broken))
    shutil.rmtree(checkout / "build", ignore_errors=True)


def test_a_misspelt_choice_is_an_error(checkout: Path) -> None:
    assert "LEVI_FAST_NO_NATIVE must be 1 or 0, got 'maybe'" in failing_build(checkout, LEVI_FAST_NO_NATIVE="maybe")
