// What every CUDA kernel here is written with: element types, 16-byte loads, sums over a warp or a block, launches.
//
// The kernels are plain CUDA C++, and also plain C++: with LEVI_FAST_CUDA_EMULATION a C++ compiler builds these same
// files, each launch runs block after block on the CPU, and the tests compare every kernel with float64 where there is
// no GPU (tests/kernels/cpp/cuda_emulation.h). So nothing here names a GPU's instruction that the emulation lacks.
#pragma once

#include <stdint.h>

#include "cpu/common.h"

#if defined(LEVI_FAST_CUDA_EMULATION)
#include "cpu/vec.h"
#include "cuda_emulation.h"
#define LEVI_FAST_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), ::cuda_emulation::launch(grid, block, [&] { kernel(__VA_ARGS__); }))
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LEVI_FAST_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace levi_fast {
namespace cuda {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// --- element types ------------------------------------------------------------------------------------------------

#if defined(LEVI_FAST_CUDA_EMULATION)
using levi_fast::bf16;
using levi_fast::f16;
using levi_fast::narrow;
using levi_fast::widen;
#else
using bf16 = __nv_bfloat16;
using f16 = __half;
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(bf16 x) { return __bfloat162float(x); }
__device__ inline float widen(f16 x) { return __half2float(x); }
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(double x, double* out) { *out = x; }
__device__ inline void narrow(float x, bf16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, f16* out) { *out = __float2half_rn(x); }
#endif

// What sums of T are taken in.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

// N neighbouring elements, moved as one: 16 bytes are one load instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <class T>
constexpr int kFull = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes

template <class T, int N>
__device__ inline Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <class T, int N>
__device__ inline void store(T* p, const Pack<T, N>& values) {
  *reinterpret_cast<Pack<T, N>*>(p) = values;
}

// One element of a tensor whose dtype is known at run time, as fp32.
__device__ inline float load_any(const void* p, int64_t i, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<const float*>(p)[i];
    case Dtype::kFloat64:
      return static_cast<float>(static_cast<const double*>(p)[i]);
    case Dtype::kBFloat16:
      return widen(static_cast<const bf16*>(p)[i]);
    default:
      return widen(static_cast<const f16*>(p)[i]);
  }
}

// --- sums in a fixed order ----------------------------------------------------------------------------------------
// A butterfly adds the same pairs in every lane, so all lanes hold the same bits, and the same at every run.

struct Add {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};

struct Max {
  __device__ float operator()(float a, float b) const { return a != a || a > b ? a : b; }  // a NaN wins
};

// The value of the lane whose number differs in the bits of `step`. What is no plain number brings its own overload.
template <class A>
__device__ inline A across(A value, int step) {
  return __shfl_xor_sync(kAllLanes, value, step);
}

// Reduction over groups of LANES neighbouring threads, at most a warp.
template <int LANES, class A, class F>
__device__ inline A lanes_reduce(A value, F combine) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) {
    value = combine(value, across(value, step));
  }
  return value;
}

// Reduction over GROUP threads: part of a warp, a warp, or the whole block. All threads of the block must come here.
template <int GROUP, class A, class F>
__device__ inline A group_reduce(A value, F combine) {
  if constexpr (GROUP <= kWarp) {
    return lanes_reduce<GROUP>(value, combine);
  } else {
    static_assert(GROUP == kThreads, "a group is a part of a warp or the whole block");
    __shared__ A warps[kThreads / kWarp];
    value = lanes_reduce<kWarp>(value, combine);
    __syncthreads();  // a reduction before this one may still be read
    if (threadIdx.x % kWarp == 0) {
      warps[threadIdx.x / kWarp] = value;
    }
    __syncthreads();
    value = warps[0];
#pragma unroll
    for (int i = 1; i < kThreads / kWarp; ++i) {
      value = combine(value, warps[i]);
    }
    return value;
  }
}

// --- shapes of launches -------------------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for `count` pieces of work; kernels step on by the grid's width, so any count is served.
inline unsigned blocks_for(int64_t count, int64_t most = int64_t{1} << 30) {
  return static_cast<unsigned>(count < 1 ? 1 : count < most ? count : most);
}

// Block of kThreads as columns x rows: as many columns as a row of `packs` can use, a power of two up to `most`.
inline dim3 tile_threads(int64_t packs, unsigned most = kThreads) {
  unsigned columns = 1;
  while (columns < most && columns < packs) {
    columns *= 2;
  }
  return dim3(columns, kThreads / columns, 1);
}

}  // namespace cuda
}  // namespace levi_fast
