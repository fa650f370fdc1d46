// Small matrix products on one thread, in pieces that a fused kernel strings together. fp32 accumulators throughout.
//
//   product   C[m, n] (+)= sum_k A[m, k] B[k, n]     A: working type, any strides; B: rows of the weights' own dtype
//
// The register tile is as many rows as leave room for the operands (12 x 2 vectors of 32 registers). B is repacked, a
// panel of rows at a time, into the tile's own width: that reads it in address order, widens it to fp32 and pads its
// edge. A tile sums its stretch of k from zero and is added to C at the end: blocked summation, whose rounding error
// grows with the number of stretches instead of with k.
#pragma once

#include "simd.h"

namespace levi_fast {
namespace {

#if defined(LEVI_FAST_ISA_AVX2)
constexpr int kRows = 6;  // 16 vector registers
#else
constexpr int kRows = 12;  // 32 of them
#endif
constexpr int64_t kDepth = 128;           // rows of B per panel: a panel of one tile's width stays in L1
constexpr int64_t kWide = 2 * kLanes;     // a panel's width

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr bool kIsFloat = kSame<T, float>;

// What becomes of a tile's sums. kStream writes past the cache: for aligned results too large to stay in it.
enum class Out : int { kSet, kAdd, kStream };

constexpr int64_t kLineBytes = 64;

// What is read next, after this product, asked for a few lines at each step of k: spread so thin, the requests never stop
// the arithmetic. `at` is a number, not a pointer: it may point past the end, which a prefetch may and a pointer may not.
// Only for weights that come from memory: they fill the memory's time, and bursts between tiles (Soon) would be late. In a
// tile's loop this costs a twentieth of its time, so tiles are compiled without it too.
struct Ahead {
  uintptr_t at;
  int64_t lines;  // per step; 0 where the memory will be in cache anyway
};

inline void ask(Ahead ahead, int64_t k) {
  for (int64_t i = 0; i < ahead.lines; ++i) {
    const auto offset = static_cast<uintptr_t>((k * ahead.lines + i) * kLineBytes);
    __builtin_prefetch(reinterpret_cast<const void*>(ahead.at + offset), 0, 2);
  }
}

inline Ahead after(Ahead ahead, int64_t steps) {
  return {ahead.at + static_cast<uintptr_t>(steps * ahead.lines * kLineBytes), ahead.lines};
}

// Asks for rows [begin, end) that lie `stride` bytes apart; those that are no neighbours, which `plan` cannot express.
inline void ask_rows(const void* first, int64_t stride, int64_t bytes, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const uintptr_t row = reinterpret_cast<uintptr_t>(first) + static_cast<uintptr_t>(i * stride);
    for (int64_t at = 0; at < bytes; at += kLineBytes) {
      __builtin_prefetch(reinterpret_cast<const void*>(row + static_cast<uintptr_t>(at)), 0, 2);
    }
  }
}

// Rows that the next task or pass reads, asked for a piece at each call: between two tiles, so that the loops within them
// stay as they are. Spread over `calls`, and no line twice.
struct Soon {
  uintptr_t at = 0;
  int64_t stride = 0, lines = 0, rows = 0;  // bytes from row to row, lines of each, rows left
  int64_t piece = 0, done = 0;              // lines a call, lines of this row already asked for

  Soon() = default;
  Soon(const void* first, int64_t row_stride, int64_t row_bytes, int64_t count, int64_t calls)
      : at(reinterpret_cast<uintptr_t>(first)), stride(row_stride), lines((row_bytes + kLineBytes - 1) / kLineBytes),
        rows(count), piece(calls > 0 ? (count * lines + calls - 1) / calls : 0) {}

