// Tests of the pooling kernels; see support.h.
#include "support.h"

#include "cpu/masked_mean_pool.h"

#include <random>

namespace levi_fast {
namespace {

struct Shape {
  int64_t batch, length, width;
  int64_t gap;       // unused elements between rows (poisoned by NaN)
  int64_t stride_d;  // 1: the fast path
};

template <class T>
void run_forward(Isa isa, const PoolForward& args, int64_t batch, int64_t tile) {
  const PoolForwardFn kernel = pool_forward_table(isa).by_dtype[static_cast<int>(Traits<T>::dtype)];
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t begin = 0; begin < args.width; begin += tile) {
      const PoolUnit unit{b, begin, begin + tile < args.width ? begin + tile : args.width};
      const PoolUnit next{b + 1, begin, unit.end};
      kernel(args, unit, b + 1 < batch ? &next : nullptr);
    }
  }
}

template <class T>
void test_pool(const Shape& shape, double keep_rate, std::mt19937& random) {
  const T nan = make<T>(NAN);
  const int64_t stride_t = shape.width * shape.stride_d + shape.gap;
  const int64_t stride_b = shape.length * stride_t;
  const int64_t last = (shape.batch - 1) * stride_b + (shape.length - 1) * stride_t + (shape.width - 1) * shape.stride_d;
  std::vector<T> hidden(static_cast<std::size_t>(shape.length > 0 ? last + 1 : 0), nan);
  std::vector<int64_t> mask(static_cast<std::size_t>(shape.batch * shape.length));
  std::normal_distribution<double> normal;
  std::uniform_real_distribution<double> uniform;
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t t = 0; t < shape.length; ++t) {
      const bool keep = uniform(random) < keep_rate;
      mask[static_cast<std::size_t>(b * shape.length + t)] = keep ? -7 : 0;
      for (int64_t j = 0; j < shape.width && keep; ++j) {  // masked positions stay NaN
        hidden[static_cast<std::size_t>(b * stride_b + t * stride_t + j * shape.stride_d)] = make<T>(normal(random));
      }
    }
  }
  const std::string name = std::string(Traits<T>::name) + " " + std::to_string(shape.batch) + "x" +
                           std::to_string(shape.length) + "x" + std::to_string(shape.width) + " gap " +
                           std::to_string(shape.gap) + " stride " + std::to_string(shape.stride_d) + " keep " +
                           std::to_string(keep_rate);
  const Mask view{mask.data(), shape.length, 1, 8, false};
  std::vector<T> first;
  for (Isa isa : isas()) {
    for (int64_t tile : {int64_t{1024}, int64_t{64}}) {
      std::vector<T> out(static_cast<std::size_t>(shape.batch * shape.width), nan);
      const PoolForward args{hidden.data(), stride_b, stride_t, shape.stride_d, view,
                             shape.batch, shape.length, shape.width, out.data()};
      run_forward<T>(isa, args, shape.batch, tile);
      if (first.empty()) {
        first = out;
      }
      for (std::size_t i = 0; i < out.size(); ++i) {
        expect(same_bits_or_both_nan(out[i], first[i]), name + ": " + isa_name(isa) + " differs from scalar");
      }
    }
  }
  for (int64_t b = 0; b < shape.batch; ++b) {
    int64_t kept = 0;
    for (int64_t t = 0; t < shape.length; ++t) {
      kept += mask[static_cast<std::size_t>(b * shape.length + t)] != 0;
    }
    for (int64_t j = 0; j < shape.width; ++j) {
      double sum = 0;
      double magnitude = 0;
      for (int64_t t = 0; t < shape.length; ++t) {
        if (mask[static_cast<std::size_t>(b * shape.length + t)] != 0) {
          const double value = widen(hidden[static_cast<std::size_t>(b * stride_b + t * stride_t + j * shape.stride_d)]);
          sum += value;
          magnitude += std::fabs(value);
        }
      }
      const double count = kept > 0 ? static_cast<double>(kept) : 1.0;
      const double got = widen(first[static_cast<std::size_t>(b * shape.width + j)]);
      // Rounding of the result itself, plus about twenty roundings of the accumulator along the tree.
      const double bound = Traits<T>::epsilon * std::fabs(sum / count) +
                           20 * (sizeof(T) == 8 ? 2.3e-16 : 6e-8) * magnitude / count + 6e-8 * (sizeof(T) == 2);
      expect(std::fabs(got - sum / count) <= bound, name + ": wrong mean");
    }
  }

  std::vector<T> grad(static_cast<std::size_t>(shape.batch * shape.width));
  for (T& value : grad) {
    value = make<T>(normal(random));
  }
  for (bool stream : {false, true}) {
    // One element off, so that the streaming writer meets an address no vector is aligned to.
    const std::size_t size = static_cast<std::size_t>(shape.batch * shape.length * shape.width);
    std::vector<T> storage(size + 1, nan);
    T* out = storage.data() + 1;
    const PoolBackward args{grad.data(), shape.width, 1, view, shape.length, shape.width, out, stream};
    for (int64_t b = 0; b < shape.batch; ++b) {
      const int64_t half = shape.length / 2;
      pool_backward(Traits<T>::dtype, args, b, 0, half);
      pool_backward(Traits<T>::dtype, args, b, half, shape.length);
      int64_t kept = 0;
      for (int64_t t = 0; t < shape.length; ++t) {
        kept += mask[static_cast<std::size_t>(b * shape.length + t)] != 0;
      }
      for (int64_t t = 0; t < shape.length; ++t) {
        const bool keep = mask[static_cast<std::size_t>(b * shape.length + t)] != 0;
        for (int64_t j = 0; j < shape.width; ++j) {
          T wanted = make<T>(0);
          const T g = grad[static_cast<std::size_t>(b * shape.width + j)];
          if (keep) {
            narrow(static_cast<decltype(widen(g))>(widen(g) / static_cast<decltype(widen(g))>(kept)), &wanted);
          }
          const T got = out[(b * shape.length + t) * shape.width + j];
          expect(std::memcmp(&wanted, &got, sizeof(T)) == 0, name + ": wrong gradient");
        }
      }
    }
    expect(std::isnan(static_cast<double>(widen(storage[0]))), name + ": gradient written before its buffer");
  }
}

