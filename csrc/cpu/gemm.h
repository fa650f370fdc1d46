// Small matrix products on one thread, in pieces that a fused kernel strings together. fp32 accumulators throughout.
//
//   product      C[m, n] (+)= sum_k A[m, k] B[k, n]     A: fp32 with any strides, B: rows of the weights' own dtype
//   dots         C[m, n]   = sum_k A[m, k] B[n, k]      both contiguous along k
//
// The register tile of `product` is as many rows as leave room for the operands (12 x 2 vectors of 32 registers). On a
// 3.6 GHz Zen 4 core it runs at 115 GFLOP/s, the core's peak, where MKL's sgemm reaches 55. B is repacked, a panel of
// rows at a time, into the tile's own width: that reads it in address order, widens it to fp32 and pads its edge.
#pragma once

#include "simd.h"

namespace levi_fast {
namespace {

#if defined(LEVI_FAST_ISA_AVX2)
constexpr int kRows = 6;  // 16 vector registers
#else
constexpr int kRows = 12;  // 32 of them
#endif
constexpr int64_t kDepth = 128;  // rows of B per panel: a panel of one tile's width stays in L1

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

// E: float, or uint32_t for a pair of bf16 of neighbouring k (AVX-512 BF16: twice the rate, same fp32 sums).
template <int R, int N, class E>
inline void tile(const E* a, int64_t row_a, int64_t step_a, const E* b, int64_t row_b, float* c, int64_t row_c,
                 int64_t depth, bool add) {
  Vf sum[R][N];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      sum[i][j] = add ? load(c + i * row_c + j * kLanes) : Vf{};
    }
  }
  if constexpr (kIsFloat<E>) {
    for (int64_t k = 0; k < depth; ++k) {
      Vf right[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        right[j] = load(b + k * row_b + j * kLanes);
      }
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Vf left = splat(a[i * row_a + k * step_a]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
          sum[i][j] += left * right[j];
        }
      }
    }
  } else {
#if defined(LEVI_FAST_BF16_DOT)
    for (int64_t k = 0; k < depth; ++k) {
      __m512i right[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        right[j] = _mm512_loadu_si512(b + k * row_b + j * kLanes);
      }
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const __m512i left = _mm512_set1_epi32(static_cast<int>(a[i * row_a + k * step_a]));
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
          sum[i][j] = (Vf)_mm512_dpbf16_ps((__m512)sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
      }
    }
#endif
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      store(sum[i][j], c + i * row_c + j * kLanes);
    }
  }
}

template <class E>
using TileFn = void (*)(const E*, int64_t, int64_t, const E*, int64_t, float*, int64_t, int64_t, bool);

template <class E, int N, int R>
inline TileFn<E> pick_tile(int rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? &tile<R, N, E> : pick_tile<E, N, R - 1>(rows);
  }
}

// One vector of columns for the last odd one, two elsewhere; few rows take more columns, to keep enough sums in flight.
template <class E>
inline TileFn<E> tile_for(int rows, int vectors) {
  switch (vectors) {
    case 8:
      return pick_tile<E, 8, 1>(rows);
    case 4:
      return pick_tile<E, 4, kRows / 3>(rows);
    case 2:
      return pick_tile<E, 2, kRows>(rows);
    default:
      return pick_tile<E, 1, kRows>(rows);
  }
}

inline int widest(int rows) { return rows == 1 ? 8 : rows <= kRows / 3 ? 4 : 2; }

