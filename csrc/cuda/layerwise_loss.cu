// layerwise_loss on NVIDIA GPUs: kernels, launches and checks.
//
// One launch takes all layers' predictions [L, B, C]: a few threads, a warp or a block to a row, with a running maximum,
// so any number of classes fits; where a gradient will be asked, the same launch writes it. Each block leaves one partial
// sum, and a last block adds those in their order. A gradient needs the number of examples that count before its first
// element is written: a launch of one block counts the labels first.
#include <math.h>

#include "cuda/ops.h"

namespace levi_fast {
namespace cuda {
namespace {

constexpr const char* kOp = "layerwise_loss";
constexpr int64_t kIgnored = -100;  // torch.nn.functional.cross_entropy's ignore_index
constexpr int64_t kMostBlocks = 4096;

__global__ void __launch_bounds__(kThreads)
    count_labels_kernel(const int64_t* target, int64_t stride, int64_t batch, float* count) {
  int32_t mine = 0;  // an int: a float stops counting at 2^24
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    mine += target[b * stride] != kIgnored ? 1 : 0;
  }
  mine = group_reduce<kThreads>(mine, Add{});
  if (threadIdx.x == 0) {
    *count = static_cast<float>(mine);
  }
}

// A maximum with the sum of exponentials below it. Two of them combine in any order to the same maximum; the tree of
// combinations is fixed, so the sum has the same bits every time.
struct Peak {
  float highest, total;
};

__device__ inline Peak across(Peak value, int step) {
  return {cuda::across(value.highest, step), cuda::across(value.total, step)};
}

struct Combine {
  __device__ Peak operator()(Peak a, Peak b) const {
    const float highest = Max{}(a.highest, b.highest);
    const float base = highest == -INFINITY ? 0.0f : highest;  // a row of -inf alone has no maximum to subtract
    return {highest, a.total * expf(a.highest - base) + b.total * expf(b.highest - base)};
  }
};

template <class T>
struct CrossEntropyArgs {
  const T* logits;        // [L, B, C]
  const int64_t* target;  // [B]
  int64_t stride;
  const float* count;
  int64_t layers, batch, outputs;
  float* sums;      // one a block
  float* gradient;  // [L, B, C], or null
};

template <class T, int GROUP>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(CrossEntropyArgs<T> args) {
  constexpr int kRows = kThreads / GROUP;
  const int member = static_cast<int>(threadIdx.x % GROUP);
  const int64_t rows = args.layers * args.batch;
  const float scale = 1.0f / (fmaxf(*args.count, 1.0f) * static_cast<float>(args.layers));
  float mine = 0.0f;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kRows); first < rows;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    const int64_t row = first + threadIdx.x / GROUP;
    const bool inside = row < rows;
    const int64_t label = inside ? args.target[row % args.batch * args.stride] : kIgnored;
    const bool counts = label != kIgnored;  // an ignored row is not read: its NaN stays where it is
    const T* x = args.logits + (inside ? row * args.outputs : 0);
    Peak peak{-INFINITY, 0.0f};
    for (int64_t c = member; counts && c < args.outputs; c += GROUP) {
      peak = Combine{}(peak, {static_cast<float>(widen(x[c])), 1.0f});
    }
    peak = group_reduce<GROUP>(peak, Combine{});
    const float base = peak.highest == -INFINITY ? 0.0f : peak.highest;
    const float log_sum = base + logf(peak.total);
    if (counts && member == 0) {
      // A label out of range makes the loss NaN: reading there would be out of bounds, and a number would hide it.
      const bool valid = label >= 0 && label < args.outputs;
      mine += valid ? log_sum - widen(x[label]) : NAN;
    }
    if (args.gradient != nullptr && inside) {
      float* g = args.gradient + row * args.outputs;
      const float inverse = 1.0f / peak.total;  // exp(x - log_sum) would lose the last digits of log_sum
      for (int64_t c = member; c < args.outputs; c += GROUP) {
        g[c] = counts ? (expf(widen(x[c]) - base) * inverse - (c == label ? 1.0f : 0.0f)) * scale : 0.0f;
      }
    }
  }
  mine = group_reduce<kThreads>(mine, Add{});
  if (threadIdx.x == 0) {
    args.sums[blockIdx.x] = mine;
  }
}

