// The ensemble's activations, its mixing weights, and rows of taps, as the kernels see them.
#pragma once

#include <math.h>

#include "cuda/device.h"

namespace levi_fast {
namespace cuda {

// 0 gelu (exact), 1 relu, 2 silu, 3 tanh: the op's `activation`.
template <int ACT>
__device__ inline float activate(float x) {
  if constexpr (ACT == 0) {
    return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  } else if constexpr (ACT == 1) {
    return x < 0 ? 0.0f : x;  // not fmaxf(x, 0): a NaN stays one
  } else if constexpr (ACT == 2) {
    return __fdividef(x, 1.0f + expf(-x));
  } else {
    return tanhf(x);
  }
}

template <int ACT>
__device__ inline float activate_backward(float x) {
  if constexpr (ACT == 0) {
    return 0.5f * (1.0f + erff(x * 0.70710678118654752f)) + x * 0.39894228040143268f * expf(-0.5f * x * x);
  } else if constexpr (ACT == 1) {
    return x > 0 ? 1.0f : 0.0f;
  } else if constexpr (ACT == 2) {
    const float s = __fdividef(1.0f, 1.0f + expf(-x));
    return s * (1.0f + x * (1.0f - s));
  } else {
    const float t = tanhf(x);
    return 1.0f - t * t;
  }
}

// The mixing weights, read where they are: any dtype, nothing comes to the host. Null: every layer has 1 / L.
struct Mix {
  const void* weights;
  Dtype dtype;
  float mean;

  __device__ float operator()(int64_t layer) const {
    return weights == nullptr ? mean : load_any(weights, layer, dtype);
  }
};

// One of two arguments: an index that is not known when compiling would put a copy of all arguments into memory.
template <class A>
__device__ inline A pick(const A (&pair)[2], int side) {
  return side == 0 ? pair[0] : pair[1];
}

// What hidden dropout keeps, [L, B, H] bytes, or null for everything; the factor of what is kept.
struct Dropout {
  const uint8_t* keep;
  float scale;

  __device__ float operator()(float value, int64_t i) const {
    return keep == nullptr ? value : keep[i] != 0 ? value * scale : 0.0f;  // not a product: a dropped NaN is gone
  }
};

// Rows that are read one by one: a tap, or the view.
struct Rows {
  const void* data;
  int64_t row_stride, feature_stride, width;
  float inverse;  // 1 / width
  void* out;      // contiguous rows of `width`
};

// Taps of one launch, by value: no table is copied to the device, so nothing synchronises and a CUDA graph captures it.
constexpr int kRowSets = 32;
struct RowTable {
  Rows at[kRowSets];
};

constexpr float kEpsilon = 1e-5f;  // torch.nn.functional.layer_norm's

struct Moments {
  float mean, rstd;
};

// LayerNorm's statistics of one row, by GROUP threads of which this one is `member`. Two passes: E[x^2] - mean^2 would
// cancel. The row comes from the cache the second time.
template <class T, int GROUP, int N>
__device__ inline Moments moments(const T* row, int64_t stride, int64_t width, float inverse, int member) {
  float sum = 0.0f;
  for (int64_t i = static_cast<int64_t>(member) * N; i < width; i += GROUP * N) {
    const Pack<T, N> values = load<T, N>(row + i * stride);
#pragma unroll
    for (int v = 0; v < N; ++v) {
      sum += widen(values.at[v]);
    }
  }
  const float mean = group_reduce<GROUP>(sum, Add{}) * inverse;
  float squares = 0.0f;
  for (int64_t i = static_cast<int64_t>(member) * N; i < width; i += GROUP * N) {
    const Pack<T, N> values = load<T, N>(row + i * stride);
#pragma unroll
    for (int v = 0; v < N; ++v) {
      const float centred = widen(values.at[v]) - mean;
      squares += centred * centred;
    }
  }
  return {mean, rsqrtf(group_reduce<GROUP>(squares, Add{}) * inverse + kEpsilon)};
}

}  // namespace cuda
}  // namespace levi_fast
