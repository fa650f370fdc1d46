"""Many heads in one pass: K configurations trained over the same taps, one worker process per CPU core.

The backbone's pass, the taps, the texts and the process that holds them are shared by all heads. On a CPU each core
trains one head at a time on one thread: the products of a single head are too small to keep several cores busy, and
stacking heads would not make them fewer. A head draws from its own seed and computes what its run by itself would
compute, so its figures are that run's, to the last bit where that run has one thread too (a sum that several threads
share is rounded in another order).

Workers map the taps from files, one copy in memory for all of them. They are never forked from this process, whose
other threads may hold locks that a fork would copy: they come from a server (multiprocessing's "forkserver") that has
done nothing but imports. On a GPU the heads are trained one after another in this process. Several processes that
torchrun started share the heads out; the first one ends up with all results.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed

from levi_fast.cache.ranks import World
from levi_fast.config import LeviConfig
from levi_fast.data.encoded import EncodedDataset
from levi_fast.errors import DataError
from levi_fast.modeling import LeviModel
from levi_fast.training.best_epoch import FitResult
from levi_fast.training.fit import TrainingOptions, check_loop, fit, resolve_device
from levi_fast.training.metrics import selection_key
from levi_fast.training.prefetch import resident
from levi_fast.training.runs import Splits, move, score
from levi_fast.training.sharing import receive, send
from levi_fast.training.workers import START_METHOD, start_server

# Called after every head with (heads done, heads in all, the head's result).
HeadProgress = Callable[[int, int, "HeadResult"], None]


@dataclass(frozen=True)
class Head:
    """One configuration to train.

    Args:
        name: of its own.
        config: completed, as ``get_levi_model`` leaves it in ``model.config`` (tap layers, widths, view width).
        options: its schedule and seed.
        splits: encoded data with the taps that ``config`` reads attached; heads may share them.
        loop: "lean" or "graph", see :func:`levi_fast.training.fit.fit`.
    """

    name: str
    config: LeviConfig
    options: TrainingOptions
    splits: Splits
    loop: str = "lean"


@dataclass
class HeadResult:
    """A trained head: its scores, as :class:`levi_fast.training.runs.MethodResult` has them, and its weights.

    ``fit`` is None and ``error`` says why where the training diverged.
    """

    head: Head
    fit: FitResult | None
    id: dict[str, float]
    ood: dict[str, dict[str, float]]
    weights: dict[str, Tensor]
    error: str | None = None

    def model(self, backbone: torch.nn.Module | None = None) -> LeviModel:
        """The trained model in eval mode; without a backbone it runs on precomputed taps.

        Raises:
            ValueError: the training diverged.
        """
        if self.fit is None:
            raise ValueError(f"head {self.head.name!r}: {self.error}")
        config = copy.deepcopy(self.head.config)
        config.standalone_view = config.standalone_view and self.fit.view_blend > 0  # else training let go of it
        with torch.random.fork_rng():
            model = LeviModel(config, backbone)
        model.load_state_dict(self.weights)
        model.config.blend, model.config.view_blend = self.fit.weights
        return model.eval()


def train_heads(
    heads: Sequence[Head], *, workers: int | None = None, on_head: HeadProgress | None = None
) -> list[HeadResult]:
    """Train every head and score it on its splits.

    Args:
        heads: their splits must have taps attached; the backbone is not run.
        workers: processes; by default one per CPU core that torch uses. 1 trains in this process, with its threads.
        on_head: progress over this process's share.

    Returns:
        the results in the order of ``heads``; in a process of torchrun's other than the first, those of its share.

    Workers import this program anew: in a script of your own, call this under ``if __name__ == "__main__":``.

    Raises:
        DataError: no heads, two of one name, a head without taps or with a loop that cannot serve, a worker that was
            killed, or no room for the taps in the folder for temporary files.
    """
    _check(heads)
    if workers is None:
        workers = torch.get_num_threads()
    world = World.from_environment()
    mine = heads[world.rank :: world.size]
    on_cpu = all(resolve_device(head.options.device).type == "cpu" for head in heads)
    workers = max(1, min(workers, len(mine))) if on_cpu else 1
    results: list[HeadResult | None] = [None] * len(mine)
    trained = _trained_here(mine) if workers == 1 else _trained_by_workers(mine, workers)
    for done, (place, result) in enumerate(trained, start=1):
        results[place] = result
        if on_head is not None:
            on_head(done, len(mine), result)
    own = [result for result in results if result is not None]
    return own if world.size == 1 else _gathered(heads, own, world)


def _gathered(heads: Sequence[Head], own: list[HeadResult], world: World) -> list[HeadResult]:
    """In the first process all results in order, elsewhere this process's. A process that died ends them all."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    parts: list[Any] = [None] * world.size
    content = [(result.fit, result.id, result.ood, result.weights, result.error) for result in own]
    torch.distributed.gather_object(content, parts if world.rank == 0 else None)
    if world.rank:
        return own
    return [HeadResult(head, *parts[place % world.size][place // world.size]) for place, head in enumerate(heads)]


def ranked(results: Sequence[HeadResult]) -> list[HeadResult]:
    """Best first, by the validation score that chooses the epoch; equals stay in order, diverged ones come last.

    Raises:
        ValueError: the heads solve problems of different kinds, whose scores cannot be compared.
    """
    kinds = {str(result.head.config.problem_type) for result in results}
    if len(kinds) > 1:
        raise ValueError(f"heads: cannot be ranked, as they solve {' and '.join(sorted(kinds))} problems")
    (kind,) = kinds
    finished = [(selection_key(result.fit.validation, kind), result) for result in results if result.fit is not None]
    finished.sort(key=lambda pair: pair[0], reverse=True)
    return [result for _, result in finished] + [result for result in results if result.fit is None]


def _check(heads: Sequence[Head]) -> None:
    if not heads:
        raise DataError("heads: expected at least one")
    names = [head.name for head in heads]
    for head in heads:
        if names.count(head.name) > 1:
            raise DataError(f"heads: the name {head.name!r} is given twice")
        if head.loop not in ("lean", "graph"):
            raise DataError(f"head {head.name!r}: loop: expected lean or graph, got {head.loop!r}")
        check_loop(head.loop, head.options.device)
        if any(head.config.tap_widths or []):
            for split, dataset in head.splits.named():
                if not dataset.has_taps:
                    raise DataError(f"head {head.name!r}: its {split} split has no taps attached")


def _trained_here(heads: Sequence[Head]) -> Iterator[tuple[int, HeadResult]]:
    """(place, result) of every head, one after another."""
    # of every device its own data sets, each once
    datasets: dict[torch.device, dict[int, EncodedDataset]] = {}
    for head in heads:
        here = datasets.setdefault(resolve_device(head.options.device), {})
        here.update((id(data), data) for _, data in head.splits.named())
    with ExitStack() as stack:
        for device, of_device in datasets.items():
            stack.enter_context(resident(of_device.values(), device))
        for place, head in enumerate(heads):
            yield place, _train(head)


def _trained_by_workers(heads: Sequence[Head], workers: int) -> Iterator[tuple[int, HeadResult]]:
    """(place, result) of every head, as they are done."""
    start_server()
    context = multiprocessing.get_context(START_METHOD)
    with tempfile.TemporaryDirectory(prefix="levi-fast-") as folder:
        try:
            content = send(list(heads), folder)
        except OSError as error:
            raise DataError(f"heads: no room to share their taps ({error}); TMPDIR names another folder") from error
        with ProcessPoolExecutor(workers, context, _become_worker, (content,)) as pool:
            # The longest first, so that no core ends up waiting for one late head.
            order = sorted(range(len(heads)), key=lambda place: -_steps(heads[place]))
            waiting = {pool.submit(_train_in_worker, place, folder): place for place in order}
            try:
                for future in as_completed(waiting):
                    future.result()
                    place = waiting[future]
                    yield place, _read(heads[place], Path(folder), place)
            except BrokenProcessPool as error:
                raise DataError("a worker process was killed, perhaps for memory; try fewer workers") from error
            finally:
                pool.shutdown(cancel_futures=True)


# torchrun's: a worker is no rank.
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
# In a worker, what it was sent.
_heads: Sequence[Head] = ()


def _become_worker(content: bytes) -> None:
    global _heads
    for name in _RANK:
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    _heads = receive(content)


def _steps(head: Head) -> int:
    return head.options.epochs * -(-len(head.splits.train) // head.options.batch_size)


def _train(head: Head) -> HeadResult:
    """What :func:`levi_fast.training.runs.run_method` does, with the taps attached already."""
    set_seed(head.options.seed)
    model = LeviModel(head.config)
    move(model, resolve_device(head.options.device))
    try:
        result = fit(model, head.splits.train, head.splits.validation, head.options, loop=head.loop, alone=True)
        scored = head.splits.validation if head.splits.test is None else head.splits.test
        id_metrics = score(model, scored)
        ood = {name: score(model, dataset) for name, dataset in head.splits.ood.items()}
    except ValueError as error:  # it diverged; that is this configuration's result, and no reason to lose the others
        return HeadResult(head, None, {}, {}, {}, str(error))
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return HeadResult(head, result, id_metrics, ood, weights)


def _train_in_worker(place: int, folder: str) -> None:
    """Train a head and leave its result in files: weights for many heads would be much for a pipe."""
    result = _train(_heads[place])
    save_file(result.weights, os.path.join(folder, f"{place}.safetensors"))
    fitted = None if result.fit is None else asdict(result.fit)
    document = {"fit": fitted, "id": result.id, "ood": result.ood, "error": result.error}
    Path(folder, f"{place}.json").write_text(json.dumps(document), encoding="utf-8")


def _read(head: Head, folder: Path, place: int) -> HeadResult:
    document = json.loads((folder / f"{place}.json").read_text(encoding="utf-8"))
    weights = load_file(folder / f"{place}.safetensors")
    fitted = None if document["fit"] is None else FitResult(**document["fit"])
    return HeadResult(head, fitted, document["id"], document["ood"], weights, document["error"])
