"""Ranks of builds by several processes; run by test_ranks.py.

    python rank_builder.py BACKBONE FOLDER:SIZE[:fail|die:RANK]...     forks the ranks of one build after another
    torchrun ... rank_builder.py BACKBONE FOLDER                      is one rank

A rank's output goes to FOLDER.RANK.txt; how the ranks ended is printed, one line per build.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

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


def build(backbone: str, folder: str, trouble: str = "", where: str = "") -> None:
    ran = 0

    class Troubled(TapExtractor):
        def __call__(self, **inputs):
            nonlocal ran
            ran += 1
            if where == os.environ["RANK"] and ran == 2:
                if trouble == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("this rank is out of luck")
            return super().__call__(**inputs)

    data = {"train": texts(40, 0), "test": texts(9, 1)}
    cache = ActivationCache.build(
        folder, Troubled(load_backbone(backbone)), data, batch_size=4, batches_per_shard=2, wait_seconds=60
    )
    assert cache.verify() == []
    os.write(1, f"ran {os.environ['RANK']} {ran}\n".encode())  # at once: under torchrun the ranks share the pipe


def start(rank: int, size: int, backbone: str, folder: str, *trouble: str) -> int:
    child = os.fork()  # before any arithmetic: no thread pool exists yet
    if child:
        return child
    try:
        output = os.open(f"{folder}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_PORT="1")
        build(backbone, folder, *trouble)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def main() -> None:
    torch.set_num_threads(1)
    backbone, *builds = sys.argv[1:]
    if "RANK" in os.environ:
        return build(backbone, builds[0])
    for arguments in builds:
        folder, size, *trouble = arguments.split(":")
        ranks = [start(rank, int(size), backbone, folder, *trouble) for rank in reversed(range(int(size)))]
        print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in reversed(ranks)), flush=True)


if __name__ == "__main__":
    main()
