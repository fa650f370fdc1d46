"""The end of a process that trained among others under torchrun."""

from __future__ import annotations

import atexit
import gc
import os
import sys


def end_rank() -> None:
    """End this process with status 0 if it has joined a process group; else return at once.

    gloo's threads outlive even ``destroy_process_group`` while anything refers to the group, as Trainer and
    DistributedDataParallel do. A thread that lets go of a tensor while Python shuts down aborts the process
    (pytorch/pytorch#190489), and the job with it, after all its work was done. So functions registered with
    ``atexit`` run, output is flushed, and Python's shutdown is left out.

    Call it after success only: while another rank hangs or is dead, the group's work never ends.
    """
    torch = sys.modules.get("torch")  # not imported for this: --help is quick
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    gc.collect()
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
