// Shared by the kernels' C++ tests. No torch, no Python: for the sanitizers, and for CPUs that are only emulated.
//
// Every buffer is a heap block of exactly the size the arguments describe, so that a read or write past it is seen by
// AddressSanitizer; outputs start as NaN, so that an element left unwritten is seen by the comparison.
#pragma once

#include "cpu/isa.h"
#include "cpu/vec.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace levi_fast {

void test_masked_mean_pool();
void test_layerwise_loss();
void test_layerwise_ensemble();

inline int failures = 0;
inline int checks = 0;

inline void expect(bool condition, const std::string& what) {
  ++checks;
  if (!condition && ++failures <= 20) {
    std::printf("FAILED: %s\n", what.c_str());
  }
}

namespace {

template <class T>
struct Traits;
template <>
struct Traits<float> {
  static constexpr Dtype dtype = Dtype::kFloat32;
  static constexpr const char* name = "float32";
  static constexpr double epsilon = 1.2e-7;
};
template <>
struct Traits<bf16> {
  static constexpr Dtype dtype = Dtype::kBFloat16;
  static constexpr const char* name = "bfloat16";
  static constexpr double epsilon = 7.9e-3;
};
template <>
struct Traits<f16> {
  static constexpr Dtype dtype = Dtype::kFloat16;
  static constexpr const char* name = "float16";
  static constexpr double epsilon = 9.8e-4;
};
template <>
struct Traits<double> {
  static constexpr Dtype dtype = Dtype::kFloat64;
  static constexpr const char* name = "float64";
  static constexpr double epsilon = 2.3e-16;
};

template <class T>
T make(double value) {
  T out;
  if constexpr (sizeof(T) == 8) {
    out = value;
  } else {
    narrow(static_cast<float>(value), &out);
  }
  return out;
}

template <class T>
bool same_bits_or_both_nan(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0 ||
         (std::isnan(static_cast<double>(widen(a))) && std::isnan(static_cast<double>(widen(b))));
}


std::vector<Isa> isas() {
  std::vector<Isa> found;
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_supported(static_cast<Isa>(i))) {
      found.push_back(static_cast<Isa>(i));
    }
  }
  return found;
}


// A vector that grows nowhere: its end is the end of the heap block.
template <class T>
std::vector<T> filled(int64_t count, T value) {
  return std::vector<T>(static_cast<std::size_t>(count), value);
}

template <class T>
double wide(T value) {
  return static_cast<double>(widen(value));
}

}  // namespace
}  // namespace levi_fast
