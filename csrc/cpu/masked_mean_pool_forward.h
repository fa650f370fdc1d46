// The forward kernel, written once over the vector types of vec.h and compiled once per instruction set.
//
// A memory-bound sum: each kept row is read once into fp32 accumulators that stay in L1. Eight rows
// are added per pass over the accumulators, so these cost one load and one store for eight row loads. Sums are taken
// over 64 rows, then over 64 such sums, then over those: the rounding error grows with the depth of that tree instead
// of with T, as in PyTorch's own sum.
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

// How many groups of eight rows ahead of the sum the next ones are asked for. Measured out of cache on one Zen 4 core,
// bf16 rows of 384: none 7.6 GB/s, one group 12.5, two 14.5, three or four no better; plain sequential reading 16.5.
constexpr int kGroupsAhead = 2;

// Rows of two-byte numbers are short enough for that to pay. On fp32 the hardware does as well or better: 0.94-1.0 of a
// plain sum's rate without it, 0.85-0.95 with it (width 384 to 4096, two cores).
template <class T>
constexpr bool kReadsAhead = sizeof(T) == 2;

// Where rows lie that will be added soon, one after another; 0 where unknown. A number, not a pointer: it may well point
// past the tensor, which a prefetch may and a pointer may not.
using Ahead = uintptr_t;

template <class T>
inline Ahead ahead_of(const T* rows, int64_t elements = 0) {
  return reinterpret_cast<Ahead>(rows) + static_cast<Ahead>(elements * static_cast<int64_t>(sizeof(T)));
}

// Eight interleaved short rows are too much for the hardware's own prefetching, so each step asks for its share of the
// rows `ahead`, in address order, into L2: asked into L1 they are dropped or crowd out what is being added.
template <int R, bool kFirst, bool kUnitStride, class W, class T, class Acc>
inline void add_rows(const T* const* rows, Ahead ahead, int64_t stride_d, int64_t columns, Acc* __restrict acc) {
  const T* r[R];
  for (int i = 0; i < R; ++i) {
    r[i] = rows[i];
  }
  for_each_vector(W{}, 0, columns, [&](auto* tag, int64_t j) {
    using V = __typeof__(*tag + *tag);
    const int64_t offset = kUnitStride ? j : j * stride_d;
    if constexpr (V::kWidth > 1) {
      if (ahead != 0) {
        constexpr int kShare = R * V::kWidth * static_cast<int>(sizeof(T));
        const Ahead share = ahead + static_cast<Ahead>(R * j) * sizeof(T);
        for (int i = 0; i < kShare; i += kLineBytes) {
          __builtin_prefetch(reinterpret_cast<const void*>(share + static_cast<Ahead>(i)), 0, 2);
        }
      }
    }
    V sum = V::load(r[0] + offset);
    if constexpr (R == 2) {
      sum = sum + V::load(r[1] + offset);
    } else if constexpr (R >= 4) {
      sum = (sum + V::load(r[1] + offset)) + (V::load(r[2] + offset) + V::load(r[3] + offset));
      if constexpr (R == 8) {
        sum = sum + ((V::load(r[4] + offset) + V::load(r[5] + offset)) +
                     (V::load(r[6] + offset) + V::load(r[7] + offset)));
      }
    }
    if constexpr (!kFirst) {
      sum = V::load(acc + j) + sum;
    }
    sum.store(acc + j);
  });
}

// Where the R rows lie that come kGroupsAhead groups after `done`: among the block's own, or past its end at `ahead`.
// Every pass asks for as many rows as it adds, so none is left out, whatever the number of rows.
template <int R, class T>
inline Ahead rows_ahead(const T* const* rows, Ahead ahead, int done, int count, int64_t columns) {
  const int first = done + kGroupsAhead * kGroupRows;
  const int last = first + R - 1;
  const Ahead row_bytes = static_cast<Ahead>(columns) * sizeof(T);
  if (first >= count) {
    return ahead == 0 ? 0 : ahead + static_cast<Ahead>(first - count) * row_bytes;
  }
  if (last < count) {
    return rows[last] - rows[first] == (R - 1) * columns ? ahead_of(rows[first]) : 0;
  }
  for (int i = first; i <= last; ++i) {  // both: two regions, once per block, so not worth spreading over the pass
    if (i < count || ahead != 0) {
      const Ahead row = i < count ? ahead_of(rows[i]) : ahead + static_cast<Ahead>(i - count) * row_bytes;
      for (Ahead byte = 0; byte < row_bytes; byte += kLineBytes) {
        __builtin_prefetch(reinterpret_cast<const void*>(row + byte), 0, 2);
      }
    }
  }
  return 0;
}

