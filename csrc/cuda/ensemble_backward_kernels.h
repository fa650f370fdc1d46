// The kernels around the ensemble's matrix products, backward; see layerwise_ensemble_backward.cu for what calls them.
#pragma once

#include "cuda/ensemble_math.h"

namespace levi_fast {
namespace cuda {

template <class T>
struct PredictionArgs {
  const T* grad[2];        // [B, C] of each side, or null
  const T* layer_grad[2];  // [L, B, C] of each side, or null
  Mix mix;
  int64_t layers, batch, outputs;
  int sides;
  T* out;  // [sides * B, L, C]
};

// dloss/dy_l = layer_grad + m_l grad, of both sides.
template <class T>
__global__ void __launch_bounds__(kThreads) prediction_grad_kernel(PredictionArgs<T> args) {
  const int64_t row = args.layers * args.outputs;
  const int64_t size = args.sides * args.batch * row;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < size;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t sb = i / row;
    const int64_t within = i - sb * row;
    const int64_t layer = within / args.outputs;
    const int64_t c = within - layer * args.outputs;
    const int side = sb >= args.batch ? 1 : 0;
    const int64_t at = (sb - side * args.batch) * args.outputs + c;
    float g = 0.0f;
    if (const T* layer_grad = pick(args.layer_grad, side); layer_grad != nullptr) {
      g = widen(layer_grad[layer * args.batch * args.outputs + at]);
    }
    if (const T* grad = pick(args.grad, side); grad != nullptr) {
      g += args.mix(layer) * widen(grad[at]);
    }
    narrow(g, args.out + i);
  }
}

template <class T>
struct HiddenGradArgs {
  const T* product;    // [L, sides * B, H]: gradient at the dropped activations
  const T* before[2];  // [L, B, H] of each side
  Dropout dropout;
  int64_t layers, batch, width;
  int sides;
  T* out;     // [sides * B, L, H]: gradient at `before`
  T* hidden;  // [sides * B, L, H]: the dropped activations once more, or null
};

template <class T, int ACT, int N>
__global__ void __launch_bounds__(kThreads, 4) hidden_grad_kernel(HiddenGradArgs<T> args) {
  const int64_t both = args.sides * args.batch;
  const int64_t rows = args.layers * both;
  for (int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y; row < rows;
       row += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t layer = row / both;
    const int64_t sb = row - layer * both;
    const int side = sb >= args.batch ? 1 : 0;
    const int64_t source = (layer * args.batch + sb - side * args.batch) * args.width;
    const int64_t target = (sb * args.layers + layer) * args.width;
    for (int64_t h = static_cast<int64_t>(threadIdx.x) * N; h < args.width;
         h += static_cast<int64_t>(blockDim.x) * N) {
      const Pack<T, N> before = load<T, N>(pick(args.before, side) + source + h);
      Pack<T, N> grad, hidden;
      if (args.out != nullptr) {
        grad = load<T, N>(args.product + row * args.width + h);
      }
#pragma unroll
      for (int v = 0; v < N; ++v) {
        const float x = widen(before.at[v]);
        if (args.out != nullptr) {
          narrow(args.dropout(widen(grad.at[v]), source + h + v) * activate_backward<ACT>(x), &grad.at[v]);
        }
        narrow(args.dropout(activate<ACT>(x), source + h + v), &hidden.at[v]);
      }
      if (args.out != nullptr) {
        store<T, N>(args.out + target + h, grad);
      }
      if (args.hidden != nullptr) {
        store<T, N>(args.hidden + target + h, hidden);
      }
    }
  }
}

// out[i] = x[i] + x[i + size]: the two sides' gradients of what both read.
template <class T>
__global__ void __launch_bounds__(kThreads) add_sides_kernel(const T* x, int64_t size, T* out) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < size;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    narrow(widen(x[i]) + widen(x[i + size]), out + i);
  }
}

