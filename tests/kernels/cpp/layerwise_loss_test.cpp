// Tests of the loss kernels against fp64; see support.h.
#include "support.h"

#include "cpu/layerwise_loss.h"

#include <random>

namespace levi_fast {
namespace {

struct LossShape {
  int64_t layers, batch, outputs;
};

// Loss of element c (of the whole row for cross-entropy, at c = 0) and its slope, in fp64.
template <class T>
void reference(Problem problem, const T* row, int64_t n, int64_t label, const float* target, double* loss,
               std::vector<double>* slope) {
  *loss = 0;
  slope->assign(static_cast<std::size_t>(n), 0.0);
  if (problem == Problem::kCrossEntropy) {
    double highest = -INFINITY, norm = 0;
    for (int64_t c = 0; c < n; ++c) {
      highest = std::fmax(highest, wide(row[c]));
    }
    for (int64_t c = 0; c < n; ++c) {
      norm += std::exp(wide(row[c]) - highest);
    }
    *loss = std::log(norm) + highest - wide(row[label]);
    for (int64_t c = 0; c < n; ++c) {
      (*slope)[static_cast<std::size_t>(c)] = std::exp(wide(row[c]) - highest) / norm - (c == label);
    }
    return;
  }
  for (int64_t c = 0; c < n; ++c) {
    const double x = wide(row[c]), t = static_cast<double>(target[c]);
    const bool binary = problem == Problem::kBinary;
    *loss += binary ? std::fmax(x, 0.0) - x * t + std::log1p(std::exp(-std::fabs(x))) : (x - t) * (x - t);
    (*slope)[static_cast<std::size_t>(c)] = binary ? 1 / (1 + std::exp(-x)) - t : 2 * (x - t);
  }
}

template <class T>
void test_loss(const LossShape& shape, Problem problem, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  const int64_t rows = shape.layers * shape.batch, n = shape.outputs;
  std::vector<T> logits(static_cast<std::size_t>(rows * n));
  for (T& x : logits) {
    x = make<T>(5 * normal(random));
  }
  std::vector<int64_t> labels(static_cast<std::size_t>(shape.batch));
  for (int64_t& label : labels) {
    label = uniform(random) < 0.2f ? kIgnoredLabel : static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  }
  labels[0] = n - 1;
  std::vector<float> target(static_cast<std::size_t>(shape.batch * n));
  for (float& t : target) {
    t = uniform(random);
  }
  // A row of NaN that does not count (cross-entropy), or that spoils itself alone.
  const int64_t bad = shape.batch > 2 ? shape.batch - 1 : -1;
  if (bad >= 0) {
    labels[static_cast<std::size_t>(bad)] = kIgnoredLabel;
    for (int64_t c = 0; c < n && problem == Problem::kCrossEntropy; ++c) {
      logits[static_cast<std::size_t>(bad * n + c)] = make<T>(NAN);
    }
  }
  const std::string name = std::string(Traits<T>::name) + " loss " + std::to_string(static_cast<int>(problem)) + " " +
                           std::to_string(shape.layers) + "x" + std::to_string(shape.batch) + "x" + std::to_string(n);
  for (Isa isa : isas()) {
    const LossKernels& kernels = loss_kernels(isa, Traits<T>::dtype);
    for (bool save : {true, false}) {
      auto gradient = filled<float>(save ? rows * n : 0, NAN);
      const LossForward args{shape.layers, shape.batch, n,    logits.data(), labels.data(), 1, target.data(),
                             0.25f,        save ? gradient.data() : nullptr};
      double total = 0;
      for (int64_t l = 0; l < shape.layers; ++l) {
        const int64_t half = shape.batch / 2;
        total += kernels.forward[static_cast<int>(problem)](args, l, 0, half);
        total += kernels.forward[static_cast<int>(problem)](args, l, half, shape.batch);
      }
      double wanted = 0, loss;
      std::vector<double> slope;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t b = r % shape.batch, label = labels[static_cast<std::size_t>(b)];
        const bool counts = problem != Problem::kCrossEntropy || label != kIgnoredLabel;
        slope.assign(static_cast<std::size_t>(n), 0.0);
        if (counts) {
          reference(problem, logits.data() + r * n, n, label, target.data() + b * n, &loss, &slope);
          wanted += loss;
        }
        for (int64_t c = 0; c < n && save; ++c) {
          const double got = static_cast<double>(gradient[static_cast<std::size_t>(r * n + c)]);
          const double exact = 0.25 * slope[static_cast<std::size_t>(c)];
          expect(std::fabs(got - exact) <= 1e-6 + 1e-6 * std::fabs(exact), name + ": wrong gradient on " + isa_name(isa));
        }
      }
      expect(std::fabs(total - wanted) <= 1e-5 * (1 + std::fabs(wanted)), name + ": wrong sum on " + isa_name(isa));
      auto scaled = filled<T>(rows * n, make<T>(NAN));
      if (save) {
        kernels.scale(gradient.data(), -2.0f, scaled.data(), 0, rows * n / 2);
        kernels.scale(gradient.data(), -2.0f, scaled.data(), rows * n / 2, rows * n);
        for (std::size_t i = 0; i < scaled.size(); ++i) {
          const T exact = make<T>(static_cast<double>(-2.0f * gradient[i]));
          expect(std::fabs(wide(scaled[i]) - wide(exact)) <= 1e-37, name + ": wrong scaling on " + isa_name(isa));
        }
      }
    }
  }
}

template <class T>
void test_loss_dtype(std::mt19937& random) {
  for (const LossShape& shape : std::vector<LossShape>{{1, 1, 1}, {2, 3, 2}, {3, 5, 7}, {1, 4, 15}, {2, 3, 16},
                                                       {2, 3, 17}, {1, 6, 33}, {2, 3, 130}, {1, 9, 1100}}) {
    for (Problem problem : {Problem::kCrossEntropy, Problem::kBinary, Problem::kSquared}) {
      test_loss<T>(shape, problem, random);
    }
  }
}

}  // namespace

void test_layerwise_loss() {
  std::mt19937 random(20240205);
  test_loss_dtype<float>(random);
  test_loss_dtype<bf16>(random);
  test_loss_dtype<f16>(random);
  test_loss_dtype<double>(random);
}

}  // namespace levi_fast
