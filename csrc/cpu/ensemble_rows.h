// What the ensemble's forward and backward share: how rows are padded and normalised, and what a task needs of scratch.
#pragma once

#include "dots.h"
#include "layerwise_ensemble.h"

namespace levi_fast {
namespace {

// What rows between two products are kept in: bf16 where the products take bf16 pairs (PyTorch's own bf16 rounds there
// too), else fp32.
template <class T>
struct WorkOf {
  using Type = float;
};
#if defined(LEVI_FAST_BF16_DOT)
template <>
struct WorkOf<bf16> {
  using Type = bf16;
};
#endif
template <class T>
using Work = typename WorkOf<T>::Type;

// Rows padded to whole tiles, and then by one vector more: a power-of-two distance between rows would map a tile's rows
// to the same few sets of the L1 cache.
inline int64_t padded_width(int64_t n) { return round_up(n, kWide) + kLanes; }

// Rows of the batch per task: what a task works on should stay in half an L2 cache of 1 MiB, as two hardware threads may
// share it.
template <class T>
inline int64_t rows_per_task(int64_t widest, int64_t first) {
  constexpr int64_t kBytes = int64_t{1} << 19, kWork = sizeof(Work<T>), kSum = sizeof(float);
  const int64_t rows = kBytes / (kWork * (padded_width(widest) + padded_width(first)) + kSum * padded_width(first));
  return rows < 2 * kRows ? 2 * kRows : rows > 16 * kRows ? 16 * kRows : rows / kRows * kRows;
}

inline int64_t ensemble_scratch(const Ensemble& in, int64_t rows) {
  int64_t widest = in.view_width;
  for (int64_t l = 0; l < in.layers; ++l) {
    widest = in.widths[l] > widest ? in.widths[l] : widest;
  }
  const int64_t first = padded_width(in.first), outputs = padded_width(in.outputs);
  const int64_t packing = packing_space(in.first > in.outputs ? in.first : in.outputs);
  const int64_t by_rows = rows * (padded_width(widest) + 2 * first + outputs) + packing;
  const int64_t by_sums = kWeightRows * first + kDepth * (kWeightRows + kWide) + 2 * outputs;
  return (by_rows > by_sums ? by_rows : by_sums) + 64;
}

struct Moments {
  float mean;
  float scale;  // 1 / standard deviation
};

constexpr float kEpsilon = 1e-5f;  // torch.nn.functional.layer_norm's default

#if defined(LEVI_FAST_BF16_DOT)
// Sum and sum of squares in one pass of dot products. False where their difference would cancel (or is not a number).
inline bool moments_of_pairs(const bf16* row, int64_t n, float* mean, float* variance) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512 sums[4] = {}, squares[4] = {};
  const auto add = [&](int i, __m512i x) {
    sums[i] = _mm512_dpbf16_ps(sums[i], (__m512bh)x, ones);
    squares[i] = _mm512_dpbf16_ps(squares[i], (__m512bh)x, (__m512bh)x);
  };
  int64_t k = 0;
  for (; k + 8 * kLanes <= n; k += 8 * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      add(i, _mm512_loadu_si512(row + k + 2 * i * kLanes));
    }
  }
  for (; k < n; k += 2 * kLanes) {
    add(0, load_columns(row + k, n - k));
  }
  const float count = static_cast<float>(n);
  *mean = sum((Vf)((sums[0] + sums[1]) + (sums[2] + sums[3]))) / count;
  *variance = sum((Vf)((squares[0] + squares[1]) + (squares[2] + squares[3]))) / count - *mean * *mean;
  return *variance * 16.0f > *mean * *mean;
}
#endif

// Two passes over a row that is in L1 after the first: no cancellation. The order of additions depends on n alone.
template <class T>
inline Moments moments(const T* row, int64_t n) {
  if (n == 0) {
    return {0.0f, 1.0f};
  }
#if defined(LEVI_FAST_BF16_DOT)
  if constexpr (kSame<T, bf16>) {
    float centre, spread;
    if (moments_of_pairs(row, n, &centre, &spread)) {
      return {centre, 1.0f / __builtin_sqrtf(spread + kEpsilon)};
    }
  }
#endif
  Vf parts[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes <= n; k += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      parts[i] += load(row + k + i * kLanes);
    }
  }
  for (; k < n; k += kLanes) {
    parts[0] += load_upto(row + k, n - k);
  }
  const float mean = sum((parts[0] + parts[1]) + (parts[2] + parts[3])) / static_cast<float>(n);
  Vf squares[4] = {};
  for (k = 0; k + 4 * kLanes <= n; k += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      const Vf off = load(row + k + i * kLanes) - mean;
      squares[i] += off * off;
    }
  }
  for (; k < n; k += kLanes) {
    Vf off = load_upto(row + k, n - k) - mean;
    off = lanes_below(n - k) ? off : Vf{};
    squares[0] += off * off;
  }
  const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(n);
  return {mean, 1.0f / __builtin_sqrtf(variance + kEpsilon)};
}

// to[0, n) = (row - mean) * scale; zeros behind, up to `padded`.
template <class T, class To>
inline void normalised(const T* row, int64_t n, Moments m, To* to, int64_t padded) {
  int64_t k = 0;
  for (; k + 2 * kLanes <= n; k += 2 * kLanes) {
    store_two((load(row + k) - m.mean) * m.scale, (load(row + k + kLanes) - m.mean) * m.scale, to + k);
  }
  for (; k < n; k += kLanes) {
    Vf value = (load_upto(row + k, n - k) - m.mean) * m.scale;
    value = n - k < kLanes ? (lanes_below(n - k) ? value : Vf{}) : value;
    store(value, to + k);
  }
  for (; k < padded; k += kLanes) {
    store(Vf{}, to + k);
  }
}

template <class T, class To>
inline void norm_row(const Ensemble& in, const T* row, int64_t n, To* to, int64_t padded) {
  normalised(row, n, in.normalize ? moments(row, n) : Moments{0.0f, 1.0f}, to, padded);
}

template <class T>
void view_rows(const Ensemble& in, void* out, int64_t begin, int64_t end) {
  const int64_t padded = padded_width(in.view_width);
  for (int64_t b = begin; b < end; ++b) {
    Work<T>* to = static_cast<Work<T>*>(out) + b * padded;
    if (in.view_keep == nullptr || in.view_keep[b]) {
      norm_row(in, static_cast<const T*>(in.view) + b * in.view_stride, in.view_width, to, padded);
    } else {
      for (int64_t k = 0; k < padded; k += kLanes) {
        store(Vf{}, to + k);
      }
    }
  }
}

// The mask's bytes at p as lanes; all ones where kept.
inline Vi kept_lanes(const uint8_t* p, int64_t left) {
  typedef uint8_t Vb __attribute__((vector_size(kLanes)));
  Vb raw = {};
  if (left >= kLanes) {
    __builtin_memcpy(&raw, p, sizeof(raw));
  } else {
    __builtin_memcpy(&raw, p, static_cast<size_t>(left));
  }
  return __builtin_convertvector(raw, Vi) != 0;
}

}  // namespace
}  // namespace levi_fast
