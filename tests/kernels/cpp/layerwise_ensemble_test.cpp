// Tests of the ensemble kernels, forward and backward, against fp64; see support.h.
#include "support.h"

#include "cpu/layerwise_ensemble.h"

#include <algorithm>
#include <memory>
#include <new>
#include <random>

namespace levi_fast {
namespace {

struct EnsembleCase {
  std::vector<int64_t> widths;
  int64_t batch, view_width, first, outputs;
  bool linear, normalize, dropped, both;  // both: also the prediction with the view zeroed
  int activation;
};

using Doubles = std::vector<double>;

template <class T>
std::vector<T> draw(int64_t count, double scale, std::mt19937& random) {
  std::normal_distribution<double> normal;
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) {
    value = make<T>(scale * normal(random));
  }
  return values;
}

double act(int kind, double x, double* slope) {
  const double e = std::exp(-x), s = 1 / (1 + e), cdf = 0.5 * std::erfc(-x / std::sqrt(2.0));
  switch (kind) {
    case 0:
      *slope = cdf + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
      return x * cdf;
    case 1:
      *slope = x > 0;
      return x > 0 ? x : 0;
    case 2:
      *slope = s * (1 + x * (1 - s));
      return x * s;
    default:
      *slope = 1 - std::tanh(x) * std::tanh(x);
      return std::tanh(x);
  }
}

// norm(x) of a row, and dx from the gradient at it.
Doubles normed(const Doubles& x, bool normalize, double* scale) {
  double mean = 0, variance = 0;
  const double n = static_cast<double>(x.size());
  *scale = 1;
  if (!normalize || x.empty()) {
    return x;
  }
  for (double v : x) {
    mean += v / n;
  }
  for (double v : x) {
    variance += (v - mean) * (v - mean) / n;
  }
  *scale = 1 / std::sqrt(variance + 1e-5);
  Doubles out;
  for (double v : x) {
    out.push_back((v - mean) * *scale);
  }
  return out;
}

void add_norm_gradient(const Doubles& xhat, double scale, bool normalize, const Doubles& g, double* out) {
  double mean = 0, along = 0;
  const double n = static_cast<double>(g.size());
  for (std::size_t i = 0; i < g.size() && normalize; ++i) {
    mean += g[i] / n;
    along += g[i] * xhat[i] / n;
  }
  for (std::size_t i = 0; i < g.size(); ++i) {
    out[i] += normalize ? scale * (g[i] - mean - xhat[i] * along) : g[i];
  }
}

template <class T>
class Run {
 public:
  Run(EnsembleCase which, std::mt19937& random) : c(std::move(which)), layers(static_cast<int64_t>(c.widths.size())) {
    for (int64_t width : c.widths) {
      rows.push_back(columns);
      columns += width;
      strides.push_back(width + 3);
      taps.push_back(draw<T>(std::max<int64_t>(c.batch * (width + 3) - 3, 0), 2, random));
    }
    const int64_t k = c.first;
    view = draw<T>(c.batch * c.view_width, 1, random);
    tap_weight = draw<T>(columns * k, 0.3, random);
    view_weight = draw<T>(c.view_width * layers * k, 0.3, random);
    bias = draw<T>(layers * k, 0.3, random);
    output_weight = draw<T>(c.linear ? 0 : c.outputs * layers * k, 0.3, random);
    output_bias = draw<T>(c.linear ? 0 : layers * c.outputs, 0.3, random);
    for (int64_t l = 0; l < layers; ++l) {
      mix.push_back(0.5f / static_cast<float>(l + 1));
    }
    for (int64_t b = 0; b < c.batch; ++b) {
      view_keep.push_back(!c.dropped || random() % 3 != 0);
    }
    for (int64_t i = 0; i < layers * c.batch * k; ++i) {
      hidden_keep.push_back(!c.dropped || random() % 4 != 0);
    }
    for (int side = 0; side < 2; ++side) {
      grad_logits[side] = draw<T>(c.batch * c.outputs, 1, random);
      grad_layer_logits[side] = draw<T>(layers * c.batch * c.outputs, 1, random);
    }
    reference();
  }

  void check(Isa isa) {
    const EnsembleKernels* found = ensemble_kernels(isa, Traits<T>::dtype);
    forward(*found, isa);
    backward(*found, isa);
  }

