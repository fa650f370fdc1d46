"""Many heads in one pass: each equals its run by itself; they are ranked; none takes the others with it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import set_seed

from levi_fast.errors import DataError
from levi_fast.modeling import LeviModel
from levi_fast.training import prefetch
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.prediction import predict
from levi_fast.training.runs import Splits, score
from levi_fast.training.sharing import receive, send
from levi_fast.training.sweep import Head, HeadResult, ranked, train_heads

Tasks = Callable[..., Any]
FIELDS: list[dict[str, Any]] = [
    {},
    {"view_dropout": 0.0, "dropout": 0.3},
    {"hidden_width": 5},
    {"hidden_width": None},
    {"standalone_view": True},
]


def make_heads(task: Any, count: int = 4, **options: Any) -> list[Head]:
    splits = Splits(task.train, task.validation, ood={"again": task.train})
    heads = []
    for place in range(count):
        chosen = {"epochs": 2, "batch_size": 16, "seed": place, "learning_rate": 1e-3 * (place + 1), **options}
        config = task.model(**FIELDS[place % len(FIELDS)]).config
        heads.append(Head(f"head {place}", config, TrainingOptions(**chosen), splits))
    return heads


def assert_equals_its_own_run(result: HeadResult) -> None:
    """The head's figures and weights are those of a run by itself, on one thread, through Trainer."""
    head = result.head
    set_seed(head.options.seed)
    model = LeviModel(head.config)
    own = fit(model, head.splits.train, head.splits.validation, head.options, loop="trainer")
    assert result.fit is not None and result.fit.history == own.history
    assert (result.fit.best_epoch, result.fit.weights) == (own.best_epoch, own.weights)
    assert result.fit.blend_rows == own.blend_rows
    assert result.weights.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(result.weights[name], value), name
    assert result.id == score(model, head.splits.validation)
    assert result.ood == {"again": score(model, head.splits.train)}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("view", "problem"), [("text", "classes"), ("tabular", "regression"), ("recommendation", "multi-label")]
)
def test_every_head_equals_its_own_run(cached_task: Tasks, view: str, problem: str) -> None:
    results = train_heads(make_heads(cached_task(view, problem), len(FIELDS)), workers=2)
    assert [result.head.name for result in results] == [f"head {place}" for place in range(len(FIELDS))]
    for result in results:
        assert_equals_its_own_run(result)


