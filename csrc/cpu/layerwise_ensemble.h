// layerwise_ensemble on CPU: what the op hands to its kernels. No torch in here; see masked_mean_pool.h.
//
// The work is cut into tasks that share nothing but read-only inputs and write disjoint outputs, so any number of threads
// gives the same bits:
//   forward    (layer, rows of the batch): normalise, both first products in one accumulator, activation, second product
//   mixing     rows of the batch
//   backward 1 (layer, rows of the batch): gradient at the pre-activations, and the activations again
//   backward 2 pieces of the weights' gradients (sums over the batch), rows of the view's and of the taps' gradients
#pragma once

#include "common.h"

namespace levi_fast {

struct Ensemble {
  int64_t layers;
  int64_t batch;
  int64_t first;      // K: H, or C without an output layer
  int64_t outputs;    // C
  int64_t view_width;
  bool linear;        // no output layer
  bool normalize;
  bool far;           // the first layer's weights are too large to be in cache when they are read
  bool far_outputs;   // the output weights too
  int activation;
  float dropout_scale;  // 1 / (1 - p)

  const int64_t* widths;       // D_l
  const int64_t* weight_rows;  // first row of layer l in tap_weight
  const void* const* taps;     // layer l's [B, D_l], rows `tap_strides[l]` apart, unit stride along D
  const int64_t* tap_strides;
  const void* view;            // [B, V], rows `view_stride` apart; null without a view
  int64_t view_stride;
  const uint8_t* view_keep;    // [B] or null
  const void* tap_weight;      // [sum D, K]
  const void* view_weight;     // [V, L, K] or null
  const void* bias;            // [L, K]
  const void* output_weight;   // [C, L, H] or null
  const void* output_bias;     // [L, C]
  const float* mix;            // [L]
  const uint8_t* hidden_keep;  // [L, B, H] or null
};

struct EnsembleForward {
  Ensemble in;
  bool zeroed_view;
  void* view_rows;      // scratch [B, padded_width(V)] of the working type: the normalised view, zeros where dropped
  void* logits[2];      // with the view, and with it zeroed; [B, C]
  void* layer_logits[2];  // [L, B, C]
  void* before[2];      // [L, B, H]; null where nothing is saved
};

struct EnsembleBackward {
  Ensemble in;
  // [0] of the prediction with the view, [1] with it zeroed; a side without any gradient has active = false.
  bool active[2];
  const void* grad_logits[2];        // [B, C] or null
  const void* grad_layer_logits[2];  // [L, B, C] or null
  const void* layer_logits[2];       // only for mix_weights' gradient
  const void* before[2];
  // Scratch in the kernels' working type (`work_bytes` each), rows padded with zeros to padded_width().
  void* view_rows;                   // [B, padded V]
  void* dy[2];                       // [L, B, padded C]: gradient at layer_logits
  void* hidden[2];                   // [L, B, padded K]; only where output_weight asks
  void* d[2];                        // [L, B, padded K]: gradient at the pre-activations; d[1] of both sides' sum
  float* moments;                    // [L, B, 2]: each tap row's mean and 1 / standard deviation
  bool stream;                       // the weights' gradients are too large to stay in cache
  // Results; null where not asked.
  void* view;
  void* tap_weight;
  void* view_weight;
  void* bias;
  void* output_weight;
  void* output_bias;
  float* mix;
  void* const* taps;                 // [B, D_l] each, rows `tap_grad_strides[l]` apart
};

enum class GradTask : int { kTapWeight, kViewWeight, kOutputWeight, kBias, kView, kTap };

struct EnsembleKernels {
  int64_t work_bytes;  // of what rows between two products are kept in: fp32, or bf16 where products take bf16 pairs
  int64_t (*padded_width)(int64_t n);
  int64_t (*rows_per_task)(int64_t widest, int64_t first);
  // Floats of scratch a thread needs for any of the tasks below with at most `rows` rows.
  int64_t (*scratch)(const Ensemble& in, int64_t rows);
  void (*view_rows)(const Ensemble& in, void* out, int64_t begin, int64_t end);
  void (*forward)(const EnsembleForward& args, int64_t layer, int64_t begin, int64_t end, float* scratch);
  void (*mixing)(const EnsembleForward& args, int64_t begin, int64_t end);
  void (*backward_rows)(const EnsembleBackward& args, int64_t layer, int64_t begin, int64_t end, float* scratch);
  void (*backward_sums)(const EnsembleBackward& args, GradTask task, int64_t layer, int64_t begin, int64_t end,
                        float* scratch);
};

// Rows of a weight's gradient per task, sixteen register tiles at most: each task reads and packs the gradients at the
// pre-activations anew.
constexpr int64_t kWeightRows = 192;

// Null where there is none for the dtype (fp64). `isa` must be compiled in.
const EnsembleKernels* ensemble_kernels(Isa isa, Dtype dtype);

struct EnsembleTable {
  EnsembleKernels by_dtype[3];
};
extern const EnsembleTable kEnsembleScalar;
extern const EnsembleTable kEnsembleAvx2;
extern const EnsembleTable kEnsembleAvx512;
extern const EnsembleTable kEnsembleNeon;
extern const EnsembleKernels kEnsembleAvx512Bf16;

}  // namespace levi_fast
