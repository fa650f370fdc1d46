// The ensemble's backward kernels: gradients at the pre-activations row by row, then sums over the batch.
#pragma once

#include "ensemble_rows.h"

namespace levi_fast {
namespace {

// The moments of tap row b, which comes from memory: the rows behind it are asked for meanwhile.
template <class T>
inline void tap_moments(const Ensemble& in, int64_t layer, int64_t b, Moments* to) {
  constexpr int64_t kSoon = 4, kSize = sizeof(T);
  const T* row = static_cast<const T*>(in.taps[layer]) + b * in.tap_strides[layer];
  if (b + kSoon < in.batch) {
    ask_rows(row + kSoon * in.tap_strides[layer], 0, in.widths[layer] * kSize, 0, 1);
  }
  to[layer * in.batch + b] = moments(row, in.widths[layer]);
}

// d = dh * act'(before) through dropout; hidden = drop(act(before)) where asked. The taps' moments, where asked, are made
// row by row beside it: they wait for memory, this for its own arithmetic.
template <class T, int kActivation>
void activation_gradient(const Ensemble& in, int64_t layer, int64_t begin, int64_t end, const T* before,
                         const float* dh, Work<T>* d, Work<T>* hidden, Moments* tap) {
  const int64_t n = in.first, padded = padded_width(n);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t row = layer * in.batch + b;
    if (tap != nullptr) {
      tap_moments<T>(in, layer, b, tap);
    }
    for (int64_t k = 0; k < n; k += kLanes) {
      Vf derivative;
      Vf value = activate<kActivation>(load_upto(before + row * n + k, n - k), &derivative);
      Vf grad = load(dh + (b - begin) * padded + k) * derivative;
      if (in.hidden_keep != nullptr) {
        const Vi kept = kept_lanes(in.hidden_keep + row * n + k, n - k);
        value = kept ? value * in.dropout_scale : Vf{};
        grad = kept ? grad * in.dropout_scale : Vf{};
      }
      if (n - k < kLanes) {
        value = lanes_below(n - k) ? value : Vf{};
        grad = lanes_below(n - k) ? grad : Vf{};
      }
      store(grad, d + row * padded + k);
      if (hidden != nullptr) {
        store(value, hidden + row * padded + k);
      }
    }
  }
}

template <class T>
using ActivationGradientFn = void (*)(const Ensemble&, int64_t, int64_t, int64_t, const T*, const float*, Work<T>*,
                                      Work<T>*, Moments*);

template <class T>
void backward_rows(const EnsembleBackward& args, int64_t layer, int64_t begin, int64_t end, float* scratch) {
  using W = Work<T>;
  const Ensemble& in = args.in;
  const int64_t rows = end - begin, c = in.outputs, outputs = padded_width(c), first = padded_width(in.first);
  const int64_t offset = layer * in.batch + begin;
  Moments* tap = args.tap_weight != nullptr && in.normalize ? reinterpret_cast<Moments*>(args.moments) : nullptr;
  for (int side = 0; side < 2; ++side) {
    if (!args.active[side]) {
      continue;
    }
    W* dy = static_cast<W*>(in.linear ? args.d[side] : args.dy[side]);
    if (dy == nullptr) {
      continue;  // mix_weights alone asks
    }
    dy += offset * outputs;
    const T* g = static_cast<const T*>(args.grad_logits[side]);
    const T* own = static_cast<const T*>(args.grad_layer_logits[side]);
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t k = 0; k < outputs; k += kLanes) {
        Vf value = {};
        if (k < c && own != nullptr) {
          value = load_upto(own + (offset + m) * c + k, c - k);
        }
        if (k < c && g != nullptr) {
          value += load_upto(g + (begin + m) * c + k, c - k) * in.mix[layer];
        }
        store(k < c && c - k < kLanes ? (lanes_below(c - k) ? value : Vf{}) : value, dy + m * outputs + k);
      }
    }
    if (!in.linear && args.d[side] != nullptr) {
      float* dh = scratch;  // [rows, first]
      product(dy, outputs, rows, static_cast<const T*>(in.output_weight) + layer * in.first, in.layers * in.first, dh,
              first, in.first, c, false, in.far_outputs, dh + rows * first);
      static constexpr ActivationGradientFn<T> kGradients[] = {
          &activation_gradient<T, 0>, &activation_gradient<T, 1>, &activation_gradient<T, 2>,
          &activation_gradient<T, 3>};
      kGradients[in.activation](in, layer, begin, end, static_cast<const T*>(args.before[side]), dh,
                                static_cast<W*>(args.d[side]), static_cast<W*>(args.hidden[side]), tap);
      tap = nullptr;
    }
  }
  for (int64_t b = begin; tap != nullptr && b < end; ++b) {
    tap_moments<T>(in, layer, b, tap);
  }
  if (args.active[0] && args.active[1] && args.d[1] != nullptr) {  // from here on d[1] is the taps' gradient: of both
    W* both = static_cast<W*>(args.d[1]);
    const W* other = static_cast<const W*>(args.d[0]);
    for (int64_t i = offset * first; i < (offset + rows) * first; i += kLanes) {
      store(load(both + i) + load(other + i), both + i);
    }
  }
}

