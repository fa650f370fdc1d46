"""The schema of every op under ``torch.ops.levi_fast``, in one place.

The native library defines the same texts itself (``csrc/schemas.h``), because a C++ program loads it without Python.
Python defines them only where that library is absent; :mod:`levi_fast.kernels.native` refuses a library whose texts
differ.
"""

from __future__ import annotations

SCHEMAS: dict[str, str] = {
    "masked_mean_pool": "masked_mean_pool(Tensor hidden, Tensor? mask=None) -> Tensor",
    "masked_mean_pool_backward": "masked_mean_pool_backward(Tensor grad, Tensor? mask, SymInt length) -> Tensor",
}
