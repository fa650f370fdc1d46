// layerwise_loss on CPU: what the op hands to its kernels. No torch in here; see masked_mean_pool.h.
//
// A task is rows of one layer's predictions. It leaves one partial sum and writes its rows of the gradient, both made
// while a row is in cache; the caller cuts tasks by the shape alone and adds the partial sums in their order, so any
// number of threads gives the same bits.
#pragma once

#include "common.h"

namespace levi_fast {

constexpr int64_t kIgnoredLabel = -100;  // torch.nn.functional.cross_entropy's ignore_index

// Numbered as in kernels/layerwise_loss.py.
enum class Problem : int { kCrossEntropy = 0, kBinary = 1, kSquared = 2 };
constexpr int kProblemCount = 3;

struct LossForward {
  int64_t layers;
  int64_t batch;
  int64_t outputs;        // C
  const void* logits;     // [L, B, C]
  const int64_t* labels;  // [B], each in [0, C) or kIgnoredLabel; cross-entropy alone
  int64_t label_stride;
  const float* target;    // [B, C]; the other two
  float scale;            // one over the number of losses in the mean
  float* gradient;        // [L, B, C]; null where none is asked
};

// Sum of the losses of rows [begin, end) of a layer.
using LossFn = double (*)(const LossForward& args, int64_t layer, int64_t begin, int64_t end);

// out[i] = gradient[i] * by for i in [begin, end), in the logits' dtype.
using LossScaleFn = void (*)(const float* gradient, float by, void* out, int64_t begin, int64_t end);

struct LossKernels {
  LossFn forward[kProblemCount];
  LossScaleFn scale;
};
struct LossTable {
  LossKernels by_dtype[kDtypeCount];
};

// `isa` must be compiled in.
const LossKernels& loss_kernels(Isa isa, Dtype dtype);

extern const LossTable kLossScalar;
extern const LossTable kLossAvx2;
extern const LossTable kLossAvx512;
extern const LossTable kLossNeon;

}  // namespace levi_fast
