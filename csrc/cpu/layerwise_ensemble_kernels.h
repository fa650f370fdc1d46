// The ensemble's kernels, written once over simd.h's vectors and compiled once per instruction set.
#pragma once

#include "gemm.h"
#include "layerwise_ensemble.h"

namespace levi_fast {
namespace {

template <class T>
constexpr bool kDots = false;
template <>
constexpr bool kDots<bf16> = kPairs;

// Rows padded to whole tiles, and then by one vector more: a power-of-two distance between rows would map a tile's rows
// to the same few sets of the L1 cache.
inline int64_t padded_width(int64_t n) { return round_up(n, 2 * kLanes) + kLanes; }

// Rows of the batch per task: the normalised rows of a task should stay in L2.
inline int64_t rows_per_task(int64_t widest, int64_t first) {
  const int64_t rows = (int64_t{1} << 17) / (padded_width(widest) + 2 * padded_width(first));
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
  const int64_t pairs = kDepth / 2 * (kWeightRows + first);
  const int64_t by_sums = kWeightRows * (kDepth + first) + 2 * outputs + packing + pairs;
  return (by_rows > by_sums ? by_rows : by_sums) + 64;
}

struct Moments {
  float mean;
  float scale;  // 1 / standard deviation
};

constexpr float kEpsilon = 1e-5f;  // torch.nn.functional.layer_norm's default

// Two passes over a row that is in L1 after the first: no cancellation. The order of additions depends on n alone.
template <class T>
inline Moments moments(const T* row, int64_t n) {
  if (n == 0) {
    return {0.0f, 1.0f};
  }
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
void view_rows(const Ensemble& in, float* out, int64_t begin, int64_t end) {
  const int64_t padded = padded_width(in.view_width);
  for (int64_t b = begin; b < end; ++b) {
    float* to = out + b * padded;
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

// ---- forward -------------------------------------------------------------------------------------------------------

// hidden = drop(act(sums + bias)), and the pre-activations where they are saved.
template <class T, int kActivation>
void activation_rows(const Ensemble& in, int64_t layer, int64_t begin, int64_t end, const float* sums, T* before,
                     float* hidden) {
  const int64_t n = in.first, padded = padded_width(n);
  const T* bias = static_cast<const T*>(in.bias) + layer * n;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t row = layer * in.batch + b;
    const float* from = sums + (b - begin) * padded;
    float* to = hidden + (b - begin) * padded;
    for (int64_t k = 0; k < n; k += kLanes) {
      const Vf x = load(from + k) + load_upto(bias + k, n - k);
      if (before != nullptr) {
        store_upto(x, before + row * n + k, n - k);
      }
      Vf value = activate<kActivation>(x);
      if (in.hidden_keep != nullptr) {
        value = kept_lanes(in.hidden_keep + row * n + k, n - k) ? value * in.dropout_scale : Vf{};
      }
      store(value, to + k);
    }
  }
}

template <class T>
using ActivationFn = void (*)(const Ensemble&, int64_t, int64_t, int64_t, const float*, T*, float*);

// From the first product (without its bias) to layer_logits.
template <class T>
void finish_rows(const EnsembleForward& args, int side, int64_t layer, int64_t begin, int64_t end, const float* sums,
                 float* hidden, float* y) {
  const Ensemble& in = args.in;
  const int64_t rows = end - begin, first = padded_width(in.first), outputs = padded_width(in.outputs);
  T* out = static_cast<T*>(args.layer_logits[side]) + (layer * in.batch + begin) * in.outputs;
  const T* bias = static_cast<const T*>(in.linear ? in.bias : in.output_bias) + layer * in.outputs;
  const float* from = sums;
  int64_t from_row = first;
  if (!in.linear) {
    static constexpr ActivationFn<T> kActivations[] = {&activation_rows<T, 0>, &activation_rows<T, 1>,
                                                       &activation_rows<T, 2>, &activation_rows<T, 3>};
    kActivations[in.activation](in, layer, begin, end, sums, static_cast<T*>(args.before[side]), hidden);
    const T* weight = static_cast<const T*>(in.output_weight) + layer * in.first;
    dots(hidden, first, 0, rows, weight, in.layers * in.first, 0, in.outputs, in.first, 1, y, outputs);
    from = y;
    from_row = outputs;
  }
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t c = 0; c < in.outputs; c += kLanes) {
      const int64_t left = in.outputs - c;
      store_upto(load(from + m * from_row + c) + load_upto(bias + c, left), out + m * in.outputs + c, left);
    }
  }
}

template <class T>
void forward_rows(const EnsembleForward& args, int64_t layer, int64_t begin, int64_t end, float* scratch) {
  const Ensemble& in = args.in;
  const int64_t rows = end - begin, width = in.widths[layer];
  const int64_t tap_row = padded_width(width), first = padded_width(in.first);
  const int64_t view_row = padded_width(in.view_width);
  float* taps = scratch;  // and later the view's rows, where they are wanted narrower
  float* sums = taps + rows * (tap_row > view_row ? tap_row : view_row);
  float* hidden = sums + rows * first;
  float* y = hidden + rows * first;
  float* packing = y + rows * padded_width(in.outputs);
  const T* weight = static_cast<const T*>(in.tap_weight) + in.weight_rows[layer] * in.first;
  const auto normalise = [&](auto* to) {
    for (int64_t b = begin; b < end; ++b) {
      norm_row(in, static_cast<const T*>(in.taps[layer]) + b * in.tap_strides[layer], width,
               to + (b - begin) * tap_row, tap_row);
    }
  };
  if constexpr (kDots<T>) {
    normalise(reinterpret_cast<bf16*>(taps));
    product_pairs(reinterpret_cast<const uint32_t*>(taps), tap_row / 2, rows, weight, in.first, sums, first, in.first,
                  width, false, reinterpret_cast<uint32_t*>(packing));
  } else {
    normalise(taps);
    product(taps, tap_row, 1, rows, weight, in.first, sums, first, in.first, width, false, packing);
  }
  if (args.zeroed_view) {
    finish_rows<T>(args, 1, layer, begin, end, sums, hidden, y);
  }
  if (in.view != nullptr) {
    const T* view_weight = static_cast<const T*>(in.view_weight) + layer * in.first;
    const float* view = args.view_rows + begin * view_row;
    if constexpr (kDots<T>) {
      bf16* narrow_view = reinterpret_cast<bf16*>(taps);
      for (int64_t i = 0; i < rows * view_row; i += kLanes) {
        store(load(view + i), narrow_view + i);
      }
      product_pairs(reinterpret_cast<const uint32_t*>(narrow_view), view_row / 2, rows, view_weight,
                    in.layers * in.first, sums, first, in.first, in.view_width, true,
                    reinterpret_cast<uint32_t*>(packing));
    } else {
      product(view, view_row, 1, rows, view_weight, in.layers * in.first, sums, first, in.first, in.view_width, true,
              packing);
    }
  }
  finish_rows<T>(args, 0, layer, begin, end, sums, hidden, y);
}

template <class T>
void mixing(const EnsembleForward& args, int64_t begin, int64_t end) {
  const Ensemble& in = args.in;
  const int64_t from = begin * in.outputs, to = end * in.outputs, all = in.batch * in.outputs;
  for (int side = 0; side < (args.zeroed_view ? 2 : 1); ++side) {
    const T* y = static_cast<const T*>(args.layer_logits[side]);
    T* out = static_cast<T*>(args.logits[side]);
    for (int64_t i = from; i < to; i += kLanes) {
      Vf total = {};
      for (int64_t l = 0; l < in.layers; ++l) {
        total += load_upto(y + l * all + i, to - i) * in.mix[l];
      }
      store_upto(total, out + i, to - i);
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// d = dh * act'(before) through dropout, added to `total` where given; hidden = drop(act(before)) where asked.
template <class T, int kActivation>
void activation_gradient(const Ensemble& in, int64_t layer, int64_t begin, int64_t end, const T* before, float* d,
                         float* hidden) {
  const int64_t n = in.first, padded = padded_width(n);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t row = layer * in.batch + b;
    for (int64_t k = 0; k < n; k += kLanes) {
      Vf derivative;
      Vf value = activate<kActivation>(load_upto(before + row * n + k, n - k), &derivative);
      Vf grad = load(d + row * padded + k) * derivative;
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
using ActivationGradientFn = void (*)(const Ensemble&, int64_t, int64_t, int64_t, const T*, float*, float*);

template <class T>
void backward_rows(const EnsembleBackward& args, int64_t layer, int64_t begin, int64_t end, float* scratch) {
  const Ensemble& in = args.in;
  const int64_t rows = end - begin, c = in.outputs, outputs = padded_width(c), first = padded_width(in.first);
  const int64_t offset = layer * in.batch + begin;
  if (args.tap_weight != nullptr && in.normalize) {
    Moments* to = reinterpret_cast<Moments*>(args.moments) + offset;
    for (int64_t m = 0; m < rows; ++m) {
      to[m] = moments(static_cast<const T*>(in.taps[layer]) + (begin + m) * in.tap_strides[layer], in.widths[layer]);
    }
  }
  for (int side = 0; side < 2; ++side) {
    if (!args.active[side]) {
      continue;
    }
    float* dy = in.linear ? args.d[side] : args.dy[side];
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
      float* d = args.d[side];
      product(dy, outputs, 1, rows, static_cast<const T*>(in.output_weight) + layer * in.first,
              in.layers * in.first, d + offset * first, first, in.first, c, false, scratch);
      static constexpr ActivationGradientFn<T> kGradients[] = {
          &activation_gradient<T, 0>, &activation_gradient<T, 1>, &activation_gradient<T, 2>,
          &activation_gradient<T, 3>};
      kGradients[in.activation](in, layer, begin, end, static_cast<const T*>(args.before[side]), d,
                                args.hidden[side]);
    }
  }
  if (args.active[0] && args.active[1] && args.d[1] != nullptr) {  // from here on d[1] is the taps' gradient: of both
    for (int64_t i = offset * first; i < (offset + rows) * first; i += kLanes) {
      store(load(args.d[1] + i) + load(args.d[0] + i), args.d[1] + i);
    }
  }
}

// What the taps and the biases see: both sides' sum.
inline const float* tap_side(const EnsembleBackward& args) { return args.d[args.active[1] ? 1 : 0]; }

template <class T>
inline void write_rows(const float* from, int64_t row_from, int64_t rows, int64_t n, T* to, int64_t row_to) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < n; k += kLanes) {
      store_upto(load(from + m * row_from + k), to + m * row_to + k, n - k);
    }
  }
}

// Rows [begin, end) of A^T d, A's columns made piece by piece by fill(first row of the batch, rows, to).
template <class T, class Fill>
void weight_gradient(const Ensemble& in, Fill fill, int64_t begin, int64_t end, const float* d, T* out,
                     int64_t row_out, float* scratch) {
  const int64_t rows = end - begin, n = in.first, padded = padded_width(n);
  float* left = scratch;                       // [kDepth, kWeightRows]
  float* sums = left + kDepth * kWeightRows;  // [kWeightRows, padded]
  bool direct = false;
  if constexpr (kIsFloat<T>) {
    direct = n % kLanes == 0;
    if (direct) {
      sums = out;
    }
  }
  const int64_t row_sums = direct ? row_out : padded;
  if constexpr (kDots<T>) {  // both sides as pairs of neighbouring examples
    uint32_t* pairs_left = reinterpret_cast<uint32_t*>(sums + kWeightRows * padded);
    uint32_t* pairs_right = pairs_left + kDepth / 2 * kWeightRows;
    const int64_t columns = round_up(n, kLanes);
    for (int64_t b = 0; b < in.batch; b += kDepth) {
      const int64_t count = smaller(kDepth, in.batch - b), pairs = (count + 1) / 2;
      fill(b, count, left);
      const auto pack = [&](const float* from, int64_t row, int64_t width, uint32_t* to) {
        for (int64_t i = 0; i < pairs; ++i) {
          const bool lone = 2 * i + 1 == count;
          for (int64_t k = 0; k < width; k += kLanes) {
            const float* even = from + 2 * i * row + k;
            store_pairs(rounded_bits(load(even)), lone ? Vu{} : rounded_bits(load(even + row)), to + i * width + k);
          }
        }
      };
      pack(left, kWeightRows, kWeightRows, pairs_left);
      pack(d + b * padded, padded, columns, pairs_right);
      product_rows(static_cast<const uint32_t*>(pairs_left), 1, kWeightRows, rows,
                   static_cast<const uint32_t*>(pairs_right), columns, sums, row_sums, columns, pairs, b > 0);
    }
    write_rows(sums, row_sums, rows, n, out, row_out);
    return;
  }
  for (int64_t b = 0; b < in.batch; b += kDepth) {
    const int64_t count = smaller(kDepth, in.batch - b);
    fill(b, count, left);
    product_rows(left, 1, kWeightRows, rows, d + b * padded, padded, sums, row_sums, round_up(n, kLanes), count,
                 b > 0);
  }
  if (!direct) {
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

// out[k] = sum over the batch of d[b, k], eight rows at a time.
template <class T>
inline void column_sums(const float* d, int64_t rows, int64_t row, int64_t n, T* out) {
  for (int64_t k = 0; k < n; k += kLanes) {
    Vf parts[8] = {};
    int64_t b = 0;
    for (; b + 8 <= rows; b += 8) {
      for (int i = 0; i < 8; ++i) {
        parts[i] += load(d + (b + i) * row + k);
      }
    }
    for (; b < rows; ++b) {
      parts[0] += load(d + b * row + k);
    }
    const Vf total = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
    store_upto(total, out + k, n - k);
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
void backward_sums(const EnsembleBackward& args, GradTask task, int64_t layer, int64_t begin, int64_t end,
                   float* scratch) {
  const Ensemble& in = args.in;
  const int64_t first = padded_width(in.first), outputs = padded_width(in.outputs), rows = end - begin;
  const int64_t offset = layer * in.batch;
  switch (task) {
    case GradTask::kTapWeight: {
      const T* tap = static_cast<const T*>(in.taps[layer]);
      const Moments* m = reinterpret_cast<const Moments*>(args.moments) + offset;
      const auto fill = [&](int64_t b, int64_t count, float* to) {
        for (int64_t i = 0; i < count; ++i) {
          normalised(tap + (b + i) * in.tap_strides[layer] + begin, rows,
                     in.normalize ? m[b + i] : Moments{0.0f, 1.0f}, to + i * kWeightRows, rows);
        }
      };
      weight_gradient(in, fill, begin, end, tap_side(args) + offset * first,
                      static_cast<T*>(args.tap_weight) + (in.weight_rows[layer] + begin) * in.first, in.first, scratch);
      return;
    }
    case GradTask::kViewWeight: {
      const int64_t view_row = padded_width(in.view_width);
      const auto fill = [&](int64_t b, int64_t count, float* to) {
        for (int64_t i = 0; i < count; ++i) {
          write_rows(args.view_rows + (b + i) * view_row + begin, 0, 1, round_up(rows, kLanes), to + i * kWeightRows,
                     0);
        }
      };
      weight_gradient(in, fill, begin, end, args.d[0] + offset * first,
                      static_cast<T*>(args.view_weight) + (begin * in.layers + layer) * in.first,
                      in.layers * in.first, scratch);
      return;
    }
    case GradTask::kOutputWeight: {
      float* sums = scratch;  // [kWeightRows, first]
      bool add = false;
      for (int side = 0; side < 2; ++side) {
        if (args.active[side]) {
          product(args.dy[side] + offset * outputs + begin, 1, outputs, rows, args.hidden[side] + offset * first, first,
                  sums, first, round_up(in.first, kLanes), in.batch, add, sums + kWeightRows * first);
          add = true;
        }
      }
      write_rows(sums, first, rows, in.first,
                 static_cast<T*>(args.output_weight) + (begin * in.layers + layer) * in.first, in.layers * in.first);
      return;
    }
    case GradTask::kBias:
      if (args.bias != nullptr) {
        column_sums(tap_side(args) + offset * first, in.batch, first, in.first,
                    static_cast<T*>(args.bias) + layer * in.first);
      }
      if (args.output_bias != nullptr) {
        T* out = static_cast<T*>(args.output_bias) + layer * in.outputs;
        if (args.active[0] && args.active[1]) {
          float* part = scratch + outputs;
          column_sums(args.dy[0] + offset * outputs, in.batch, outputs, in.outputs, scratch);
          column_sums(args.dy[1] + offset * outputs, in.batch, outputs, in.outputs, part);
          for (int64_t i = 0; i < in.outputs; ++i) {
            scratch[i] += part[i];
          }
          write_rows(scratch, 0, 1, in.outputs, out, 0);
        } else {
          column_sums(args.dy[args.active[1] ? 1 : 0] + offset * outputs, in.batch, outputs, in.outputs, out);
        }
      }
      if (args.mix != nullptr) {
        mix_gradient<T>(args, layer);
      }
      return;
    case GradTask::kView: {
      const int64_t view_row = padded_width(in.view_width);
      dots(args.d[0] + begin * first, first, in.batch * first, rows, static_cast<const T*>(in.view_weight),
           in.layers * in.first, in.first, in.view_width, in.first, in.layers, scratch, view_row);
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
      dots(tap_side(args) + (offset + begin) * first, first, 0, rows,
           static_cast<const T*>(in.tap_weight) + in.weight_rows[layer] * in.first, in.first, 0, width, in.first, 1,
           scratch, row);
      for (int64_t b = begin; b < end; ++b) {
        norm_gradient(in, static_cast<const T*>(in.taps[layer]) + b * in.tap_strides[layer],
                      scratch + (b - begin) * row, width, static_cast<T*>(args.taps[layer]) + b * width);
      }
      return;
    }
  }
}

template <class T>
constexpr EnsembleKernels ensemble_entry() {
  return {&padded_width, &rows_per_task,  &ensemble_scratch,   &view_rows<T>,
          &forward_rows<T>, &mixing<T>, &backward_rows<T>, &backward_sums<T>};
}

constexpr EnsembleTable ensemble_table() {
  return {{ensemble_entry<float>(), ensemble_entry<bf16>(), ensemble_entry<f16>()}};
}

}  // namespace
}  // namespace levi_fast
