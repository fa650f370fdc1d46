// The forward kernel, written once over the vector types of vec.h and compiled once per instruction set.
//
// A memory-bound sum: each kept row is read once into fp32 accumulators that stay in registers or in L1. Eight rows are
// added one after another, then eight such sums, then 64 of those, then the rest: the rounding error grows with the depth
// of that tree instead of with T, as in PyTorch's own sum.
//
// What costs most are not the additions but the ends: where an example's kept rows end, the hardware has asked for lines
// past them that nobody needs, and the next example starts with page walks and misses. So rows are read in address order
// where that pays, and the rows that come next, the next example's among them, are asked for in time.
#pragma once

#include "mask_scan.h"
#include "masked_mean_pool.h"
#include "vec.h"

namespace levi_fast {
namespace {

constexpr int kBlockRows = 64;
constexpr int kBlocksPerLevel = 64;
constexpr int kGroupRows = 8;
constexpr int kLineBytes = 64;

// How far ahead of the sum the next rows are asked for: 3 KiB, three rows at least. Measured out of cache on two Zen 5
// cores, rows of 0.75 to 2 KiB: closer is too late where memory is fast, farther crowds out what is being added where it
// is slow.
constexpr int kLeastAhead = 3;
constexpr int kMostAhead = 16;
constexpr int64_t kBytesAhead = 3072;

constexpr int rows_ahead(int64_t row_bytes) {
  const int64_t rows = (kBytesAhead + row_bytes - 1) / row_bytes;
  return static_cast<int>(rows < kLeastAhead ? kLeastAhead : rows > kMostAhead ? kMostAhead : rows);
}

// Rows of fp32 are added eight at a time: there the hardware alone reads as fast as it does for a plain sum, and from the
// last cache faster than row after row. Two-byte rows are read one at a time, in address order, the later ones asked for.
template <class T>
constexpr bool kOneByOne = sizeof(T) == 2;

template <class V, class T>
inline void ask(const T* p) {
  for (int byte = 0; byte < V::kWidth * static_cast<int>(sizeof(T)); byte += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 0, 3);
  }
}

// part (+)= R rows; at a group's end the sum goes on into `total` instead, which it starts where kFirst.
template <int R, bool kBegin, bool kEnd, bool kFirst, bool kUnitStride, class W, class T, class Acc>
inline void add_rows(const T* const* rows, const T* soon, int64_t stride_d, int64_t columns, Acc* __restrict part,
                     Acc* __restrict total) {
  const T* r[R];
  for (int i = 0; i < R; ++i) {
    r[i] = rows[i];
  }
  for_each_vector(W{}, 0, columns, [&](auto* tag, int64_t j) {
    using V = __typeof__(*tag + *tag);
    const int64_t offset = kUnitStride ? j : j * stride_d;
    if constexpr (V::kWidth > 1 && kUnitStride && kOneByOne<T>) {
      if (j * static_cast<int64_t>(sizeof(T)) % kLineBytes == 0) {
        ask<V>(soon + j);
      }
    }
    V sum = V::load(r[0] + offset);
    if constexpr (!kBegin) {
      sum = V::load(part + j) + sum;
    }
    for (int i = 1; i < R; ++i) {
      sum = sum + V::load(r[i] + offset);
    }
    if constexpr (!kEnd) {
      sum.store(part + j);
    } else {
      (kFirst ? sum : V::load(total + j) + sum).store(total + j);
    }
  });
}

// Row after row of a group; every pass asks for one row that comes `ahead` rows later.
template <bool kFirst, bool kUnitStride, class W, class T, class Acc>
inline void add_group(const T* const* rows, int count, int ahead, int64_t stride_d, int64_t columns, Acc* part,
                      Acc* total) {
  if (count == 1) {
    add_rows<1, true, true, kFirst, kUnitStride, W>(rows, rows[ahead], stride_d, columns, part, total);
    return;
  }
  add_rows<1, true, false, kFirst, kUnitStride, W>(rows, rows[ahead], stride_d, columns, part, total);
  for (int i = 1; i + 1 < count; ++i) {
    add_rows<1, false, false, kFirst, kUnitStride, W>(rows + i, rows[i + ahead], stride_d, columns, part, total);
  }
  const int last = count - 1;
  add_rows<1, false, true, kFirst, kUnitStride, W>(rows + last, rows[last + ahead], stride_d, columns, part, total);
}

template <bool kFirst, bool kUnitStride, class W, class T, class Acc>
inline void sum_group(const T* const* rows, int count, int ahead, int64_t stride_d, int64_t columns, Acc* part,
                      Acc* total) {
  if (!kOneByOne<T> && count == kGroupRows) {
    add_rows<kGroupRows, true, true, kFirst, kUnitStride, W>(rows, rows[0], stride_d, columns, part, total);
  } else {
    add_group<kFirst, kUnitStride, W>(rows, count, ahead, stride_d, columns, part, total);
  }
}

#if defined(LEVI_FAST_ISA_AVX512)
constexpr int kMostPairs = 12;  // 24 of 32 registers

// The same sums for rows that fit the registers: N pairs of vectors.
template <int N, class T>
inline void sum_in_registers(const T* const* rows, int count, int ahead, float* __restrict total) {
  using V = Avx512Pair;
  for (int done = 0; done < count; done += kGroupRows) {
    V sum[N];
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
      ask<V>(rows[done + ahead] + n * V::kWidth);
      sum[n] = V::load(rows[done] + n * V::kWidth);
    }
    const int end = done + kGroupRows < count ? done + kGroupRows : count;
    for (int i = done + 1; i < end; ++i) {
      const T* row = rows[i];
      const T* soon = rows[i + ahead];
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) {
        ask<V>(soon + n * V::kWidth);
        sum[n] = sum[n] + V::load(row + n * V::kWidth);
      }
    }
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) {
      (done == 0 ? sum[n] : V::load(total + n * V::kWidth) + sum[n]).store(total + n * V::kWidth);
    }
  }
}

