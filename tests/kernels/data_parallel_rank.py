"""One of two ranks that train the model of test_drop_in.py under DistributedDataParallel; run by that test.

    python data_parallel_rank.py RANK ADDRESS BACKEND FOLDER      writes FOLDER/RANK.pt, the trained parameters

A program of its own, not a fork of the tests: a fork inherits the locks that the tests' other threads hold.
"""

from __future__ import annotations

import sys

import torch
from test_drop_in import Head, batch_of

from levi_fast.kernels import use_backend
from levi_fast.ranks import end_rank


def main() -> None:
    rank, address, backend, folder = int(sys.argv[1]), *sys.argv[2:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(Head())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taps, x, target = batch_of(16)
    mine = slice(8 * rank, 8 * rank + 8)
    with use_backend(backend):
        for _ in range(4):
            optimizer.zero_grad()
            model(taps[:, mine], x[mine], target[mine]).backward()
            optimizer.step()
    torch.save([p.detach() for p in model.parameters()], f"{folder}/{rank}.pt")
    end_rank()


if __name__ == "__main__":
    main()
