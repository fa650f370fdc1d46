"""The server that worker processes of a sweep are forked from: started early, as its imports take seconds.

This module imports neither torch nor transformers, so that a command can start the server before it does.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os

START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
# What the server imports, for all workers at once.
PRELOADED = "levi_fast.training.worker_imports"
# Libraries that would start threads at import: a fork copies none of them, but locks that they hold.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def start_server() -> None:
    """Start what workers come from, without waiting for its imports; where it runs already, return at once."""
    if START_METHOD != "forkserver":
        return
    multiprocessing.set_forkserver_preload([PRELOADED])
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start_server_early(device: str) -> None:
    """:func:`start_server` for ``--device``'s ``auto`` or ``cpu``, unless training is going to be on a GPU."""
    if device == "auto":
        import torch

        if torch.cuda.is_available():
            return
    if device in ("auto", "cpu"):
        start_server()
