"""Writing and running one artefact per format: torch.export's archive, ONNX, AOTInductor's package."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from levi_fast.errors import DataError
from levi_fast.export.inputs import InputSpec

# A protobuf file ends at 2 GiB; weights beyond this go into a second file, NAME.onnx.data.
ONNX_INLINE_BYTES = 1_500_000_000

Runner = Callable[[Sequence[Tensor]], Tensor]


def require_tools(kind: str, verify: bool) -> None:
    """Raise DataError, naming what to install, where a format's tools are missing."""
    if kind == "onnx":
        for package in ("onnx", "onnxscript", *(["onnxruntime"] if verify else [])):
            if importlib.util.find_spec(package) is None:
                raise DataError(f"--format onnx needs {package}: pip install 'levi_fast[export]'")
    if kind == "aoti" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise DataError("--format aoti compiles C++ and found no compiler; install g++, or name one in CXX")


def write(kind: str, program: ExportedProgram, file: Path, inputs: Sequence[InputSpec]) -> None:
    """Write a traced program as ``file`` (and, for large ONNX models, ``file`` + ".data")."""
    {"pt2": _write_pt2, "onnx": _write_onnx, "aoti": _write_aoti}[kind](program, file, inputs)


def load(kind: str, file: Path, inputs: Sequence[InputSpec]) -> Runner:
    """The written artefact as a function of its tensors."""
    if kind == "onnx":
        return _onnx_runner(file, inputs)
    if kind == "pt2":
        module: Any = torch.export.load(str(file)).module()
    else:
        module = torch._inductor.aoti_load_package(str(file))

    def run(arguments: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            result = module(*arguments)
        return result if isinstance(result, Tensor) else result[0]

    return run


def _write_pt2(program: ExportedProgram, file: Path, _inputs: Sequence[InputSpec]) -> None:
    torch.export.save(program, str(file))


def _write_onnx(program: ExportedProgram, file: Path, inputs: Sequence[InputSpec]) -> None:
    names = [spec.name for spec in inputs]
    with contextlib.redirect_stdout(io.StringIO()), _quiet_log("torch.onnx"):
        found: Any = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=["logits"], verbose=False
        )
    assert found is not None
    _name_dimensions(found.model, inputs)
    size = sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())
    found.save(str(file), external_data=size > ONNX_INLINE_BYTES)


@contextlib.contextmanager
def _quiet_log(name: str) -> Iterator[None]:
    """Errors alone: without torchvision the exporter warns of every op of torchvision's."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _name_dimensions(model: Any, inputs: Sequence[InputSpec]) -> None:
    """Call the dynamic dimensions by their names; the tracer numbers them. Traces of this machine's paths go."""
    renamed: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        for found, wanted in zip(value.shape, spec.shape, strict=True):
            if isinstance(wanted, str):
                renamed[str(found)] = wanted
    for value in [*model.graph.inputs, *model.graph.outputs]:
        for axis, dimension in enumerate(value.shape or ()):
            if str(dimension) in renamed:
                value.shape[axis] = renamed[str(dimension)]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
            if output not in model.graph.outputs:
                output.shape = None  # onnxruntime infers them again, by the names above


def _onnx_runner(file: Path, inputs: Sequence[InputSpec]) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch wants the cores between calls
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(arguments: Sequence[Tensor]) -> Tensor:
        given = {spec.name: tensor.numpy() for spec, tensor in zip(inputs, arguments, strict=True)}
        return torch.from_numpy(session.run(["logits"], given)[0])

    return run


def _write_aoti(program: ExportedProgram, file: Path, _inputs: Sequence[InputSpec]) -> None:
    with _private_cache() as folder:
        raw = folder / "model.pt2"
        with contextlib.redirect_stdout(io.StringIO()):
            torch._inductor.aoti_compile_and_package(program, package_path=str(raw))
        _without_paths(raw, file, str(folder))


@contextlib.contextmanager
def _private_cache() -> Iterator[Path]:
    """A folder of its own for the compiler's files: the usual one is called after the user."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="levi-fast-aoti-") as folder:
        os.environ[name] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _without_paths(source: Path, target: Path, folder: str) -> None:
    """Copy a package with its C++ sources emptied, and with this machine's paths overwritten in the compiled code.

    They stand there as names of source files, in debugging information and error messages; an overwriting of the same
    length moves nothing. A source's name stays: torch 2.11 derives those of other files from it.
    """
    torch_folder = str(Path(torch.__file__).parent)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            data = b"" if entry.filename.endswith(".cpp") else old.read(entry)
            for path in (folder, torch_folder, os.path.realpath(torch_folder), os.getcwd(), os.path.expanduser("~")):
                if len(path) > 1:
                    data = data.replace(path.encode(), b"/" + b"_" * (len(path.encode()) - 1))
            new.writestr(zipfile.ZipInfo(entry.filename), data)
