// The ops as library.cu registers them, with the argument order of csrc/schemas.h.
#pragma once

#include <tuple>

#include "cuda/host.h"

namespace levi_fast {
namespace cuda {

Tensor masked_mean_pool(const Tensor& hidden, const MaybeTensor& mask);
Tensor masked_mean_pool_backward(const Tensor& grad, const MaybeTensor& mask, int64_t length);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layerwise_ensemble(
    const std::vector<Tensor>& taps, const MaybeTensor& view, const MaybeTensor& view_keep, const Tensor& tap_weight,
    const MaybeTensor& view_weight, const Tensor& bias, const MaybeTensor& output_weight,
    const MaybeTensor& output_bias, const MaybeTensor& mix_weights, const MaybeTensor& hidden_keep, int64_t activation,
    bool normalize, double dropout, bool zeroed_view, bool save);
std::vector<Tensor> layerwise_ensemble_backward(
    const MaybeTensor& grad_logits, const MaybeTensor& grad_layer_logits, const MaybeTensor& grad_logits_zeroed,
    const MaybeTensor& grad_layer_logits_zeroed, const std::vector<Tensor>& taps, const MaybeTensor& view,
    const MaybeTensor& view_keep, const Tensor& tap_weight, const MaybeTensor& view_weight,
    const MaybeTensor& output_weight, const MaybeTensor& mix_weights, const MaybeTensor& hidden_keep,
    const MaybeTensor& layer_logits, const MaybeTensor& layer_logits_zeroed, const Tensor& before,
    const Tensor& before_zeroed, int64_t activation, bool normalize, double dropout, int64_t needs);

std::tuple<Tensor, Tensor> layerwise_loss(const Tensor& layer_logits, const Tensor& target, int64_t problem, bool save);
Tensor layerwise_loss_backward(const Tensor& grad, const Tensor& gradient, const Tensor& like);

}  // namespace cuda
}  // namespace levi_fast