// What the taps and the biases see: both sides' sum.
template <class T>
inline const Work<T>* tap_side(const EnsembleBackward& args) {
  return static_cast<const Work<T>*>(args.d[args.active[1] ? 1 : 0]);
}

template <class From, class T>
inline void write_rows(const From* from, int64_t row_from, int64_t rows, int64_t n, T* to, int64_t row_to) {
  for (int64_t m = 0; m < rows; ++m) {
    const From* x = from + m * row_from;
    T* y = to + m * row_to;
    int64_t k = 0;
    for (; k + 2 * kLanes <= n; k += 2 * kLanes) {
      store_two(load(x + k), load(x + k + kLanes), y + k);
    }
    for (; k < n; k += kLanes) {
      store_upto(load(x + k), y + k, n - k);
    }
  }
}

// Rows of a panel that go to `out` at once, past the cache.
template <class T>
inline void stream_rows(const float* from, int64_t rows, T* to, int64_t row_to) {
  for (int64_t m = 0; m < rows; ++m) {
    if constexpr (sizeof(T) == 2) {
      store_past(load(from + m * kWide), load(from + m * kWide + kLanes), to + m * row_to);
    } else {
      for (int64_t k = 0; k < kWide; k += kLanes) {
        store_past(load(from + m * kWide + k), to + m * row_to + k);
      }
    }
  }
}

// A right operand up to this size stays in L1 while all row groups pass over it.
constexpr int64_t kRightBytes = 32 * 1024;

// Rows [b, b + count) of A as a weight's gradient multiplies them: `to` is [count, kWeightRows], or pairs of rows where
// products take pairs. fill(side, row of the batch, to) makes one row.
template <class W, class Fill>
inline void fill_left(Fill fill, int side, int64_t b, int64_t count, int64_t rows, float* to) {
  if constexpr (kSame<W, bf16>) {
    alignas(64) W two[2][kWeightRows];
    uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < count; i += 2, pairs += kWeightRows) {
      const bool both = i + 1 < count;
      fill(side, b + i, two[0]);
      if (both) {
        fill(side, b + i + 1, two[1]);
      }
      for (int64_t j = 0; j < rows; j += kWide) {
        pair_rows(two[0] + j, both ? two[1] + j : nullptr, kWide, pairs + j, kWide);
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      fill(side, b + i, reinterpret_cast<W*>(to) + i * kWeightRows);
    }
  }
}

