// masked_mean_pool on CPU: what the op hands to a kernel. No torch in here: the kernels are plain C++ over pointers, so
// that they can be tested alone (sanitizers, an emulated CPU).
#pragma once

#include "common.h"

namespace levi_fast {

// Columns a kernel keeps in its accumulators at once: 4 KiB of fp32, so that all three levels stay in L1.
constexpr int64_t kMaxTile = 1024;

struct PoolForward {
  const void* hidden;  // [B, T, D], strides in elements
  int64_t stride_b;
  int64_t stride_t;
  int64_t stride_d;
  Mask mask;
  int64_t batch;       // B
  int64_t length;      // T
  int64_t width;       // D
  void* out;           // [B, D], contiguous
};

struct PoolBackward {
  const void* grad;    // [B, D], strides in elements
  int64_t stride_b;
  int64_t stride_d;
  Mask mask;
  int64_t length;
  int64_t width;
  void* out;           // [B, T, D], contiguous
  bool stream;         // write around the cache: the result is larger than what the cache could keep
};

// Columns [begin, end) of example `b`; end - begin <= kMaxTile.
struct PoolUnit {
  int64_t b;
  int64_t begin;
  int64_t end;
};

// Pools one unit. `next` is what the same thread pools after it (its first rows are asked for early), or null. The order
// of additions per column depends on the mask alone (not on the unit, the instruction set or the number of threads), so
// all of them give the same bits.
using PoolForwardFn = void (*)(const PoolForward& args, const PoolUnit& unit, const PoolUnit* next);

struct PoolForwardTable {
  PoolForwardFn by_dtype[kDtypeCount];
  int64_t (*kept)(const Mask& mask, int64_t b, int64_t length);  // tokens that example `b` keeps
};

// `isa` must be compiled in (isa_compiled).
const PoolForwardTable& pool_forward_table(Isa isa);

// Rows [begin, end) of example `b`. One build for all machines: it is copies and, per example, D divisions.
void pool_backward(Dtype dtype, const PoolBackward& args, int64_t b, int64_t begin, int64_t end);

extern const PoolForwardTable kPoolForwardScalar;
extern const PoolForwardTable kPoolForwardAvx2;
extern const PoolForwardTable kPoolForwardAvx512;
extern const PoolForwardTable kPoolForwardNeon;

}  // namespace levi_fast
