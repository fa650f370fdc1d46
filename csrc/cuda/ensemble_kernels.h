// The kernels around the ensemble's matrix products, forward; see layerwise_ensemble.cu for what calls them when.
#pragma once

#include "cuda/ensemble_math.h"

namespace levi_fast {
namespace cuda {

// Every row of every tap, normalised (or only copied), rows that are not kept as zeros. GROUP threads a row.
template <class T, int GROUP, int N>
__global__ void __launch_bounds__(kThreads)
    norm_rows_kernel(RowTable table, int64_t batch, const uint8_t* keep, bool normalize) {
  const Rows& rows = table.at[blockIdx.y];
  const int member = static_cast<int>(threadIdx.x % GROUP);
  constexpr int kRows = kThreads / GROUP;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kRows); first < batch;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    const int64_t b = first + threadIdx.x / GROUP;
    const bool live = b < batch && (keep == nullptr || keep[b] != 0);
    const T* row = static_cast<const T*>(rows.data) + (live ? b * rows.row_stride : 0);
    // A row that is not live still takes part in the reductions, with a width of none.
    Moments norm{0.0f, 1.0f};
    if (normalize) {
      norm = moments<T, GROUP, N>(row, rows.feature_stride, live ? rows.width : 0, rows.inverse, member);
    }
    if (b < batch) {
      T* out = static_cast<T*>(rows.out) + b * rows.width;
      for (int64_t i = static_cast<int64_t>(member) * N; i < rows.width; i += GROUP * N) {
        Pack<T, N> values;
        if (live) {
          values = load<T, N>(row + i * rows.feature_stride);
        }
#pragma unroll
        for (int v = 0; v < N; ++v) {
          narrow(live ? (widen(values.at[v]) - norm.mean) * norm.rstd : 0.0f, &values.at[v]);
        }
        store<T, N>(out + i, values);
      }
    }
  }
}

template <class T>
struct FirstArgs {
  const T* taps;  // [L, B, K]: the taps' products
  const T* view;  // [B, L, K]: the view's, or null
  const T* bias;  // [L, K]
  Dropout dropout;
  int64_t layers, batch, width;
  T* before[2];  // [L, B, K] with the view and with it zeroed; null where not asked
  T* hidden;     // [L, sides * B, K]: dropped activations, side after side; or null
  int sides;
};

// before = tap product + view product + bias, and the activations that the second product reads.
template <class T, int ACT, int N>
__global__ void __launch_bounds__(kThreads) first_epilogue_kernel(FirstArgs<T> args) {
  const int64_t rows = args.layers * args.batch;
  for (int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y; row < rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t layer = row / args.batch;
    const int64_t b = row - layer * args.batch;
    for (int64_t k = static_cast<int64_t>(threadIdx.x) * N; k < args.width;
         k += static_cast<int64_t>(blockDim.x) * N) {
      const int64_t at = row * args.width + k;
      const Pack<T, N> tap = load<T, N>(args.taps + at);
      const Pack<T, N> bias = load<T, N>(args.bias + layer * args.width + k);
      Pack<T, N> view;
      if (args.view != nullptr) {
        view = load<T, N>(args.view + (b * args.layers + layer) * args.width + k);
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        if (side == args.sides) {
          break;
        }
        Pack<T, N> before, hidden;
#pragma unroll
        for (int v = 0; v < N; ++v) {
          float x = widen(tap.at[v]) + widen(bias.at[v]);
          if (args.view != nullptr && side == 0) {
            x += widen(view.at[v]);
          }
          narrow(x, &before.at[v]);
          narrow(args.dropout(activate<ACT>(x), at + v), &hidden.at[v]);
        }
        if (args.before[side] != nullptr) {
          store<T, N>(args.before[side] + at, before);
        }
        if (args.hidden != nullptr) {
          store<T, N>(args.hidden + ((layer * args.sides + side) * args.batch + b) * args.width + k, hidden);
        }
      }
    }
  }
}

template <class T>
struct MixArgs {
  const T* products[2];    // of each side: layer 0's [B, C]; the next layer's is `layer_stride` further on
  int64_t layer_stride;
  const T* bias;           // [L, C], or null: already in the products
  Mix mix;
  int64_t layers, batch, outputs;
  T* layer_logits[2];      // [L, B, C], or null where the products are these already
  T* logits[2];            // [B, C]
};

// y_l = product + bias, and y = sum_l m_l y_l, layer after layer: no atomics, the same bits every time.
template <class T>
__global__ void __launch_bounds__(kThreads) mix_kernel(MixArgs<T> args) {
  const int side = static_cast<int>(blockIdx.y);
  const int64_t size = args.batch * args.outputs;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < size;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t c = i % args.outputs;
    const T* products = pick(args.products, side) + i;
    T* layer_logits = pick(args.layer_logits, side);
    float total = 0.0f;
#pragma unroll 8
    for (int64_t layer = 0; layer < args.layers; ++layer) {
      float y = widen(products[layer * args.layer_stride]);
      if (args.bias != nullptr) {
        y += widen(args.bias[layer * args.outputs + c]);
      }
      if (layer_logits != nullptr) {
        narrow(y, layer_logits + layer * size + i);
      }
      total += args.mix(layer) * y;
    }
    narrow(total, pick(args.logits, side) + i);
  }
}

}  // namespace cuda
}  // namespace levi_fast
