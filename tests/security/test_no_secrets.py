"""Nothing that a run writes tells who ran it, where, or with which token."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TOKEN = "hf_TELLTALEtoken0123456789"
FOLDER = "telltale-home-of-jane-doe"
USER = "telltale-jane"


def written(root: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file's bytes, and those of the members of archives, which may be compressed."""
    for file in sorted(root.rglob("*")):
        if file.is_file():
            yield file, file.read_bytes()
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    yield from ((file / name, archive.read(name)) for name in archive.namelist())


@pytest.mark.slow
def test_grep_everything_that_is_written(tiny_bert_dir: str, tmp_path: Path) -> None:
    home = tmp_path / FOLDER
    home.mkdir()
    shutil.copytree(tiny_bert_dir, home / "bert")
    rows = "".join(f"the film was {('bad', 'good')[i % 2]} {('dull', 'fine')[i % 2]},{i % 2}\n" for i in range(40))
    for name in ("train", "test"):
        (home / f"{name}.csv").write_text("text,label\n" + rows)
    environment = {
        **os.environ,
        **{"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "HOME": str(home), "USER": USER, "LOGNAME": USER},
        **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    }
    out, model = home / "out", str(home / "out" / "model")
    data = ["--train", "train.csv", "--test", str(home / "test.csv"), "--text-column", "text"]
    training = ["--backbone", str(home / "bert"), "--include-backbone", "--epochs", "1", "--hidden-width", "8"]
    runs = [
        ["train", *data, "--label-column", "label", *training, "--cache", str(out / "taps"), "--output", model],
        ["export", "--model", model, "--output", str(out / "served.pt2")],
        ["export", "--model", model, "--format", "onnx", "--output", str(out / "o.onnx")],
    ]
    (home / "out").mkdir()
    for words in runs:
        if "onnx" in words:
            pytest.importorskip("onnxruntime")
        done = subprocess.run(
            [sys.executable, "-m", "levi_fast", *words],
            cwd=home, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert TOKEN not in done.stdout + done.stderr
    found = list(written(home / "out"))
    assert len(found) > 12
    for secret in (TOKEN, FOLDER, USER, str(tmp_path), sys.prefix):
        told = [str(file.relative_to(home)) for file, content in found if secret.encode() in content]
        assert not told, (secret, told)
