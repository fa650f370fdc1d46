// layerwise_ensemble on CPU as torch sees it: input checks, allocation, division of the work into tasks.
#include "cpu/layerwise_ensemble.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "library.h"
#include "tasks.h"
#include "tensor_utils.h"

namespace levi_fast {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr const char* kOp = "layerwise_ensemble";

// Weights larger than this come from memory, or at best from the outer cache, at every step.
constexpr int64_t kFarBytes = 2 * 1024 * 1024;

// Weights' gradients larger than this will not be in cache when the optimizer comes.
constexpr int64_t kStreamBytes = 64 * 1024 * 1024;

// Bits of the backward op's `needs`, in the order of its results (kernels/layerwise_ensemble_eager.py's NEEDS).
enum Need : int64_t {
  kNeedView = 1,
  kNeedTapWeight = 2,
  kNeedViewWeight = 4,
  kNeedBias = 8,
  kNeedOutputWeight = 16,
  kNeedOutputBias = 32,
  kNeedMix = 64,
  kNeedTaps = 128,
};

std::string name_of(const char* argument) { return std::string(kOp) + ": " + argument; }

void check(const char* argument, const Tensor& tensor, const Tensor& like, std::initializer_list<int64_t> shape) {
  if (tensor.scalar_type() != like.scalar_type()) {
    fail(name_of(argument) + " must have tap_weight's dtype, " + dtype_name(like.scalar_type()) + ", got " +
         dtype_name(tensor.scalar_type()));
  }
  if (!tensor.is_cpu()) {
    fail(name_of(argument) + " must be on tap_weight's device, cpu, got another one");
  }
  const auto sizes = tensor.sizes();
  if (sizes.size() != shape.size() || !std::equal(shape.begin(), shape.end(), sizes.begin())) {
    fail(name_of(argument) + " must have shape " + shape_text(shape) + ", got " + shape_text(sizes));
  }
}

void check_mask(const char* argument, const Tensor& mask, std::initializer_list<int64_t> shape) {
  if (mask.scalar_type() != torch::headeronly::ScalarType::Bool) {
    fail(name_of(argument) + " must be bool, got " + dtype_name(mask.scalar_type()));
  }
  check(argument, mask, mask, shape);
}

Tensor dense(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// Rows may lie apart; along a row, elements must be neighbours.
Tensor unit_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) < 2 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// The arguments that both directions share, checked, with the copies that odd strides make necessary.
struct Inputs {
  Ensemble args{};
  std::vector<Tensor> kept;  // owns what the pointers below point into
  std::vector<int64_t> widths, weight_rows, tap_strides;
  std::vector<const void*> taps;
  std::vector<float> mix;
  int64_t widest = 0;
  int64_t tap_columns = 0;  // sum of D_l
  bool stacked = false;     // taps came as one [L, B, D]

  const void* keep(Tensor tensor) {
    kept.push_back(std::move(tensor));
    return kept.back().const_data_ptr();
  }

