"""The bank of taps on the GPU: how much it may take, what happens where it does not fit, the same results from it.

Without a GPU the bank lies in the host's memory, and nothing else differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from levi_fast.training import device_bank, prefetch
from levi_fast.training.device_bank import DeviceTaps, device_room, on_device
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.prefetch import prefetched, resident
from levi_fast.training.runs import Splits
from levi_fast.training.sweep import Head, train_heads

Tasks = Callable[..., Any]
CPU = torch.device("cpu")


class OnDisk:
    """What a cache hands out, in shards of ten entries."""

    def __init__(self, taps: torch.Tensor) -> None:
        self.taps, self.shape, self.reads, self.loads = taps, taps.shape, 0, 0

    def __len__(self) -> int:
        return len(self.taps)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        self.reads += 1
        return self.taps[rows]

    def chunks(self) -> Iterator[torch.Tensor]:
        yield from self.taps.split(10)

    def load(self) -> torch.Tensor:
        self.loads += 1
        return self.taps.clone()


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with room for everything."""
    monkeypatch.setattr(device_bank, "device_room", lambda device: 2**40)


def trained(task: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model = task.model(seed=1)
    result = fit(model, task.train, task.validation, TrainingOptions(epochs=2, batch_size=16, seed=5), loop="lean")
    return result.history, model.state_dict()


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("kind", ["tensor", "cache"])
def test_training_from_the_bank_gives_the_same_bits(
    cached_task: Tasks, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = cached_task()
    source = task.train.taps()
    which = torch.randperm(len(source))  # rows that share entries, as equal texts do
    task.train.set_taps(source, which)
    with monkeypatch.context() as none:
        none.setattr(device_bank, "device_room", lambda device: 0)
        history, weights = trained(task)
    given = source if kind == "tensor" else OnDisk(source)
    task.train.set_taps(given, which)
    seen: list[type] = []
    gather = DeviceTaps.__getitem__

    def spied(bank: DeviceTaps, rows: torch.Tensor) -> torch.Tensor:
        seen.append(type(bank))
        return gather(bank, rows)

    monkeypatch.setattr(DeviceTaps, "__getitem__", spied)
    from_bank = trained(task)
    assert len(seen) == 2 * (5 + 1)  # every batch of 70 rows, every evaluation
    assert from_bank[0] == history
    for name, value in weights.items():
        assert torch.equal(from_bank[1][name], value), name
    assert task.train.tap_source() is given
    assert kind == "tensor" or (given.reads, given.loads) == (0, 0)  # copied shard by shard, never whole in memory


@pytest.mark.usefixtures("roomy")
def test_taps_that_data_sets_share_are_copied_once(cached_task: Tasks) -> None:
    task = cached_task()
    shared = task.train.tap_source()
    task.validation.set_taps(shared, torch.arange(37))
    with resident([task.train, task.validation, task.train], CPU):
        bank = task.train.tap_source()
        assert isinstance(bank, DeviceTaps) and task.validation.tap_source() is bank
        assert bank.taps.data_ptr() != shared.data_ptr() and torch.equal(bank.taps, shared)
        assert task.train.tap_dtype == "float32" and len(bank) == 70
        with resident([task.train], CPU):  # a head of a sweep, whose taps are there already
            assert task.train.tap_source() is bank
    assert task.train.tap_source() is task.validation.tap_source() is shared


def test_the_bank_may_take_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 250)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 150)
    assert device_room(cuda) == 400  # of 700 that are free, and 100 that torch holds without using them
    assert device_room(CPU) == 0


def test_on_the_cpu_taps_stay_what_they_are(cached_task: Tasks) -> None:
    task = cached_task()
    taps = task.train.tap_source()
    with resident([task.train], CPU):
        assert task.train.tap_source() is taps


def test_size_counts_by_the_dtype_that_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_bank, "device_room", lambda device: 240)
    taps = torch.randn(12, 5)
    bank = on_device(taps, CPU)
    assert bank is not None and bank.dtype == torch.float32
    assert on_device(torch.randn(13, 5), CPU) is None and on_device(OnDisk(torch.randn(13, 5)), CPU) is None
    halves = on_device(torch.randn(24, 5).bfloat16(), CPU)
    assert halves is not None and halves.dtype == torch.bfloat16
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(bank[rows], taps[rows])


def test_without_room_taps_are_loaded_or_gathered_ahead(cached_task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    task = cached_task()
    source = OnDisk(task.train.taps())
    task.train.set_taps(source)
    with resident([task.train], CPU):
        assert isinstance(task.train.tap_source(), torch.Tensor)
    monkeypatch.setattr(prefetch, "MEMORY_SHARE", 0.0)
    with resident([task.train], CPU):
        assert task.train.tap_source() is source
        list(prefetched(task.train, torch.arange(64).split(8)))
    assert (source.loads, source.reads) == (1, 8)


@pytest.mark.usefixtures("roomy")
def test_a_device_that_filled_up_meanwhile_is_left_alone(cached_task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    task = cached_task()
    taps = task.train.tap_source()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_bank.torch, "empty", full)
    with resident([task.train], CPU):
        assert task.train.tap_source() is taps


@pytest.mark.usefixtures("roomy")
def test_heads_of_a_sweep_share_the_bank(cached_task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    task = cached_task()
    heads = [
        Head(f"head {seed}", task.config, TrainingOptions(epochs=1, batch_size=16, seed=seed), Splits(*task[1:]))
        for seed in range(2)
    ]
    made: list[int] = []
    copy = on_device
    monkeypatch.setattr(prefetch, "on_device", lambda taps, device: made.append(1) or copy(taps, device))
    from_bank = train_heads(heads, workers=1)
    assert len(made) == 2  # the taps of two data sets, not of two heads
    monkeypatch.setattr(device_bank, "device_room", lambda device: 0)
    for one, other in zip(from_bank, train_heads(heads, workers=1), strict=True):
        assert (one.id, one.fit.history) == (other.id, other.fit.history)  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_bank_of_a_gpu(cached_task: Tasks) -> None:
    task = cached_task()
    taps, cuda = task.train.taps(), torch.device("cuda", 0)
    assert device_room(cuda) > taps.nbytes
    rows = torch.randperm(70)[:16]
    with resident([task.train], cuda):
        batch = task.train.__getitems__(rows)
        assert batch["taps"].device == cuda and torch.equal(batch["taps"].cpu(), taps[rows])
    assert task.train.tap_source().device == CPU