template <class T>
struct ElementwiseArgs {
  const T* logits;      // [L, B, C]
  const float* target;  // [B, C]
  int64_t layers, size;  // L, B * C
  float* sums;
  float* gradient;  // or null
};

// Squared errors, or binary cross-entropy with logits.
template <class T, bool SQUARED>
__global__ void __launch_bounds__(kThreads, 4) elementwise_loss_kernel(ElementwiseArgs<T> args) {
  const int64_t all = args.layers * args.size;
  const float scale = 1.0f / static_cast<float>(all);
  float mine = 0.0f;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < all;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const float x = widen(args.logits[i]);
    const float t = args.target[i % args.size];
    float g;
    if constexpr (SQUARED) {
      mine += (x - t) * (x - t);
      g = 2.0f * (x - t);
    } else {
      const float e = expf(-fabsf(x));
      mine += (x < 0 ? 0.0f : x) - x * t + log1pf(e);
      g = (x < 0 ? e : 1.0f) / (1.0f + e) - t;
    }
    if (args.gradient != nullptr) {
      args.gradient[i] = g * scale;
    }
  }
  mine = group_reduce<kThreads>(mine, Add{});
  if (threadIdx.x == 0) {
    args.sums[blockIdx.x] = mine;
  }
}

// loss = sum of the blocks' sums, over (count, or 1) * divisor. No example that counts: 0 / 0, NaN, as PyTorch has it.
__global__ void __launch_bounds__(kThreads)
    finish_loss_kernel(const float* sums, int64_t parts, const float* count, float divisor, float* loss) {
  float total = 0.0f;
  for (int64_t i = threadIdx.x; i < parts; i += kThreads) {
    total += sums[i];
  }
  total = group_reduce<kThreads>(total, Add{});
  if (threadIdx.x == 0) {
    *loss = total / ((count != nullptr ? *count : 1.0f) * divisor);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const float* grad, const float* gradient, int64_t size, T* out) {
  const float factor = *grad;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < size;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    narrow(static_cast<Wide<T>>(factor * gradient[i]), out + i);
  }
}

template <class F>
void by_classes(int64_t classes, int64_t rows, int64_t processors, const F& run) {
  if (classes > 4096 || (classes > 512 && rows < 8 * processors)) {
    run(Int<kThreads>{});
  } else if (classes > 8) {
    run(Int<kWarp>{});
  } else {
    run(Int<4>{});
  }
}

}  // namespace

