// Tasks on torch's threads, and the memory they work in.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/vec.h"
#include "memory.h"
#include "tensor_utils.h"

namespace levi_fast {

// Threads worth waking for `nanoseconds` of one thread's work: a parallel region costs a few microseconds.
inline int64_t threads_for(double nanoseconds) {
  if (nanoseconds < 12e3) {
    return 1;
  }
  const int64_t useful = static_cast<int64_t>(nanoseconds / 6e3);
  const int64_t threads = torch::stable::get_num_threads();
  return useful < threads ? useful : threads;
}

// A thread's part of the tasks, each on a cache line of its own.
struct alignas(64) Stretch {
  std::atomic<int64_t> next;
  int64_t end;
};

// run(i) for every i in [0, count), each once. Every thread begins with a stretch of its own, the same one at each call of
// the same size: weights it reads and gradients it writes are in its own cache from the step before, not in another
// core's. Whoever is done helps the others. Tasks write disjoint results, so which thread takes which is not seen in them.
template <class F>
void run_tasks(int64_t count, int64_t threads, const F& run) {
  constexpr int64_t kMost = 64;  // stretches; more threads share them
  if (count < threads) {
    threads = count;
  }
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) {
      run(i);
    }
    return;
  }
  const int64_t stretches = threads < kMost ? threads : kMost;
  std::array<Stretch, kMost> all;
  for (int64_t s = 0; s < stretches; ++s) {
    all[s].next.store(count * s / stretches, std::memory_order_relaxed);
    all[s].end = count * (s + 1) / stretches;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t s = 0; s < stretches; ++s) {
      Stretch& stretch = all[(thread + s) % stretches];
      for (int64_t i; (i = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;) {
        run(i);
      }
    }
  });
}

// run(begin, end) over [0, count) in blocks whose borders depend on `step` alone.
template <class F>
void run_blocks(int64_t count, int64_t step, int64_t threads, const F& run) {
  run_tasks((count + step - 1) / step, threads, [&](int64_t i) {
    const int64_t begin = i * step;
    run(begin, begin + step < count ? begin + step : count);
  });
}

// This thread's own scratch, kept from call to call: at most a few MiB, where a fresh one would be mapped and zeroed by
// the system each time.
inline float* thread_scratch(int64_t floats) {
  thread_local std::vector<float> scratch;
  const std::size_t wanted = static_cast<std::size_t>(floats) + kAlignment / sizeof(float);
  if (scratch.size() < wanted) {
    scratch.clear();
    scratch.resize(wanted);
  }
  const auto address = reinterpret_cast<std::uintptr_t>(scratch.data());
  return scratch.data() + ((kAlignment - address % kAlignment) % kAlignment) / sizeof(float);
}

// A short one-dimensional tensor of any floating dtype, as floats and back.
inline std::vector<float> as_floats(const torch::stable::Tensor& tensor) {
  const torch::stable::Tensor dense = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
  std::vector<float> values(static_cast<std::size_t>(dense.numel()));
  const void* data = dense.const_data_ptr();
  const Dtype dtype = float_dtype("layerwise_ensemble", "mix_weights", dense.scalar_type());
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = dtype == Dtype::kFloat32    ? static_cast<const float*>(data)[i]
                : dtype == Dtype::kFloat64  ? static_cast<float>(static_cast<const double*>(data)[i])
                : dtype == Dtype::kBFloat16 ? widen(static_cast<const bf16*>(data)[i])
                                            : widen(static_cast<const f16*>(data)[i]);
  }
  return values;
}

inline void from_floats(const std::vector<float>& values, torch::stable::Tensor& tensor) {
  void* data = tensor.mutable_data_ptr();
  const Dtype dtype = float_dtype("layerwise_ensemble", "mix_weights", tensor.scalar_type());
  for (std::size_t i = 0; i < values.size(); ++i) {
    switch (dtype) {
      case Dtype::kFloat32:
        static_cast<float*>(data)[i] = values[i];
        break;
      case Dtype::kFloat64:
        static_cast<double*>(data)[i] = static_cast<double>(values[i]);
        break;
      case Dtype::kBFloat16:
        narrow(values[i], static_cast<bf16*>(data) + i);
        break;
      case Dtype::kFloat16:
        narrow(values[i], static_cast<f16*>(data) + i);
        break;
    }
  }
}

}  // namespace levi_fast
