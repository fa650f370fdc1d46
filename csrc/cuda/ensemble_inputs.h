// The arguments that the ensemble's forward and backward share: checked, and ready for kernels and products.
#pragma once

#include "cuda/ensemble_math.h"
#include "cuda/host.h"

namespace levi_fast {
namespace cuda {

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

// Raises RuntimeError unless `tensor` has `like`'s dtype and device and this shape.
void check_like(const char* argument, const Tensor& tensor, const Tensor& like, const std::vector<int64_t>& shape);

struct EnsembleInputs {
  int64_t layers = 0, batch = 0, first = 0, outputs = 0;  // L, B, K = H or C, C
  int64_t view_width = 0, tap_columns = 0;                // V, sum of D_l
  std::vector<int64_t> widths;                            // D_l
  bool linear = false;                                    // no hidden layer
  bool stacked = false;                                   // taps came as one [L, B, D]
  bool equal = false;                                     // all D_l are the same
  bool normalize = false;
  int activation = 0;
  Dtype dtype = Dtype::kFloat32;
  Mix mix{};
  Dropout dropout{};
  std::vector<Tensor> taps;
  std::optional<Tensor> view, view_weight, output_weight;  // the weights contiguous
  const uint8_t* view_keep = nullptr;
  Tensor tap_weight;
  cudaStream_t stream = nullptr;
  std::vector<Tensor> kept;  // owns what the pointers point into

  EnsembleInputs(const std::vector<Tensor>& taps, const MaybeTensor& view, const MaybeTensor& view_keep,
                 const Tensor& tap_weight, const MaybeTensor& view_weight, const MaybeTensor& output_weight,
                 const MaybeTensor& mix_weights, const MaybeTensor& hidden_keep, int64_t activation, bool normalize,
                 double dropout);

  Tensor empty(const std::vector<int64_t>& sizes) const { return empty_on(tap_weight, sizes); }

  // All taps normalised, one after the other; nothing where they are used as they came.
  std::optional<Tensor> normed_taps() const;
  // Tap l as a matrix [B, D_l]: out of `normed`, or as it came.
  Tensor tap_matrix(const std::optional<Tensor>& normed, int64_t layer) const;
  // All taps as [L, B, D]; only where `batched`.
  Tensor tap_matrices(const std::optional<Tensor>& normed) const;
  bool batched() const { return stacked || (equal && normalize); }
  // norm(view) [B, V] with zeros where it is not kept.
  Tensor view_rows() const;
  // Gradients at normalised rows, in place the gradients at the rows themselves (norm_backward_kernel).
  void norm_backward(const std::vector<Tensor>& grads) const;         // of the taps, shaped as they came
  void view_norm_backward(const Tensor& grad) const;

 private:
  std::vector<Rows> tap_rows() const;
};

}  // namespace cuda
}  // namespace levi_fast