template <int R, bool kUnitStride, class W, class T, class Acc>
inline int add_group(const T* const* rows, Ahead ahead, int done, int count, int64_t stride_d, int64_t columns,
                     Acc* acc) {
  for (; done + R <= count; done += R) {
    Ahead soon = 0;
    if constexpr (kUnitStride && kReadsAhead<T>) {
      soon = rows_ahead<R>(rows, ahead, done, count, columns);
    }
    if (done == 0) {
      add_rows<R, true, kUnitStride, W>(rows, soon, stride_d, columns, acc);
    } else {
      add_rows<R, false, kUnitStride, W>(rows + done, soon, stride_d, columns, acc);
    }
  }
  return done;
}

// acc = sum of `count` rows, 1 <= count <= kBlockRows. `ahead`: what is read after them, or 0.
template <bool kUnitStride, class W, class T, class Acc>
inline void sum_block(const T* const* rows, Ahead ahead, int count, int64_t stride_d, int64_t columns, Acc* acc) {
  int done = add_group<kGroupRows, kUnitStride, W>(rows, ahead, 0, count, stride_d, columns, acc);
  done = add_group<4, kUnitStride, W>(rows, ahead, done, count, stride_d, columns, acc);
  done = add_group<2, kUnitStride, W>(rows, ahead, done, count, stride_d, columns, acc);
  add_group<1, kUnitStride, W>(rows, ahead, done, count, stride_d, columns, acc);
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

template <bool kUnitStride, class W, class T, class Acc>
inline void pool_columns(const PoolForward& args, int64_t b, int64_t begin, int64_t end) {
  alignas(64) Acc level[3][kMaxTile];
  const int64_t columns = end - begin;
  const T* base = static_cast<const T*>(args.hidden) + b * args.stride_b + begin * args.stride_d;
  T* out = static_cast<T*>(args.out) + b * args.width + begin;

  int64_t kept = 0;
  int blocks = 0;         // 64-row sums folded into level 1 since it was last emptied
  bool top_used = false;  // level 2 holds something
  int64_t t = 0;
  while (t < args.length) {
    const T* rows[kBlockRows];
    int count = 0;
    t = scan(args.mask, b, t, args.length, [&](int64_t row, bool keep) {
      rows[count] = base + row * args.stride_t;
      count += keep;
      return count < kBlockRows;
    });
    if (count == 0) {
      break;  // the rest is masked: scan stops early only on a full block
    }
    kept += count;
    // A guess that can only cost a little bandwidth: the next block's rows, or the next example's, follow one another.
    Ahead ahead = 0;
    if (kReadsAhead<T> && args.stride_t == columns && (t < args.length || b + 1 < args.batch)) {
      ahead = ahead_of(base, t < args.length ? t * args.stride_t : args.stride_b);
    }
    sum_block<kUnitStride, W>(rows, ahead, count, args.stride_d, columns, level[0]);
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
void pool_forward(const PoolForward& args, int64_t b, int64_t begin, int64_t end) {
  if (args.stride_d == 1) {
    pool_columns<true, W, T, Acc>(args, b, begin, end);
  } else {
    pool_columns<false, Widths<One<Acc>>, T, Acc>(args, b, begin, end);
  }
}

// W: the widths for fp32 accumulators. fp64 (there for gradient checks) is left to the compiler's vectoriser.
template <class W>
constexpr PoolForwardTable make_table() {
  return {{&pool_forward<W, float, float>, &pool_forward<W, bf16, float>, &pool_forward<W, f16, float>,
           &pool_forward<Widths<One<double>>, double, double>}};
}

}  // namespace
}  // namespace levi_fast
