"""Builds a cache and kills itself (SIGKILL) at a chosen moment; run by test_resume.py.

    python killed_builder.py BACKBONE FOLDER THREADS MOMENT...

Imports once, then forks a child per moment, which builds in FOLDER/MOMENT. A moment is CALL-NUMBER-before|after:
around the NUMBER-th call of os.replace, os.unlink or os.fsync, or "batch-NUMBER-before". Prints, per moment, how the
child ended and how many batches it had run.
"""

from __future__ import annotations

import os
import signal
import sys

import torch
import transformers.models.bert.modeling_bert  # noqa: F401 (here once, or every child would import it)

from levi_fast import ActivationCache
from levi_fast.backbones import load_backbone
from levi_fast.data.encoded import EncodedDataset
from levi_fast.taps import TapExtractor


def texts(count: int, seed: int) -> EncodedDataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 11, (count,), generator=generator).tolist()
    rows = [[2, *torch.randint(4, 40, (length,), generator=generator).tolist(), 3] for length in lengths]
    return EncodedDataset(f"seed {seed}", token_ids=rows)


DATA = {"train": (21, 0), "test": (6, 1)}  # with batches of 4, shards of 2 batches: 3 + 1 shards


def build(backbone: str, folder: str, moment: str, report: int) -> None:
    call, number, when = moment.split("-")
    counts = {"replace": 0, "unlink": 0, "fsync": 0, "batch": 0}

    def at(name: str, place: str) -> None:
        if name == call and counts[name] == int(number) and place == when:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("replace", "unlink", "fsync"):
        original = getattr(os, name)

        def patched(*args, original=original, name=name):
            counts[name] += 1
            at(name, "before")
            result = original(*args)
            at(name, "after")
            return result

        setattr(os, name, patched)

    class Reporting(TapExtractor):
        def __call__(self, **inputs):
            counts["batch"] += 1
            at("batch", "before")
            taps = super().__call__(**inputs)
            os.write(report, b".")
            return taps

    extractor = Reporting(load_backbone(backbone))
    data = {name: texts(*arguments) for name, arguments in DATA.items()}
    ActivationCache.build(
        folder, extractor, data, batch_size=4, batches_per_shard=2, on_estimate=lambda estimate: None
    )


def main() -> None:
    backbone, folder, threads, *moments = sys.argv[1:]
    torch.set_num_threads(int(threads))
    for moment in moments:
        reading, report = os.pipe()
        child = os.fork()  # before any arithmetic: no thread pool exists yet
        if child == 0:
            try:
                build(backbone, os.path.join(folder, moment), moment, report)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(report)
        done = 0
        while chunk := os.read(reading, 4096):
            done += len(chunk)
        os.close(reading)
        _, status = os.waitpid(child, 0)
        print(
            moment,
            os.WTERMSIG(status) if os.WIFSIGNALED(status) else f"exit{os.WEXITSTATUS(status)}",
            done,
            flush=True,
        )


if __name__ == "__main__":
    main()