template <int N, class T>
inline bool try_in_registers(int64_t pairs, const T* const* rows, int count, int ahead, float* total) {
  if constexpr (N > kMostPairs) {
    return false;
  } else {
    if (pairs == N) {
      sum_in_registers<N>(rows, count, ahead, total);
      return true;
    }
    return try_in_registers<N + 1>(pairs, rows, count, ahead, total);
  }
}
#endif

// total = sum of `count` rows, 1 <= count <= kBlockRows; behind them in `rows` stand `ahead` more that come after.
template <bool kUnitStride, class W, class T, class Acc>
inline void sum_block(const T* const* rows, int count, int ahead, int64_t stride_d, int64_t columns, Acc* part,
                      Acc* total) {
#if defined(LEVI_FAST_ISA_AVX512)
  if constexpr (kUnitStride && kOneByOne<T>) {
    constexpr int64_t kPair = Avx512Pair::kWidth;
    if (columns % kPair == 0 && try_in_registers<1>(columns / kPair, rows, count, ahead, total)) {
      return;
    }
  }
#endif
  for (int done = 0; done < count; done += kGroupRows) {
    const int n = count - done < kGroupRows ? count - done : kGroupRows;
    if (done == 0) {
      sum_group<true, kUnitStride, W>(rows, n, ahead, stride_d, columns, part, total);
    } else {
      sum_group<false, kUnitStride, W>(rows + done, n, ahead, stride_d, columns, part, total);
    }
  }
}

// to = from where `first`, to += from elsewhere.
template <class W, class Acc>
inline void fold(bool first, const Acc* __restrict from, Acc* __restrict to, int64_t columns) {
  for_each_vector(W{}, 0, columns, [&](auto* tag, int64_t j) {
    using V = __typeof__(*tag + *tag);
    const V value = V::load(from + j);
    (first ? value : V::load(to + j) + value).store(to + j);
  });
}

