// layerwise_loss on CPU as torch sees it: input checks, allocation, division of the work into tasks.
#include "cpu/layerwise_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "library.h"
#include "tasks.h"
#include "tensor_utils.h"

namespace levi_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kLoss = "layerwise_loss";
constexpr int64_t kTaskElements = 8192;  // predictions per task: a few microseconds, and in L1 and L2 throughout

std::string loss_argument(const char* argument) { return std::string(kLoss) + ": " + argument; }

Tensor dense_cpu(const char* argument, const Tensor& tensor) {
  if (!tensor.is_cpu()) {
    fail(loss_argument(argument) + " must be on cpu, got another device");
  }
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor empty_floats(std::initializer_list<int64_t> sizes) {
  return empty_of(aoti_torch_dtype_float32(), torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

void check_target(const Tensor& target, const Tensor& logits, bool labels) {
  const ScalarType wanted = labels ? ScalarType::Long : ScalarType::Float;
  if (target.scalar_type() != wanted) {
    fail(loss_argument("target") + " must be " + dtype_name(wanted) + ", got " + dtype_name(target.scalar_type()));
  }
  const bool fits = labels ? target.dim() == 1 && target.size(0) == logits.size(1)
                           : target.dim() == 2 && target.size(0) == logits.size(1) && target.size(1) == logits.size(2);
  if (!fits) {
    fail(loss_argument("target") + " must fit layer_logits " + shape_text(logits.sizes()) + ", got " +
         shape_text(target.sizes()));
  }
  if (!target.is_cpu()) {
    fail(loss_argument("target") + " must be on the device of layer_logits, cpu, got another one");
  }
}

// How many labels count. Refuses one that is no class before anything is written.
int64_t count_labels(const LossForward& args) {
  int64_t count = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t label = args.labels[b * args.label_stride];
    if (label != kIgnoredLabel && (label < 0 || label >= args.outputs)) {
      fail(loss_argument("target") + " must hold classes from 0 to " + std::to_string(args.outputs - 1) + ", or " +
           std::to_string(kIgnoredLabel) + " to ignore an example; got " + std::to_string(label));
    }
    count += label != kIgnoredLabel;
  }
  return count;
}

std::tuple<Tensor, Tensor> layerwise_loss(const Tensor& layer_logits, const Tensor& target, int64_t problem,
                                          bool save) {
  if (layer_logits.dim() != 3) {
    fail(loss_argument("layer_logits") + " must be [L, B, C], got " + shape_text(layer_logits.sizes()));
  }
  if (problem < 0 || problem >= kProblemCount) {
    fail(loss_argument("problem") + " must be 0, 1 or 2, got " + std::to_string(problem));
  }
  const Dtype dtype = float_dtype(kLoss, "layer_logits", layer_logits.scalar_type());
  const bool labels = static_cast<Problem>(problem) == Problem::kCrossEntropy;
  check_target(target, layer_logits, labels);
  const Tensor logits = dense_cpu("layer_logits", layer_logits);
  const Tensor targets = labels ? target : dense_cpu("target", target);

  LossForward args{};
  args.layers = logits.size(0);
  args.batch = logits.size(1);
  args.outputs = logits.size(2);
  args.logits = logits.const_data_ptr();
  args.labels = labels ? static_cast<const int64_t*>(targets.const_data_ptr()) : nullptr;
  args.label_stride = labels ? targets.stride(0) : 0;
  args.target = labels ? nullptr : static_cast<const float*>(targets.const_data_ptr());
  const int64_t count = args.layers * (labels ? count_labels(args) : args.batch * args.outputs);
  args.scale = count > 0 ? static_cast<float>(1.0 / static_cast<double>(count)) : 0.0f;

  Tensor loss = empty_floats({});
  Tensor gradient = save ? empty_floats({args.layers, args.batch, args.outputs}) : empty_floats({0});
  const int64_t elements = args.layers * args.batch * args.outputs;
  double total = 0;
  if (elements > 0) {
    args.gradient = save ? static_cast<float*>(gradient.mutable_data_ptr()) : nullptr;
    const LossFn kernel = loss_kernels(current_isa(), dtype).forward[problem];
    const int64_t rows = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(args.outputs, 8));
    const int64_t blocks = (args.batch + rows - 1) / rows, tasks = args.layers * blocks;
    const double each_row = labels ? 10 : 0;  // nanoseconds, roughly, however short the row
    const double cost = static_cast<double>(elements) * 0.3 + static_cast<double>(args.layers * args.batch) * each_row;
    std::vector<double> partial(static_cast<std::size_t>(tasks));
    run_tasks(tasks, threads_for(cost), [&](int64_t task) {
      const int64_t begin = task % blocks * rows;
      partial[task] = kernel(args, task / blocks, begin, std::min(begin + rows, args.batch));
    });
    for (double part : partial) {
      total += part;
    }
  }
  // The mean over nothing is NaN, as PyTorch's own.
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total / static_cast<double>(count));
  return {loss, gradient};
}

Tensor layerwise_loss_backward(const Tensor& grad, const Tensor& gradient, const Tensor& like) {
  const char* op = "layerwise_loss_backward";
  if (grad.scalar_type() != ScalarType::Float || grad.numel() != 1 || !grad.is_cpu()) {
    fail(std::string(op) + ": grad must be one float32 on cpu, got " + dtype_name(grad.scalar_type()) + " " +
         shape_text(grad.sizes()));
  }
  if (gradient.scalar_type() != ScalarType::Float) {
    fail(std::string(op) + ": gradient must be float32, got " + dtype_name(gradient.scalar_type()));
  }
  const Dtype dtype = float_dtype(op, "like", like.scalar_type());
  const Tensor from = dense_cpu("gradient", gradient);
  Tensor out = empty_of(like_dtype(like), from.sizes());
  const int64_t elements = from.numel();
  if (elements > 0) {
    const float by = *static_cast<const float*>(grad.const_data_ptr());
    const float* values = static_cast<const float*>(from.const_data_ptr());
    void* to = out.mutable_data_ptr();
    const LossScaleFn kernel = loss_kernels(current_isa(), dtype).scale;
    run_blocks(elements, kTaskElements, threads_for(static_cast<double>(elements) * 0.1),
               [&](int64_t begin, int64_t end) { kernel(values, by, to, begin, end); });
  }
  return out;
}

}  // namespace
}  // namespace levi_fast

STABLE_TORCH_LIBRARY_IMPL(levi_fast, CPU, m) {
  m.impl("layerwise_loss", TORCH_BOX(&levi_fast::layerwise_loss));
  m.impl("layerwise_loss_backward", TORCH_BOX(&levi_fast::layerwise_loss_backward));
}
