"""The lean loop: the same bits as Trainer's, with taps in memory or streamed from disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from levi_fast.data.encoded import EncodedDataset
from levi_fast.errors import DataError, DivergedError
from levi_fast.modeling import LeviModel
from levi_fast.training import prefetch
from levi_fast.training.best_epoch import FitResult
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.lean import clip_gradients, epoch_rows
from levi_fast.training.prefetch import prefetched, resident

Tasks = Callable[..., Any]


def trained(task: Any, loop: str, **options: Any) -> tuple[LeviModel, FitResult]:
    chosen = {"epochs": 3, "batch_size": 16, "learning_rate": 5e-3, "seed": 5, **options}
    model = task.model(seed=1)
    return model, fit(model, task.train, task.validation, TrainingOptions(**chosen), loop=loop)


def assert_same(one: tuple[LeviModel, FitResult], other: tuple[LeviModel, FitResult]) -> None:
    assert one[1].history == other[1].history
    assert (one[1].best_epoch, one[1].weights) == (other[1].best_epoch, other[1].weights)
    states = one[0].state_dict(), other[0].state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize(
    ("view", "problem", "fields"),
    [
        ("text", "classes", {"dropout": 0.2}),
        ("tabular", "regression", {"dropout": 0.2}),
        ("recommendation", "regression", {"mix": "learned", "objective": "both"}),
        ("text", "multi-label", {"tap_widths": [16, 8, 12]}),
        ("tabular", "classes", {"hidden_width": None, "objective": "ensemble"}),
        (None, "multi-label", {"dropout": 0.2}),
        ("transformer", "classes", {}),
        ("text", "classes", {"view_loss": 0.5, "dropout": 0.2}),
        ("recommendation", "regression", {"view_loss": 1.0}),
        ("recommendation", "regression", {"standalone_view": True, "dropout": 0.2}),
        ("text", "classes", {"standalone_view": True, "mix": "learned", "objective": "both"}),
    ],
)
def test_weights_and_scores_are_trainers_own(
    cached_task: Tasks, view: str | None, problem: str, fields: dict[str, Any]
) -> None:
    task = cached_task(view, problem, **fields)
    assert_same(trained(task, "trainer"), trained(task, "lean"))


@pytest.mark.parametrize("loop", ["trainer", "lean"])
def test_a_baseline_trains_on_rows_that_bring_more_than_it_reads(cached_task: Tasks, loop: str) -> None:
    """The same rows serve LEVI and its baselines; without the task model, its inputs are left out."""
    task = cached_task("recommendation", "regression")
    model = task.model(task_model=None, view_width=0)
    result = fit(model, task.train, task.validation, TrainingOptions(epochs=2, batch_size=16), loop=loop)
    assert len(result.history) == 2


def test_gradients_that_are_clipped_and_weight_decay(cached_task: Tasks) -> None:
    task = cached_task()
    options = {"max_grad_norm": 0.05, "weight_decay": 0.3, "warmup_ratio": 0.4, "blend": 0.25}
    lean = trained(task, "lean", **options)
    assert_same(trained(task, "trainer", **options), lean)
    unclipped = trained(task, "lean", **{**options, "max_grad_norm": 0.0})
    assert_same(trained(task, "trainer", **{**options, "max_grad_norm": 0.0}), unclipped)
    assert not torch.equal(unclipped[0].ensemble.bias, lean[0].ensemble.bias)


def test_the_task_model_alone_trains_without_taps(cached_task: Tasks) -> None:
    task = cached_task("tabular", "classes", taps="none", tap_layers=None, tap_widths=[0], view_dropout=0.0)
    assert not task.train.has_taps
    assert_same(trained(task, "trainer"), trained(task, "auto"))


def test_a_model_without_a_task_model_is_not_handed_its_inputs(cached_task: Tasks) -> None:
    task = cached_task("recommendation", "regression")
    without = {"task_model": None, "view_width": 0}
    for loop in ("trainer", "lean"):
        fit(task.model(**without), task.train, task.validation, TrainingOptions(epochs=1), loop=loop)


def test_a_training_that_diverges_says_so(cached_task: Tasks) -> None:
    with pytest.raises(DivergedError, match="lower --learning-rate"):
        trained(cached_task(), "lean", learning_rate=1e38)


def test_auto_takes_the_lean_loop_where_the_backbone_is_not_run(
    cached_task: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("Trainer was used")

    monkeypatch.setattr("levi_fast.training.fit.train_with_trainer", refuse)
    trained(cached_task(), "auto", epochs=1)
    with pytest.raises(AssertionError, match="Trainer was used"):
        trained(cached_task(), "trainer", epochs=1)


def test_an_unknown_loop_is_refused(cached_task: Tasks) -> None:
    with pytest.raises(DataError, match="--loop: expected one of auto, trainer, lean, graph, got 'fast'"):
        trained(cached_task(), "fast")


def test_the_backbone_in_the_loop_gives_trainers_bits_too(tiny_bert_dir: str) -> None:
    from levi_fast import LeviConfig, get_levi_model

    def data(count: int, seed: int) -> EncodedDataset:
        g = torch.Generator().manual_seed(seed)
        texts = [
            [2, *torch.randint(4, 30, (n,), generator=g).tolist(), 3]
            for n in torch.randint(1, 9, (count,), generator=g)
        ]
        return EncodedDataset("d", token_ids=texts, labels=torch.tensor([text[1] % 2 for text in texts]))

    def run(loop: str) -> tuple[LeviModel, FitResult]:
        torch.manual_seed(0)
        spec = {"type": "text", "vocab_size": 48, "embedding_dim": 8, "view_width": 8}
        config = LeviConfig(num_labels=2, problem_type="single_label_classification", hidden_width=8, task_model=spec)
        model = get_levi_model(tiny_bert_dir, config)
        return model, fit(model, data(50, 0), data(20, 1), TrainingOptions(epochs=2, batch_size=16), loop=loop)

    assert_same(run("trainer"), run("lean"))


@pytest.mark.parametrize("value", [1.0, 1e-4, float("nan"), float("inf")])
def test_clipping_is_torchs(value: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)
    twins = [torch.nn.Parameter(torch.zeros_like(parameter)) for parameter in parameters]
    for twin, parameter in zip(twins, parameters, strict=True):
        assert parameter.grad is not None
        twin.grad = parameter.grad.clone()
    norms = clip_gradients(parameters, 0.5), torch.nn.utils.clip_grad_norm_(twins, 0.5)
    torch.testing.assert_close(*norms, rtol=0, atol=0, equal_nan=True)
    for twin, parameter in zip(twins, parameters, strict=True):
        torch.testing.assert_close(parameter.grad, twin.grad, rtol=0, atol=0, equal_nan=True)


def test_every_epoch_has_an_order_of_its_own() -> None:
    first, second = epoch_rows(50, 3, 0), epoch_rows(50, 3, 1)
    assert not torch.equal(first, second) and torch.equal(first.sort().values, torch.arange(50))
    assert torch.equal(epoch_rows(50, 3, 1), second)


class OnDisk:
    """What a cache hands out: indexed like a tensor, not one."""

    def __init__(self, taps: torch.Tensor) -> None:
        self.taps, self.shape, self.loads, self.threads = taps, taps.shape, 0, set[str]()

    def __len__(self) -> int:
        return len(self.taps)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        self.threads.add(threading.current_thread().name)
        return self.taps[rows]

    def load(self) -> torch.Tensor:
        self.loads += 1
        return self.taps.clone()


class TestStreaming:
    def test_taps_that_do_not_fit_are_gathered_ahead_with_the_same_result(
        self, cached_task: Tasks, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = cached_task()
        whole = trained(task, "lean", cross_fit=0)
        source = OnDisk(task.train.taps())
        task.train.set_taps(source)
        assert_same(trained(task, "lean", cross_fit=0), whole)
        assert source.loads == 1 and not source.threads  # it fits: read once, then indexed in memory
        monkeypatch.setattr(prefetch, "MEMORY_SHARE", 0.0)
        assert_same(trained(task, "lean", cross_fit=0), whole)
        assert source.loads == 1 and source.threads == {"levi-fast-prefetch"}
        assert task.train.tap_source() is source

    def test_a_mapped_file_is_read_by_the_thread_too(
        self, cached_task: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = cached_task()
        whole = trained(task, "lean")
        taps = task.train.taps()
        taps.numpy().tofile(tmp_path / "taps.bin")
        mapped = torch.from_file(str(tmp_path / "taps.bin"), shared=True, size=taps.numel()).view(taps.shape)
        assert mapped.untyped_storage().filename is not None
        task.train.set_taps(mapped)
        with resident([task.train], torch.device("cpu")):
            assert task.train.tap_source() is not mapped
            assert task.train.tap_source().untyped_storage().filename is None
        monkeypatch.setattr(prefetch, "MEMORY_SHARE", 0.0)
        seen: set[str] = set()
        gather = EncodedDataset.__getitems__

        def spied(dataset: EncodedDataset, rows: Any) -> Any:
            seen.add(threading.current_thread().name)
            return gather(dataset, rows)

        monkeypatch.setattr(EncodedDataset, "__getitems__", spied)
        with resident([task.train], torch.device("cpu")):
            assert task.train.tap_source() is mapped
            list(prefetched(task.train, torch.arange(64).split(8)))
        assert seen == {"levi-fast-prefetch"}
        assert_same(trained(task, "lean"), whole)

    def test_an_error_reaches_the_loop_and_no_thread_stays(self, cached_task: Tasks) -> None:
        task = cached_task()
        task.train.set_taps(OnDisk(task.train.taps()))
        chunks = [*torch.arange(64).split(8), torch.tensor([1000])]
        with pytest.raises(IndexError):
            list(prefetched(task.train, chunks))
        batches = prefetched(task.train, torch.arange(64).split(8))  # more than are gathered ahead
        next(batches)
        batches.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "levi-fast-prefetch"]