  Inputs(const std::vector<Tensor>& tensors, bool read_taps, const MaybeTensor& view, const MaybeTensor& view_keep,
         const Tensor& tap_weight, const MaybeTensor& view_weight, const MaybeTensor& output_weight,
         const MaybeTensor& mix_weights, const MaybeTensor& hidden_keep, int64_t activation, bool normalize,
         double dropout) {
    if (tensors.empty()) {
      fail(name_of("taps") + " must hold at least one tensor, got none");
    }
    if (tap_weight.dim() != 2) {
      fail(name_of("tap_weight") + " must have 2 dimensions, got shape " + shape_text(tap_weight.sizes()));
    }
    stacked = tensors.size() == 1 && tensors[0].dim() == 3;
    if (!stacked && tensors[0].dim() != 2) {
      fail(name_of("taps[0]") + " must have 2 dimensions, got shape " + shape_text(tensors[0].sizes()));
    }
    args.layers = stacked ? tensors[0].size(0) : static_cast<int64_t>(tensors.size());
    args.batch = tensors[0].size(stacked ? 1 : 0);
    args.first = tap_weight.size(1);
    args.linear = !output_weight.has_value();
    args.outputs = args.linear ? args.first : output_weight->size(0);
    args.normalize = normalize;
    if (activation < 0 || activation > 3) {
      fail(name_of("activation") + " must be 0, 1, 2 or 3, got " + std::to_string(activation));
    }
    args.activation = static_cast<int>(activation);
    args.dropout_scale = dropout < 1 ? static_cast<float>(1 / (1 - dropout)) : 0.0f;
    kept.reserve(tensors.size() + 8);
    for (int64_t l = 0; l < args.layers; ++l) {
      const Tensor& tensor = tensors[stacked ? 0 : l];
      const int64_t width = tensor.size(stacked ? 2 : 1);
      if (stacked && l == 0) {
        check("taps", tensor, tap_weight, {args.layers, args.batch, width});
      } else if (!stacked) {
        check("taps", tensor, tap_weight, {args.batch, width});
      }
      widths.push_back(width);
      weight_rows.push_back(tap_columns);
      tap_columns += width;
      widest = std::max(widest, width);
      if (!read_taps) {
        taps.push_back(nullptr);
        tap_strides.push_back(0);
      } else if (stacked) {
        const char* base = static_cast<const char*>(l == 0 ? keep(unit_stride(tensor)) : kept[0].const_data_ptr());
        taps.push_back(base + l * kept[0].stride(0) * static_cast<int64_t>(kept[0].element_size()));
        tap_strides.push_back(kept[0].stride(1));
      } else {
        taps.push_back(keep(unit_stride(tensor)));
        tap_strides.push_back(kept.back().stride(0));
      }
    }
    check("tap_weight", tap_weight, tap_weight, {tap_columns, args.first});
    args.tap_weight = keep(dense(tap_weight));
    args.far = tap_weight.numel() * static_cast<int64_t>(tap_weight.element_size()) >= kFarBytes;
    if (view.has_value() != view_weight.has_value()) {
      fail(std::string(kOp) + ": view and view_weight must come together");
    }
    if (view.has_value()) {
      args.view_width = view->dim() == 2 ? view->size(1) : 0;
      check("view", *view, tap_weight, {args.batch, args.view_width});
      check("view_weight", *view_weight, tap_weight, {args.view_width, args.layers, args.first});
      args.view = keep(unit_stride(*view));
      args.view_stride = kept.back().stride(0);
      args.view_weight = keep(dense(*view_weight));
    }
    if (view_keep.has_value()) {
      check_mask("view_keep", *view_keep, {args.batch});
      args.view_keep = static_cast<const uint8_t*>(keep(dense(*view_keep)));
    }
    if (!args.linear) {
      check("output_weight", *output_weight, tap_weight, {args.outputs, args.layers, args.first});
      args.output_weight = keep(dense(*output_weight));
      args.far_outputs = output_weight->numel() * static_cast<int64_t>(output_weight->element_size()) >= kFarBytes;
    }
    if (hidden_keep.has_value() && !args.linear) {
      check_mask("hidden_keep", *hidden_keep, {args.layers, args.batch, args.first});
      args.hidden_keep = static_cast<const uint8_t*>(keep(dense(*hidden_keep)));
    }
    if (!mix_weights.has_value()) {
      mix.assign(static_cast<std::size_t>(args.layers), 1.0f / static_cast<float>(args.layers));
    } else {
      check("mix_weights", *mix_weights, *mix_weights, {args.layers});
      mix = as_floats(*mix_weights);
    }
    args.widths = widths.data();
    args.weight_rows = weight_rows.data();
    args.taps = taps.data();
    args.tap_strides = tap_strides.data();
    args.mix = mix.data();
  }

  int64_t threads(double work) const { return threads_for(work); }