// C over columns [0, n), n a multiple of kLanes, B fp32 with rows `row_b` apart. Rows of A are shared out evenly.
template <class E>
inline void product_rows(const E* a, int64_t row_a, int64_t step_a, int64_t rows, const E* b, int64_t row_b, float* c,
                         int64_t row_c, int64_t n, int64_t depth, bool add) {
  const int64_t groups = (rows + kRows - 1) / kRows;
  for (int64_t g = 0, m = 0; g < groups; ++g) {
    const int count = static_cast<int>((rows - m + groups - g - 1) / (groups - g));
    int vectors = widest(count);
    TileFn<E> run = tile_for<E>(count, vectors);
    for (int64_t j = 0; j < n;) {
      while (j + vectors * kLanes > n) {
        vectors /= 2;
        run = tile_for<E>(count, vectors);
      }
      run(a + m * row_a, row_a, step_a, b + j, row_b, c + m * row_c + j, row_c, depth, add);
      j += vectors * kLanes;
    }
    m += count;
  }
}

// Floats of packing space that `product` asks for.
inline int64_t packing_space(int64_t n) { return kDepth * round_up(n, 2 * kLanes); }

// C[rows, round_up(n, kLanes)] (+)= A B; the columns past n become zero (or keep what `add` finds there).
template <class T>
void product(const float* a, int64_t row_a, int64_t step_a, int64_t rows, const T* b, int64_t row_b, float* c,
             int64_t row_c, int64_t n, int64_t depth, bool add, float* packing) {
  const int64_t padded = round_up(n, kLanes);
  if constexpr (kIsFloat<T>) {
    if (n == padded && rows <= kRows) {  // B is read once: packing would be one more pass over it
      // In slices, so that the rows being read stay few enough for the address translation caches.
      for (int64_t k = 0; k < depth; k += kDepth) {
        product_rows(a + k * step_a, row_a, step_a, rows, b + k * row_b, row_b, c, row_c, n,
                     smaller(kDepth, depth - k), add || k > 0);
      }
      if (depth > 0) {
        return;
      }
    }
  }
  if (depth <= 0) {
    for (int64_t m = 0; m < rows && !add; ++m) {
      for (int64_t j = 0; j < padded; j += kLanes) {
        store(Vf{}, c + m * row_c + j);
      }
    }
    return;
  }
  constexpr int64_t kWide = 2 * kLanes;
  for (int64_t start = 0; start < depth; start += kDepth) {
    const int64_t count = smaller(kDepth, depth - start);
    for (int64_t k = 0; k < count; ++k) {
      const T* from = b + (start + k) * row_b;
      for (int64_t j = 0; j < padded; j += kLanes) {
        // Panel after panel of two vectors' width; a last odd vector makes a panel of one.
        const int64_t panel = j / kWide * kWide;
        const int64_t width = smaller(kWide, padded - panel);
        store(load_upto(from + j, n - j), packing + panel * count + k * width + (j - panel));
      }
    }
    for (int64_t j = 0; j < padded; j += kWide) {
      const int64_t width = smaller(kWide, padded - j);
      product_rows(a + start * step_a, row_a, step_a, rows, packing + j * count, width, c + j, row_c, width, count,
                   add || start > 0);
    }
  }
}

#if defined(LEVI_FAST_BF16_DOT)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

inline Vu widen_bits(const bf16* p) {
  Vh raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return __builtin_convertvector(raw, Vu);
}

inline Vu rounded_bits(Vf v) {
  bf16 out[kLanes];
  store(v, out);
  return widen_bits(out);
}

inline void store_pairs(Vu even, Vu odd, uint32_t* to) {
  const Vu pairs = even | (odd << 16);
  __builtin_memcpy(to, &pairs, sizeof(pairs));
}

