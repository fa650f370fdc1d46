"""Memory of loading: a backbone is in memory once, as transformers loads it, also while it is saved or quantised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read a process's peak from"),
]

MB = 2**20
SLACK = 40 * MB  # the ensemble, buffers of reading and writing, and what differs from run to run

# VmHWM is a process's own peak; ru_maxrss is handed down through exec, and would be pytest's.
MEASURED = """
import sys
from pathlib import Path
import torch
import levi_fast.modeling  # so that every run has the same libraries in memory
from transformers import AutoModel
from levi_fast import LeviConfig, get_levi_model, load_backbone

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

folder, output = sys.argv[1:]
before = resident("VmRSS:")
{work}
print(before, resident("VmHWM:"))
"""
# Weights are mapped from the file, and in memory once they are read: by a forward, here by a sum, by the fingerprint.
PLAIN = "read = [weight.sum() for weight in AutoModel.from_pretrained(folder).parameters()]"
LEVI = "model = get_levi_model(load_backbone(folder), LeviConfig(num_labels=2))"
OFFLOADED = """
backbone = AutoModel.from_pretrained(folder, device_map={"": "disk"}, offload_folder=output)
model = get_levi_model(backbone, LeviConfig(num_labels=2))
model(input_ids=torch.ones(2, 8, dtype=torch.int64), labels=torch.tensor([0, 1])).loss.backward()
"""
SAVE = "\nmodel.save_pretrained(output, include_backbone=True)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of 352 MB in safetensors, most of it in linear layers."""
    import torch
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("large") / "bert"
    config = BertConfig(vocab_size=8000, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        backbone = BertModel(config)
    backbone.to_empty(device="cpu")
    for tensor in backbone.state_dict().values():
        tensor.fill_(0.01) if tensor.is_floating_point() else tensor.zero_()
    backbone.save_pretrained(path)
    return str(path)


def peak(work: str, folder: str, output: Path) -> int:
    """Bytes by which a fresh process's resident set grows at most while it does some work."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED.format(work=work), folder, str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, highest = map(int, done.stdout.split())
    return highest - before


def test_a_backbone_is_in_memory_once(folder: str, tmp_path: Path) -> None:
    size = Path(folder, "model.safetensors").stat().st_size
    assert 340 * MB < size < 400 * MB
    plain = peak(PLAIN, folder, tmp_path)
    assert plain > 0.9 * size  # the measure sees a backbone
    assert peak(LEVI, folder, tmp_path) <= 1.1 * plain + SLACK
    assert peak(LEVI + SAVE, folder, tmp_path / "saved") <= 1.1 * plain + SLACK
    assert (tmp_path / "saved" / "backbone" / "model.safetensors").stat().st_size > 0.99 * size


def test_an_offloaded_backbone_is_never_in_memory_as_a_whole(folder: str, tmp_path: Path) -> None:
    size = Path(folder, "model.safetensors").stat().st_size
    assert peak(OFFLOADED, folder, tmp_path) <= 0.1 * size + 2 * SLACK  # fingerprint, forward and backward