// `rows` rows of A^T d in one pass over the batch. As many columns of d at a time as stay close, row group after row
// group: so rows are written in long pieces, straight from registers, and the next ones can be asked for. False where the
// dtypes do not allow that, or in fp32 where not all columns stay close.
template <class T, class Fill>
bool whole_weight_rows(const Ensemble& in, Fill fill, const Work<T>* d, int64_t rows, T* out, int64_t row_out,
                       bool past, float* scratch) {
  using W = Work<T>;
  if constexpr (!kSame<T, W>) {
    return false;  // rounded on their way out: weight_gradient's own panels do that
  } else {
    constexpr bool kAsPairs = kSame<W, bf16>;
    constexpr int64_t kSize = sizeof(T);
    const int64_t n = in.first, padded = padded_width(n), count = in.batch, pairs = (count + 1) / 2;
    if (n % kLanes != 0 || (!kAsPairs && count * padded * kSize > kRightBytes)) {
      return false;
    }
    const int64_t fit = kRightBytes / (4 * pairs) / kWide * kWide, block = !kAsPairs || fit > n ? n : fit;
    const auto soon = [&](int64_t j, int64_t width, int64_t begin) {
      if (!past) {
        ask_rows(out + j, row_out * kSize, width * kSize, begin, smaller(begin + kRows, rows));
      }
    };
    soon(0, block, 0);
    float* panels = scratch;                                        // [pairs, block], where nothing else is by then
    float* left = scratch + kWeightRows * padded;
    fill_left<W>(fill, 0, 0, count, rows, left);
    const Out mode = past ? Out::kStream : Out::kSet;
    for (int64_t j = 0; j < n; j += block) {
      const int64_t width = smaller(block, n - j);
      if constexpr (kAsPairs) {
        pack_pairs(d + j, padded, width, count, reinterpret_cast<uint32_t*>(panels));
      }
      for (int64_t m = 0; m < rows; m += kRows) {
        const int64_t group = smaller(kRows, rows - m);
        T* to = out + m * row_out + j;
        soon(j, width, m + kRows);
        if constexpr (kAsPairs) {
          product_to_rows(reinterpret_cast<uint32_t*>(left) + m, 1, kWeightRows, group,
                          reinterpret_cast<uint32_t*>(panels), pairs, to, row_out, width, mode);
        } else {
          product_rows<float>(left + m, 1, kWeightRows, group, d + j, padded, to, row_out, width, count, mode);
        }
      }
    }
    if (past) {
      fence_stores();
    }
    return true;
  }
}

// For weight_gradient, where what it reads is in cache.
inline Soon nothing_later(int64_t, int64_t, int64_t) { return Soon(); }

