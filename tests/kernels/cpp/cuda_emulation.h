// Runs CUDA kernels on the CPU: csrc/cuda compiled by a C++ compiler, every block's threads as fibers.
//
// A kernel is executed as it stands, with its own index arithmetic, shared memory and barriers. Threads of a block run
// one after the other between barriers; a warp shuffle is a barrier of its warp. What a GPU leaves undefined is an
// error here: a shuffle or a barrier that not all threads reach. The order of blocks and threads can be reversed
// (`reversed`): results that change with it depend on a race. Warp-wide execution in step is NOT assumed, as on a GPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

using cudaStream_t = void*;

namespace cuda_emulation {

extern dim3 grid_dim, block_dim, block_idx, thread_idx;
extern bool reversed;

void launch(dim3 grid, dim3 block, const std::function<void()>& kernel);  // throws std::runtime_error
void block_barrier();
// Every lane's 8 bytes, exchanged: the value of lane `source` of this warp.
uint64_t exchange(uint64_t value, unsigned source);
unsigned lane();

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane exchanges at most 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, lane() ^ static_cast<unsigned>(mask));
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_emulation

inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }

#define threadIdx ::cuda_emulation::thread_idx
#define blockIdx ::cuda_emulation::block_idx
#define blockDim ::cuda_emulation::block_dim
#define gridDim ::cuda_emulation::grid_dim
#define __syncthreads() ::cuda_emulation::block_barrier()
#define __shfl_xor_sync(lanes, value, mask) ::cuda_emulation::shuffle_xor(value, mask)
