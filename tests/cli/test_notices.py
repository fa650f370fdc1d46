"""What libraries say about themselves is not for the user of a command."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_no_word_of_torchao_beside_lora() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("torchao")
    command = [sys.executable, "-m", "levi_fast", "bench", "step", "--device", "cpu", "--backbone", "tiny"]
    ran = subprocess.run(
        [*command, "--peers", "lora", "--seconds", "0.01"], capture_output=True, text=True, check=True
    )
    assert ran.stderr.splitlines() == ["step tiny 4 x 16 float32"]


def test_no_word_of_torchao_from_the_workers_of_a_sweep() -> None:
    pytest.importorskip("torchao")
    command = [sys.executable, "-c", "import levi_fast.training.worker_imports"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stderr == ""