// `rows` rows of sum over `sides` of A^T d. fill is as fill_left takes it; later(first row of the batch, rows, calls) says
// what fill will read; d[side] is [B, padded K]. With `stream`, a result that needs one pass is written past the cache.
template <class T, class Fill, class Later>
void weight_gradient(const Ensemble& in, int sides, Fill fill, Later later, const Work<T>* const* d, int64_t rows,
                     T* out, int64_t row_out, bool stream, float* scratch) {
  using W = Work<T>;
  constexpr bool kAsPairs = kSame<W, bf16>;
  constexpr int64_t kChunk = kAsPairs ? 2 * kDepth : kDepth;
  const int64_t n = in.first, padded = padded_width(n), columns = round_up(n, kLanes);
  const bool once = sides == 1 && in.batch <= kChunk;
  float* sums = scratch;                       // [kWeightRows, padded]
  float* left = sums + kWeightRows * padded;   // [kDepth, kWeightRows]
  float* panel = left + kWeightRows * kDepth;  // [kDepth, kWide]
  int64_t row_sums = once ? kWide : padded;
  bool direct = false, past = false;
  if constexpr (kSame<T, W>) {
    const auto place = reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(row_out) * sizeof(T);
    past = stream && once && n % kWide == 0 && place % 64 == 0;
  }
  if constexpr (kIsFloat<T>) {
    direct = n % kLanes == 0;
    if (direct) {
      sums = out;
      row_sums = row_out;
    }
  }
  if (once && whole_weight_rows(in, fill, d[0], rows, out, row_out, past, scratch)) {
    return;
  }
  bool more = false;
  for (int side = 0; side < sides; ++side) {
    for (int64_t b = 0; b < in.batch; b += kChunk, more = true) {
      const int64_t count = smaller(kChunk, in.batch - b);
      const W* right = d[side] + b * padded;
      const Out mode = more ? Out::kAdd : past && direct ? Out::kStream : Out::kSet;
      fill_left<W>(fill, side, b, count, rows, left);
      const int64_t panels = (columns + kWide - 1) / kWide;
      const int64_t next = smaller(kChunk, in.batch - b - count), tiles = (rows + kRows - 1) / kRows * panels;
      constexpr int64_t kSize = sizeof(W);
      Soon soon = kAsPairs ? Soon(right + count * padded, padded * kSize, padded * kSize, next, tiles) : Soon();
      Soon also = later(b + count, next, tiles);
      for (int64_t j = 0; j < columns; j += kWide) {
        const int64_t width = smaller(kWide, columns - j);
        float* to = once && !direct ? sums : sums + j;
        if constexpr (kAsPairs) {
          uint32_t* pairs = reinterpret_cast<uint32_t*>(panel);
          pack_pairs(right + j, padded, width, count, pairs);
          product_rows<uint32_t>(reinterpret_cast<uint32_t*>(left), 1, kWeightRows, rows, pairs, width, to,
                                 row_sums, width, (count + 1) / 2, mode, {0, 0}, &soon, &also);
        } else {
          const bool few = count <= 8;  // not worth a copy
          if (!few) {
            write_rows(right + j, padded, count, width, panel, width);
          }
          product_rows<float>(left, 1, kWeightRows, rows, few ? right + j : panel, few ? padded : width, to, row_sums,
                              width, count, mode, {0, 0}, &also);
        }
        if (once && !direct) {
          if (past) {
            stream_rows(sums, rows, out + j, row_out);
          } else {
            write_rows(sums, row_sums, rows, n - j < width ? n - j : width, out + j, row_out);
          }
        }
      }
    }
  }
  if (past) {
    fence_stores();
  }
  if (!once && !direct) {
    write_rows(sums, row_sums, rows, n, out, row_out);
  }
}

// dx of LayerNorm: scale * (g - mean(g) - xhat * mean(g * xhat)).
template <class T>
inline void norm_gradient(const Ensemble& in, const T* row, const float* g, int64_t n, T* out) {
  if (!in.normalize) {
    write_rows(g, 0, 1, n, out, 0);
    return;
  }
  const Moments m = moments(row, n);
  Vf plain = {}, weighted = {};
  for (int64_t k = 0; k < n; k += kLanes) {
    const Vf grad = load_upto(g + k, n - k);
    plain += grad;
    weighted += grad * ((load_upto(row + k, n - k) - m.mean) * m.scale);
  }
  const float mean = sum(plain) / static_cast<float>(n), along = sum(weighted) / static_cast<float>(n);
  for (int64_t k = 0; k < n; k += kLanes) {
    const Vf x = (load_upto(row + k, n - k) - m.mean) * m.scale;
    store_upto((load_upto(g + k, n - k) - mean - x * along) * m.scale, out + k, n - k);
  }
}

// N vectors' columns summed over the rows, 64 at a time: each piece of a row is one or more whole lines, and errors grow
// with the number of such sums only.
template <int N, class From>
inline void sum_columns(const From* d, int64_t rows, int64_t row, Vf* total) {
  for (int64_t b = 0; b < rows;) {
    Vf part[2][N] = {};
    const int64_t stop = smaller(rows, b + 64);
    for (; b + 2 <= stop; b += 2) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        part[0][i] += load(d + b * row + i * kLanes);
        part[1][i] += load(d + (b + 1) * row + i * kLanes);
      }
    }
    for (; b < stop; ++b) {
      for (int i = 0; i < N; ++i) {
        part[0][i] += load(d + b * row + i * kLanes);
      }
    }
    for (int i = 0; i < N; ++i) {
      total[i] += part[0][i] + part[1][i];
    }
  }
}