 private:
  const EnsembleCase c;
  const int64_t layers;
  int64_t columns = 0;
  std::vector<int64_t> rows, strides;
  std::vector<std::vector<T>> taps;
  std::vector<const void*> tap_pointers;
  std::vector<T> view, tap_weight, view_weight, bias, output_weight, output_bias, grad_logits[2], grad_layer_logits[2];
  std::vector<T> before[2];
  std::vector<float> mix;
  std::vector<uint8_t> view_keep, hidden_keep;
  // What fp64 says.
  Doubles y[2], logits[2], d_view, d_tap_weight, d_view_weight, d_bias, d_output_weight, d_output_bias, d_mix;
  std::vector<Doubles> d_taps;

  int sides() const { return c.both ? 2 : 1; }

  Doubles row(const std::vector<T>& from, int64_t at, int64_t count) const {
    Doubles out;
    for (int64_t i = 0; i < count; ++i) {
      out.push_back(wide(from[static_cast<std::size_t>(at + i)]));
    }
    return out;
  }

  void reference() {
    const int64_t k = c.first, n = c.outputs, v = c.view_width;
    d_view.assign(static_cast<std::size_t>(c.batch * v), 0);
    d_tap_weight.assign(tap_weight.size(), 0);
    d_view_weight.assign(view_weight.size(), 0);
    d_bias.assign(bias.size(), 0);
    d_output_weight.assign(output_weight.size(), 0);
    d_output_bias.assign(output_bias.size(), 0);
    d_mix.assign(mix.size(), 0);
    for (int side = 0; side < 2; ++side) {
      y[side].assign(static_cast<std::size_t>(layers * c.batch * n), 0);
      logits[side].assign(static_cast<std::size_t>(c.batch * n), 0);
    }
    for (int64_t l = 0; l < layers; ++l) {
      const std::size_t layer = static_cast<std::size_t>(l);
      d_taps.emplace_back(static_cast<std::size_t>(c.batch * c.widths[layer]), 0.0);
      for (int64_t b = 0; b < c.batch; ++b) {
        double tap_scale, view_scale;
        const Doubles x = normed(row(taps[layer], b * strides[layer], c.widths[layer]), c.normalize, &tap_scale);
        const Doubles u = normed(row(view, b * v, v), c.normalize, &view_scale);
        Doubles both(static_cast<std::size_t>(k), 0), seen(static_cast<std::size_t>(k), 0);
        for (int side = 0; side < sides(); ++side) {
          const bool sees = side == 0 && v > 0 && view_keep[static_cast<std::size_t>(b)];
          Doubles h, slope;
          for (int64_t i = 0; i < k; ++i) {
            double sum = wide(bias[static_cast<std::size_t>(l * k + i)]), s = 1;
            for (std::size_t j = 0; j < x.size(); ++j) {
              sum += x[j] * wide(tap_weight[static_cast<std::size_t>((rows[layer] + static_cast<int64_t>(j)) * k + i)]);
            }
            for (int64_t j = 0; j < v && sees; ++j) {
              sum += u[static_cast<std::size_t>(j)] * wide(view_weight[static_cast<std::size_t>((j * layers + l) * k + i)]);
            }
            double value = sum;
            if (!c.linear) {
              value = act(c.activation, sum, &s);
              const double kept = hidden_keep[static_cast<std::size_t>((l * c.batch + b) * k + i)] ? 1.25 : 0.0;
              value *= kept;
              s *= kept;
            }
            h.push_back(value);
            slope.push_back(s);
          }
          Doubles dh(static_cast<std::size_t>(k), 0);
          for (int64_t o = 0; o < n; ++o) {
            double sum = 0;
            if (c.linear) {
              sum = h[static_cast<std::size_t>(o)];
            } else {
              sum = wide(output_bias[static_cast<std::size_t>(l * n + o)]);
              for (int64_t i = 0; i < k; ++i) {
                sum += h[static_cast<std::size_t>(i)] * wide(output_weight[static_cast<std::size_t>((o * layers + l) * k + i)]);
              }
            }
            const std::size_t at = static_cast<std::size_t>((l * c.batch + b) * n + o), at_b = static_cast<std::size_t>(b * n + o);
            y[side][at] = sum;
            logits[side][at_b] += static_cast<double>(mix[layer]) * sum;
            const double g = wide(grad_logits[side][at_b]);
            const double dy = wide(grad_layer_logits[side][at]) + static_cast<double>(mix[layer]) * g;
            d_mix[layer] += g * sum;
            if (c.linear) {
              dh[static_cast<std::size_t>(o)] = dy;
              continue;
            }
            d_output_bias[static_cast<std::size_t>(l * n + o)] += dy;
            for (int64_t i = 0; i < k; ++i) {
              const std::size_t w = static_cast<std::size_t>((o * layers + l) * k + i);
              d_output_weight[w] += dy * h[static_cast<std::size_t>(i)];
              dh[static_cast<std::size_t>(i)] += dy * wide(output_weight[w]);
            }
          }
          for (std::size_t i = 0; i < dh.size(); ++i) {
            both[i] += dh[i] * slope[i];
            seen[i] += sees ? dh[i] * slope[i] : 0;
          }
        }
        Doubles dx(x.size(), 0), du(u.size(), 0);
        for (int64_t i = 0; i < k; ++i) {
          const double d = both[static_cast<std::size_t>(i)], e = seen[static_cast<std::size_t>(i)];
          d_bias[static_cast<std::size_t>(l * k + i)] += d;
          for (std::size_t j = 0; j < x.size(); ++j) {
            const std::size_t w = static_cast<std::size_t>((rows[layer] + static_cast<int64_t>(j)) * k + i);
            d_tap_weight[w] += x[j] * d;
            dx[j] += wide(tap_weight[w]) * d;
          }
          for (std::size_t j = 0; j < u.size(); ++j) {
            const std::size_t w = static_cast<std::size_t>((static_cast<int64_t>(j) * layers + l) * k + i);
            d_view_weight[w] += u[j] * e;
            du[j] += wide(view_weight[w]) * e;
          }
        }
        add_norm_gradient(x, tap_scale, c.normalize, dx, d_taps[layer].data() + b * c.widths[layer]);
        add_norm_gradient(u, view_scale, c.normalize, du, d_view.data() + b * v);
      }
    }
  }

