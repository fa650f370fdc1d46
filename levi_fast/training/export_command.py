"""What ``levi-fast export`` does, apart from reading the command line."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from levi_fast.backbones import load_backbone, load_tokenizer
from levi_fast.config import LeviConfig
from levi_fast.data.preprocessing import PROCESSOR_FILE, TableProcessor
from levi_fast.errors import DataError
from levi_fast.export import Artefact, export_model
from levi_fast.export.inputs import model_inputs
from levi_fast.model_folder import located_name
from levi_fast.modeling import LeviModel
from levi_fast.report.console import Console

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def export(
    model_folder: str,
    output: str,
    console: Console,
    *,
    format: str,
    head_only: bool,
    ops: str,
    verify: bool,
    backbone: str | None = None,
) -> Artefact:
    """Write a saved model as an artefact, its tokenizer, column preprocessing and label names beside it.

    Raises:
        DataError: see :func:`levi_fast.export.export_model`; a folder that cannot be loaded.
        BackboneMismatchError: the backbone is not the one that the model was trained on.
    """
    folder = Path(model_folder)
    with console.status("loading the model"):
        given = None
        if backbone is not None and not head_only:
            given = load_backbone(backbone, dtype=LeviConfig.from_pretrained(model_folder).backbone_dtype)
        model = LeviModel.from_pretrained(model_folder, backbone=given, load_backbone_weights=not head_only)
    processor = TableProcessor.load(folder) if (folder / PROCESSOR_FILE).is_file() else None
    with tempfile.TemporaryDirectory() as spare, console.status(f"exporting as {format}"):
        files = _preprocessing(folder, model, Path(spare))
        written = export_model(
            model,
            output,
            format=format,
            head_only=head_only,
            ops=ops,
            verify=verify,
            preprocessing=files,
            max_length=None if processor is None or not processor.columns.text else processor.max_length,
        )
    found = written.largest_difference
    checked = "not verified" if found is None else f"logits within {found:.1e} of the model's"
    console.note(f"wrote {output} and {written.manifest.name}: {checked}")
    return written


def _preprocessing(folder: Path, model: LeviModel, spare: Path) -> dict[str, Path]:
    """Files that turn a user's rows into the artefact's inputs, by name; the backbone's tokenizer where none is."""
    names = (PROCESSOR_FILE, "preprocessor_config.json", *TOKENIZER_FILES)
    found = {name: folder / name for name in names if (folder / name).is_file()}
    reads_text = any(spec.name == "input_ids" for spec in model_inputs(model))
    if reads_text and TOKENIZER_FILES[0] not in found and model.config.backbone is not None:
        with contextlib.suppress(DataError):  # ids may come from elsewhere
            tokenizer = load_tokenizer(located_name(model.config.backbone, folder))
            tokenizer.name_or_path = ""
            tokenizer.save_pretrained(spare)
            found.update({file.name: file for file in spare.iterdir()})
    return found