  // What one multiplication of all layers' inputs by a first-layer-sized matrix costs, in rough nanoseconds: its
  // arithmetic at half a core's rate, or its weights' way from the outer cache.
  double cost() const {
    const double weights = static_cast<double>(args.first) *
                               static_cast<double>(tap_columns + args.view_width * args.layers) +
                           (args.linear ? 0.0 : static_cast<double>(args.outputs * args.layers * args.first));
    return weights * (0.15 + static_cast<double>(args.batch) * 0.035);
  }
};

int64_t rows_for(const EnsembleKernels& kernels, const Inputs& in, int64_t threads) {
  // Fewer rows than the cache would hold where threads would be left without a task; and equal shares, up to a quarter
  // more than it would hold: every block of rows reads and packs all of a layer's weights, a block of four rows too.
  const int64_t wanted = (threads + in.args.layers - 1) / in.args.layers;
  const int64_t share = (in.args.batch + wanted - 1) / wanted;
  const int64_t most = kernels.rows_per_task(in.widest, in.args.first) * 5 / 4;
  const int64_t blocks = (in.args.batch + most - 1) / most;
  const int64_t rows = (in.args.batch + blocks - 1) / blocks;
  return std::max<int64_t>(1, std::min(rows, std::max<int64_t>(share, 8)));
}

const EnsembleKernels& kernels_for(const Tensor& tensor) {
  const auto dtype = float_dtype(kOp, "tap_weight", tensor.scalar_type());
  const EnsembleKernels* kernels = ensemble_kernels(current_isa(), dtype);
  if (kernels == nullptr) {
    fail(std::string(kOp) + ": the cpp kernels serve float32, bfloat16 and float16, not float64; use the eager backend");
  }
  return *kernels;
}

// Floats that hold `count` of the kernels' working type.
int64_t work_floats(const EnsembleKernels& kernels, int64_t count) {
  return (count * kernels.work_bytes + 3) / 4;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layerwise_ensemble(
    const std::vector<Tensor>& taps, const MaybeTensor& view, const MaybeTensor& view_keep, const Tensor& tap_weight,
    const MaybeTensor& view_weight, const Tensor& bias, const MaybeTensor& output_weight,
    const MaybeTensor& output_bias, const MaybeTensor& mix_weights, const MaybeTensor& hidden_keep, int64_t activation,
    bool normalize, double dropout, bool zeroed_view, bool save) {
  const EnsembleKernels& kernels = kernels_for(tap_weight);
  Inputs in(taps, true, view, view_keep, tap_weight, view_weight, output_weight, mix_weights, hidden_keep, activation,
            normalize, dropout);
  const int64_t layers = in.args.layers, batch = in.args.batch, first = in.args.first, outputs = in.args.outputs;
  check("bias", bias, tap_weight, {layers, first});
  in.args.bias = in.keep(dense(bias));
  if (output_bias.has_value() != output_weight.has_value()) {
    fail(std::string(kOp) + ": output_weight and output_bias must come together");
  }
  if (output_bias.has_value()) {
    check("output_bias", *output_bias, tap_weight, {layers, outputs});
    in.args.output_bias = in.keep(dense(*output_bias));
  }

  EnsembleForward args{};
  args.in = in.args;
  args.zeroed_view = zeroed_view;
  const int64_t sides = zeroed_view ? 2 : 1;
  Tensor results[6];
  for (int side = 0; side < 2; ++side) {
    const bool used = side < sides;
    results[2 * side] = used ? empty_like_dtype(tap_weight, {batch, outputs}) : empty_like_dtype(tap_weight, {0});
    results[2 * side + 1] =
        used ? empty_like_dtype(tap_weight, {layers, batch, outputs}) : empty_like_dtype(tap_weight, {0});
    const bool saved = used && save && !in.args.linear;
    results[4 + side] = saved ? empty_kept(tap_weight, {layers, batch, first}) : empty_like_dtype(tap_weight, {0});
    args.logits[side] = results[2 * side].mutable_data_ptr();
    args.layer_logits[side] = results[2 * side + 1].mutable_data_ptr();
    args.before[side] = saved ? results[4 + side].mutable_data_ptr() : nullptr;
  }
  if (batch > 0 && outputs > 0) {
    const int64_t threads = in.threads(in.cost());
    const int64_t rows = rows_for(kernels, in, threads);
    Buffer view_rows(view.has_value() ? work_floats(kernels, batch * kernels.padded_width(in.args.view_width)) : 0);
    args.view_rows = view_rows.data();
    const int64_t space = kernels.scratch(in.args, rows);
    const int64_t blocks = (batch + rows - 1) / rows;
    if (view.has_value()) {
      run_blocks(batch, 64, threads_for(static_cast<double>(batch * in.args.view_width) * 0.3),
                 [&](int64_t begin, int64_t end) { kernels.view_rows(args.in, args.view_rows, begin, end); });
    }
    run_tasks(layers * blocks, threads, [&](int64_t task) {
      const int64_t begin = task % blocks * rows;
      kernels.forward(args, task / blocks, begin, std::min(begin + rows, batch), thread_scratch(space));
    });
    run_blocks(batch, 64, threads_for(static_cast<double>(sides * layers * batch * outputs) * 0.2),
               [&](int64_t begin, int64_t end) { kernels.mixing(args, begin, end); });
  }
  return {results[0], results[1], results[2], results[3], results[4], results[5]};
}

struct SumTask {
  GradTask kind;
  int64_t layer, begin, end;
};

std::vector<Tensor> layerwise_ensemble_backward(
    const MaybeTensor& grad_logits, const MaybeTensor& grad_layer_logits, const MaybeTensor& grad_logits_zeroed,
    const MaybeTensor& grad_layer_logits_zeroed, const std::vector<Tensor>& taps, const MaybeTensor& view,
    const MaybeTensor& view_keep, const Tensor& tap_weight, const MaybeTensor& view_weight,
    const MaybeTensor& output_weight, const MaybeTensor& mix_weights, const MaybeTensor& hidden_keep,
    const MaybeTensor& layer_logits, const MaybeTensor& layer_logits_zeroed, const Tensor& before,
    const Tensor& before_zeroed, int64_t activation, bool normalize, double dropout, int64_t needs) {
  const EnsembleKernels& kernels = kernels_for(tap_weight);
  Inputs in(taps, (needs & (kNeedTapWeight | kNeedTaps)) != 0, view, view_keep, tap_weight, view_weight, output_weight,
            mix_weights, hidden_keep, activation, normalize, dropout);
  const int64_t layers = in.args.layers, batch = in.args.batch, first = in.args.first, outputs = in.args.outputs;
  const bool linear = in.args.linear;
  if (!view.has_value()) {
    needs &= ~(kNeedView | kNeedViewWeight);
  }
  if (linear) {
    needs &= ~(kNeedOutputWeight | kNeedOutputBias);
  }
  if (!mix_weights.has_value()) {
    needs &= ~kNeedMix;
  }
  EnsembleBackward args{};
  args.in = in.args;
  const MaybeTensor* const sides[2][2] = {{&grad_logits, &grad_layer_logits},
                                          {&grad_logits_zeroed, &grad_layer_logits_zeroed}};
  for (int side = 0; side < 2; ++side) {
    if (sides[side][0]->has_value()) {
      check("grad_logits", **sides[side][0], tap_weight, {batch, outputs});
      args.grad_logits[side] = in.keep(dense(**sides[side][0]));
    }
    if (sides[side][1]->has_value()) {
      check("grad_layer_logits", **sides[side][1], tap_weight, {layers, batch, outputs});
      args.grad_layer_logits[side] = in.keep(dense(**sides[side][1]));
    }
    args.active[side] = args.grad_logits[side] != nullptr || args.grad_layer_logits[side] != nullptr;
    const Tensor& first_sums = side == 0 ? before : before_zeroed;
    if (args.active[side] && !linear) {
      check("before", first_sums, tap_weight, {layers, batch, first});
      args.before[side] = in.keep(dense(first_sums));
    }
    const MaybeTensor& y = side == 0 ? layer_logits : layer_logits_zeroed;
    if (args.grad_logits[side] != nullptr && (needs & kNeedMix) != 0) {
      if (!y.has_value()) {
        fail(std::string(kOp) + "_backward: mix_weights' gradient needs layer_logits");
      }
      check("layer_logits", *y, tap_weight, {layers, batch, outputs});
      args.layer_logits[side] = in.keep(dense(*y));
    }
  }

  std::vector<Tensor> results;
  results.reserve(7 + taps.size());
  const auto result = [&](int64_t need, auto make) -> void* {
    const bool wanted = (needs & need) != 0;
    results.push_back(wanted ? make() : empty_like_dtype(tap_weight, {0}));
    if (!wanted) {
      return nullptr;
    }
    return results.back().mutable_data_ptr();
  };
  args.view = result(kNeedView, [&] { return empty_kept(tap_weight, {batch, in.args.view_width}); });
  args.tap_weight = result(kNeedTapWeight, [&] { return empty_kept(tap_weight, {in.tap_columns, first}); });
  args.view_weight =
      result(kNeedViewWeight, [&] { return empty_kept(tap_weight, {in.args.view_width, layers, first}); });
  args.bias = result(kNeedBias, [&] { return empty_kept(tap_weight, {layers, first}); });
  args.output_weight =
      result(kNeedOutputWeight, [&] { return empty_kept(tap_weight, {outputs, layers, first}); });
  args.output_bias = result(kNeedOutputBias, [&] { return empty_kept(tap_weight, {layers, outputs}); });
  std::vector<float> mix_grad(static_cast<std::size_t>(layers));
  void* mix_result = result(kNeedMix, [&] { return empty_kept(*mix_weights, {layers}); });
  args.mix = mix_result != nullptr ? mix_grad.data() : nullptr;
  std::vector<void*> tap_grads;
  for (std::size_t i = 0; i < taps.size(); ++i) {
    char* base = static_cast<char*>(result(kNeedTaps, [&] {
      return in.stacked ? empty_kept(tap_weight, {layers, batch, in.widths[0]})
                        : empty_kept(tap_weight, {batch, in.widths[i]});
    }));
    for (int64_t l = 0; in.stacked && l < layers; ++l) {
      tap_grads.push_back(base + l * batch * in.widths[0] * static_cast<int64_t>(tap_weight.element_size()));
    }
    if (!in.stacked) {
      tap_grads.push_back(base);  // null too where its width is 0
    }
  }
  args.taps = tap_grads.data();

  const auto zero = [](Tensor& tensor) {
    const std::size_t bytes = static_cast<std::size_t>(tensor.numel()) * tensor.element_size();
    if (bytes > 0) {
      std::memset(tensor.mutable_data_ptr(), 0, bytes);
    }
  };
  if (batch == 0 || outputs == 0 || (!args.active[0] && !args.active[1])) {
    for (Tensor& tensor : results) {
      zero(tensor);
    }
    return results;
  }
  if (!args.active[0]) {  // the zeroed view's prediction does not depend on the view
    for (int i : {0, 2}) {
      zero(results[i]);
    }
    needs &= ~(kNeedView | kNeedViewWeight);
  }

  const bool wants_d =
      (needs & (kNeedView | kNeedTapWeight | kNeedViewWeight | kNeedBias | kNeedOutputWeight | kNeedTaps)) != 0;
  const int64_t first_row = kernels.padded_width(first), output_row = kernels.padded_width(outputs);
  const int64_t lead = layers * batch;
  int64_t floats = 0;
  const auto reserve = [&floats](bool wanted, int64_t count) {
    const int64_t at = floats;
    floats += wanted ? (count + 31) / 32 * 32 : 0;
    return wanted ? at : int64_t{-1};
  };
  int64_t places[8];
  for (int side = 0; side < 2; ++side) {
    const int64_t row_floats = work_floats(kernels, lead * first_row);
    places[side] = reserve(args.active[side] && wants_d, row_floats);
    places[2 + side] = reserve(args.active[side] && !linear, work_floats(kernels, lead * output_row));
    places[4 + side] = reserve(args.active[side] && (needs & kNeedOutputWeight) != 0, row_floats);
  }
  places[6] = reserve((needs & kNeedTapWeight) != 0, lead * 2);
  places[7] = reserve((needs & kNeedViewWeight) != 0,
                      work_floats(kernels, batch * kernels.padded_width(in.args.view_width)));
  Buffer shared(floats);
  args.stream = tap_weight.numel() * static_cast<int64_t>(tap_weight.element_size()) >= kStreamBytes;
  const auto at = [&](int place) { return places[place] < 0 ? nullptr : shared.data() + places[place]; };
  for (int side = 0; side < 2; ++side) {
    args.d[side] = at(side);
    args.dy[side] = at(2 + side);
    args.hidden[side] = at(4 + side);
  }
  args.moments = at(6);
  args.view_rows = at(7);

  const int64_t threads = in.threads(in.cost());
  const int64_t rows = rows_for(kernels, in, threads);
  const int64_t space = kernels.scratch(in.args, std::max<int64_t>(rows, 64));
  const int64_t blocks = (batch + rows - 1) / rows;
  // Little beside the sums below, so it has an estimate of its own: the activation's slope, the product behind it, and
  // the taps' moments.
  const double by_rows = static_cast<double>(lead * first) * (2.0 + 0.035 * static_cast<double>(outputs)) +
                         static_cast<double>(batch * in.tap_columns) * 0.1;
  run_tasks(layers * blocks, threads_for(by_rows), [&](int64_t task) {
    const int64_t begin = task % blocks * rows;
    kernels.backward_rows(args, task / blocks, begin, std::min(begin + rows, batch), thread_scratch(space));
  });
  if (args.view_rows != nullptr) {
    run_blocks(batch, 64, threads_for(static_cast<double>(batch * in.args.view_width) * 0.3),
               [&](int64_t begin, int64_t end) { kernels.view_rows(args.in, args.view_rows, begin, end); });
  }

  std::vector<SumTask> tasks;
  const auto split = [&](bool wanted, GradTask kind, int64_t layer, int64_t count, int64_t step) {
    for (int64_t i = 0; wanted && i < count; i += step) {
      tasks.push_back({kind, layer, i, std::min(i + step, count)});
    }
  };
  split((needs & kNeedView) != 0, GradTask::kView, 0, batch,
        std::clamp<int64_t>((batch + threads - 1) / threads, 8, 64));
  for (int64_t l = 0; l < layers; ++l) {
    split((needs & kNeedTapWeight) != 0, GradTask::kTapWeight, l, in.widths[l], kWeightRows);
    split((needs & kNeedViewWeight) != 0, GradTask::kViewWeight, l, in.args.view_width, kWeightRows);
    split((needs & kNeedOutputWeight) != 0, GradTask::kOutputWeight, l, outputs, kWeightRows);
    split((needs & kNeedTaps) != 0, GradTask::kTap, l, batch, std::min<int64_t>(rows, 64));
    split((needs & (kNeedBias | kNeedOutputBias | kNeedMix)) != 0, GradTask::kBias, l, 1, 1);
  }
  run_tasks(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i) {
    const SumTask& task = tasks[i];
    kernels.backward_sums(args, task.kind, task.layer, task.begin, task.end, thread_scratch(space));
  });
  if (mix_result != nullptr) {
    from_floats(mix_grad, results[6]);
  }
  return results;
}

}  // namespace
}  // namespace levi_fast

STABLE_TORCH_LIBRARY_IMPL(levi_fast, CPU, m) {
  m.impl("layerwise_ensemble", TORCH_BOX(&levi_fast::layerwise_ensemble));
  m.impl("layerwise_ensemble_backward", TORCH_BOX(&levi_fast::layerwise_ensemble_backward));
}
