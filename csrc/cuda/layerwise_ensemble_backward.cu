// layerwise_ensemble on NVIDIA GPUs, backward: PyTorch's matrix products, and our kernels for all that surrounds them.
//
// Of the two predictions, with the view and with it zeroed, those with a gradient are "sides"; their rows are stacked,
// so that each product below takes both at once. With g_l = dloss/dy_l + m_l dloss/dy, written once as [sides B, L, C]:
//
//     d_l            = (g_l O_l) * drop * act'(before_l)     one batched product and one launch, as [sides B, L, K]
//     output_weight  = g_l^T drop(act(before_l)),   output_bias = sum_b g_l
//     tap_weight     = norm(tap_l)^T d_l,           bias        = sum_b d_l
//     view_weight    = norm(view)^T d,   view = norm'(d V^T)   all layers in one product each: d is [B, L K] as it lies
//     tap_l          = norm'(d_l W_l^T)                        only where asked
//     mix_weights    = sum_bc dloss/dy * y_l
//
// Sums over examples are cut into parts that a last launch adds in their order; no atomics.
#include "cuda/ensemble_backward_kernels.h"
#include "cuda/ensemble_inputs.h"
#include "cuda/ops.h"

namespace levi_fast {
namespace cuda {
namespace {

constexpr const char* kOp = "layerwise_ensemble_backward";

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

// One prediction that has a gradient.
struct Side {
  std::optional<Tensor> grad, layer_grad, layer_logits, before;
};

const void* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// [R, L, N], with its memory as it lies, as L matrices [R, N].
Tensor by_layer(const Tensor& tensor, int64_t rows, int64_t layers, int64_t width) {
  return restride(tensor, {layers, rows, width}, {width, layers * width, 1});
}

Tensor transposed(const Tensor& matrices) {
  return restride(matrices, {matrices.size(0), matrices.size(2), matrices.size(1)},
                  {matrices.stride(0), matrices.stride(2), matrices.stride(1)});
}

Tensor prediction_grads(const EnsembleInputs& in, const std::vector<Side>& sides) {
  const int64_t count = static_cast<int64_t>(sides.size());
  Tensor out = in.empty({count * in.batch, in.layers, in.outputs});
  by_fast_dtype(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    PredictionArgs<T> args{};
    for (int64_t side = 0; side < count; ++side) {
      args.grad[side] = static_cast<const T*>(pointer(sides[side].grad));
      args.layer_grad[side] = static_cast<const T*>(pointer(sides[side].layer_grad));
    }
    args.mix = in.mix;
    args.layers = in.layers;
    args.batch = in.batch;
    args.outputs = in.outputs;
    args.sides = static_cast<int>(count);
    args.out = static_cast<T*>(out.mutable_data_ptr());
    LEVI_FAST_LAUNCH((prediction_grad_kernel<T>), blocks_for(ceil_div(out.numel(), kThreads)), dim3(kThreads),
                     in.stream, args);
  });
  return out;
}

// The gradient at `before` [sides B, L, H], and the dropped activations likewise; each only where it is asked for.
void hidden_grads(const EnsembleInputs& in, const std::vector<Side>& sides, const Tensor& g, std::optional<Tensor>& out,
                  std::optional<Tensor>& hidden) {
  const int64_t count = static_cast<int64_t>(sides.size()), rows = count * in.batch;
  std::optional<Tensor> product;
  if (out.has_value()) {
    product = in.empty({in.layers, rows, in.first});
    matmul_into(*product, by_layer(g, rows, in.layers, in.outputs),
                restride(*in.output_weight, {in.layers, in.outputs, in.first}, {in.first, in.layers * in.first, 1}));
  }
  by_fast_dtype(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    HiddenGradArgs<T> args{};
    args.product = static_cast<const T*>(pointer(product));
    bool aligned = true;
    for (int64_t side = 0; side < count; ++side) {
      args.before[side] = static_cast<const T*>(pointer(sides[side].before));
      aligned = aligned && is_aligned(args.before[side], 16);
    }
    args.dropout = in.dropout;
    args.layers = in.layers;
    args.batch = in.batch;
    args.width = in.first;
    args.sides = static_cast<int>(count);
    args.out = out ? static_cast<T*>(out->mutable_data_ptr()) : nullptr;
    args.hidden = hidden ? static_cast<T*>(hidden->mutable_data_ptr()) : nullptr;
    by_pack<T>(aligned && in.first % kFull<T> == 0, [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      const dim3 threads = tile_threads(ceil_div(in.first, N));
      const unsigned grid = blocks_for(ceil_div(in.layers * rows, threads.y));
      by_activation(in.activation, [&](auto act) {
        LEVI_FAST_LAUNCH((hidden_grad_kernel<T, decltype(act)::value, N>), grid, threads, in.stream, args);
      });
    });
  });
}

Tensor add_sides(const EnsembleInputs& in, const Tensor& d) {
  Tensor out = in.empty({in.batch, in.layers, in.first});
  by_fast_dtype(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    LEVI_FAST_LAUNCH((add_sides_kernel<T>), blocks_for(ceil_div(out.numel(), kThreads)), dim3(kThreads), in.stream,
                     static_cast<const T*>(d.const_data_ptr()), out.numel(), static_cast<T*>(out.mutable_data_ptr()));
  });
  return out;
}