  void ask() {
    for (int64_t i = 0; i < piece && rows > 0; ++i) {
      __builtin_prefetch(reinterpret_cast<const void*>(at + static_cast<uintptr_t>(done * kLineBytes)), 0, 2);
      if (++done == lines) {
        done = 0;
        at += static_cast<uintptr_t>(stride);
        --rows;
      }
    }
  }
};

inline void ask(Soon* soon, Soon* also) {
  if (soon != nullptr) {
    soon->ask();
  }
  if (also != nullptr) {
    also->ask();
  }
}

// E: float, or uint32_t for a pair of bf16 of neighbouring k (AVX-512 BF16: twice the rate, same fp32 sums).
template <int R, int N, bool kAsks, class E, class C>
inline void tile(const E* a, int64_t row_a, int64_t step_a, const E* b, int64_t row_b, C* c, int64_t row_c,
                 int64_t depth, Out out, Ahead ahead) {
  Vf sum[R][N] = {};
  if constexpr (kIsFloat<E>) {
    for (int64_t k = 0; k < depth; ++k) {
      if constexpr (kAsks) {
        ask(ahead, k);
      }
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
      if constexpr (kAsks) {
        ask(ahead, k);
      }
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
    if constexpr (!kIsFloat<C>) {  // results of one pass, rounded: never added to
      C* to = c + i * row_c;
      if constexpr (N == 2) {
        out == Out::kStream ? store_past(sum[i][0], sum[i][1], to) : store_two(sum[i][0], sum[i][1], to);
      } else {
        store(sum[i][0], to);
      }
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) {
        float* to = c + i * row_c + j * kLanes;
        if (out == Out::kStream) {
          store_past(sum[i][j], to);
        } else {
          store(out == Out::kAdd ? load(to) + sum[i][j] : sum[i][j], to);
        }
      }
    }
  }
}

template <class E, class C = float>
using TileFn = void (*)(const E*, int64_t, int64_t, const E*, int64_t, C*, int64_t, int64_t, Out, Ahead);

template <class E, int N, int R, bool kAsks, class C = float>
inline TileFn<E, C> pick_tile(int rows) {
  if constexpr (R == 0) {
    return nullptr;
  } else {
    return rows == R ? &tile<R, N, kAsks, E, C> : pick_tile<E, N, R - 1, kAsks, C>(rows);
  }
}

// One vector of columns for the last odd one, two elsewhere; few rows take more columns, to keep enough sums in flight.
template <class E, bool kAsks>
inline TileFn<E> tile_for(int rows, int vectors) {
  switch (vectors) {
    case 8:
      return pick_tile<E, 8, 1, kAsks>(rows);
    case 4:
      return pick_tile<E, 4, kRows / 3, kAsks>(rows);
    case 2:
      return pick_tile<E, 2, kRows, kAsks>(rows);
    default:
      return pick_tile<E, 1, kRows, kAsks>(rows);
  }
}

inline int widest(int rows) { return rows == 1 ? 8 : rows <= kRows / 3 ? 4 : 2; }

template <class E>
inline TileFn<E> tile_for(int rows, int vectors, Ahead ahead) {
  return ahead.lines > 0 ? tile_for<E, true>(rows, vectors) : tile_for<E, false>(rows, vectors);
}

// C over columns [0, n), n a multiple of kLanes, B of the tile's own type with rows `row_b` apart. Rows of A are shared
// out evenly.
template <class E>
inline void product_rows(const E* a, int64_t row_a, int64_t step_a, int64_t rows, const E* b, int64_t row_b, float* c,
                         int64_t row_c, int64_t n, int64_t depth, Out out, Ahead ahead = {0, 0},
                         Soon* soon = nullptr, Soon* also = nullptr) {
  const int64_t groups = (rows + kRows - 1) / kRows;
  for (int64_t g = 0, m = 0; g < groups; ++g) {
    const int count = static_cast<int>((rows - m + groups - g - 1) / (groups - g));
    int vectors = widest(count);
    TileFn<E> run = tile_for<E>(count, vectors, ahead);
    for (int64_t j = 0; j < n;) {
      while (j + vectors * kLanes > n) {
        vectors /= 2;
        run = tile_for<E>(count, vectors, ahead);
      }
      ask(soon, also);
      run(a + m * row_a, row_a, step_a, b + j, row_b, c + m * row_c + j, row_c, depth, out, ahead);
      ahead = after(ahead, depth);
      j += vectors * kLanes;
    }
    m += count;
  }
}

inline void zero_rows(float* c, int64_t row_c, int64_t rows, int64_t columns) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      store(Vf{}, c + m * row_c + j);
    }
  }
}

// Rows of B that are packed at once: fewer where they are long, so that the packed ones and the next stay in L2.
inline int64_t slice_of(int64_t n, int64_t most) { return n <= 256 ? most : most / 2; }