std::tuple<Tensor, Tensor> layerwise_loss(const Tensor& layer_logits, const Tensor& target, int64_t problem,
                                          bool save) {
  const std::string op = kOp;
  if (layer_logits.dim() != 3) {
    fail(op + ": layer_logits must be [L, B, C], got " + shape_text(layer_logits.sizes()));
  }
  if (problem < 0 || problem > 2) {
    fail(op + ": problem must be 0, 1 or 2, got " + std::to_string(problem));
  }
  const Dtype dtype = float_dtype(kOp, "layer_logits", layer_logits.scalar_type());
  const ScalarType wanted = problem == 0 ? ScalarType::Long : ScalarType::Float;
  if (target.scalar_type() != wanted) {
    fail(op + ": target must be " + dtype_name(wanted) + ", got " + dtype_name(target.scalar_type()));
  }
  if (!same_device(target, layer_logits)) {
    fail(op + ": target must be on the device of layer_logits, got another one");
  }
  const int64_t layers = layer_logits.size(0), batch = layer_logits.size(1), outputs = layer_logits.size(2);
  const bool fits = problem == 0 ? target.dim() == 1 && target.size(0) == batch
                                 : target.dim() == 2 && target.size(0) == batch && target.size(1) == outputs;
  if (!fits) {
    fail(op + ": target must fit layer_logits " + shape_text(layer_logits.sizes()) + ", got " +
         shape_text(target.sizes()));
  }
  const Scope scope(layer_logits);
  Tensor loss = empty_on(layer_logits, {}, ScalarType::Float);
  const std::vector<int64_t> shape = save ? std::vector{layers, batch, outputs} : std::vector<int64_t>{0};
  const Tensor gradient = empty_on(layer_logits, shape, ScalarType::Float);
  if (layers * batch * outputs == 0) {
    torch::stable::fill_(loss, NAN);  // a mean over nothing
    return {loss, gradient};
  }
  const Tensor logits = dense(layer_logits);
  const Tensor targets = problem == 0 ? target : dense(target);
  const cudaStream_t stream = current_stream(layer_logits);
  auto* gradients = save ? static_cast<float*>(gradient.mutable_data_ptr()) : nullptr;
  const Tensor count = empty_on(layer_logits, {1}, ScalarType::Float);
  auto* counted = static_cast<float*>(count.mutable_data_ptr());
  by_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto* data = static_cast<const T*>(logits.const_data_ptr());
    int64_t parts = 0;
    std::optional<Tensor> sums;
    const auto reserve = [&](int64_t blocks) {
      parts = std::min(blocks, kMostBlocks);
      sums = empty_on(layer_logits, {parts}, ScalarType::Float);
      return static_cast<float*>(sums->mutable_data_ptr());
    };
    if (problem == 0) {
      const auto* labels = static_cast<const int64_t*>(targets.const_data_ptr());
      LEVI_FAST_LAUNCH(count_labels_kernel, 1u, dim3(kThreads), stream, labels, targets.stride(0), batch, counted);
      by_classes(outputs, layers * batch, multiprocessors(logits), [&](auto group) {
        constexpr int kGroup = decltype(group)::value;
        float* partial = reserve(ceil_div(layers * batch, kThreads / kGroup));
        const CrossEntropyArgs<T> args{data,  labels,  targets.stride(0), counted,  layers,
                                       batch, outputs, partial,           gradients};
        LEVI_FAST_LAUNCH((cross_entropy_kernel<T, kGroup>), blocks_for(parts), dim3(kThreads), stream, args);
      });
    } else {
      float* partial = reserve(ceil_div(layers * batch * outputs, 4 * kThreads));
      const ElementwiseArgs<T> args{data,    static_cast<const float*>(targets.const_data_ptr()),
                                    layers,  batch * outputs,
                                    partial, gradients};
      if (problem == 1) {
        LEVI_FAST_LAUNCH((elementwise_loss_kernel<T, false>), blocks_for(parts), dim3(kThreads), stream, args);
      } else {
        LEVI_FAST_LAUNCH((elementwise_loss_kernel<T, true>), blocks_for(parts), dim3(kThreads), stream, args);
      }
    }
    const float divisor = static_cast<float>(problem == 0 ? layers : layers * batch * outputs);
    LEVI_FAST_LAUNCH(finish_loss_kernel, 1u, dim3(kThreads), stream,
                     static_cast<const float*>(sums->const_data_ptr()), parts, problem == 0 ? counted : nullptr, divisor,
                     static_cast<float*>(loss.mutable_data_ptr()));
  });
  check_launch(kOp);
  return {loss, gradient};
}

Tensor layerwise_loss_backward(const Tensor& grad, const Tensor& gradient, const Tensor& like) {
  const char* op = "layerwise_loss_backward";
  const Dtype dtype = float_dtype(op, "like", like.scalar_type());
  if (grad.scalar_type() != ScalarType::Float || grad.numel() != 1) {
    fail(std::string(op) + ": grad must be one float32, got " + shape_text(grad.sizes()) + " " +
         dtype_name(grad.scalar_type()));
  }
  if (gradient.scalar_type() != ScalarType::Float) {
    fail(std::string(op) + ": gradient must be float32, got " + dtype_name(gradient.scalar_type()));
  }
  if (!same_device(grad, gradient)) {
    fail(std::string(op) + ": grad must be on gradient's device, got another one");
  }
  const Scope scope(gradient);
  const auto sizes = gradient.sizes();
  Tensor out = empty_on(gradient, std::vector<int64_t>(sizes.begin(), sizes.end()), like.scalar_type());
  if (out.numel() == 0) {
    return out;
  }
  const Tensor kept = dense(gradient);
  by_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    LEVI_FAST_LAUNCH((scale_kernel<T>), blocks_for(ceil_div(out.numel(), kThreads)), dim3(kThreads),
                     current_stream(gradient), static_cast<const float*>(grad.const_data_ptr()),
                     static_cast<const float*>(kept.const_data_ptr()), out.numel(),
                     static_cast<T*>(out.mutable_data_ptr()));
  });
  check_launch(op);
  return out;
}

}  // namespace cuda
}  // namespace levi_fast