// partial[part, n] = sum of x[r, n] over a part of the rows. Blocks of 32 columns x 8 rows.
template <class T>
__global__ void __launch_bounds__(kThreads)
    column_sum_kernel(const T* x, int64_t rows, int64_t columns, int64_t part_length, float* partial) {
  __shared__ float sums[kThreads];
  constexpr int kRows = kThreads / kWarp;
  const int64_t begin = blockIdx.y * part_length;
  const int64_t end = begin + part_length < rows ? begin + part_length : rows;
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kWarp); first < columns;
       first += static_cast<int64_t>(gridDim.x) * kWarp) {
    const int64_t column = first + lane;
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 4
      for (int64_t r = begin + threadIdx.x / kWarp; r < end; r += kRows) {
        sum += widen(x[r * columns + column]);
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x < kWarp && column < columns) {
      for (int i = 1; i < kRows; ++i) {
        sum += sums[i * kWarp + lane];
      }
      partial[blockIdx.y * columns + column] = sum;
    }
    __syncthreads();
  }
}

// partial[part, l] = sum over a part of [B, C] of grad * layer_logits[l].
template <class T>
__global__ void __launch_bounds__(kThreads)
    mix_grad_kernel(const T* grad, const T* layer_logits, int64_t size, int64_t part_length, float* partial) {
  const int64_t layer = blockIdx.y;
  const int64_t begin = blockIdx.x * part_length;
  const int64_t end = begin + part_length < size ? begin + part_length : size;
  float sum = 0.0f;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    sum += widen(grad[i]) * widen(layer_logits[layer * size + i]);
  }
  sum = group_reduce<kThreads>(sum, Add{});
  if (threadIdx.x == 0) {
    partial[blockIdx.x * static_cast<int64_t>(gridDim.y) + layer] = sum;
  }
}

// In place: the gradient at normalised rows (`out`, contiguous) becomes the gradient at the rows themselves; zero where
// a row was not kept, whatever it held.
template <class T, int GROUP, int N>
__global__ void __launch_bounds__(kThreads)
    norm_backward_kernel(RowTable table, int64_t batch, const uint8_t* keep, bool normalize) {
  const Rows& rows = table.at[blockIdx.y];
  const int member = static_cast<int>(threadIdx.x % GROUP);
  constexpr int kRows = kThreads / GROUP;
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kRows); first < batch;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    const int64_t b = first + threadIdx.x / GROUP;
    const bool live = b < batch && (keep == nullptr || keep[b] != 0);
    const T* row = static_cast<const T*>(rows.data) + (live ? b * rows.row_stride : 0);
    T* grad = static_cast<T*>(rows.out) + (b < batch ? b * rows.width : 0);
    const int64_t width = live ? rows.width : 0;
    Moments norm{0.0f, 1.0f};
    float sum = 0.0f, dot = 0.0f;
    if (normalize) {
      norm = moments<T, GROUP, N>(row, rows.feature_stride, width, rows.inverse, member);
      for (int64_t i = static_cast<int64_t>(member) * N; i < width; i += GROUP * N) {
        const Pack<T, N> x = load<T, N>(row + i * rows.feature_stride);
        const Pack<T, N> g = load<T, N>(grad + i);
#pragma unroll
        for (int v = 0; v < N; ++v) {
          sum += widen(g.at[v]);
          dot += widen(g.at[v]) * (widen(x.at[v]) - norm.mean) * norm.rstd;
        }
      }
      sum = group_reduce<GROUP>(sum, Add{}) * rows.inverse;
      dot = group_reduce<GROUP>(dot, Add{}) * rows.inverse;
    }
    if (b < batch) {
      for (int64_t i = static_cast<int64_t>(member) * N; i < rows.width; i += GROUP * N) {
        Pack<T, N> g;
        if (live && normalize) {
          const Pack<T, N> x = load<T, N>(row + i * rows.feature_stride);
          g = load<T, N>(grad + i);
#pragma unroll
          for (int v = 0; v < N; ++v) {
            const float normed = (widen(x.at[v]) - norm.mean) * norm.rstd;
            narrow((widen(g.at[v]) - sum - normed * dot) * norm.rstd, &g.at[v]);
          }
        } else if (live) {
          g = load<T, N>(grad + i);
        } else {
#pragma unroll
          for (int v = 0; v < N; ++v) {
            narrow(0.0f, &g.at[v]);
          }
        }
        store<T, N>(grad + i, g);
      }
    }
  }
}

}  // namespace cuda
}  // namespace levi_fast