// Floats of packing space that `product` asks for.
inline int64_t packing_space(int64_t n) { return (kDepth + 1) * round_up(n, kWide); }

// Asks for `bytes` from `next` on over tile calls of `steps` steps of k in all.
inline Ahead plan(bool far, const void* next, int64_t bytes, int64_t steps) {
  const int64_t lines = far ? (bytes + kLineBytes * steps - 1) / (kLineBytes * steps) : 0;
  return {reinterpret_cast<uintptr_t>(next), smaller(lines, 8)};
}

// Rows behind these that are no neighbours, which `plan` cannot express.
template <class T>
inline Soon rows_apart(bool wanted, const T* rows, int64_t row_b, int64_t n, int64_t count, int64_t calls) {
  constexpr int64_t kSize = sizeof(T);
  return wanted ? Soon(rows, row_b * kSize, n * kSize, count, calls) : Soon();
}

// Tiles that a packed `product` of this size is made of, about.
inline int64_t tile_calls(int64_t rows, int64_t n, int64_t depth, int64_t most) {
  const int64_t slice = slice_of(n, most);
  return (rows + kRows - 1) / kRows * ((round_up(n, kLanes) + kWide - 1) / kWide) * ((depth + slice - 1) / slice);
}

// C[rows, round_up(n, kLanes)] (+)= A B; the columns past n become zero (or keep what `add` finds there). A's elements
// lie next to one another along k. With `far`, B comes from memory and its next rows are asked for while these multiply.
template <class T>
void product(const float* a, int64_t row_a, int64_t rows, const T* b, int64_t row_b, float* c, int64_t row_c,
             int64_t n, int64_t depth, bool add, bool far, float* packing, Soon* soon = nullptr) {
  const int64_t padded = round_up(n, kLanes), groups = (rows + kRows - 1) / kRows;
  // Few rows and whole vectors: B is read once, and packing would be one more pass over it. In short slices, so that a
  // row of B is read whole before it leaves L1.
  const bool direct = kIsFloat<T> && n == padded && rows <= kRows;
  const int64_t slice = direct ? (n <= 256 ? 32 : 16) : slice_of(n, kDepth);
  if (depth <= 0 && !add) {
    zero_rows(c, row_c, rows, padded);
  }
  for (int64_t start = 0; start < depth; start += slice) {
    const int64_t count = smaller(slice, depth - start), next = smaller(slice, depth - start - count);
    const Out out = add || start > 0 ? Out::kAdd : Out::kSet;
    const T* from = b + start * row_b;
    const int64_t bytes = next * n * static_cast<int64_t>(sizeof(T));
    if constexpr (kIsFloat<T>) {
      if (direct) {
        const int64_t wide = widest(static_cast<int>(rows)) * kLanes, tiles = (padded + wide - 1) / wide;
        product_rows(a + start, row_a, 1, rows, from, row_b, c, row_c, n, count, out,
                     plan(far, from + count * row_b, bytes, tiles * count), soon);
        continue;
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t j = 0; j < padded; j += kLanes) {
        // Panel after panel of two vectors' width, a row apart: a power-of-two distance would map all panels to the same
        // few sets of the L1 cache. A last odd vector makes a panel of one.
        const int64_t panel = j / kWide * kWide;
        const int64_t width = smaller(kWide, padded - panel);
        store(load_upto(from + k * row_b + j, n - j), packing + panel * (count + 1) + k * width + (j - panel));
      }
    }
    const int64_t panels = (padded + kWide - 1) / kWide;
    const bool apart = row_b != n;
    Ahead ahead = plan(far && !apart, from + count * row_b, bytes, panels * groups * count);
    Soon weights = rows_apart(far && apart, from + count * row_b, row_b, n, next, panels * groups);
    for (int64_t j = 0; j < padded; j += kWide, ahead = after(ahead, groups * count)) {
      const int64_t width = smaller(kWide, padded - j);
      product_rows(a + start, row_a, 1, rows, packing + j * (count + 1), width, c + j, row_c, width, count, out, ahead,
                   &weights, soon);
    }
  }
}

}  // namespace
}  // namespace levi_fast
