"""What processes that train one model together tell each other: weights, gradients, predictions, checkpoints.

Each holds the whole trained part. The rows of every step are dealt out as accelerate deals them under Trainer,
gradients are averaged, and so all take the same step. DistributedDataParallel would do for gradients, but packs them
in another order after its first step, and among more than two processes the order decides a sum's last bits: a run
that went on from a checkpoint would differ from one that never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import BatchSampler
from transformers import TrainingArguments

from levi_fast.errors import DataError
from levi_fast.training.checkpoints import TrainingState

# As DistributedDataParallel: large enough to use the network, small beside a backbone that is trained whole.
BUCKET_BYTES = 25 * 2**20


class Replicas:
    """This process among those that train the model; by itself (``size`` 1) it has nobody to tell anything.

    Args:
        rank, size: this one, and how many there are; above 1 torch's default process group must be there.
        device: what the group exchanges lies there: that of the model.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device or torch.device("cpu")

    @classmethod
    def of(cls, arguments: TrainingArguments, device: torch.device) -> Replicas:
        """Those that ``torchrun`` or accelerate started; joins the process group, as a Trainer does."""
        arguments.device  # noqa: B018 (asking for it is what joins)
        return cls(arguments.process_index, arguments.world_size, device)

    def rows(self, order: Tensor, batch_size: int) -> list[Tensor]:
        """This process's batches of row numbers; a last step that is not full is filled up from the first rows."""
        if self.size == 1:
            return list(order.split(batch_size))
        whole = BatchSampler(order.tolist(), batch_size, drop_last=False)
        return [torch.tensor(rows) for rows in BatchSamplerShard(whole, self.size, self.rank)]

    def steps(self, rows: int, batch_size: int) -> int:
        """Steps over so many rows with ``batch_size`` of them in each process."""
        return -(-rows // (batch_size * self.size))

    def begin_alike(self, model: nn.Module) -> None:
        """Give every process the first one's trained weights and buffers."""
        if self.size > 1:
            for tensor in [*trained(model), *moving_buffers(model)]:
                dist.broadcast(tensor.data, 0)

    def follow(self, buffers: list[Tensor]) -> None:
        """Give every process the first one's buffers (running statistics), as DistributedDataParallel does."""
        if self.size > 1:
            for buffer in buffers:
                dist.broadcast(buffer, 0)

    def average_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; one that no process has stays None."""
        if self.size == 1:
            return
        used = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=self.device)
        for parameter in parameters:
            if parameter.grad is None:  # all must exchange the same
                parameter.grad = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        for bucket in _buckets([*gradients, used]):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).mul_(1 / self.size)
            dist.all_reduce(flat)
            for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(mean.view_as(tensor))
        for parameter, share in zip(parameters, used.tolist(), strict=True):
            if not share:  # what lies behind the last tap of a backbone that is trained: not to be decayed either
                parameter.grad = None

    def gather_predictions(self, batches: list[Tensor], rows: int) -> Tensor:
        """The predictions [N, C] of ``rows`` rows, from every process's batches of :meth:`rows`, each [b, C]."""
        if self.size == 1:
            return torch.cat(batches)
        own = torch.stack(batches)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return torch.stack(found, dim=1).flatten(0, 2)[:rows]

    def gather_states(self, state: Tensor) -> list[Tensor]:
        """A random generator's state of every process, on the CPU."""
        if self.size == 1:
            return [state]
        own = state.to(self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [each.cpu() for each in found]

    def read_alike(self, read: Callable[[], TrainingState | None]) -> TrainingState | None:
        """What the first process reads, in all of them: the folder need not be the others' too.

        Raises:
            DataError: the first process's, in all of them.
        """
        if self.size == 1:
            return read()
        said: list[Any] = [None]
        state: TrainingState | None = None
        if self.rank == 0:
            try:
                state = read()
                said = [None if state is None else _described(state)]
            except DataError as error:
                said = [str(error)]
        dist.broadcast_object_list(said, 0, device=self.device)
        if isinstance(said[0], str):
            raise DataError(said[0])
        if said[0] is None:
            return None
        epoch, step, scores, kinds = said[0]
        tensors: dict[str, Tensor] = {}
        for name, shape, dtype in kinds:
            held = torch.empty(shape, dtype=dtype) if state is None else state.tensors[name]
            sent = held.to(self.device).contiguous()
            dist.broadcast(sent, 0)
            tensors[name] = sent.cpu()
        return TrainingState(epoch, step, tensors, scores)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that take part in training, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def moving_buffers(model: nn.Module) -> list[Tensor]:
    """Running statistics that a training step changes: of BatchNorm inside a part that is trained."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in module.parameters())
        for buffer in module.buffers()
    ]


def _described(state: TrainingState) -> tuple[int, int, dict[str, Any], list[tuple[str, torch.Size, torch.dtype]]]:
    kinds = [(name, tensor.shape, tensor.dtype) for name, tensor in state.tensors.items()]
    return state.epoch, state.step, state.scores, kinds


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors in an order that never changes, cut where a bucket is full or the dtype is another."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        bytes_here = tensor.numel() * tensor.element_size()
        if not buckets or buckets[-1][0].dtype != tensor.dtype or size + bytes_here > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += bytes_here
    return buckets