// Random bit patterns (infinities, NaN and subnormals among them) through T = 1 and T = 2: the first is the identity,
// the second exercises rounding; every instruction set must agree with the portable conversions.
template <class T, class Bits>
void test_conversions(std::mt19937& random) {
  const int64_t width = 65536;
  std::vector<T> hidden(static_cast<std::size_t>(2 * width));
  for (int64_t j = 0; j < width; ++j) {
    const Bits every = static_cast<Bits>(sizeof(Bits) == 2 ? static_cast<uint32_t>(j) : random());
    const Bits other = static_cast<Bits>(random());
    std::memcpy(&hidden[static_cast<std::size_t>(j)], &every, sizeof(T));
    std::memcpy(&hidden[static_cast<std::size_t>(width + j)], &other, sizeof(T));
  }
  for (int64_t length : {1, 2}) {
    std::vector<T> first;
    for (Isa isa : isas()) {
      std::vector<T> out(static_cast<std::size_t>(width));
      const PoolForward args{hidden.data(), 0, width, 1, {nullptr, 0, 0, 1, false}, 1, length, width, out.data()};
      run_forward<T>(isa, args, 1, kMaxTile);
      if (first.empty()) {
        first = out;
      }
      for (std::size_t j = 0; j < out.size(); ++j) {
        expect(same_bits_or_both_nan(out[j], first[j]),
               std::string(Traits<T>::name) + ": conversion on " + isa_name(isa) + " differs from the portable one");
        if (length == 1) {
          expect(same_bits_or_both_nan(out[j], hidden[j]), std::string(Traits<T>::name) + ": T = 1 is the identity");
        }
      }
    }
  }
}

template <class Word>
void test_mask_words(bool floating, std::vector<Word> words, const std::vector<bool>& keeps, const char* name) {
  const auto length = static_cast<int64_t>(words.size());
  std::vector<float> hidden(words.size());
  float sum = 0;
  int kept = 0;
  for (std::size_t t = 0; t < words.size(); ++t) {
    hidden[t] = keeps[t] ? static_cast<float>(t + 1) : NAN;
    sum += keeps[t] ? hidden[t] : 0.0f;
    kept += keeps[t];
  }
  for (Isa isa : isas()) {
    float out = NAN;
    const PoolForward args{hidden.data(), length, 1, 1, {words.data(), length, 1, sizeof(Word), floating}, 1,
                           length, 1, &out};
    run_forward<float>(isa, args, 1, kMaxTile);
    expect(out == sum / static_cast<float>(kept), std::string("mask of ") + name + " read wrongly");
  }
}

template <class T>
void test_dtype(std::mt19937& random) {
  for (const Shape& shape : std::vector<Shape>{{1, 1, 1, 0, 1},
                                               {2, 3, 5, 0, 1},
                                               {2, 0, 5, 0, 1},
                                               {3, 7, 31, 3, 1},
                                               {2, 64, 33, 0, 1},
                                               {1, 65, 47, 1, 1},
                                               {2, 130, 384, 0, 1},
                                               {1, 9, 1500, 0, 1},
                                               {1, 9000, 8, 0, 1},
                                               {2, 70, 37, 0, 3},
                                               {1, 5, 1100, 2, 2}}) {
    for (double keep_rate : {1.0, 0.5, 0.05, 0.0}) {
      test_pool<T>(shape, keep_rate, random);
    }
  }
}

}  // namespace

void test_masked_mean_pool() {
  std::mt19937 random(20240204);
  test_dtype<float>(random);
  test_dtype<bf16>(random);
  test_dtype<f16>(random);
  test_dtype<double>(random);
  test_conversions<float, uint32_t>(random);
  test_conversions<bf16, uint16_t>(random);
  test_conversions<f16, uint16_t>(random);
  const std::vector<bool> keeps{true, false, true, false, true};
  test_mask_words<uint8_t>(false, {1, 0, 255, 0, 128}, keeps, "uint8");
  test_mask_words<uint16_t>(false, {1, 0, 0x8000, 0, 256}, keeps, "int16");
  test_mask_words<uint16_t>(true, {1, 0x8000, 0x3c00, 0, 0x7e00}, keeps, "float16 (-0.0 drops, NaN keeps)");
  test_mask_words<uint32_t>(false, {1, 0, 0x80000000u, 0, 65536}, keeps, "int32");
  test_mask_words<uint32_t>(true, {1, 0x80000000u, 0x3f800000u, 0, 0x7fc00000u}, keeps, "float32");
  test_mask_words<uint64_t>(false, {1, 0, 1ull << 63, 0, 1ull << 32}, keeps, "int64");
  test_mask_words<uint64_t>(true, {1, 1ull << 63, 1, 0, 1ull << 62}, keeps, "float64");
}

}  // namespace levi_fast
