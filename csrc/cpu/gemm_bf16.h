// The products of gemm.h on AVX-512 BF16's dot products of pairs: both operands bf16, sums fp32. Without that instruction
// set the same names exist, so that code which never calls them compiles.
#pragma once

#include "gemm.h"

namespace levi_fast {
namespace {

#if defined(LEVI_FAST_BF16_DOT)
constexpr bool kPairs = true;

struct alignas(64) Lanes16 {
  uint16_t at[32];
};

// Picks low (or high) halves of two rows alternately: x0 y0 x1 y1 ...; lane 32 + i of a two-source permute is y's i.
constexpr Lanes16 alternate(int from) {
  Lanes16 lanes{};
  for (int i = 0; i < 16; ++i) {
    lanes.at[2 * i] = static_cast<uint16_t>(from + i);
    lanes.at[2 * i + 1] = static_cast<uint16_t>(32 + from + i);
  }
  return lanes;
}
constexpr Lanes16 kLow = alternate(0), kHigh = alternate(16);

inline __m512i load_columns(const bf16* p, int64_t left) {
  const __mmask32 mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1u;
  return _mm512_maskz_loadu_epi16(mask, p);
}
#else
constexpr bool kPairs = false;
#endif

// kWide columns (`left` of them real, zeros behind) of two neighbouring rows as pairs, `width` of them stored; a null `odd`
// counts as zeros.
inline void pair_rows(const bf16* even, const bf16* odd, int64_t left, uint32_t* to, int64_t width) {
#if defined(LEVI_FAST_BF16_DOT)
  const __m512i x = load_columns(even, left), y = odd == nullptr ? _mm512_setzero_si512() : load_columns(odd, left);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, _mm512_load_si512(&kLow), y));
  if (width > kLanes) {
    _mm512_storeu_si512(to + kLanes, _mm512_permutex2var_epi16(x, _mm512_load_si512(&kHigh), y));
  }
#else
  (void)even, (void)odd, (void)left, (void)to, (void)width;
#endif
}

// Rows [0, count) of B, columns [0, n), as panels of pairs: panel j / kWide at packing + j * (pairs + 1).
inline void pack_pairs(const bf16* b, int64_t row_b, int64_t n, int64_t count, uint32_t* packing) {
  const int64_t padded = round_up(n, kLanes), pairs = (count + 1) / 2;
  for (int64_t k = 0; k < pairs; ++k) {
    const bf16* even = b + 2 * k * row_b;
    const bf16* odd = 2 * k + 1 < count ? even + row_b : nullptr;
    for (int64_t j = 0; j < padded; j += kWide) {
      const int64_t width = smaller(kWide, padded - j);
      pair_rows(even + j, odd == nullptr ? nullptr : odd + j, n - j, packing + j * (pairs + 1) + k * width, width);
    }
  }
}

// R rows of A, G * kWide columns at a time, B made into pairs in registers: for so few rows, packing would cost more
// than multiplying.
template <int R, int G>
inline void few_rows(const uint32_t* a, int64_t row_a, const bf16* b, int64_t row_b, float* c, int64_t row_c,
                     int64_t n, int64_t depth, bool add, Ahead ahead, Soon* soon, Soon* also) {
#if defined(LEVI_FAST_BF16_DOT)
  const __m512i low = _mm512_load_si512(&kLow), high = _mm512_load_si512(&kHigh);
  for (int64_t j = 0; j < n; j += G * kWide, ahead = after(ahead, (depth + 1) / 2)) {
    ask(soon, also);
    __m512 sum[R][2 * G] = {};
    for (int64_t k = 0; k < depth; k += 2) {
      ask(ahead, k / 2);
      const bf16* even = b + k * row_b + j;
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const __m512i x = load_columns(even + g * kWide, n - j - g * kWide);
        const __m512i y =
            k + 1 < depth ? load_columns(even + row_b + g * kWide, n - j - g * kWide) : _mm512_setzero_si512();
        const __m512i first = _mm512_permutex2var_epi16(x, low, y), second = _mm512_permutex2var_epi16(x, high, y);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
          const __m512i left = _mm512_set1_epi32(static_cast<int>(a[i * row_a + k / 2]));
          sum[i][2 * g] = _mm512_dpbf16_ps(sum[i][2 * g], (__m512bh)left, (__m512bh)first);
          sum[i][2 * g + 1] = _mm512_dpbf16_ps(sum[i][2 * g + 1], (__m512bh)left, (__m512bh)second);
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int g = 0; g < 2 * G; ++g) {
        if (j + g * kLanes >= n) {
          break;
        }
        float* to = c + i * row_c + j + g * kLanes;
        store(add ? load(to) + (Vf)sum[i][g] : (Vf)sum[i][g], to);
      }
    }
  }
