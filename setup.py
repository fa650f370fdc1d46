"""Build script: maps ``kernels/`` to ``levi_fast.kernels`` and drives CMake for the native part.

What is compiled, from which sources and with which flags stands in CMakeLists.txt and nowhere else. Metadata and
dependencies stand in pyproject.toml. ``LEVI_FAST_NO_NATIVE=1`` installs the pure-Python package.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TRUE_WORDS = {"1", "true", "yes", "on"}
FALSE_WORDS = {"", "0", "false", "no", "off"}


def native_wanted() -> bool:
    """Whether to build the native part; anything but a plain yes or no in the variable is an error."""
    value = os.environ.get("LEVI_FAST_NO_NATIVE", "").strip().lower()
    if value in TRUE_WORDS:
        return False
    if value in FALSE_WORDS:
        return True
    raise SystemExit(f"levi_fast: LEVI_FAST_NO_NATIVE must be 1 or 0, got {value!r}")


def find_tool(name: str, directory_attribute: str) -> str | None:
    """Path of a build tool: the Python package's copy first, then this environment's scripts, then PATH.

    pip run as ``.venv/bin/pip`` does not put ``.venv/bin`` on PATH, so PATH alone is not enough.
    """
    if importlib.util.find_spec(name) is not None:
        directory = getattr(importlib.import_module(name), directory_attribute, None)
        if directory is not None and (found := shutil.which(name, path=str(directory))):
            return found
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def find_compiler() -> str | None:
    """The C++ compiler CMake will pick: $CXX where set, else the first of the usual names."""
    if os.environ.get("CXX"):
        return shutil.which(os.environ["CXX"].split()[0])
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def torch_root() -> Path | None:
    """Folder of the installed torch, found without importing it (importing takes seconds)."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def require_build_tools() -> tuple[str, str, Path, str]:
    """Paths of cmake, ninja, torch and pybind11's CMake folder, or one message that lists all that is missing."""
    missing = []
    cmake = find_tool("cmake", "CMAKE_BIN_DIR")
    if cmake is None:
        missing.append("cmake >= 3.24 (pip install cmake)")
    ninja = find_tool("ninja", "BIN_DIR")
    if ninja is None:
        missing.append("ninja (pip install ninja)")
    if find_compiler() is None:
        wanted = os.environ.get("CXX")
        missing.append(
            f"the C++ compiler named by CXX={wanted!r}"
            if wanted
            else "a C++17 compiler (for example: apt install g++, or xcode-select --install)"
        )
    torch = torch_root()
    if torch is None:
        missing.append("torch >= 2.11 at build time (pip install torch first, then pip install --no-build-isolation)")
    pybind11_dir = ""
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11 (pip install pybind11)")
    else:
        pybind11_dir = importlib.import_module("pybind11").get_cmake_dir()
    if missing or cmake is None or ninja is None or torch is None:
        lines = "\n".join(f"  - {item}" for item in missing)
        raise SystemExit(
            f"\nlevi_fast: the native CPU kernels cannot be built on this machine. Missing:\n{lines}\n"
            "Install what is missing, or set LEVI_FAST_NO_NATIVE=1 to install the pure-Python package\n"
            "(same results; the kernels are then served by PyTorch's own operators).\n"
        )
    return cmake, ninja, torch, pybind11_dir


class BuildNative(build_ext):
    """Runs CMake and puts both libraries beside the package's Python files."""

    def build_extension(self, ext: Extension) -> None:
        cmake, ninja, torch, pybind11_dir = require_build_tools()
        # One build folder per interpreter, so that a second build only recompiles what changed.
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{platform.machine()}"
        stage = build / "stage"
        # Tools may sit in another environment than last time (a moved checkout): CMake's cache would insist.
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text(errors="replace"):
            shutil.rmtree(build)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={stage}",
            f"-DLEVI_FAST_TORCH_ROOT={torch}",
            f"-Dpybind11_DIR={pybind11_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        if cuda := os.environ.get("LEVI_FAST_CUDA", "").strip().lower():
            configure.append(f"-DLEVI_FAST_CUDA={cuda}")
        if architectures := os.environ.get("LEVI_FAST_CUDA_ARCHITECTURES", "").strip():
            configure.append(f"-DLEVI_FAST_CUDA_ARCHITECTURES={architectures}")
        jobs = os.environ.get("MAX_JOBS")
        shutil.rmtree(stage, ignore_errors=True)  # never install a library that this build did not make
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)
            subprocess.run([cmake, "--install", str(build)], check=True, stdout=subprocess.DEVNULL)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"\nlevi_fast: the native build failed (exit status {error.returncode}); the compiler's own message "
                "is above.\nSet LEVI_FAST_NO_NATIVE=1 to install the pure-Python package instead.\n"
            ) from error
        for target in self._targets():
            target.mkdir(parents=True, exist_ok=True)
            for library in sorted(stage.iterdir()):
                # Replace, never overwrite: a process that has the old file mapped must keep its old bytes.
                temporary = target / f".{library.name}.new"
                shutil.copy2(library, temporary)
                os.replace(temporary, target / library.name)

    def _targets(self) -> list[Path]:
        """Where the libraries go: always the build tree, and the checkout too when installing in place."""
        extension = Path(self.get_ext_fullpath("levi_fast._build_info")).parent
        in_place = self.editable_mode or self.inplace
        return [ROOT / "levi_fast"] if in_place else [extension]

    def copy_extensions_to_source(self) -> None:
        """Nothing left to copy: ``build_extension`` has written into the checkout already."""

    def get_outputs(self) -> list[str]:
        return [str(path) for target in self._targets() for path in sorted(target.glob("*.so"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


packages = find_packages(include=["levi_fast", "levi_fast.*"], exclude=["levi_fast.kernels", "levi_fast.kernels.*"])
kernel_packages = ["levi_fast.kernels", *(f"levi_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=packages + kernel_packages,
    # levi_fast/kernels in the checkout is a link to kernels/ (so that Python started there finds it too); the
    # mapping makes every build read the real folder.
    package_dir={"levi_fast.kernels": "kernels"},
    ext_modules=[Extension("levi_fast._build_info", sources=[])] if native_wanted() else [],
    cmdclass={"build_ext": BuildNative},
)
