"""``export_model``: a LEVI model as one file that runs without levi_fast, with what a server needs beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from levi_fast.cache.weights import file_sha256
from levi_fast.errors import DataError
from levi_fast.export import formats
from levi_fast.export.inputs import (
    BATCH,
    SEQUENCE,
    InputSpec,
    example_sizes,
    head_inputs,
    longest_sequence,
    model_inputs,
    task_inputs,
)
from levi_fast.export.modules import ServingHead, ServingModel
from levi_fast.export.tracing import custom_ops, trace
from levi_fast.kernels import native
from levi_fast.modeling import LeviModel
from levi_fast.offloading import is_placed
from levi_fast.quantization import QUANTIZED
from levi_fast.storage import staged_directory, write_atomic

FORMATS = ("pt2", "onnx", "aoti")
OPS = ("plain", "fused")
SUFFIXES = {"pt2": ".pt2", "onnx": ".onnx", "aoti": ".pt2"}
MANIFEST_VERSION = 1

# Of the largest logit, or of 1 where that is less. A compiler may sum in another order; bfloat16 keeps 8 bits.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Artefact:
    """What was written.

    Attributes:
        file: the model.
        manifest: JSON beside it: inputs, outputs, label names, versions, what verification found.
        largest_difference: of the logits from the model's, relative to the largest logit or 1; None if not verified.
    """

    file: Path
    manifest: Path
    largest_difference: float | None


def export_model(
    model: LeviModel,
    output: str | Path,
    *,
    format: str = "pt2",
    head_only: bool = False,
    ops: str = "plain",
    verify: bool = True,
    preprocessing: dict[str, Path] | None = None,
    max_length: int | None = None,
) -> Artefact:
    """Write a model, or its head, as an artefact.

    Args:
        model: as ``LeviModel.from_pretrained`` gives it, on the CPU. For ``head_only`` it needs no backbone.
        output: the new file, ending in ``.pt2`` (pt2, aoti) or ``.onnx``. Beside it come ``STEM.json`` and, where
            there is any, ``STEM-preprocessing/``; with fused ops ``liblevi_fast.so`` too.
        format: "pt2" (``torch.export.load``), "onnx", or "aoti" (compiled for this kind of CPU by AOTInductor).
        head_only: taps [L, B, D] (where widths differ [B, sum_l D_l]; of a model of tokens [L, B, T, D] or
            [B, T, sum_l D_l]) and the task model's inputs -> logits; else the whole model, the backbone ending at its
            last tap.
        ops: "plain" needs nothing but the format's runtime. "fused" keeps the library's own ops, which the host
            loads by ``torch.ops.load_library("liblevi_fast.so")``; not for ONNX.
        verify: run the written file on batches of several sizes and compare its logits with the model's.
        preprocessing: files to copy into ``STEM-preprocessing/``, by the name they get there.
        max_length: most tokens per text; None asks backbone and task model alone.

    Returns:
        the files' paths, and the largest difference found.

    Raises:
        DataError: for an argument that does not fit, a file that exists, a tool that is missing, a model that cannot
            be traced, or a file whose logits are not the model's; nothing is written then.
    """
    file = Path(output)
    folder = _check(model, file, format, head_only, ops, verify)
    model = model.eval()
    task = task_inputs(model)
    inputs = head_inputs(model) if head_only else model_inputs(model)
    names = [spec.name for spec in task]
    module: torch.nn.Module
    module = ServingHead(model, names) if head_only else ServingModel(model, [spec.name for spec in inputs], names)
    longest = longest_sequence(model, max_length)
    program = trace(module.eval(), inputs, longest, ops)
    with staged_directory(folder) as stage:
        written = stage / file.name
        formats.write(format, program, written, inputs)
        worst = verified(model, module, format, written, inputs, longest) if verify else None
        library = None
        if custom_ops(program):
            library = native.LIBRARY_NAME
            shutil.copyfile(str(native.load().path), stage / library)
        for name, source in (preprocessing or {}).items():
            target = stage / f"{file.stem}-preprocessing" / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
        document = _manifest(model, written, format, head_only, inputs, longest, library, worst, bool(preprocessing))
        write_atomic(stage / f"{file.stem}.json", json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return Artefact(file, folder / f"{file.stem}.json", worst)


def verified(
    model: LeviModel,
    module: torch.nn.Module,
    format: str,
    file: Path,
    inputs: list[InputSpec],
    longest: int,
) -> float:
    """The largest relative difference between the file's logits and ``model(...)``'s over several batch shapes.

    Raises:
        DataError: if it exceeds the tolerance for the model's dtype.
    """
    run = formats.load(format, file, inputs)
    tolerance = max(TOLERANCES.get(parameter.dtype, 5e-2) for parameter in module.parameters())
    worst = 0.0
    for seed, (batch, length) in enumerate(((1, 1), (2, min(9, longest)), (5, min(64, longest)))):
        sizes = {**example_sizes(), "batch": batch, "sequence": length}
        arguments = [spec.example(sizes, seed=seed) for spec in inputs]
        given = {spec.name: value for spec, value in zip(inputs, arguments, strict=True)}
        if "taps" in given:
            given["taps"] = as_model_taps(model, given["taps"])
        with torch.no_grad():
            wanted = model(**given).logits.double()
        found = run(arguments).double()
        if found.shape != wanted.shape:
            raise DataError(f"export: {file.name} gives logits {list(found.shape)}, the model {list(wanted.shape)}")
        scale = max(1.0, float(wanted.abs().max()))
        worst = max(worst, float((found - wanted).abs().max()) / scale)
        if not worst <= tolerance:  # NaN is not
            raise DataError(
                f"export: {file.name} differs from the model by {worst:.3g} of its largest logit at batch {batch}, "
                f"{length} tokens; at most {tolerance:g} was expected"
            )
    return worst


def as_model_taps(model: LeviModel, taps: Tensor) -> Tensor:
    """A head's taps, [L, B, D] or [L, B, T, D], as ``LeviModel.forward`` takes them: [B, L * D] or [B, T, L * D]."""
    widths = set(model.ensemble.tap_widths)
    return taps.movedim(0, -2).flatten(-2) if len(widths) == 1 else taps