// out[k] = sum over the batch of d[b, k].
template <class From, class T>
inline void column_sums(const From* d, int64_t rows, int64_t row, int64_t n, T* out) {
  constexpr int kMost = 4;
  for (int64_t k = 0; k < n;) {
    Vf total[kMost] = {};
    const int count = n - k > (kMost - 1) * kLanes ? kMost : 1;
    count == kMost ? sum_columns<kMost>(d + k, rows, row, total) : sum_columns<1>(d + k, rows, row, total);
    for (int i = 0; i < count; ++i, k += kLanes) {
      store_upto(total[i], out + k, n - k);
    }
  }
}

template <class T>
void mix_gradient(const EnsembleBackward& args, int64_t layer) {
  const int64_t n = args.in.batch * args.in.outputs;
  double total = 0;
  for (int side = 0; side < 2; ++side) {
    const T* g = static_cast<const T*>(args.grad_logits[side]);
    if (g == nullptr) {
      continue;
    }
    const T* y = static_cast<const T*>(args.layer_logits[side]) + layer * n;
    constexpr int64_t kChunk = 1024;
    for (int64_t i = 0; i < n; i += kChunk) {
      Vf part = {};
      for (int64_t k = i; k < smaller(n, i + kChunk); k += kLanes) {
        part += load_upto(g + k, n - k) * load_upto(y + k, n - k);
      }
      total += static_cast<double>(sum(part));
    }
  }
  args.mix[layer] = static_cast<float>(total);
}

template <class T>
void bias_gradients(const EnsembleBackward& args, int64_t layer, float* scratch) {
  using W = Work<T>;
  const Ensemble& in = args.in;
  const int64_t first = padded_width(in.first), outputs = padded_width(in.outputs), offset = layer * in.batch;
  if (args.bias != nullptr) {
    column_sums(tap_side<T>(args) + offset * first, in.batch, first, in.first,
                static_cast<T*>(args.bias) + layer * in.first);
  }
  if (args.output_bias != nullptr) {
    T* out = static_cast<T*>(args.output_bias) + layer * in.outputs;
    const W* const dy[2] = {static_cast<const W*>(args.dy[0]), static_cast<const W*>(args.dy[1])};
    if (args.active[0] && args.active[1]) {
      float* part = scratch + outputs;
      column_sums(dy[0] + offset * outputs, in.batch, outputs, in.outputs, scratch);
      column_sums(dy[1] + offset * outputs, in.batch, outputs, in.outputs, part);
      for (int64_t i = 0; i < in.outputs; ++i) {
        scratch[i] += part[i];
      }
      write_rows(scratch, 0, 1, in.outputs, out, 0);
    } else {
      column_sums(dy[args.active[1] ? 1 : 0] + offset * outputs, in.batch, outputs, in.outputs, out);
    }
  }
  if (args.mix != nullptr) {
    mix_gradient<T>(args, layer);
  }
}

