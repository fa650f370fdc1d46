// Plain types shared by all CPU kernels. No C++ standard header: see vec.h for why.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace levi_fast {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3 };
constexpr int kIsaCount = 4;

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int kDtypeCount = 4;

// A mask entry is "keep" when nonzero. Only its width matters, and for floating point that -0.0 is zero too: so it is
// read as an integer of `itemsize` bytes, without its sign bit where `floating`. No dtype is ever converted.
struct Mask {
  const void* data;  // null: everything is kept
  int64_t stride_b;  // in elements
  int64_t stride_t;
  int itemsize;      // 1, 2, 4 or 8
  bool floating;
};

}  // namespace levi_fast