// out[n] = sum_r x[r, n].
void column_sums(const EnsembleInputs& in, const Tensor& x, int64_t rows, int64_t columns, Tensor& out) {
  const int64_t tiles = ceil_div(columns, kWarp);
  const int64_t wanted = parts_for(tiles, ceil_div(rows, 64), multiprocessors(x));
  const int64_t part_length = ceil_div(rows, wanted);
  const int64_t parts = ceil_div(rows, part_length);
  const Tensor partial = empty_on(x, {parts, columns}, ScalarType::Float);
  auto* sums = static_cast<float*>(partial.mutable_data_ptr());
  by_fast_dtype(in.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(blocks_for(tiles), static_cast<unsigned>(parts), 1);
    LEVI_FAST_LAUNCH((column_sum_kernel<T>), grid, dim3(kThreads), in.stream,
                     static_cast<const T*>(x.const_data_ptr()), rows, columns, part_length, sums);
  });
  sum_parts(sums, parts, columns, out, in.stream);
}

void mix_grad(const EnsembleInputs& in, const std::vector<Side>& sides, Tensor& out) {
  const int64_t size = in.batch * in.outputs;
  const int64_t part_length = std::max<int64_t>(ceil_div(size, 64), 4 * kThreads);
  const int64_t parts = ceil_div(size, part_length);
  const Tensor partial = empty_on(in.tap_weight, {2 * parts, in.layers}, ScalarType::Float);
  auto* sums = static_cast<float*>(partial.mutable_data_ptr());
  int64_t used = 0;
  for (const Side& side : sides) {
    if (!side.grad.has_value()) {
      continue;
    }
    by_fast_dtype(in.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(in.layers), 1);
      LEVI_FAST_LAUNCH((mix_grad_kernel<T>), grid, dim3(kThreads), in.stream,
                       static_cast<const T*>(pointer(side.grad)), static_cast<const T*>(pointer(side.layer_logits)),
                       size, part_length, sums + used * in.layers);
    });
    used += parts;
  }
  sum_parts(sums, used, in.layers, out, in.stream);  // zeros where no prediction mixed
}

// norm(tap_l)^T d_l for all layers, into [sum D_l, K].
void tap_weight_grad(const EnsembleInputs& in, const Tensor& d, Tensor& out) {
  const std::optional<Tensor> normed = in.normed_taps();
  const Tensor grads = by_layer(d, in.batch, in.layers, in.first);
  if (in.batched()) {
    const int64_t width = in.widths[0];
    Tensor target = restride(out, {in.layers, width, in.first}, {width * in.first, in.first, 1});
    matmul_into(target, transposed(in.tap_matrices(normed)), grads);
    return;
  }
  int64_t row = 0;
  for (int64_t l = 0; l < in.layers; ++l) {
    Tensor target = restride(out, {in.widths[l], in.first}, {in.first, 1}, row * in.first);
    const Tensor tap = in.tap_matrix(normed, l);
    matmul_into(target, restride(tap, {in.widths[l], in.batch}, {tap.stride(1), tap.stride(0)}),
                restride(d, {in.batch, in.first}, {in.layers * in.first, 1}, l * in.first));
    row += in.widths[l];
  }
}

