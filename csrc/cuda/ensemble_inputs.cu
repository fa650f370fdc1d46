// See ensemble_inputs.h. The checks say what csrc/layerwise_ensemble.cpp's say.
#include "cuda/ensemble_inputs.h"

#include "cuda/ensemble_backward_kernels.h"
#include "cuda/ensemble_kernels.h"

namespace levi_fast {
namespace cuda {
namespace {

constexpr const char* kOp = "layerwise_ensemble";

std::string name_of(const char* argument) { return std::string(kOp) + ": " + argument; }

std::string shape_of(const std::vector<int64_t>& shape) {
  return shape_text(torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
}

void check_mask(const char* argument, const Tensor& mask, const Tensor& like, const std::vector<int64_t>& shape) {
  if (mask.scalar_type() != ScalarType::Bool) {
    fail(name_of(argument) + " must be bool, got " + dtype_name(mask.scalar_type()));
  }
  check_like(argument, mask, mask, shape);
  if (!same_device(mask, like)) {
    fail(name_of(argument) + " must be on tap_weight's device, got another one");
  }
}

float inverse_of(int64_t width) { return 1.0f / static_cast<float>(std::max<int64_t>(width, 1)); }

// launch(table, count) for the sets of rows, kRowSets at a time.
template <class Launch>
void over_rows(const std::vector<Rows>& rows, const Launch& launch) {
  for (std::size_t first = 0; first < rows.size(); first += kRowSets) {
    RowTable table{};
    const std::size_t count = std::min<std::size_t>(rows.size() - first, kRowSets);
    std::copy_n(rows.begin() + static_cast<std::ptrdiff_t>(first), count, table.at);
    launch(table, static_cast<unsigned>(count));
  }
}

// A warp a row where rows are short or many, else a block a row.
bool block_a_row(int64_t rows, int64_t widest, int64_t processors) {
  return widest > 2048 || (widest > 512 && rows < 8 * processors);
}

template <class T>
bool packs(const std::vector<Rows>& rows) {
  return std::all_of(rows.begin(), rows.end(), [](const Rows& r) {
    return r.width % kFull<T> == 0 && r.feature_stride == 1 && r.row_stride % kFull<T> == 0 &&
           is_aligned(r.data, 16) && is_aligned(r.out, 16);
  });
}

template <class F>
void by_group(bool block, const F& run) {
  if (block) {
    run(Int<kThreads>{});
  } else {
    run(Int<kWarp>{});
  }
}

void run_rows(bool backward, Dtype dtype, const std::vector<Rows>& rows, int64_t batch, const uint8_t* keep,
              bool normalize, int64_t processors, cudaStream_t stream) {
  int64_t widest = 0;
  for (const Rows& r : rows) {
    widest = std::max(widest, r.width);
  }
  if (batch == 0 || widest == 0) {
    return;
  }
  by_fast_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    by_group(block_a_row(batch * static_cast<int64_t>(rows.size()), widest, processors), [&](auto group) {
      constexpr int kGroup = decltype(group)::value;
      by_pack<T>(packs<T>(rows), [&](auto pack) {
        constexpr int N = decltype(pack)::value;
        over_rows(rows, [&](const RowTable& table, unsigned count) {
          const dim3 grid(blocks_for(ceil_div(batch, kThreads / kGroup)), count, 1);
          if (backward) {
            LEVI_FAST_LAUNCH((norm_backward_kernel<T, kGroup, N>), grid, dim3(kThreads), stream, table, batch, keep,
                             normalize);
          } else {
            LEVI_FAST_LAUNCH((norm_rows_kernel<T, kGroup, N>), grid, dim3(kThreads), stream, table, batch, keep,
                             normalize);
          }
        });
      });
    });
  });
}

}  // namespace

void check_like(const char* argument, const Tensor& tensor, const Tensor& like, const std::vector<int64_t>& shape) {
  if (tensor.scalar_type() != like.scalar_type()) {
    fail(name_of(argument) + " must have tap_weight's dtype, " + dtype_name(like.scalar_type()) + ", got " +
         dtype_name(tensor.scalar_type()));
  }
  if (!same_device(tensor, like)) {
    fail(name_of(argument) + " must be on tap_weight's device, got another one");
  }
  const auto sizes = tensor.sizes();
  if (sizes.size() != shape.size() || !std::equal(shape.begin(), shape.end(), sizes.begin())) {
    fail(name_of(argument) + " must have shape " + shape_of(shape) + ", got " + shape_text(sizes));
  }
}

EnsembleInputs::EnsembleInputs(const std::vector<Tensor>& tensors, const MaybeTensor& view_, const MaybeTensor& keep,
                               const Tensor& weight, const MaybeTensor& view_weight_, const MaybeTensor& output_weight_,
                               const MaybeTensor& mix_weights, const MaybeTensor& hidden_keep, int64_t activation_,
                               bool normalize_, double dropout_)
    : normalize(normalize_), taps(tensors), view(view_), tap_weight(weight) {
  dtype = float_dtype(kOp, "tap_weight", weight.scalar_type());
  if (dtype == Dtype::kFloat64) {
    fail(std::string(kOp) + ": the cuda kernels serve float32, bfloat16 and float16, not float64; use the eager backend");
  }
  if (tensors.empty()) {
    fail(name_of("taps") + " must hold at least one tensor, got none");
  }
  if (weight.dim() != 2) {
    fail(name_of("tap_weight") + " must have 2 dimensions, got shape " + shape_text(weight.sizes()));
  }
  stacked = tensors.size() == 1 && tensors[0].dim() == 3;
  if (!stacked && tensors[0].dim() != 2) {
    fail(name_of("taps[0]") + " must have 2 dimensions, got shape " + shape_text(tensors[0].sizes()));
  }
  layers = stacked ? tensors[0].size(0) : static_cast<int64_t>(tensors.size());
  batch = tensors[0].size(stacked ? 1 : 0);
  first = weight.size(1);
  linear = !output_weight_.has_value();
  outputs = linear ? first : output_weight_->size(0);
  if (activation_ < 0 || activation_ > 3) {
    fail(name_of("activation") + " must be 0, 1, 2 or 3, got " + std::to_string(activation_));
  }
  activation = static_cast<int>(activation_);
  for (int64_t l = 0; l < layers; ++l) {
    const Tensor& tap = tensors[stacked ? 0 : l];
    if (tap.dim() < 2) {
      fail(name_of("taps") + " must have 2 dimensions, got shape " + shape_text(tap.sizes()));
    }
    const int64_t width = tap.size(tap.dim() - 1);
    check_like("taps", tap, weight, stacked ? std::vector{layers, batch, width} : std::vector{batch, width});
    widths.push_back(width);
    tap_columns += width;
  }
  equal = std::all_of(widths.begin(), widths.end(), [&](int64_t w) { return w == widths[0]; });
  check_like("tap_weight", weight, weight, {tap_columns, first});
  tap_weight = dense(weight);
  if (view_.has_value() != view_weight_.has_value()) {
    fail(std::string(kOp) + ": view and view_weight must come together");
  }
  if (view_.has_value()) {
    view_width = view_->dim() == 2 ? view_->size(1) : 0;
    check_like("view", *view_, weight, {batch, view_width});
    check_like("view_weight", *view_weight_, weight, {view_width, layers, first});
    view_weight = dense(*view_weight_);
  }
  if (keep.has_value()) {
    check_mask("view_keep", *keep, weight, {batch});
    kept.push_back(dense(*keep));
    view_keep = static_cast<const uint8_t*>(kept.back().const_data_ptr());
  }
  if (!linear) {
    check_like("output_weight", *output_weight_, weight, {outputs, layers, first});
    output_weight = dense(*output_weight_);
  }
  if (hidden_keep.has_value() && !linear) {
    check_mask("hidden_keep", *hidden_keep, weight, {layers, batch, first});
    kept.push_back(dense(*hidden_keep));
    dropout.keep = static_cast<const uint8_t*>(kept.back().const_data_ptr());
  }
  dropout.scale = dropout_ < 1 ? static_cast<float>(1 / (1 - dropout_)) : 0.0f;
  mix.mean = 1.0f / static_cast<float>(layers);
  if (mix_weights.has_value()) {
    check_like("mix_weights", *mix_weights, *mix_weights, {layers});
    if (!same_device(*mix_weights, weight)) {
      fail(name_of("mix_weights") + " must be on tap_weight's device, got another one");
    }
    mix.dtype = float_dtype(kOp, "mix_weights", mix_weights->scalar_type());
    kept.push_back(dense(*mix_weights));
    mix.weights = kept.back().const_data_ptr();
  }
  stream = current_stream(weight);
}

std::vector<Rows> EnsembleInputs::tap_rows() const {
  std::vector<Rows> rows;
  for (int64_t l = 0; l < layers; ++l) {
    const Tensor& tap = taps[stacked ? 0 : l];
    const auto* base = static_cast<const char*>(tap.const_data_ptr());
    const int64_t offset = stacked ? l * tap.stride(0) * static_cast<int64_t>(tap.element_size()) : 0;
    rows.push_back({base + offset, tap.stride(stacked ? 1 : 0), tap.stride(stacked ? 2 : 1), widths[l],
                    inverse_of(widths[l]), nullptr});
  }
  return rows;
}

std::optional<Tensor> EnsembleInputs::normed_taps() const {
  if (!normalize) {
    return std::nullopt;
  }
  Tensor out = empty({batch * tap_columns});
  std::vector<Rows> rows = tap_rows();
  auto* next = static_cast<char*>(out.mutable_data_ptr());
  for (Rows& r : rows) {
    r.out = next;
    next += batch * r.width * static_cast<int64_t>(out.element_size());
  }
  run_rows(false, dtype, rows, batch, nullptr, true, multiprocessors(out), stream);
  return out;
}

Tensor EnsembleInputs::tap_matrix(const std::optional<Tensor>& normed, int64_t layer) const {
  const int64_t width = widths[layer];
  if (normed.has_value()) {
    int64_t before = 0;
    for (int64_t l = 0; l < layer; ++l) {
      before += widths[l];
    }
    return restride(*normed, {batch, width}, {std::max<int64_t>(width, 1), 1}, batch * before);
  }
  if (!stacked) {
    return taps[layer];
  }
  return restride(taps[0], {batch, width}, {taps[0].stride(1), taps[0].stride(2)}, layer * taps[0].stride(0));
}

Tensor EnsembleInputs::tap_matrices(const std::optional<Tensor>& normed) const {
  if (!normed.has_value()) {
    return taps[0];
  }
  const int64_t width = widths[0];
  return restride(*normed, {layers, batch, width}, {batch * width, std::max<int64_t>(width, 1), 1});
}

Tensor EnsembleInputs::view_rows() const {
  if (!normalize && view_keep == nullptr) {
    return *view;
  }
  Tensor out = empty({batch, view_width});
  const std::vector<Rows> rows{
      {view->const_data_ptr(), view->stride(0), view->stride(1), view_width, inverse_of(view_width),
       out.mutable_data_ptr()}};
  run_rows(false, dtype, rows, batch, view_keep, normalize, multiprocessors(out), stream);
  return out;
}

void EnsembleInputs::norm_backward(const std::vector<Tensor>& grads) const {
  if (!normalize) {
    return;
  }
  std::vector<Rows> rows = tap_rows();
  for (int64_t l = 0; l < layers; ++l) {
    const Tensor& grad = grads[stacked ? 0 : l];
    const int64_t offset = stacked ? l * batch * widths[0] * static_cast<int64_t>(grad.element_size()) : 0;
    rows[l].out = static_cast<char*>(grad.mutable_data_ptr()) + offset;
  }
  run_rows(true, dtype, rows, batch, nullptr, true, multiprocessors(tap_weight), stream);
}

void EnsembleInputs::view_norm_backward(const Tensor& grad) const {
  if (!normalize && view_keep == nullptr) {
    return;
  }
  const std::vector<Rows> rows{
      {view->const_data_ptr(), view->stride(0), view->stride(1), view_width, inverse_of(view_width),
       grad.mutable_data_ptr()}};
  run_rows(true, dtype, rows, batch, view_keep, normalize, multiprocessors(grad), stream);
}

}  // namespace cuda
}  // namespace levi_fast
