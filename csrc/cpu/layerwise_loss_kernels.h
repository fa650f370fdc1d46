// The loss's kernels, written once over simd.h's vectors and compiled once per instruction set. All arithmetic is fp32
// whatever the predictions' dtype, sums over rows are fp64.
#pragma once

#include "layerwise_loss.h"
#include "simd.h"

namespace levi_fast {
namespace {

// Largest of the first n elements; NaN is passed over here and comes through with its exponential.
template <class T>
inline float largest(const T* row, int64_t n) {
  const Vf least = splat(-__builtin_inff());
  Vf parts[2] = {least, least};
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
    for (int i = 0; i < 2; ++i) {
      const Vf x = load(row + c + i * kLanes);
      parts[i] = x > parts[i] ? x : parts[i];
    }
  }
  for (; c < n; c += kLanes) {
    Vf x = load_upto(row + c, n - c);
    x = n - c < kLanes ? (lanes_below(n - c) ? x : least) : x;
    parts[0] = x > parts[0] ? x : parts[0];
  }
  return maximum(parts[1] > parts[0] ? parts[1] : parts[0]);
}

template <class T>
double cross_entropy(const LossForward& args, int64_t layer, int64_t begin, int64_t end) {
  const int64_t n = args.outputs;
  double total = 0;
  for (int64_t b = begin; b < end; ++b) {
    const T* row = static_cast<const T*>(args.logits) + (layer * args.batch + b) * n;
    float* to = args.gradient == nullptr ? nullptr : args.gradient + (layer * args.batch + b) * n;
    const int64_t label = args.labels[b * args.label_stride];
    if (label == kIgnoredLabel) {  // a NaN in its predictions must not come through
      for (int64_t c = 0; c < n && to != nullptr; c += kLanes) {
        store_upto(Vf{}, to + c, n - c);
      }
      continue;
    }
    const float highest = largest(row, n);
    if (n <= kLanes) {  // the whole row is one vector
      Vf e = vexp(load_upto(row, n) - highest);
      e = n < kLanes ? (lanes_below(n) ? e : Vf{}) : e;
      const float norm = sum(e);
      total += static_cast<double>(__builtin_logf(norm) + (highest - widen(row[label])));
      if (to != nullptr) {
        Vf g = e * (args.scale / norm);
        g = lanes_at(label) ? g - args.scale : g;
        store_upto(g, to, n);
      }
      continue;
    }
    Vf sums = {};
    for (int64_t c = 0; c < n; c += kLanes) {
      Vf e = vexp(load_upto(row + c, n - c) - highest);
      e = n - c < kLanes ? (lanes_below(n - c) ? e : Vf{}) : e;
      sums += e;
      if (to != nullptr) {
        store_upto(e, to + c, n - c);
      }
    }
    const float norm = sum(sums);
    total += static_cast<double>(__builtin_logf(norm) + (highest - widen(row[label])));
    if (to != nullptr) {
      const float scale = args.scale / norm;
      for (int64_t c = 0; c < n; c += kLanes) {
        store_upto(load_upto(to + c, n - c) * scale, to + c, n - c);
      }
      to[label] -= args.scale;
    }
  }
  return total;
}

// Both losses that are one term per element: kBinary is max(x, 0) - x t + log(1 + e^-|x|), else (x - t)^2.
template <class T, bool kBinary>
double elementwise(const LossForward& args, int64_t layer, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 1024;
  const int64_t offset = layer * args.batch * args.outputs;
  const T* logits = static_cast<const T*>(args.logits) + offset;
  float* gradient = args.gradient == nullptr ? nullptr : args.gradient + offset;
  const int64_t last = end * args.outputs;
  double total = 0;
  for (int64_t chunk = begin * args.outputs; chunk < last; chunk += kChunk) {
    const int64_t stop = chunk + kChunk < last ? chunk + kChunk : last;
    Vf sums = {};
    for (int64_t i = chunk; i < stop; i += kLanes) {
      const Vf x = load_upto(logits + i, stop - i), t = load_upto(args.target + i, stop - i);
      Vf loss, slope;
      if constexpr (kBinary) {
        const Vf e = vexp(-vabs(x));
        loss = (x < 0.0f ? Vf{} : x) - x * t + vlog1p(e);
        slope = (x < 0.0f ? e : splat(1.0f)) / (1.0f + e) - t;
      } else {
        const Vf off = x - t;
        loss = off * off;
        slope = off + off;
      }
      sums += stop - i < kLanes ? (lanes_below(stop - i) ? loss : Vf{}) : loss;
      if (gradient != nullptr) {
        store_upto(slope * args.scale, gradient + i, stop - i);
      }
    }
    total += static_cast<double>(sum(sums));
  }
  return total;
}

template <class T>
void scale_gradient(const float* gradient, float by, void* out, int64_t begin, int64_t end) {
  T* to = static_cast<T*>(out);
  for (int64_t i = begin; i < end; i += kLanes) {
    store_upto(load_upto(gradient + i, end - i) * by, to + i, end - i);
  }
}

template <class T>
constexpr LossKernels loss_entry() {
  return {{&cross_entropy<T>, &elementwise<T, true>, &elementwise<T, false>}, &scale_gradient<T>};
}

constexpr LossTable loss_table() {
  return {{loss_entry<float>(), loss_entry<bf16>(), loss_entry<f16>(), loss_entry<double>()}};
}

}  // namespace
}  // namespace levi_fast
