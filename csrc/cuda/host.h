// What the launchers share: allocation on an input's device, views, PyTorch's matrix products, streams, checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "tensor_utils.h"

namespace levi_fast {
namespace cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// --- the device ---------------------------------------------------------------------------------------------------

// Makes a tensor's GPU the current one while it lives, and switches gradients off: the products below are PyTorch's own
// operators, and a C++ program without Python may call these ops on tensors that require gradients.
class Scope {
 public:
  explicit Scope(const Tensor& tensor);
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
#if !defined(LEVI_FAST_CUDA_EMULATION)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  bool gradients_;
};

cudaStream_t current_stream(const Tensor& tensor);
int64_t multiprocessors(const Tensor& tensor);
void check_launch(const char* op);  // raises RuntimeError where the last launch was refused

// --- tensors ------------------------------------------------------------------------------------------------------

Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype);
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_on(like, sizes, like.scalar_type());
}

// The same memory with other sizes and strides, `offset` elements further on.
Tensor restride(const Tensor& tensor, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                int64_t offset = 0);

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// out = a @ b by PyTorch (cuBLAS on a GPU), 2 or 3 dimensions, `out` with any strides cuBLAS can write.
void matmul_into(Tensor& out, const Tensor& a, const Tensor& b);

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline bool is_aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// --- choice of a kernel's template arguments ----------------------------------------------------------------------

template <class T>
struct Tag {
  using type = T;
};

template <class F>
void by_dtype(Dtype dtype, const F& run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(Tag<float>{});
    case Dtype::kBFloat16:
      return run(Tag<bf16>{});
    case Dtype::kFloat16:
      return run(Tag<f16>{});
    case Dtype::kFloat64:
      return run(Tag<double>{});
  }
}

// Without float64: the ensemble's kernels do not take it.
template <class F>
void by_fast_dtype(Dtype dtype, const F& run) {
  switch (dtype) {
    case Dtype::kFloat32:
      return run(Tag<float>{});
    case Dtype::kBFloat16:
      return run(Tag<bf16>{});
    default:
      return run(Tag<f16>{});
  }
}

template <int N>
using Int = std::integral_constant<int, N>;

// 16 bytes at a time where `can`, else one element.
template <class T, class F>
void by_pack(bool can, const F& run) {
  if (can) {
    run(Int<kFull<T>>{});
  } else {
    run(Int<1>{});
  }
}

// --- a sum of parts in their order, shared by all reductions ------------------------------------------------------

// out[i] = sum_p partial[p, i] over `parts`, in fp32, for i < size; out has any floating dtype.
void sum_parts(const float* partial, int64_t parts, int64_t size, Tensor& out, cudaStream_t stream);

// Parts into which to cut a reduction of `steps` so that `blocks` blocks a part fill the device; at most 64.
inline int64_t parts_for(int64_t blocks, int64_t steps, int64_t processors) {
  return std::max<int64_t>(1, std::min<int64_t>({2 * processors / std::max<int64_t>(blocks, 1), steps, 64}));
}

}  // namespace cuda
}  // namespace levi_fast
