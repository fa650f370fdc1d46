// layerwise_ensemble on NVIDIA GPUs, forward: PyTorch's matrix products, and our kernels for all that surrounds them.
//
//     rows     = norm(tap_l), norm(view)                    one launch for all taps, one for the view
//     products = rows W_l for all layers (one batched product where widths are equal), view V for all layers (one product)
//     before   = product + product + bias; act, dropout     one launch, which also makes the prediction without the view
//     y_l      = hidden O_l                                 one batched product, of both predictions at once
//     y        = sum_l m_l (y_l + c_l)                      one launch, layer after layer
//
// The concatenation of tap and view is never built. The prediction with the view zeroed shares the taps' product.
#include "cuda/ensemble_inputs.h"
#include "cuda/ensemble_kernels.h"
#include "cuda/ops.h"

namespace levi_fast {
namespace cuda {
namespace {

constexpr const char* kOp = "layerwise_ensemble";

template <class F>
void by_activation(int activation, const F& run) {
  switch (activation) {
    case 0:
      return run(Int<0>{});
    case 1:
      return run(Int<1>{});
    case 2:
      return run(Int<2>{});
    default:
      return run(Int<3>{});
  }
}

// norm(tap_l) W_l for all layers, [L, B, K].
Tensor tap_products(const EnsembleInputs& in) {
  const std::optional<Tensor> normed = in.normed_taps();
  Tensor out = in.empty({in.layers, in.batch, in.first});
  if (in.batched()) {
    const int64_t width = in.widths[0];
    const Tensor weights = restride(in.tap_weight, {in.layers, width, in.first}, {width * in.first, in.first, 1});
    matmul_into(out, in.tap_matrices(normed), weights);
    return out;
  }
  int64_t row = 0;
  for (int64_t l = 0; l < in.layers; ++l) {
    Tensor here = restride(out, {in.batch, in.first}, {in.first, 1}, l * in.batch * in.first);
    const Tensor weight = restride(in.tap_weight, {in.widths[l], in.first}, {in.first, 1}, row * in.first);
    matmul_into(here, in.tap_matrix(normed, l), weight);
    row += in.widths[l];
  }
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layerwise_ensemble(
    const std::vector<Tensor>& taps, const MaybeTensor& view, const MaybeTensor& view_keep, const Tensor& tap_weight,
    const MaybeTensor& view_weight, const Tensor& bias, const MaybeTensor& output_weight,
    const MaybeTensor& output_bias, const MaybeTensor& mix_weights, const MaybeTensor& hidden_keep, int64_t activation,
    bool normalize, double dropout, bool zeroed_view, bool save) {
  const Scope scope(tap_weight);
  EnsembleInputs in(taps, view, view_keep, tap_weight, view_weight, output_weight, mix_weights, hidden_keep, activation,
                    normalize, dropout);
  const int64_t layers = in.layers, batch = in.batch, first = in.first, outputs = in.outputs;
  check_like("bias", bias, tap_weight, {layers, first});
  const Tensor first_bias = dense(bias);
  if (output_bias.has_value() != output_weight.has_value()) {
    fail(std::string(kOp) + ": output_weight and output_bias must come together");
  }
  std::optional<Tensor> second_bias;
  if (output_bias.has_value()) {
    check_like("output_bias", *output_bias, tap_weight, {layers, outputs});
    second_bias = dense(*output_bias);
  }

  const int sides = zeroed_view ? 2 : 1;
  std::vector<Tensor> logits, layer_logits, before;
  for (int side = 0; side < 2; ++side) {
    const bool used = side < sides;
    logits.push_back(used ? in.empty({batch, outputs}) : in.empty({0}));
    layer_logits.push_back(used ? in.empty({layers, batch, outputs}) : in.empty({0}));
    before.push_back(used && save && !in.linear ? in.empty({layers, batch, first}) : in.empty({0}));
  }
  const auto results = [&] {
    return std::make_tuple(logits[0], layer_logits[0], logits[1], layer_logits[1], before[0], before[1]);
  };
  if (batch == 0 || outputs == 0) {
    return results();
  }

  const Tensor tap_part = tap_products(in);
  std::optional<Tensor> view_part;
  if (in.view.has_value()) {
    view_part = in.empty({batch, layers * first});
    const Tensor weights = restride(*in.view_weight, {in.view_width, layers * first}, {layers * first, 1});
    matmul_into(*view_part, in.view_rows(), weights);
  }
  std::optional<Tensor> hidden;
  if (!in.linear) {
    hidden = in.empty({layers, sides * batch, first});
  }
  by_fast_dtype(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    FirstArgs<T> args{};
    args.taps = static_cast<const T*>(tap_part.const_data_ptr());
    args.view = view_part ? static_cast<const T*>(view_part->const_data_ptr()) : nullptr;
    args.bias = static_cast<const T*>(first_bias.const_data_ptr());
    args.dropout = in.dropout;
    args.layers = layers;
    args.batch = batch;
    args.width = first;
    args.sides = sides;
    args.hidden = hidden ? static_cast<T*>(hidden->mutable_data_ptr()) : nullptr;
    for (int side = 0; side < sides; ++side) {
      Tensor& target = in.linear ? layer_logits[side] : before[side];  // a linear layer's sums are its predictions
      args.before[side] = in.linear || save ? static_cast<T*>(target.mutable_data_ptr()) : nullptr;
    }
    by_pack<T>(first % kFull<T> == 0 && is_aligned(args.bias, 16), [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      const dim3 threads = tile_threads(ceil_div(first, N));
      const unsigned grid = blocks_for(ceil_div(layers * batch, threads.y));
      by_activation(in.activation, [&](auto act) {
        LEVI_FAST_LAUNCH((first_epilogue_kernel<T, decltype(act)::value, N>), grid, threads, in.stream, args);
      });
    });
  });

  std::optional<Tensor> products;
  if (!in.linear) {
    products = in.empty({layers, sides * batch, outputs});
    const Tensor weights = restride(*in.output_weight, {layers, first, outputs}, {first, 1, layers * first});
    matmul_into(*products, *hidden, weights);
  }
  by_fast_dtype(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    MixArgs<T> args{};
    args.layer_stride = (in.linear ? 1 : sides) * batch * outputs;
    args.bias = second_bias ? static_cast<const T*>(second_bias->const_data_ptr()) : nullptr;
    args.mix = in.mix;
    args.layers = layers;
    args.batch = batch;
    args.outputs = outputs;
    for (int side = 0; side < sides; ++side) {
      args.products[side] = in.linear ? static_cast<const T*>(layer_logits[side].const_data_ptr())
                                      : static_cast<const T*>(products->const_data_ptr()) + side * batch * outputs;
      args.layer_logits[side] = in.linear ? nullptr : static_cast<T*>(layer_logits[side].mutable_data_ptr());
      args.logits[side] = static_cast<T*>(logits[side].mutable_data_ptr());
    }
    const dim3 grid(blocks_for(ceil_div(batch * outputs, kThreads)), static_cast<unsigned>(sides), 1);
    LEVI_FAST_LAUNCH((mix_kernel<T>), grid, dim3(kThreads), in.stream, args);
  });
  check_launch(kOp);
  return results();
}

}  // namespace cuda
}  // namespace levi_fast
