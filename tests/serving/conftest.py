"""Small trained-looking models and a process without levi_fast to serve them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from levi_fast import LeviConfig, LeviModel, get_levi_model

TEXT = {"type": "text", "vocab_size": 40, "embedding_dim": 8, "view_width": 6}
TABLE = {
    "type": "table",
    "text": TEXT,
    "tabular": {"num_numeric": 2, "cardinalities": [3, 4], "view_width": 4},
}

SERVER = """
import sys
import torch
from safetensors.torch import load_file, save_file
kind, package, library, inputs, output = sys.argv[1:]
if library != "-":
    torch.ops.load_library(library)
if kind == "onnx":
    import onnxruntime
    session = onnxruntime.InferenceSession(package)
    named = {name.split(":")[1]: value.numpy() for name, value in sorted(load_file(inputs).items())}
    logits = torch.from_numpy(session.run(["logits"], named)[0])
else:
    tensors = [value for _, value in sorted(load_file(inputs).items())]
    model = torch.export.load(package).module() if kind == "pt2" else torch._inductor.aoti_load_package(package)
    with torch.no_grad():
        logits = model(*tensors)
    logits = logits if isinstance(logits, torch.Tensor) else logits[0]
assert not any(name.split(".")[0] in ("levi_fast", "transformers") for name in sys.modules), "not on its own"
save_file({"logits": logits.contiguous()}, output)
"""


@pytest.fixture
def text_model(tiny_bert_dir: str) -> Callable[..., LeviModel]:
    """``text_model(**config)``: LEVI on the tiny BERT, random weights, blended; task_model="table" adds columns."""

    def build(**config: Any) -> LeviModel:
        torch.manual_seed(3)
        settings = {"hidden_width": 8, "task_model": TEXT, "blend": 0.25, **config}
        if settings["task_model"] == "table":
            settings["task_model"] = TABLE
        return get_levi_model(tiny_bert_dir, LeviConfig(**settings)).eval()

    return build


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., torch.Tensor]:
    """``serve(kind, package, library, tensors)``: logits from a Python process that never imports levi_fast."""

    def run(kind: str, package: Path, library: Path | None, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        given, answer = tmp_path / "inputs.safetensors", tmp_path / "logits.safetensors"
        save_file({f"{place}:{name}": t.contiguous() for place, (name, t) in enumerate(tensors.items())}, given)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        words = [kind, str(package), str(library or "-"), str(given), str(answer)]
        done = subprocess.run(
            [sys.executable, "-c", SERVER, *words], capture_output=True, text=True, timeout=120, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return load_file(answer)["logits"]

    return run