// Appends the kept rows of example `b` from row t on until `rows` holds `most`; returns where it stopped.
template <class T>
inline int64_t gather(const PoolForward& args, int64_t b, int64_t t, int64_t column, int most, const T** rows,
                      int* count) {
  const T* base = static_cast<const T*>(args.hidden) + b * args.stride_b + column * args.stride_d;
  int n = *count;
  t = scan(args.mask, b, t, args.length, [&](int64_t row, bool keep) {
    rows[n] = base + row * args.stride_t;
    n += keep;
    return n < most;
  });
  *count = n;
  return t;
}

template <bool kUnitStride, class W, class T, class Acc>
inline void pool_columns(const PoolForward& args, const PoolUnit& unit, const PoolUnit* next) {
  alignas(64) Acc level[3][kMaxTile];
  alignas(64) Acc part[kMaxTile];
  const int64_t b = unit.b, columns = unit.end - unit.begin;
  const int ahead = rows_ahead(columns * static_cast<int64_t>(sizeof(T)));
  T* out = static_cast<T*>(args.out) + b * args.width + unit.begin;

  int64_t kept = 0;
  int blocks = 0;         // 64-row sums folded into level 1 since it was last emptied
  bool top_used = false;  // level 2 holds something
  int64_t t = 0;
  while (t < args.length) {
    const T* rows[kBlockRows + kMostAhead + 1];  // scan() writes one past the last it keeps
    int count = 0;
    t = gather(args, b, t, unit.begin, kBlockRows, rows, &count);
    if (count == 0) {
      break;  // the rest is masked: scan stops early only on a full block
    }
    kept += count;
    int known = count;
    if constexpr (kUnitStride) {
      if (t < args.length) {
        gather(args, b, t, unit.begin, count + ahead, rows, &known);
      }
      if (next != nullptr && known < count + ahead) {
        gather(args, next->b, 0, next->begin, count + ahead, rows, &known);
      }
    }
    for (const T* last = rows[known - 1]; known < count + ahead; ++known) {
      rows[known] = last;
    }
    sum_block<kUnitStride, W>(rows, count, ahead, args.stride_d, columns, part, level[0]);
    fold<W>(blocks == 0, level[0], level[1], columns);
    if (++blocks == kBlocksPerLevel) {
      fold<W>(!top_used, level[1], level[2], columns);
      top_used = true;
      blocks = 0;
    }
  }
  if (kept == 0) {
    for (int64_t j = 0; j < columns; ++j) {
      narrow(Acc(0), out + j);
    }
    return;
  }
  if (blocks != 0 && top_used) {
    fold<W>(false, level[1], level[2], columns);
  }
  const Acc* total = top_used ? level[2] : level[1];
  const Acc divisor = static_cast<Acc>(kept);
  for_each_vector(W{}, 0, columns, [&](auto* tag, int64_t j) {
    using V = __typeof__(*tag + *tag);
    (V::load(total + j) / divisor).store(out + j);
  });
}

template <class W, class T, class Acc>
void pool_forward(const PoolForward& args, const PoolUnit& unit, const PoolUnit* next) {
  if (args.stride_d == 1) {
    pool_columns<true, W, T, Acc>(args, unit, next);
  } else {
    pool_columns<false, Widths<One<Acc>>, T, Acc>(args, unit, next);
  }
}

// W: the widths for fp32 accumulators. fp64 (there for gradient checks) is left to the compiler's vectoriser.
template <class W>
constexpr PoolForwardTable make_table() {
  return {{&pool_forward<W, float, float>, &pool_forward<W, bf16, float>, &pool_forward<W, f16, float>,
           &pool_forward<Widths<One<double>>, double, double>},
          &count_kept};
}

}  // namespace
}  // namespace levi_fast
