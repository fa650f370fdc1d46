// C[m, n] = sum_k A[m, k] B[n, k]: both operands contiguous along k, nothing is packed, each result a horizontal sum.
#pragma once

#include "gemm_bf16.h"

namespace levi_fast {
namespace {

// A step along k: one vector of fp32, or two of bf16 pairs' worth where there are dot products of pairs.
template <class A>
constexpr int64_t kStep = kSame<A, bf16> ? 2 * kLanes : kLanes;

template <class A, class T>
inline Vf dot_step(Vf sum, const A* a, const T* b, int64_t left) {
  if constexpr (kSame<A, bf16>) {
#if defined(LEVI_FAST_BF16_DOT)
    return (Vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load_columns(a, left), (__m512bh)load_columns(b, left));
#else
    return sum;
#endif
  } else {
    return sum + load_upto(a, left) * load_upto(b, left);
  }
}

// Four horizontal sums at once: the shuffles of one serve all.
inline void sum4(Vf a, Vf b, Vf c, Vf d, float* to) {
#if defined(LEVI_FAST_ISA_AVX512)
  const __m512 x = (__m512)a, y = (__m512)b, z = (__m512)c, w = (__m512)d;
  const __m512 xy = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  const __m512 zw = _mm512_add_ps(_mm512_unpacklo_ps(z, w), _mm512_unpackhi_ps(z, w));
  const __m512d p = _mm512_castps_pd(xy), q = _mm512_castps_pd(zw);
  const __m512d low = _mm512_unpacklo_pd(p, q), high = _mm512_unpackhi_pd(p, q);
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                    _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  to[0] = sum(a);
  to[1] = sum(b);
  to[2] = sum(c);
  to[3] = sum(d);
#endif
}

// Dots of R rows of A with N rows of B over `segments` stretches of `depth` elements; `jump` from stretch to stretch.
template <int R, int N, class A, class T>
inline void dot_tile(const A* a, int64_t row_a, int64_t jump_a, const T* b, int64_t row_b, int64_t jump_b,
                     int64_t depth, int64_t segments, float* c, int64_t row_c) {
  Vf total[R][N] = {};
  for (int64_t s = 0; s < segments; ++s) {
    const A* x = a + s * jump_a;
    const T* y = b + s * jump_b;
    int64_t k = 0;
    for (; k + kStep<A> <= depth; k += kStep<A>) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          total[i][j] = dot_step(total[i][j], x + i * row_a + k, y + j * row_b + k, kStep<A>);
        }
      }
    }
    if (k < depth) {
      for (int j = 0; j < N; ++j) {
        for (int i = 0; i < R; ++i) {
          total[i][j] = dot_step(total[i][j], x + i * row_a + k, y + j * row_b + k, depth - k);
        }
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    if constexpr (N == 4) {
      sum4(total[i][0], total[i][1], total[i][2], total[i][3], c + i * row_c);
    } else {
      for (int j = 0; j < N; ++j) {
        c[i * row_c + j] = sum(total[i][j]);
      }
    }
  }
}

// With `far`, B comes from memory and its next rows are asked for while these multiply.
template <class A, class T>
inline void dots(const A* a, int64_t row_a, int64_t jump_a, int64_t rows, const T* b, int64_t row_b, int64_t jump_b,
                 int64_t n, int64_t depth, int64_t segments, float* c, int64_t row_c, bool far) {
  constexpr int R = kRows == 6 ? 2 : 4;
  constexpr int64_t kSize = sizeof(T);
  const int64_t lines = (depth * kSize + kLineBytes - 1) / kLineBytes, groups = (rows + R - 1) / R;
  const int64_t share = (lines + groups - 1) / groups * kLineBytes;  // of a row, per group of A's rows
  for (int64_t j = 0; j < n;) {
    const int64_t wide = n - j >= 4 ? 4 : n - j >= 2 ? 2 : 1;
    const int64_t next = smaller(4, n - j - wide);
    for (int64_t m = 0; m < rows;) {
      const bool full = rows - m >= R;
      if (far) {
        const int64_t at = m / R * share;
        ask_rows(reinterpret_cast<const char*>(b + (j + wide) * row_b) + at, row_b * kSize,
                 smaller(share, depth * kSize - at), 0, next);
      }
      const A* x = a + m * row_a;
      const T* y = b + j * row_b;
      float* to = c + m * row_c + j;
      const auto run = [&](auto tile) { tile(x, row_a, jump_a, y, row_b, jump_b, depth, segments, to, row_c); };
      if (wide == 4) {
        full ? run(&dot_tile<R, 4, A, T>) : run(&dot_tile<1, 4, A, T>);
      } else if (wide == 2) {
        full ? run(&dot_tile<R, 2, A, T>) : run(&dot_tile<1, 2, A, T>);
      } else {
        full ? run(&dot_tile<R, 1, A, T>) : run(&dot_tile<1, 1, A, T>);
      }
      m += full ? R : 1;
    }
    j += wide;
  }
}

}  // namespace
}  // namespace levi_fast