template <class T>
void backward_sums(const EnsembleBackward& args, GradTask task, int64_t layer, int64_t begin, int64_t end,
                   float* scratch) {
  using W = Work<T>;
  const Ensemble& in = args.in;
  const int64_t first = padded_width(in.first), outputs = padded_width(in.outputs), rows = end - begin;
  const int64_t offset = layer * in.batch;
  const auto side = [&](void* const* all, int i, int64_t row) { return static_cast<const W*>(all[i]) + offset * row; };
  switch (task) {
    case GradTask::kTapWeight: {
      const T* tap = static_cast<const T*>(in.taps[layer]);
      const Moments* m = reinterpret_cast<const Moments*>(args.moments) + offset;
      const auto fill = [&](int, int64_t b, W* to) {
        constexpr int64_t kSoon = 12;  // rows; pieces of them, far apart: the hardware does not foresee the next one
        if (b + kSoon < in.batch) {    // into L2: in L1, rows a power of two apart would push one another out
          ask_rows(tap + (b + kSoon) * in.tap_strides[layer] + begin, 0, rows * static_cast<int64_t>(sizeof(T)), 0, 1);
        }
        normalised(tap + b * in.tap_strides[layer] + begin, rows, in.normalize ? m[b] : Moments{0.0f, 1.0f}, to,
                   round_up(rows, kWide));
      };
      const W* d = tap_side<T>(args) + offset * first;
      const auto later = [&](int64_t b, int64_t count, int64_t calls) {
        constexpr int64_t kSize = sizeof(T);
        return Soon(tap + b * in.tap_strides[layer] + begin, in.tap_strides[layer] * kSize, rows * kSize, count, calls);
      };
      weight_gradient<T>(in, 1, fill, later, &d, rows,
                         static_cast<T*>(args.tap_weight) + (in.weight_rows[layer] + begin) * in.first, in.first,
                         args.stream, scratch);
      return;
    }
    case GradTask::kViewWeight: {
      const int64_t view_row = padded_width(in.view_width);
      const auto fill = [&](int, int64_t b, W* to) {
        write_rows(static_cast<const W*>(args.view_rows) + b * view_row + begin, 0, 1, round_up(rows, kWide), to, 0);
      };
      const W* d = side(args.d, 0, first);
      weight_gradient<T>(in, 1, fill, nothing_later, &d, rows,
                         static_cast<T*>(args.view_weight) + (begin * in.layers + layer) * in.first,
                         in.layers * in.first, args.stream, scratch);
      return;
    }
    case GradTask::kOutputWeight: {
      const int only = args.active[0] ? 0 : 1, sides = args.active[0] && args.active[1] ? 2 : 1;
      const auto fill = [&](int i, int64_t b, W* to) {
        write_rows(side(args.dy, only + i, outputs) + b * outputs + begin, 0, 1, round_up(rows, kWide), to, 0);
      };
      const W* const hidden[2] = {side(args.hidden, only, first), sides == 2 ? side(args.hidden, 1, first) : nullptr};
      weight_gradient<T>(in, sides, fill, nothing_later, hidden, rows,
                         static_cast<T*>(args.output_weight) + (begin * in.layers + layer) * in.first,
                         in.layers * in.first, args.stream, scratch);
      return;
    }
    case GradTask::kBias:
      bias_gradients<T>(args, layer, scratch);
      return;
    case GradTask::kView: {
      const int64_t view_row = padded_width(in.view_width);
      dots(static_cast<const W*>(args.d[0]) + begin * first, first, in.batch * first, rows,
           static_cast<const T*>(in.view_weight), in.layers * in.first, in.first, in.view_width, in.first, in.layers,
           scratch, view_row, false);
      for (int64_t b = begin; b < end; ++b) {
        T* out = static_cast<T*>(args.view) + b * in.view_width;
        if (in.view_keep != nullptr && !in.view_keep[b]) {
          __builtin_memset(out, 0, static_cast<size_t>(in.view_width) * sizeof(T));
        } else {
          norm_gradient(in, static_cast<const T*>(in.view) + b * in.view_stride, scratch + (b - begin) * view_row,
                        in.view_width, out);
        }
      }
      return;
    }
    case GradTask::kTap: {
      const int64_t width = in.widths[layer], row = padded_width(width);
      dots(tap_side<T>(args) + (offset + begin) * first, first, 0, rows,
           static_cast<const T*>(in.tap_weight) + in.weight_rows[layer] * in.first, in.first, 0, width, in.first, 1,
           scratch, row, in.far);
      for (int64_t b = begin; b < end; ++b) {
        norm_gradient(in, static_cast<const T*>(in.taps[layer]) + b * in.tap_strides[layer],
                      scratch + (b - begin) * row, width, static_cast<T*>(args.taps[layer]) + b * width);
      }
      return;
    }
  }
}

}  // namespace
}  // namespace levi_fast