  Ensemble inputs() {
    tap_pointers.clear();
    for (const auto& tap : taps) {
      tap_pointers.push_back(tap.data());
    }
    Ensemble in{};
    in.layers = layers;
    in.batch = c.batch;
    in.first = c.first;
    in.outputs = c.outputs;
    in.view_width = c.view_width;
    in.linear = c.linear;
    in.normalize = c.normalize;
    in.far = c.dropped;
    in.activation = c.activation;
    in.dropout_scale = 1.25f;
    in.widths = c.widths.data();
    in.weight_rows = rows.data();
    in.taps = tap_pointers.data();
    in.tap_strides = strides.data();
    in.view = c.view_width > 0 ? view.data() : nullptr;
    in.view_stride = c.view_width;
    in.view_keep = view_keep.data();
    in.tap_weight = tap_weight.data();
    in.view_weight = c.view_width > 0 ? view_weight.data() : nullptr;
    in.bias = bias.data();
    in.output_weight = c.linear ? nullptr : output_weight.data();
    in.output_bias = output_bias.data();
    in.mix = mix.data();
    in.hidden_keep = hidden_keep.data();
    return in;
  }

  template <class X>
  void close(const std::vector<X>& got, const Doubles& wanted, const char* what, Isa isa) {
    double error = 0, size = 0;
    expect(got.size() == wanted.size(), std::string(what) + ": wrong size");
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const double off = wide(got[i]) - wanted[i];
      error += std::isfinite(off) ? off * off : INFINITY;
      size += wanted[i] * wanted[i];
    }
    const double bound = sizeof(T) == 4 ? 4e-6 : 3 * Traits<T>::epsilon;
    expect(std::sqrt(error) <= bound * std::sqrt(size) + 1e-5,
           std::string(Traits<T>::name) + " ensemble: " + what + " wrong on " + isa_name(isa) + ": L " +
               std::to_string(layers) + " B " + std::to_string(c.batch) + " K " + std::to_string(c.first) + " C " +
               std::to_string(c.outputs) + " V " + std::to_string(c.view_width) + ", relative error " +
               std::to_string(std::sqrt(error / (size + 1e-30))));
  }

