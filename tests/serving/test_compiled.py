"""AOTInductor's packages, loaded by a Python that lacks levi_fast and by a C++ program against libtorch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from levi_fast import LeviModel
from levi_fast.export import export_model
from levi_fast.export.inputs import head_inputs, model_inputs
from levi_fast.kernels import native

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler"),
]

SOURCES = Path(__file__).parent / "cpp"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ server, built by CMake against the installed torch."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake to build the C++ host with")
    build = tmp_path_factory.mktemp("host")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for words in ([cmake, *generator, "-S", str(SOURCES), "-B", str(build), prefix], [cmake, "--build", str(build)]):
        done = subprocess.run(words, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return build / "host"


@pytest.mark.parametrize(("head_only", "ops"), [(False, "plain"), (False, "fused"), (True, "fused")])
def test_python_and_cpp_hosts(
    text_model: Callable[..., LeviModel],
    serve: Callable[..., torch.Tensor],
    host: Path,
    tmp_path: Path,
    head_only: bool,
    ops: str,
) -> None:
    if ops == "fused" and not native.load().loaded:
        pytest.skip(native.load().reason)
    model = text_model()
    written = export_model(model, tmp_path / "m.pt2", format="aoti", head_only=head_only, ops=ops)
    assert written.largest_difference is not None and written.largest_difference < 1e-5
    library = tmp_path / "liblevi_fast.so" if ops == "fused" else None
    specs = head_inputs(model) if head_only else model_inputs(model)
    given = {spec.name: spec.example({"batch": 4, "sequence": 11}, seed=9) for spec in specs}
    keywords = dict(given)
    if head_only:
        keywords["taps"] = given["taps"].transpose(0, 1).flatten(1)
    with torch.no_grad():
        wanted = model(**keywords).logits
    found = serve("aoti", written.file, library, given)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)

    words = [str(host), str(written.file), str(library or "-")]
    for name, tensor in given.items():
        file = tmp_path / f"{name}.bin"
        file.write_bytes(tensor.numpy().tobytes())
        words += [str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape)), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    from_cpp = torch.from_numpy(np.array(done.stdout.split(), dtype=np.float32)).view(wanted.shape)
    torch.testing.assert_close(from_cpp, wanted, rtol=1e-5, atol=1e-6)


def test_cpp_host_reports_a_broken_package(host: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.pt2").write_bytes(b"not a package")
    done = subprocess.run([str(host), str(tmp_path / "broken.pt2"), "-"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr


def test_nothing_of_this_machine_is_in_a_package(text_model: Callable[..., LeviModel], tmp_path: Path) -> None:
    import zipfile

    written = export_model(text_model(), tmp_path / "m.pt2", format="aoti", verify=False)
    with zipfile.ZipFile(written.file) as package:
        content = b"".join(package.read(name) for name in package.namelist())
    for path in (Path.home(), Path.cwd(), Path(torch.__file__).parent, tmp_path):
        if len(str(path)) > 5:  # "/root" and the like may be part of a word
            assert str(path).encode() not in content
