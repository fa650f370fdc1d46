// The schema of every op, as the native library defines it. A C++ program that loads the library has no Python, so
// these texts cannot live there; kernels/schemas.py repeats them for installations without the native library, refuses
// a library whose texts differ, and a test compares both.
#pragma once

namespace levi_fast {

inline constexpr const char* kSchemas[] = {
    "masked_mean_pool(Tensor hidden, Tensor? mask=None) -> Tensor",
    "masked_mean_pool_backward(Tensor grad, Tensor? mask, SymInt length) -> Tensor",
    "layerwise_ensemble(Tensor[] taps, Tensor? view, Tensor? view_keep, Tensor tap_weight, Tensor? view_weight, "
    "Tensor bias, Tensor? output_weight, Tensor? output_bias, Tensor? mix_weights, Tensor? hidden_keep, int "
    "activation, bool normalize, float dropout, bool zeroed_view, bool save) -> (Tensor, Tensor, Tensor, Tensor, "
    "Tensor, Tensor)",
    "layerwise_ensemble_backward(Tensor? grad_logits, Tensor? grad_layer_logits, Tensor? grad_logits_zeroed, "
    "Tensor? grad_layer_logits_zeroed, Tensor[] taps, Tensor? view, Tensor? view_keep, Tensor tap_weight, "
    "Tensor? view_weight, Tensor? output_weight, Tensor? mix_weights, Tensor? hidden_keep, Tensor? layer_logits, "
    "Tensor? layer_logits_zeroed, Tensor before, Tensor before_zeroed, int activation, bool normalize, float "
    "dropout, int needs) -> Tensor[]",
    "layerwise_loss(Tensor layer_logits, Tensor target, int problem, bool save) -> (Tensor, Tensor)",
    "layerwise_loss_backward(Tensor grad, Tensor gradient, Tensor like) -> Tensor",
};

}  // namespace levi_fast