// As `product`, A's rows and B's in bf16: A as pairs along k (its rows padded with a zero), B made into pairs here.
inline void product_pairs(const uint32_t* a, int64_t row_a, int64_t rows, const bf16* b, int64_t row_b, float* c,
                          int64_t row_c, int64_t n, int64_t depth, bool add, uint32_t* packing) {
  constexpr int64_t kWide = 2 * kLanes;
  const int64_t padded = round_up(n, kLanes);
  static constexpr bf16 kZeros[kLanes] = {};
  for (int64_t start = 0; start < depth; start += 2 * kDepth) {
    const int64_t count = smaller(2 * kDepth, depth - start), pairs = (count + 1) / 2;
    for (int64_t k = 0; k < pairs; ++k) {
      const bf16* even = b + (start + 2 * k) * row_b;
      const bool lone = 2 * k + 1 == count;
      for (int64_t j = 0; j < padded; j += kLanes) {
        const int64_t panel = j / kWide * kWide, width = smaller(kWide, padded - panel);
        uint32_t* to = packing + panel * pairs + k * width + (j - panel);
        if (n - j >= kLanes) {
          store_pairs(widen_bits(even + j), widen_bits(lone ? kZeros : even + row_b + j), to);
        } else {
          const Vu low = (Vu)load_part(even + j, n - j) >> 16;
          store_pairs(low, lone ? Vu{} : (Vu)load_part(even + row_b + j, n - j) >> 16, to);
        }
      }
    }
    for (int64_t j = 0; j < padded; j += kWide) {
      const int64_t width = smaller(kWide, padded - j);
      product_rows(a + start / 2, row_a, 1, rows, packing + j * pairs, width, c + j, row_c, width, pairs,
                   add || start > 0);
    }
  }
  for (int64_t m = 0; depth <= 0 && !add && m < rows; ++m) {
    for (int64_t j = 0; j < padded; j += kLanes) {
      store(Vf{}, c + m * row_c + j);
    }
  }
}

// Dots of R rows of A with N rows of B over `segments` stretches of `depth` elements; `jump` from stretch to stretch.
template <int R, int N, class T>
inline void dot_tile(const float* a, int64_t row_a, int64_t jump_a, const T* b, int64_t row_b, int64_t jump_b,
                     int64_t depth, int64_t segments, float* c, int64_t row_c) {
  Vf total[R][N] = {};
  for (int64_t s = 0; s < segments; ++s) {
    const float* x = a + s * jump_a;
    const T* y = b + s * jump_b;
    int64_t k = 0;
    for (; k + kLanes <= depth; k += kLanes) {
      Vf left[R];
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        left[i] = load(x + i * row_a + k);
      }
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const Vf right = load(y + j * row_b + k);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          total[i][j] += left[i] * right;
        }
      }
    }
    if (k < depth) {
      for (int j = 0; j < N; ++j) {
        const Vf right = load_part(y + j * row_b + k, depth - k);
        for (int i = 0; i < R; ++i) {
          total[i][j] += load_part(x + i * row_a + k, depth - k) * right;
        }
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < N; ++j) {
      c[i * row_c + j] = sum(total[i][j]);
    }
  }
}

template <class T>
inline void dots(const float* a, int64_t row_a, int64_t jump_a, int64_t rows, const T* b, int64_t row_b, int64_t jump_b,
                 int64_t n, int64_t depth, int64_t segments, float* c, int64_t row_c) {
  constexpr int R = kRows == 6 ? 2 : 4;
  for (int64_t j = 0; j < n;) {
    const int64_t wide = n - j >= 4 ? 4 : 1;
    for (int64_t m = 0; m < rows;) {
      const int64_t high = rows - m >= R ? R : 1;
      const float* x = a + m * row_a;
      const T* y = b + j * row_b;
      float* to = c + m * row_c + j;
      if (wide == 4) {
        if (high == R) {
          dot_tile<R, 4>(x, row_a, jump_a, y, row_b, jump_b, depth, segments, to, row_c);
        } else {
          dot_tile<1, 4>(x, row_a, jump_a, y, row_b, jump_b, depth, segments, to, row_c);
        }
      } else if (high == R) {
        dot_tile<R, 1>(x, row_a, jump_a, y, row_b, jump_b, depth, segments, to, row_c);
      } else {
        dot_tile<1, 1>(x, row_a, jump_a, y, row_b, jump_b, depth, segments, to, row_c);
      }
      m += high;
    }
    j += wide;
  }
}

}  // namespace
}  // namespace levi_fast
