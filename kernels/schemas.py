"""The schema of every op under ``torch.ops.levi_fast``, in one place.

The native library defines the same texts itself (``csrc/schemas.h``), because a C++ program loads it without Python.
Python defines them only where that library is absent; :mod:`levi_fast.kernels.native` refuses a library whose texts
differ.
"""

from __future__ import annotations

SCHEMAS: dict[str, str] = {
    "masked_mean_pool": "masked_mean_pool(Tensor hidden, Tensor? mask=None) -> Tensor",
    "masked_mean_pool_backward": "masked_mean_pool_backward(Tensor grad, Tensor? mask, SymInt length) -> Tensor",
    "layerwise_ensemble": (
        "layerwise_ensemble(Tensor[] taps, Tensor? view, Tensor? view_keep, Tensor tap_weight, Tensor? view_weight, "
        "Tensor bias, Tensor? output_weight, Tensor? output_bias, Tensor? mix_weights, Tensor? hidden_keep, "
        "int activation, bool normalize, float dropout, bool zeroed_view, bool save) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "layerwise_ensemble_backward": (
        "layerwise_ensemble_backward(Tensor? grad_logits, Tensor? grad_layer_logits, Tensor? grad_logits_zeroed, "
        "Tensor? grad_layer_logits_zeroed, Tensor[] taps, Tensor? view, Tensor? view_keep, Tensor tap_weight, "
        "Tensor? view_weight, Tensor? output_weight, Tensor? mix_weights, Tensor? hidden_keep, Tensor? layer_logits, "
        "Tensor? layer_logits_zeroed, Tensor before, Tensor before_zeroed, int activation, bool normalize, "
        "float dropout, int needs) -> Tensor[]"
    ),
    "layerwise_loss": (
        "layerwise_loss(Tensor layer_logits, Tensor target, int problem, bool save) -> (Tensor, Tensor)"
    ),
    "layerwise_loss_backward": "layerwise_loss_backward(Tensor grad, Tensor gradient, Tensor like) -> Tensor",
}