void tap_grads(const EnsembleInputs& in, const Tensor& d, std::vector<Tensor>& outs) {
  if (in.stacked) {
    const int64_t width = in.widths[0];
    matmul_into(outs[0], by_layer(d, in.batch, in.layers, in.first),
                restride(in.tap_weight, {in.layers, in.first, width}, {width * in.first, 1, in.first}));
  } else {
    int64_t row = 0;
    for (int64_t l = 0; l < in.layers; ++l) {
      matmul_into(outs[l], restride(d, {in.batch, in.first}, {in.layers * in.first, 1}, l * in.first),
                  restride(in.tap_weight, {in.first, in.widths[l]}, {1, in.first}, row * in.first));
      row += in.widths[l];
    }
  }
  in.norm_backward(outs);
}

}  // namespace

std::vector<Tensor> layerwise_ensemble_backward(
    const MaybeTensor& grad_logits, const MaybeTensor& grad_layer_logits, const MaybeTensor& grad_logits_zeroed,
    const MaybeTensor& grad_layer_logits_zeroed, const std::vector<Tensor>& taps, const MaybeTensor& view,
    const MaybeTensor& view_keep, const Tensor& tap_weight, const MaybeTensor& view_weight,
    const MaybeTensor& output_weight, const MaybeTensor& mix_weights, const MaybeTensor& hidden_keep,
    const MaybeTensor& layer_logits, const MaybeTensor& layer_logits_zeroed, const Tensor& before,
    const Tensor& before_zeroed, int64_t activation, bool normalize, double dropout, int64_t needs) {
  const Scope scope(tap_weight);
  EnsembleInputs in(taps, view, view_keep, tap_weight, view_weight, output_weight, mix_weights, hidden_keep, activation,
                    normalize, dropout);
  const int64_t layers = in.layers, batch = in.batch, first = in.first, outputs = in.outputs;
  const int64_t absent = (view.has_value() ? int64_t{0} : kNeedView | kNeedViewWeight) |
                         (in.linear ? kNeedOutputWeight | kNeedOutputBias : int64_t{0}) |
                         (mix_weights.has_value() ? int64_t{0} : int64_t{kNeedMix});
  needs &= ~absent;

  std::vector<Side> sides;
  bool with_view = false;  // the first of them is the prediction with the view
  const MaybeTensor* const given[2][2] = {{&grad_logits, &grad_layer_logits},
                                          {&grad_logits_zeroed, &grad_layer_logits_zeroed}};
  for (int i = 0; i < 2; ++i) {
    Side side;
    if (given[i][0]->has_value()) {
      check_like("grad_logits", **given[i][0], tap_weight, {batch, outputs});
      side.grad = dense(**given[i][0]);
    }
    if (given[i][1]->has_value()) {
      check_like("grad_layer_logits", **given[i][1], tap_weight, {layers, batch, outputs});
      side.layer_grad = dense(**given[i][1]);
    }
    if (!side.grad.has_value() && !side.layer_grad.has_value()) {
      continue;
    }
    if (!in.linear) {
      const Tensor& sums = i == 0 ? before : before_zeroed;
      check_like("before", sums, tap_weight, {layers, batch, first});
      side.before = dense(sums);
    }
    if (side.grad.has_value() && (needs & kNeedMix) != 0) {
      const MaybeTensor& y = i == 0 ? layer_logits : layer_logits_zeroed;
      if (!y.has_value()) {
        fail(std::string(kOp) + ": mix_weights' gradient needs layer_logits");
      }
      check_like("layer_logits", *y, tap_weight, {layers, batch, outputs});
      side.layer_logits = dense(*y);
    }
    with_view = with_view || i == 0;
    sides.push_back(std::move(side));
  }

  std::vector<Tensor> results;
  const auto result = [&](int64_t need, const std::vector<int64_t>& shape) {
    results.push_back(in.empty((needs & need) != 0 ? shape : std::vector<int64_t>{0}));
  };
  result(kNeedView, {batch, in.view_width});
  result(kNeedTapWeight, {in.tap_columns, first});
  result(kNeedViewWeight, {in.view_width, layers, first});
  result(kNeedBias, {layers, first});
  result(kNeedOutputWeight, {outputs, layers, first});
  result(kNeedOutputBias, {layers, outputs});
  results.push_back((needs & kNeedMix) != 0 ? empty_on(*mix_weights, {layers}) : in.empty({0}));
  std::vector<Tensor> tap_results;
  for (std::size_t i = 0; i < taps.size(); ++i) {
    const std::vector<int64_t> shape =
        in.stacked ? std::vector{layers, batch, in.widths[0]} : std::vector{batch, in.widths[i]};
    tap_results.push_back(in.empty((needs & kNeedTaps) != 0 ? shape : std::vector<int64_t>{0}));
  }
  const auto everything = [&] {
    results.insert(results.end(), tap_results.begin(), tap_results.end());
    return results;
  };
  if (batch == 0 || outputs == 0 || sides.empty()) {
    for (auto* tensors : {&results, &tap_results}) {
      for (Tensor& tensor : *tensors) {
        torch::stable::zero_(tensor);
      }
    }
    return everything();
  }
  if (!with_view) {  // the prediction with the view zeroed does not depend on the view
    torch::stable::zero_(results[0]);
    torch::stable::zero_(results[2]);
    needs &= ~(kNeedView | kNeedViewWeight);
  }

  const int64_t rows = static_cast<int64_t>(sides.size()) * batch;
  if ((needs & kNeedMix) != 0) {
    mix_grad(in, sides, results[6]);
  }
  const bool wants_d = (needs & (kNeedView | kNeedTapWeight | kNeedViewWeight | kNeedBias | kNeedTaps)) != 0;
  if (!wants_d && (needs & (kNeedOutputWeight | kNeedOutputBias)) == 0) {
    check_launch(kOp);
    return everything();
  }
  const Tensor g = prediction_grads(in, sides);
  std::optional<Tensor> d;
  if (in.linear) {
    d = g;
  } else {
    std::optional<Tensor> hidden;
    if (wants_d) {
      d = in.empty({rows, layers, first});
    }
    if ((needs & kNeedOutputWeight) != 0) {
      hidden = in.empty({rows, layers, first});
    }
    if (d.has_value() || hidden.has_value()) {
      hidden_grads(in, sides, g, d, hidden);
    }
    if (hidden.has_value()) {
      Tensor target = restride(results[4], {layers, outputs, first}, {first, layers * first, 1});
      matmul_into(target, transposed(by_layer(g, rows, layers, outputs)), by_layer(*hidden, rows, layers, first));
    }
    if ((needs & kNeedOutputBias) != 0) {
      column_sums(in, g, rows, layers * outputs, results[5]);
    }
  }
  if (wants_d) {
    if ((needs & kNeedBias) != 0) {
      column_sums(in, *d, rows, layers * first, results[3]);
    }
    const Tensor flat = restride(*d, {batch, layers * first}, {layers * first, 1});  // the side with the view
    if ((needs & kNeedViewWeight) != 0) {
      const Tensor view_rows = in.view_rows();
      Tensor target = restride(results[2], {in.view_width, layers * first}, {layers * first, 1});
      matmul_into(target, restride(view_rows, {in.view_width, batch}, {view_rows.stride(1), view_rows.stride(0)}), flat);
    }
    if ((needs & kNeedView) != 0) {
      matmul_into(results[0], flat, restride(*in.view_weight, {layers * first, in.view_width}, {1, layers * first}));
      in.view_norm_backward(results[0]);
    }
    if ((needs & (kNeedTapWeight | kNeedTaps)) != 0) {
      const Tensor both = sides.size() == 2 ? add_sides(in, *d) : *d;
      if ((needs & kNeedTapWeight) != 0) {
        tap_weight_grad(in, both, results[1]);
      }
      if ((needs & kNeedTaps) != 0) {
        tap_grads(in, both, tap_results);
      }
    }
  }
  check_launch(kOp);
  return everything();
}

}  // namespace cuda
}  // namespace levi_fast