#else
  (void)a, (void)row_a, (void)b, (void)row_b, (void)c, (void)row_c, (void)n, (void)depth, (void)add, (void)ahead;
  (void)soon, (void)also;
#endif
}

using FewFn = void (*)(const uint32_t*, int64_t, const bf16*, int64_t, float*, int64_t, int64_t, int64_t, bool, Ahead,
                       Soon*, Soon*);

template <int R>
inline FewFn pick_few(int64_t rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? &few_rows<R, R <= 2 ? 4 : R <= 6 ? 2 : 1> : pick_few<R - 1>(rows);
  }
}

inline int64_t few_columns(int64_t rows) { return (rows <= 2 ? 4 : rows <= 6 ? 2 : 1) * kWide; }

constexpr int64_t kFewRows = 24;  // two groups: packing is two loads and stores of what each of them permutes

// As gemm.h's `product`. A's rows must be followed by a zero where `depth` is odd.
inline void product(const bf16* a, int64_t row_a, int64_t rows, const bf16* b, int64_t row_b, float* c, int64_t row_c,
                    int64_t n, int64_t depth, bool add, bool far, float* packing, Soon* soon = nullptr) {
  const int64_t padded = round_up(n, kLanes), slice = slice_of(n, 2 * kDepth);
  if (depth <= 0 && !add) {
    zero_rows(c, row_c, rows, padded);
  }
  const uint32_t* left = reinterpret_cast<const uint32_t*>(a);
  uint32_t* panels = reinterpret_cast<uint32_t*>(packing);
  for (int64_t start = 0; start < depth; start += slice) {
    const int64_t count = smaller(slice, depth - start), pairs = (count + 1) / 2;
    const bf16* from = b + start * row_b;
    const uint32_t* x = left + start / 2;
    const bool more = add || start > 0;
    const int64_t next = smaller(slice, depth - start - count);
    const bool apart = row_b != n;
    if (rows <= kFewRows) {
      const int64_t groups = (rows + kRows - 1) / kRows, wide = few_columns((rows + groups - 1) / groups);
      const int64_t strips = (padded + wide - 1) / wide;
      Ahead ahead = plan(far && !apart, from + count * row_b, next * n * 2, strips * groups * pairs);
      Soon weights = rows_apart(far && apart, from + count * row_b, row_b, n, next, strips * groups);
      for (int64_t g = 0, m = 0; g < groups; ++g, ahead = after(ahead, strips * pairs)) {
        const int64_t these = (rows - m + groups - g - 1) / (groups - g);
        pick_few<kRows>(these)(x + m * (row_a / 2), row_a / 2, from, row_b, c + m * row_c, row_c, n, count, more, ahead,
                               &weights, soon);
        m += these;
      }
      continue;
    }
    pack_pairs(from, row_b, n, count, panels);
    const int64_t tiles = (rows + kRows - 1) / kRows * ((padded + kWide - 1) / kWide);
    Ahead ahead = plan(far && !apart, from + count * row_b, next * n * 2, tiles * pairs);
    Soon weights = rows_apart(far && apart, from + count * row_b, row_b, n, next, tiles);
    for (int64_t j = 0; j < padded; j += kWide, ahead = after(ahead, (rows + kRows - 1) / kRows * pairs)) {
      const int64_t width = smaller(kWide, padded - j);
      product_rows<uint32_t>(x, row_a / 2, 1, rows, panels + j * (pairs + 1), width, c + j, row_c, width, pairs,
                             more ? Out::kAdd : Out::kSet, ahead, &weights, soon);
    }
  }
}

// C = A B rounded straight to bf16, all of B's panels (pack_pairs) at hand: row after row of C is written whole. n is a
// multiple of kLanes.
inline void product_to_rows(const uint32_t* a, int64_t row_a, int64_t step_a, int64_t rows, const uint32_t* panels,
                            int64_t pairs, bf16* c, int64_t row_c, int64_t n, Out out) {
  for (int64_t j = 0; j < n; j += kWide) {
    const int64_t width = smaller(kWide, n - j);
    const auto run = width == kWide ? pick_tile<uint32_t, 2, kRows, false, bf16>(static_cast<int>(rows))
                                    : pick_tile<uint32_t, 1, kRows, false, bf16>(static_cast<int>(rows));
    run(a, row_a, step_a, panels + j * (pairs + 1), width, c + j, row_c, pairs, out, {0, 0});
  }
}

}  // namespace
}  // namespace levi_fast