  static std::unique_ptr<float[], void (*)(float*)> aligned(int64_t floats) {
    constexpr std::align_val_t kLine{64};
    auto* data = static_cast<float*>(::operator new(static_cast<std::size_t>(std::max<int64_t>(floats, 1)) * 4, kLine));
    std::fill(data, data + floats, NAN);
    return {data, [](float* p) { ::operator delete(p, std::align_val_t{64}); }};
  }

  static int64_t floats(const EnsembleKernels& kernels, int64_t count) { return (count * kernels.work_bytes + 3) / 4; }

  int64_t block(const EnsembleKernels& kernels) const {
    const int64_t widest = *std::max_element(c.widths.begin(), c.widths.end());
    return std::min<int64_t>(kernels.rows_per_task(widest, c.first), std::max<int64_t>(c.batch / 2, 1));
  }

  void forward(const EnsembleKernels& kernels, Isa isa) {
    EnsembleForward args{};
    args.in = inputs();
    args.zeroed_view = c.both;
    const T nan = make<T>(NAN);
    std::vector<T> out[2], out_layers[2];
    for (int side = 0; side < sides(); ++side) {
      out[side] = filled<T>(c.batch * c.outputs, nan);
      out_layers[side] = filled<T>(layers * c.batch * c.outputs, nan);
      before[side] = filled<T>(c.linear ? 0 : layers * c.batch * c.first, nan);
      args.logits[side] = out[side].data();
      args.layer_logits[side] = out_layers[side].data();
      args.before[side] = c.linear ? nullptr : before[side].data();
    }
    auto view_rows = aligned(floats(kernels, c.batch * kernels.padded_width(c.view_width)));
    args.view_rows = view_rows.get();
    if (c.view_width > 0) {
      kernels.view_rows(args.in, args.view_rows, 0, c.batch);
    }
    const int64_t step = block(kernels);
    auto scratch = aligned(kernels.scratch(args.in, step));
    for (int64_t l = 0; l < layers; ++l) {
      for (int64_t b = 0; b < c.batch; b += step) {
        kernels.forward(args, l, b, std::min(b + step, c.batch), scratch.get());
      }
    }
    kernels.mixing(args, 0, c.batch / 2);
    kernels.mixing(args, c.batch / 2, c.batch);
    for (int side = 0; side < sides(); ++side) {
      close(out[side], logits[side], "logits", isa);
      close(out_layers[side], y[side], "layer_logits", isa);
    }
  }