def test_one_worker_trains_in_this_process_with_the_same_results(cached_task: Tasks) -> None:
    heads = make_heads(cached_task(), 2)
    seen: list[tuple[int, int]] = []
    alone = train_heads(heads, workers=1, on_head=lambda done, total, _: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    for one, other in zip(alone, train_heads(heads, workers=2), strict=True):
        assert (one.id, one.ood, one.fit.history) == (other.id, other.ood, other.fit.history)  # type: ignore[union-attr]


def test_heads_of_several_label_columns_share_the_taps(cached_task: Tasks) -> None:
    classes, regression = cached_task("text", "classes"), cached_task("text", "regression")
    regression.train.set_taps(classes.train.taps())
    heads = [replace(make_heads(task, 1)[0], name=name) for name, task in (("a", classes), ("b", regression))]
    results = train_heads(heads, workers=2)
    for result in results:
        assert_equals_its_own_run(result)
    with pytest.raises(ValueError, match="cannot be ranked, as they solve regression and single_label"):
        ranked(results)


def test_a_head_becomes_a_model_again(cached_task: Tasks) -> None:
    task = cached_task()
    result = train_heads(make_heads(task, 1), workers=1)[0]
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    model = result.model()
    assert torch.equal(torch.rand(1), expected)  # building it drew nothing
    assert not model.training and score(model, task.validation) == result.id
    assert predict(model, task.validation).logits.shape == (37, 3)


def test_ranking_is_by_validation_and_a_diverged_head_comes_last(cached_task: Tasks) -> None:
    task = cached_task("tabular", "regression")
    heads = make_heads(task, 3)
    heads[0] = replace(heads[0], options=replace(heads[0].options, learning_rate=1e38))
    results = train_heads(heads, workers=2)
    order = ranked(results)
    assert order[-1].head.name == "head 0" and order[-1].fit is None and "diverged" in str(order[-1].error)
    scores = [result.fit.validation["rmse"] for result in order[:-1]]  # type: ignore[union-attr]
    assert scores == sorted(scores)
    with pytest.raises(ValueError, match="head 'head 0': training diverged"):
        order[-1].model()


def test_training_before_the_workers_start_does_no_harm(cached_task: Tasks) -> None:
    torch.set_num_threads(2)
    task = cached_task()
    fit(task.model(), task.train, task.validation, TrainingOptions(epochs=1), loop="lean")
    torch.set_num_threads(1)
    for result in train_heads(make_heads(task, 2), workers=2):
        assert_equals_its_own_run(result)


def workers_of_this_process() -> list[psutil.Process]:
    return [worker for child in psutil.Process().children() for worker in child.children()]


def test_a_killed_worker_is_an_error_that_says_so(cached_task: Tasks) -> None:
    def kill(*_: Any) -> None:
        workers_of_this_process()[0].send_signal(signal.SIGKILL)

    heads = make_heads(cached_task(), 6)
    heads[1:] = [replace(head, options=replace(head.options, epochs=300)) for head in heads[1:]]
    heads[0] = replace(heads[0], options=replace(heads[0].options, epochs=301, learning_rate=1e38))
    timer = threading.Timer(20, kill)  # should no head ever end
    with pytest.raises(DataError, match="a worker process was killed"):
        train_heads(heads, workers=2, on_head=kill)
    timer.cancel()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are looked up in /proc")
def test_workers_are_forked_from_a_process_that_runs_no_threads(cached_task: Tasks) -> None:
    """A fork of this one would copy the locks that its other threads hold, with nobody to let them go."""
    seen: list[tuple[int, list[str]]] = []

    def look(*_: Any) -> None:
        (server,) = [child for child in psutil.Process().children() if child.children()]
        threads = [path.read_text().strip() for path in Path(f"/proc/{server.pid}/task").glob("*/comm")]
        seen.append((psutil.Process().num_threads(), threads))

    train_heads(make_heads(cached_task(), 4), workers=2, on_head=look)
    here, threads = seen[0]
    # jemalloc, which comes with pyarrow, keeps a thread, and guards its locks over a fork
    assert here > 1 and len([name for name in threads if name != "jemalloc_bg_thd"]) == 1


def test_the_taps_are_mapped_by_the_workers_not_sent(cached_task: Tasks, tmp_path: Path) -> None:
    task = cached_task(count=2000)
    splits = Splits(task.train, task.validation, ood={"again": task.train})
    content = send([splits, splits], tmp_path)
    assert len(content) < 20_000 < task.train.taps().nbytes
    one, other = receive(content)
    assert one is other and one.train is one.ood["again"]
    assert torch.equal(one.train.taps(), task.train.taps()) and not prefetch._is_on_disk(one.train.tap_source())
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    one.train.tap_source().zero_()  # stays in this process
    assert torch.equal(receive(content)[0].train.taps(), task.train.taps())
    assert size < 1.5 * task.train.taps().nbytes  # once, though three data sets name them


def test_what_cannot_be_trained_is_refused(cached_task: Tasks) -> None:
    with pytest.raises(DataError, match="heads: expected at least one"):
        train_heads([])
    heads = make_heads(cached_task(), 2)
    with pytest.raises(DataError, match="the name 'head 0' is given twice"):
        train_heads([heads[0], replace(heads[1], name="head 0")])
    heads[0].splits.validation.set_taps(None)
    with pytest.raises(DataError, match="head 'head 0': its validation split has no taps attached"):
        train_heads(heads)
