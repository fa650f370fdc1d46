// Gradient of masked_mean_pool: row t of example b is grad[b] / count(b) where kept, zero elsewhere. The quotient row is
// made once per example; the rest is copies, bound by memory writes, so one build serves every machine.
#include "mask_scan.h"
#include "masked_mean_pool.h"
#include "vec.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace levi_fast {
namespace {

// Writing past the cache saves reading each line before it is overwritten. Only worth it where the result does not fit
// the cache anyway; the caller says so, and all its threads are joined (which fences) before anyone reads.
inline void stream_bytes(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  int64_t i = 0;
  const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 15u);
  if (head < bytes) {
    __builtin_memcpy(to, from, static_cast<size_t>(head));
    for (i = head; i + 16 <= bytes; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
  }
  __builtin_memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
#else
  __builtin_memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

template <class T, class Acc>
void backward_rows(const PoolBackward& args, int64_t b, int64_t begin, int64_t end) {
  int64_t kept = 0;
  scan(args.mask, b, 0, args.length, [&](int64_t, bool keep) {
    kept += keep;
    return true;
  });
  const T* grad = static_cast<const T*>(args.grad) + b * args.stride_b;
  T* out = static_cast<T*>(args.out) + b * args.length * args.width;
  const Acc divisor = static_cast<Acc>(kept > 0 ? kept : 1);
  alignas(64) static constexpr T kZeros[kMaxTile] = {};
  for (int64_t tile = 0; tile < args.width; tile += kMaxTile) {
    const int64_t columns = args.width - tile < kMaxTile ? args.width - tile : kMaxTile;
    alignas(64) T quotient[kMaxTile];
    for (int64_t j = 0; j < columns; ++j) {
      narrow(static_cast<Acc>(widen(grad[(tile + j) * args.stride_d]) / divisor), quotient + j);
    }
    const int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
    scan(args.mask, b, begin, end, [&](int64_t t, bool keep) {
      char* to = reinterpret_cast<char*>(out + t * args.width + tile);
      const char* from = reinterpret_cast<const char*>(keep ? quotient : kZeros);
      if (args.stream) {
        stream_bytes(to, from, bytes);
      } else {
        __builtin_memcpy(to, from, static_cast<size_t>(bytes));
      }
      return true;
    });
  }
#if defined(__SSE2__)
  if (args.stream) {
    _mm_sfence();
  }
#endif
}

}  // namespace

void pool_backward(Dtype dtype, const PoolBackward& args, int64_t b, int64_t begin, int64_t end) {
  switch (dtype) {
    case Dtype::kFloat32:
      return backward_rows<float, float>(args, b, begin, end);
    case Dtype::kBFloat16:
      return backward_rows<bf16, float>(args, b, begin, end);
    case Dtype::kFloat16:
      return backward_rows<f16, float>(args, b, begin, end);
    case Dtype::kFloat64:
      return backward_rows<double, double>(args, b, begin, end);
  }
}

const PoolForwardTable& pool_forward_table(Isa isa) {
  switch (isa) {
#if defined(LEVI_FAST_HAVE_AVX2)
    case Isa::kAvx2:
      return kPoolForwardAvx2;
#endif
#if defined(LEVI_FAST_HAVE_AVX512)
    case Isa::kAvx512:
      return kPoolForwardAvx512;
#endif
#if defined(LEVI_FAST_HAVE_NEON)
    case Isa::kNeon:
      return kPoolForwardNeon;
#endif
    default:
      return kPoolForwardScalar;
  }
}

}  // namespace levi_fast