  void backward(const EnsembleKernels& kernels, Isa isa) {
    EnsembleBackward args{};
    args.in = inputs();
    const T nan = make<T>(NAN);
    const int64_t lead = layers * c.batch, k = kernels.padded_width(c.first), o = kernels.padded_width(c.outputs);
    std::vector<std::unique_ptr<float[], void (*)(float*)>> kept;
    const auto space = [&](int64_t count) {
      kept.push_back(aligned(count));
      return kept.back().get();
    };
    std::vector<T> layer_logits[2];
    for (int side = 0; side < sides(); ++side) {
      for (double value : y[side]) {
        layer_logits[side].push_back(make<T>(value));
      }
      args.active[side] = true;
      args.grad_logits[side] = grad_logits[side].data();
      args.grad_layer_logits[side] = grad_layer_logits[side].data();
      args.layer_logits[side] = layer_logits[side].data();
      args.before[side] = before[side].data();
      args.dy[side] = space(floats(kernels, lead * o));
      args.hidden[side] = c.linear ? nullptr : space(floats(kernels, lead * k));
      args.d[side] = space(floats(kernels, lead * k));
    }
    args.view_rows = space(floats(kernels, c.batch * kernels.padded_width(c.view_width)));
    args.moments = space(2 * lead);
    args.stream = c.dropped;
    auto view_grad = filled<T>(c.batch * c.view_width, nan), tap_weight_grad = filled<T>(columns * c.first, nan);
    auto view_weight_grad = filled<T>(c.view_width * layers * c.first, nan), bias_grad = filled<T>(layers * c.first, nan);
    auto output_weight_grad = filled<T>(c.linear ? 0 : c.outputs * layers * c.first, nan);
    auto output_bias_grad = filled<T>(c.linear ? 0 : layers * c.outputs, nan);
    auto mix_grad = filled<float>(layers, NAN);
    std::vector<std::vector<T>> tap_grads;
    std::vector<void*> pointers;
    for (int64_t width : c.widths) {
      tap_grads.push_back(filled<T>(c.batch * width, nan));
    }
    for (auto& grad : tap_grads) {
      pointers.push_back(grad.data());
    }
    args.view = view_grad.data();
    args.tap_weight = tap_weight_grad.data();
    args.view_weight = view_weight_grad.data();
    args.bias = bias_grad.data();
    args.output_weight = c.linear ? nullptr : output_weight_grad.data();
    args.output_bias = c.linear ? nullptr : output_bias_grad.data();
    args.mix = mix_grad.data();
    args.taps = pointers.data();

    const int64_t step = block(kernels);
    auto scratch = aligned(kernels.scratch(args.in, std::max<int64_t>(step, 64)));
    for (int64_t l = 0; l < layers; ++l) {
      for (int64_t b = 0; b < c.batch; b += step) {
        kernels.backward_rows(args, l, b, std::min(b + step, c.batch), scratch.get());
      }
    }
    if (c.view_width > 0) {
      kernels.view_rows(args.in, args.view_rows, 0, c.batch);
    }
    const auto sums = [&](GradTask task, int64_t l, int64_t count, int64_t by) {
      for (int64_t i = 0; i < count; i += by) {
        kernels.backward_sums(args, task, l, i, std::min(i + by, count), scratch.get());
      }
    };
    if (c.view_width > 0) {
      sums(GradTask::kView, 0, c.batch, 64);
    }
    for (int64_t l = 0; l < layers; ++l) {
      sums(GradTask::kTapWeight, l, c.widths[static_cast<std::size_t>(l)], kWeightRows);
      sums(GradTask::kViewWeight, l, c.view_width, kWeightRows);
      sums(GradTask::kOutputWeight, l, c.linear ? 0 : c.outputs, kWeightRows);
      sums(GradTask::kTap, l, c.batch, 64);
      sums(GradTask::kBias, l, 1, 1);
    }
    close(view_grad, d_view, "the view's gradient", isa);
    close(tap_weight_grad, d_tap_weight, "tap_weight's gradient", isa);
    close(view_weight_grad, d_view_weight, "view_weight's gradient", isa);
    close(bias_grad, d_bias, "bias's gradient", isa);
    close(output_weight_grad, d_output_weight, "output_weight's gradient", isa);
    close(output_bias_grad, d_output_bias, "output_bias's gradient", isa);
    close(mix_grad, d_mix, "mix's gradient", isa);
    for (std::size_t l = 0; l < tap_grads.size(); ++l) {
      close(tap_grads[l], d_taps[l], "a tap's gradient", isa);
    }
  }
};

template <class T>
void test_ensemble_dtype(std::mt19937& random) {
  // widths, B, V, K, C, linear, normalise, dropped, both, activation
  for (const EnsembleCase& which : std::vector<EnsembleCase>{{{1}, 1, 1, 1, 1, false, false, false, false, 1},
                                                             {{5, 7}, 3, 2, 3, 2, false, true, true, true, 0},
                                                             {{16, 16}, 2, 0, 16, 4, false, true, false, true, 3},
                                                             {{33, 64}, 5, 7, 33, 17, false, true, true, false, 2},
                                                             {{40}, 4, 20, 9, 9, true, true, false, true, 0},
                                                             {{100}, 13, 3, 32, 5, false, true, true, false, 0},
                                                             {{130, 3}, 30, 33, 48, 33, false, true, false, true, 0},
                                                             {{200}, 150, 5, 17, 3, false, false, true, false, 1},
                                                             {{20}, 270, 4, 64, 2, false, true, true, false, 0}}) {
    Run<T> run(which, random);
    for (Isa isa : isas()) {
      run.check(isa);
    }
  }
}

}  // namespace

void test_layerwise_ensemble() {
  std::mt19937 random(20240206);
  test_ensemble_dtype<float>(random);
  test_ensemble_dtype<bf16>(random);
  test_ensemble_dtype<f16>(random);
}

}  // namespace levi_fast
