"""Op schemas, input checks, gradients and dispatch; installed as ``levi_fast.kernels``. Knows torch, nothing above.

Importing it loads the native library (see :mod:`levi_fast.kernels.native`) and registers every op.
"""

from __future__ import annotations

# Python started in the checkout also finds this folder under the name ``kernels``, which transformers probes for: an
# optional package of that name. Under it nothing is registered (it would be the second time, and fail), and a module
# without names and version counts there as absent.
if __name__ == "levi_fast.kernels":
    from levi_fast.kernels.ops import (
        BackendUnavailableError,
        OpReport,
        backend_report,
        layerwise_ensemble,
        layerwise_loss,
        masked_mean_pool,
        masked_mean_pool_into,
        use_backend,
    )

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
