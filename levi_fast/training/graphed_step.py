"""A training step replayed as a CUDA graph: one launch in place of one for every kernel.

A graph has fixed addresses and waits for nothing. So a batch is copied into buffers that stay, the learning rates lie
in tensors, and the step itself may ask the GPU for no value. It has fixed shapes too: each shape of batch gets a
graph of its own, a short last one among them; nothing is padded, and dropout draws what it draws without graphs.

The first batches of a shape run as usual, on a side stream: they warm up what is initialised late (libraries,
compiled kernels, the optimizer's state) and are steps of the training like all others. Capturing a step runs nothing
of it, and a replay takes from the random generator what the step would have taken.

Where a capture fails, training goes on without graphs and says so once. All but :class:`CudaGraphs` runs on any
device, and is tested on the CPU; that class has not been run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

# Batches of a shape that run as usual before it is captured.
WARM_UP = 3
# Shapes that get a graph. Texts padded to their longest make one for every length; the rarer ones run as usual.
MOST_GRAPHS = 32
# The only one that the fused optimizer reads on a GPU.
RATE_DTYPE = torch.float32

_failed: list[torch.cuda.CUDAGraph] = []  # see CudaGraphs.capture

Shape = tuple[tuple[str, torch.Size, torch.dtype], ...]


class Graphs(Protocol):
    """How work is captured: :class:`CudaGraphs`, or a test's stand-in."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Inside the ``with`` block, work runs where it would be captured, in order with what is around the block."""

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """What does ``work`` again on the same tensors, and nothing of Python. ``work`` itself is not done.

        Raises:
            Exception: what ``work`` raised, or ending the capture.
        """


class GraphedStep:
    """A training step, captured for each shape of batch and replayed from then on.

    Args:
        step: trains on a batch: forward, backward, clipping, optimizer. It leaves no gradients behind.
        optimizer: the fused one of torch that ``step`` uses. Its rates are read before every step.
        graphs: captures.
        device: of the model.
    """

    def __init__(
        self,
        step: Callable[[Mapping[str, Tensor]], object],
        optimizer: torch.optim.Optimizer,
        graphs: Graphs,
        device: torch.device,
    ) -> None:
        self.step, self.optimizer, self.graphs, self.device = step, optimizer, graphs, device
        self.rates = StaticRates(optimizer, device)
        self.failed = False
        self._warmed: Counter[Shape] = Counter()
        self._captured: dict[Shape, tuple[dict[str, Tensor], Callable[[], object]]] = {}

    def __call__(self, batch: Mapping[str, Tensor]) -> None:
        self.rates.fill()
        shape = tuple((name, value.shape, value.dtype) for name, value in batch.items())
        if self._is_due(shape):
            self._capture(shape, batch)
        if shape in self._captured:
            inputs, replay = self._captured[shape]
            for name, value in batch.items():
                inputs[name].copy_(value, non_blocking=True)
            replay()
            return
        self._warmed[shape] += 1
        with self.graphs.aside(), self.rates.lent():
            self.step(batch)

    def _is_due(self, shape: Shape) -> bool:
        warm = self._warmed[shape] >= WARM_UP and shape not in self._captured
        return warm and not self.failed and len(self._captured) < MOST_GRAPHS

    def _capture(self, shape: Shape, batch: Mapping[str, Tensor]) -> None:
        inputs = {name: value.to(self.device, copy=True) for name, value in batch.items()}

        causes: list[Exception] = []

        def work() -> None:
            try:
                with self.rates.lent():
                    self.step(inputs)
            except Exception as error:  # ending the capture then raises another one, which says less
                causes.append(error)
                raise

        try:
            with torch.random.fork_rng(devices=[]):  # should the step draw on the host, it is not to have drawn here
                self._captured[shape] = inputs, self.graphs.capture(work)
        except Exception as error:  # of the capture: the same step has run before
            self.failed = True
            self._captured.clear()
            self.optimizer.zero_grad()  # those of the step that was broken off
            cause = next(iter(causes), error)
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            warnings.warn(f"--loop graph: steps run without a graph, as capturing one failed: {reason}", stacklevel=3)


class StaticRates:
    """An optimizer's learning rates where a graph reads them.

    The scheduler goes on writing numbers into the optimizer's groups, and checkpoints keep numbers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.tensors = [torch.zeros((), dtype=RATE_DTYPE, device=device) for _ in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["capturable"] = True  # else it refuses; the fused kernel is the same

    def fill(self) -> None:
        """Take over the numbers of the groups."""
        for tensor, group in zip(self.tensors, self.optimizer.param_groups, strict=True):
            tensor.fill_(group["lr"])

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Inside the ``with`` block, the optimizer reads the tensors."""
        numbers = [group["lr"] for group in self.optimizer.param_groups]
        try:
            self._set(self.tensors)
            yield
        finally:
            self._set(numbers)

    def _set(self, rates: list[Tensor] | list[float]) -> None:
        for rate, group in zip(rates, self.optimizer.param_groups, strict=True):
            group["lr"] = rate


class CudaGraphs:
    """Captures CUDA graphs that share their memory.

    They may share it in whatever order they are replayed: nothing that a step makes there is read by a later one.
    torch's default random generator is part of every graph; another one would have to be registered.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        around = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(around)
        with torch.cuda.stream(self.stream):  # that of the captures: libraries keep a workspace for each
            yield
        around.wait_stream(self.stream)

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            around = torch.cuda.current_stream()
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            state = generator.clone_state()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    work()
            except BaseException:
                # After a capture that failed torch leaves its stream current and the generator capturing, and its
                # allocator goes on asking the graph what belongs to it.
                torch.cuda.set_stream(around)
                generator.graphsafe_set_state(state)
                _failed.append(graph)
                raise
        return graph.replay
