"""Every op, defined and registered: the one place that knows the order in which that must happen."""

from __future__ import annotations

import contextlib

from levi_fast.kernels import native, registry
from levi_fast.kernels.schemas import SCHEMAS

# Schemas first: each op's file attaches its checks, its gradient and its eager twin to them.
registry.define_ops(SCHEMAS, native_loaded=native.load().loaded)

from levi_fast.kernels.cuda_dispatch import register as _register_cuda  # noqa: E402
from levi_fast.kernels.layerwise_ensemble import layerwise_ensemble  # noqa: E402
from levi_fast.kernels.layerwise_loss import layerwise_loss  # noqa: E402
from levi_fast.kernels.masked_mean_pool import masked_mean_pool, masked_mean_pool_into  # noqa: E402
from levi_fast.kernels.registry import (  # noqa: E402
    BackendUnavailableError,
    OpReport,
    backend_report,
    use_backend,
)
from levi_fast.kernels.triton_dispatch import register as _register_triton  # noqa: E402

_register_triton()  # before the CUDA C++ kernels: the order is the preference
_register_cuda()
# Here, and not at the first call: torch.compile would guard on "not read yet" and compile that call twice. A value
# that names no backend is an error at the calls, not at the import: `levi-fast env` has to be able to show it.
with contextlib.suppress(BackendUnavailableError):
    registry.requested_backend()

__all__ = [
    "BackendUnavailableError",
    "OpReport",
    "backend_report",
    "layerwise_ensemble",
    "layerwise_loss",
    "masked_mean_pool",
    "masked_mean_pool_into",
    "use_backend",
]
