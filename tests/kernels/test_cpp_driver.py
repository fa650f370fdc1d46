"""Builds and runs the kernels' own C++ tests: under sanitizers, and for AArch64 where this machine can emulate it."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.native,
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no sources beside the tests"),
    pytest.mark.skipif(importlib.util.find_spec("cmake") is None, reason="needs the cmake package"),
]


def build_and_run(folder: Path, *options: str, emulator: tuple[str, ...] = ()) -> str:
    import cmake
    import ninja

    tool = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}"]
    configure = [tool, "-S", str(ROOT), "-B", str(folder), *generator, "-DLEVI_FAST_KERNEL_TESTS=ON", *options]
    for command in (configure, [tool, "--build", str(folder)], [*emulator, str(folder / "levi_fast_kernel_tests")]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed" in done.stdout
    return done.stdout


def test_sanitizers(tmp_path: Path) -> None:
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    flags = ["-fsanitize=address,undefined", str(probe), "-o", str(tmp_path / "probe")]
    if compiler is None or subprocess.run([compiler, *flags], capture_output=True).returncode != 0:
        pytest.skip("this compiler has no sanitizer libraries")
    build_and_run(tmp_path / "build", "-DLEVI_FAST_SANITIZE=ON")


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_on_an_emulated_cpu(tmp_path: Path) -> None:
    output = build_and_run(
        tmp_path / "build",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
        emulator=("qemu-aarch64",),
    )
    assert "neon" in output