def _check(model: LeviModel, file: Path, format: str, head_only: bool, ops: str, verify: bool) -> Path:
    """Refuse what cannot work before any work starts; the folder to write into."""
    if format not in FORMATS:
        raise DataError(f"--format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if ops not in OPS:
        raise DataError(f"--ops: expected one of {', '.join(OPS)}, got {ops!r}")
    if ops == "fused" and format == "onnx":
        raise DataError("--ops: ONNX knows PyTorch's operators alone; expected plain, got 'fused'")
    if ops == "fused" and not native.load().loaded:
        raise DataError(f"--ops: fused needs the native library; {native.load().reason}")
    if file.suffix != SUFFIXES[format]:
        raise DataError(f"--output: expected a file ending in {SUFFIXES[format]} for {format}, got {str(file)!r}")
    folder = file.absolute().parent
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output: {folder} is no folder")
    for taken in (file, folder / f"{file.stem}.json", folder / f"{file.stem}-preprocessing"):
        if taken.exists():
            raise DataError(f"--output: {taken} exists")
    if not head_only and model.config.tap_layers is not None and model.extractor is None:
        raise DataError("model: it was loaded without its backbone; only its head can be exported")
    if not head_only and model.config.backbone_dtype in QUANTIZED:
        kept = model.config.backbone_dtype
        raise DataError(f"model: an {kept} backbone cannot be traced; export the head alone (--head-only)")
    if not head_only and model.backbone is not None and is_placed(model.backbone):
        raise DataError("model: an offloaded backbone cannot be traced; load it whole, or export the head alone")
    formats.require_tools(format, verify)
    return folder


def _manifest(
    model: LeviModel,
    file: Path,
    format: str,
    head_only: bool,
    inputs: list[InputSpec],
    longest: int,
    library: str | None,
    worst: float | None,
    preprocessing: bool,
) -> dict[str, Any]:
    config: Any = model.config
    labels = [config.id2label[place] for place in range(config.num_labels)]
    described = [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in inputs]
    dtype = str(model.ensemble.bias.dtype).removeprefix("torch.")
    by_token = [SEQUENCE] if config.pooling == "token" else []
    return {
        "manifest_version": MANIFEST_VERSION,
        "file": file.name,
        "sha256": file_sha256(file),
        "format": format,
        "part": "head" if head_only else "model",
        "library": library,
        "inputs": described,
        "outputs": [{"name": "logits", "dtype": dtype, "shape": [BATCH, *by_token, config.num_labels]}],
        "most_tokens": longest if any("sequence" in spec.shape for spec in inputs) else None,
        "labels": labels,
        "problem_type": config.problem_type,
        "blend": config.blend,
        "view_blend": config.view_blend,
        "backbone_fingerprint": config.backbone_fingerprint,
        "preprocessing": f"{file.stem}-preprocessing" if preprocessing else None,
        "verified": None if worst is None else {"largest_relative_difference": worst},
        "versions": {"torch": torch.__version__},
    }
