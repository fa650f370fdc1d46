// The ensemble's forward kernels: normalise, both first products in one accumulator, activation, second product; mixing.
#pragma once

#include "ensemble_rows.h"

namespace levi_fast {
namespace {

// hidden = drop(act(sums + bias)), and the pre-activations where they are saved.
template <class T, int kActivation>
void activation_rows(const Ensemble& in, int64_t layer, int64_t begin, int64_t end, const float* sums, T* before,
                     Work<T>* hidden) {
  const int64_t n = in.first, padded = padded_width(n);
  const T* bias = static_cast<const T*>(in.bias) + layer * n;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t row = layer * in.batch + b;
    const float* from = sums + (b - begin) * padded;
    Work<T>* to = hidden + (b - begin) * padded;
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
using ActivationFn = void (*)(const Ensemble&, int64_t, int64_t, int64_t, const float*, T*, Work<T>*);

// From the first product (without its bias) to layer_logits.
template <class T>
void finish_rows(const EnsembleForward& args, int side, int64_t layer, int64_t begin, int64_t end, const float* sums,
                 Work<T>* hidden, float* y) {
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
    dots(hidden, first, 0, rows, weight, in.layers * in.first, 0, in.outputs, in.first, 1, y, outputs,
         in.far_outputs);
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
  using W = Work<T>;
  const Ensemble& in = args.in;
  const int64_t rows = end - begin, width = in.widths[layer];
  const int64_t tap_row = padded_width(width), first = padded_width(in.first);
  const int64_t view_row = padded_width(in.view_width);
  float* sums = scratch;
  float* y = sums + rows * first;
  float* packing = y + rows * padded_width(in.outputs);
  W* hidden = reinterpret_cast<W*>(packing + packing_space(in.first));
  W* taps = hidden + rows * first;
  for (int64_t b = begin; b < end; ++b) {
    norm_row(in, static_cast<const T*>(in.taps[layer]) + b * in.tap_strides[layer], width,
             taps + (b - begin) * tap_row, tap_row);
  }
  // The rows that this thread most likely normalises next come from memory while these multiply.
  const bool same = end < in.batch, other = !same && layer + 1 < in.layers;
  const int64_t then = same ? layer : layer + 1, from = same ? end : 0;
  Soon soon;
  if (same || other) {
    constexpr int64_t kSize = sizeof(T);
    soon = Soon(static_cast<const T*>(in.taps[then]) + from * in.tap_strides[then], in.tap_strides[then] * kSize,
                in.widths[then] * kSize, smaller(rows, in.batch - from),
                tile_calls(rows, in.first, width, kSame<W, bf16> ? 2 * kDepth : kDepth));
  }
  product(taps, tap_row, rows, static_cast<const T*>(in.tap_weight) + in.weight_rows[layer] * in.first, in.first, sums,
          first, in.first, width, false, in.far, packing, &soon);
  if (args.zeroed_view) {
    finish_rows<T>(args, 1, layer, begin, end, sums, hidden, y);
  }
  if (in.view != nullptr) {
    product(static_cast<const W*>(args.view_rows) + begin * view_row, view_row, rows,
            static_cast<const T*>(in.view_weight) + layer * in.first, in.layers * in.first, sums, first, in.first,
            in.view_width, true, false, packing);
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

}  // namespace
}  // namespace levi_fast
