"""Peak memory, each figure from a process of its own: a forward over its taps, a training step of each method.

On the CPU glibc is told to hand freed tensors back at once, the kernel's high-water mark of resident memory (VmHWM)
is reset after a warm-up, and its rise over one call is read: with one thread repeats agree to the page. On a GPU it
is the rise of ``torch.cuda.max_memory_allocated``. The processes are forked from one that has imported what they need
and run nothing: imports take longer than most of what is measured.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from levi_fast.bench.backbones import BACKBONES, DTYPES, bert
from levi_fast.errors import DataError
from levi_fast.taps import TapExtractor

WIDTH, HEADS, DEPTH, VOCABULARY = 384, 12, 32, 1000
BATCH, TOKENS = 16, 128
CASES = [(DEPTH, "bare"), *((DEPTH, str(taps)) for taps in (6, 12, 32)), (DEPTH, "output_hidden_states"),
         *((depth, what) for depth in (6, 12) for what in ("bare", str(depth), "output_hidden_states"))]  # fmt: skip
MIB = 2**20
HAND_BACK_AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
MODELS = ("bert", "llama", "t5", "vit")  # of transformers, that are measured: imported once for all processes


def text(batch: int, tokens: int, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """Random ids [B, T], all kept by the mask."""
    ids = torch.randint(5, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def high_water_mark() -> int:
    """VmHWM of this process in bytes.

    Raises:
        DataError: no Linux, which alone keeps one that can be reset.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError as error:
        raise DataError(f"peak memory of the CPU is read from Linux's /proc, which is not there: {error}") from None
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def peak_of(call: Callable[[], object], device: str = "cpu") -> int:
    """Rise of the high-water mark in bytes over one call, above what is there before it."""
    call()  # thread pools, code pages, packed weights, the optimizer's state
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water_mark()
    call()
    return high_water_mark() - before


class Server:
    """A process that has imported what measuring needs and answers every request from a fork of itself.

    Not multiprocessing's "forkserver": a program has one of these, and it may have begun without the settings that
    glibc reads once, when a process starts.
    """

    def __init__(self) -> None:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # what libraries print belongs to no table
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__], env={**os.environ, **HAND_BACK_AT_ONCE}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
        )  # fmt: skip

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request; ``error`` says why there is none."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the empty answer below
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        if (status := self.process.wait()) < 0:
            return {"error": _killed(-status)}
        self.said.seek(0)
        last = (self.said.read().strip().splitlines() or ["it said nothing"])[-1]
        return {"error": f"ended with status {status}: {last}"}

    def close(self) -> None:
        """End it."""
        self.process.communicate()
        self.said.close()


@functools.cache
def _server() -> Server:
    server = Server()
    atexit.register(server.close)
    return server


def in_own_process(request: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`measure` answers to a request, from a fresh process.

    Raises:
        DataError: the process ended without an answer; the message says why, where it could.
    """
    server = _server()
    answer = server.ask(request)
    if server.process.poll() is not None:
        _server.cache_clear()  # the next request gets a new one
    if "error" in answer:
        raise DataError(f"memory of {dict(request)}: its process {answer['error']}")
    return answer


def _serve() -> None:
    """Requests from stdin, a line each, and answers to stdout, until stdin ends."""
    import importlib

    for name in ("levi_fast.bench.methods", *(f"transformers.models.{kind}.modeling_{kind}" for kind in MODELS)):
        importlib.import_module(name)
    with contextlib.suppress(ImportError):  # an option
        importlib.import_module("peft")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            try:
                answer = measure(json.loads(line))
            except Exception as error:
                answer = {"error": f"failed: {type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)
            os._exit(0)
        if (status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) < 0:
            print(json.dumps({"error": _killed(-status)}), file=answers, flush=True)


def _killed(by: int) -> str:
    return f"was killed by signal {by}; out of memory?"


def measure(request: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes, in this process: of a forward (``layers``, ``what``, ``device``) or a step (see :func:`step_peak`)."""
    if "layers" in request:
        return {"peak": _forward_peak(**request)}
    return _step_peak(**request)


def _forward_peak(layers: int, what: str, device: str) -> int:
    """Of one forward of a random BERT; ``what``: bare, output_hidden_states, or a number of taps."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    backbone: nn.Module = bert(layers, WIDTH, HEADS, VOCABULARY).eval().to(device)
    inputs = {name: value.to(device) for name, value in text(BATCH, TOKENS).items()}

    def plain() -> object:
        with torch.no_grad():
            return backbone(**inputs, output_hidden_states=what == "output_hidden_states")

    if not what.isdecimal():
        return peak_of(plain, device)
    extractor = TapExtractor(backbone, "all" if int(what) == layers else f"even:{what}")
    return peak_of(lambda: extractor(**inputs), device)


def forward_memory(
    cases: Sequence[tuple[int, str]] = CASES,
    note: Callable[[str], None] = lambda _: None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Peaks of a forward by depth and by number of taps.

    Args:
        cases: (layers, what): "bare", a number of taps, or "output_hidden_states"; with "bare" for every depth.
        note: told of every figure.
        device: "cpu" or "cuda".
    """
    rows: list[dict[str, Any]] = []
    for depth, what in cases:
        peak = in_own_process({"layers": depth, "what": what, "device": device})["peak"]
        rows.append({"layers": depth, "forward": what, "peak_mib": round(peak / MIB, 2)})
        note(str(rows[-1]))
    bare = {row["layers"]: row["peak_mib"] for row in rows if row["forward"] == "bare"}
    for row in rows:
        row["beyond_bare_mib"] = round(row["peak_mib"] - bare[row["layers"]], 2)
    hidden = BATCH * TOKENS * WIDTH * 4 / MIB
    return {"batch": [BATCH, TOKENS], "width": WIDTH, "one_hidden_state_mib": hidden, "rows": rows}


def step_peak(name: str, method: str, batch: int, length: int, dtype: str, device: str) -> dict[str, float]:
    """One training step of one method, from a process of its own.

    Returns:
        ``step_mib``, the rise over a step; ``held_mib``, what stays between steps (weights and the optimizer's
        state); their sum ``total_mib``.
    """
    request = {"name": name, "method": method, "batch": batch, "length": length, "dtype": dtype, "device": device}
    found = in_own_process({**request, "threads": torch.get_num_threads()})
    step, held = found["step"] / MIB, found["held"] / MIB
    return {"step_mib": round(step, 1), "held_mib": round(held, 1), "total_mib": round(step + held, 1)}


def _step_peak(
    name: str, method: str, batch: int, length: int, dtype: str, device: str, threads: int
) -> dict[str, int]:
    from levi_fast.bench.methods import build_methods  # a forward's process does without

    torch.set_num_threads(threads)
    spec = BACKBONES[name]
    contender = build_methods((method,), spec.load(DTYPES[dtype], device), spec.config())[method]
    inputs = spec.batches(1, batch, length, device)[0]
    peak = peak_of(lambda: contender.step(inputs), device)
    return {"step": peak, "held": contender.held_bytes()}


if __name__ == "__main__":
    _serve()
