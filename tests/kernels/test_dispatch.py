"""Who serves, why not the others, and what happens when one is asked for or is missing."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import levi_fast
from levi_fast.functional import masked_mean_pool
from levi_fast.kernels import BackendUnavailableError, backend_report, native, use_backend
from levi_fast.kernels.registry import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]
REPORT = "from levi_fast.kernels import backend_report; print(backend_report()['masked_mean_pool']['cpu'].serves)"


def test_report_names_one_server_and_a_reason_for_every_other() -> None:
    report = levi_fast.backend_report()
    for by_device in report.values():
        for device, row in by_device.items():
            assert row.serves in BACKENDS[1:], device
            assert set(row.others) == set(BACKENDS[1:]) - {row.serves}
            assert all(row.others.values())
    assert report["masked_mean_pool"]["cuda"].others["cpp"] == "the cpp kernels serve cpu, not cuda"


def test_gpu_backends_say_why_they_do_not_serve() -> None:
    for row in levi_fast.backend_report().values():
        for name in ("triton", "cuda"):
            assert row["cpu"].others[name] == f"the {name} kernels serve cuda, not cpu"
            if not torch.cuda.is_available() and torch.version.hip is None:
                assert row["cuda"].others[name] == "this PyTorch sees no GPU"


def test_the_cuda_library_is_not_looked_for_without_cuda() -> None:
    status = native.load_cuda()
    if torch.version.cuda is None:
        assert status == native.CudaStatus(None, "this PyTorch is built without CUDA")
    else:
        assert bool(status.path) != bool(status.reason)


def test_a_missing_or_foreign_cuda_library_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_folders", lambda: iter([tmp_path]))
    missing = native.load_cuda.__wrapped__()
    assert missing.path is None and "liblevi_fast_cuda.so: not there (built without nvcc" in missing.reason
    (tmp_path / native.CUDA_LIBRARY_NAME).write_bytes(b"not a library")
    foreign = native.load_cuda.__wrapped__()
    assert foreign.path is None and f"{tmp_path / native.CUDA_LIBRARY_NAME}: " in foreign.reason


@pytest.mark.native
def test_native_serves_cpu_by_default() -> None:
    assert backend_report()["masked_mean_pool"]["cpu"].serves == "cpp"


def test_a_forced_backend_shows_in_the_report_and_ends_with_its_block() -> None:
    before = backend_report()
    with use_backend("eager"):
        row = backend_report()["masked_mean_pool"]["cpu"]
        assert row.serves == "eager"
        with use_backend("auto"):
            assert backend_report() == before
        assert backend_report()["masked_mean_pool"]["cpu"].serves == "eager"
    assert backend_report() == before
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert backend_report() == before


def test_unknown_and_unable_backends_raise_with_the_reason() -> None:
    with pytest.raises(BackendUnavailableError, match="must be one of auto, cpp, triton, cuda, eager; got 'fast'"):
        use_backend("fast").__enter__()
    able = {name for rows in backend_report().values() for row in rows.values() for name in (row.serves,)}
    for name in {"triton", "cuda"} - able:
        if all(name in row.others and "first" not in row.others[name] for row in _rows()):
            with pytest.raises(BackendUnavailableError, match=f"asks for '{name}', which cannot serve: .+"):
                use_backend(name).__enter__()


def _rows() -> list[levi_fast.kernels.OpReport]:
    return [row for by_device in backend_report().values() for row in by_device.values()]


@pytest.mark.native
def test_a_backend_that_cannot_serve_this_device_raises_at_the_call() -> None:
    with use_backend("cpp"), pytest.raises(BackendUnavailableError, match="the cpp kernels serve cpu, not meta"):
        masked_mean_pool(torch.ones(1, 2, 3, device="meta"))


def test_environment_variable(run_python: Run) -> None:
    assert run_python(REPORT, LEVI_FAST_BACKEND="eager").stdout.strip() == "eager"
    bad = run_python(REPORT, LEVI_FAST_BACKEND="warp")
    assert "LEVI_FAST_BACKEND must be one of auto, cpp, triton, cuda, eager; got 'warp'" in bad.stderr


@pytest.mark.native
def test_instruction_set_variable(run_python: Run) -> None:
    script = "from levi_fast.kernels import native; print(native.cpu_isa())"
    assert run_python(script, LEVI_FAST_CPU_ISA="scalar").stdout.strip() == "scalar"
    call = "import torch; from levi_fast.functional import masked_mean_pool; masked_mean_pool(torch.ones(1, 1, 1))"
    for name, message in [
        ("mmx", "must be one of auto, scalar, avx2, avx512, neon; got 'mmx'"),
        *((isa, f"'{isa}' is not part of this build") for isa in _not_compiled()),
    ]:
        assert f"LEVI_FAST_CPU_ISA: CPU instruction set {message}" in run_python(call, LEVI_FAST_CPU_ISA=name).stderr


def _not_compiled() -> list[str]:
    info = native.load().build_info
    return [] if info is None else sorted({"avx2", "avx512", "neon"} - set(info.isa_compiled()))


@pytest.mark.native
def test_unknown_instruction_set_leaves_the_old_one() -> None:
    before = native.cpu_isa()
    with pytest.raises(RuntimeError, match="got 'mmx'"):
        native.set_cpu_isa("mmx")
    assert native.cpu_isa() == before


# --- without the native library -----------------------------------------------------------------------------------


@pytest.fixture
def pure_tree(tmp_path: Path) -> Path:
    """The package's Python files alone, as a folder that comes first on a fresh Python's path."""
    target = tmp_path / "pure"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "kernels")
    shutil.copytree(ROOT / "levi_fast", target / "levi_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", target / "levi_fast" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return target


MISSING = """
import warnings, torch
# An installed copy must not answer for the hidden library.
import importlib.metadata
importlib.metadata.distributions = lambda **_: []
from levi_fast.functional import masked_mean_pool
from levi_fast.kernels import backend_report, native
from levi_fast.kernels.schemas import SCHEMAS
hidden = torch.randn(2, 3, 4, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        masked_mean_pool(hidden).sum().backward()
print(len(caught), caught[0].message if caught else "")
print(backend_report()["masked_mean_pool"]["cpu"])
for name, text in SCHEMAS.items():
    assert str(getattr(torch.ops.levi_fast, name).default._schema) == f"levi_fast::{text}"
assert torch.allclose(hidden.grad, torch.full_like(hidden, 1.0))
"""
OPCHECK = "torch.library.opcheck(torch.ops.levi_fast.masked_mean_pool.default, (hidden, torch.ones(2, 3)))"


def test_missing_library_warns_once_and_eager_serves(run_python: Run, pure_tree: Path) -> None:
    done = run_python(MISSING + OPCHECK, cwd=pure_tree)
    assert done.returncode == 0, done.stderr
    warning, report = done.stdout.splitlines()[:2]
    assert warning.startswith("1 levi_fast: masked_mean_pool runs in plain PyTorch because the native library")
    assert "liblevi_fast.so: not there" in warning
    assert "serves='eager'" in report
    assert "'cpp': 'the native library could not be loaded:" in report


def test_asking_for_eager_is_no_reason_to_warn(run_python: Run, pure_tree: Path) -> None:
    done = run_python(MISSING, cwd=pure_tree, LEVI_FAST_BACKEND="eager")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 \n")


def test_asking_for_the_missing_library_raises_every_cause(run_python: Run, pure_tree: Path) -> None:
    done = run_python(MISSING, cwd=pure_tree, LEVI_FAST_BACKEND="cpp")
    assert done.returncode != 0
    assert "LEVI_FAST_BACKEND asks for 'cpp', which cannot serve" in done.stderr
    assert "liblevi_fast.so: not there" in done.stderr


@pytest.mark.slow
@pytest.mark.native
def test_a_broken_or_foreign_library_is_a_cause_not_a_crash(run_python: Run, pure_tree: Path) -> None:
    status = native.load()
    assert status.path is not None and status.build_info is not None
    package = pure_tree / "levi_fast"
    (package / "liblevi_fast.so").write_bytes(b"not a library")
    done = run_python(MISSING, cwd=pure_tree)
    assert "no _build_info module for this Python" in done.stdout, done.stderr
    shutil.copy(status.build_info.__file__, package)
    done = run_python(MISSING, cwd=pure_tree)
    assert "liblevi_fast.so: " in done.stdout and "serves='eager'" in done.stdout, done.stderr
    # Python files of another version: refused before it is loaded, since definitions cannot be taken back.
    shutil.copy(status.path, package)
    schemas = package / "kernels" / "schemas.py"
    schemas.write_text(schemas.read_text().replace("SymInt length)", "SymInt length, int extra=0)"))
    done = run_python(MISSING, cwd=pure_tree)
    assert "its op schemas differ from these Python files; build it again" in done.stdout, done.stderr
