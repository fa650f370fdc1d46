// masked_mean_pool on NVIDIA GPUs: kernels, launches and checks. The checks repeat kernels/masked_mean_pool.py.
//
// The forward's time is the time to read [B, T, D] once. A block takes one example and a tile of features; its threads
// are columns x token rows, each with 16 bytes of a row, four rows in flight. A masked token is never loaded: padding
// costs no bandwidth, and a NaN in it reaches no result. Few examples: the tokens are cut into parts, and a second
// launch adds the parts in their order.
#include "cuda/ops.h"

namespace levi_fast {
namespace cuda {
namespace {

constexpr int kRowsInFlight = 4;

__device__ inline bool keeps(const Mask& mask, int64_t b, int64_t t) {
  if (mask.data == nullptr) {
    return true;
  }
  const int64_t i = b * mask.stride_b + t * mask.stride_t;
  switch (mask.itemsize) {
    case 1:
      return static_cast<const uint8_t*>(mask.data)[i] != 0;
    case 2: {
      const uint16_t bits = static_cast<const uint16_t*>(mask.data)[i];
      return (mask.floating ? bits & 0x7fffu : bits) != 0;
    }
    case 4: {
      const uint32_t bits = static_cast<const uint32_t*>(mask.data)[i];
      return (mask.floating ? bits & 0x7fffffffu : bits) != 0;
    }
    default: {
      const uint64_t bits = static_cast<const uint64_t*>(mask.data)[i];
      return (mask.floating ? bits & 0x7fffffffffffffffu : bits) != 0;
    }
  }
}

template <class T>
struct PoolArgs {
  const T* hidden;
  int64_t stride_b, stride_t, stride_d;
  Mask mask;
  int64_t batch, length, width;
  int64_t part_length;  // tokens of one part
  T* out;
  Wide<T>* partial;  // [parts, B, D], or null: one part, and `out` is written
  int32_t* counts;   // [parts, B]
};

template <class T, int N>
__global__ void __launch_bounds__(kThreads) pool_kernel(PoolArgs<T> args) {
  using A = Wide<T>;
  __shared__ A sums[N * kThreads];
  __shared__ int32_t kept[kThreads];
  const int64_t packs = (args.width + N - 1) / N;
  const int64_t tiles = (packs + blockDim.x - 1) / blockDim.x;
  const int64_t begin = blockIdx.y * args.part_length;
  const int64_t end = begin + args.part_length < args.length ? begin + args.part_length : args.length;
  const int place = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int64_t unit = blockIdx.x; unit < args.batch * tiles; unit += gridDim.x) {
    const int64_t b = unit / tiles;
    const int64_t column = (unit % tiles * blockDim.x + threadIdx.x) * N;
    const bool inside = column < args.width;
    const T* row = args.hidden + b * args.stride_b + column * args.stride_d;
    A acc[N] = {};
    int32_t count = 0;
    for (int64_t t0 = begin + threadIdx.y; t0 < end; t0 += kRowsInFlight * blockDim.y) {
      bool keep[kRowsInFlight];
      Pack<T, N> values[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        const int64_t t = t0 + i * blockDim.y;
        keep[i] = t < end && keeps(args.mask, b, t);
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (keep[i] && inside) {
          values[i] = load<T, N>(row + (t0 + i * blockDim.y) * args.stride_t);
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (keep[i]) {
          ++count;
          if (inside) {
#pragma unroll
            for (int v = 0; v < N; ++v) {
              acc[v] += widen(values[i].at[v]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int v = 0; v < N; ++v) {
      sums[v * kThreads + place] = acc[v];
    }
    if (threadIdx.x == 0) {
      kept[threadIdx.y] = count;
    }
    __syncthreads();
    if (threadIdx.y == 0) {
      int64_t total = 0;
      for (unsigned y = 0; y < blockDim.y; ++y) {
        total += kept[y];
      }
      if (inside) {
        Pack<T, N> mean;
        const int64_t at = b * args.width + column;
#pragma unroll
        for (int v = 0; v < N; ++v) {
          A sum = sums[v * kThreads + threadIdx.x];
          for (unsigned y = 1; y < blockDim.y; ++y) {
            sum += sums[v * kThreads + y * blockDim.x + threadIdx.x];
          }
          if (args.partial != nullptr) {
            args.partial[blockIdx.y * args.batch * args.width + at + v] = sum;
          } else {
            narrow(sum / static_cast<A>(total > 0 ? total : 1), &mean.at[v]);
          }
        }
        if (args.partial == nullptr) {
          store<T, N>(args.out + at, mean);
        }
      }
      if (args.partial != nullptr && column == 0) {
        args.counts[blockIdx.y * args.batch + b] = static_cast<int32_t>(total);
      }
    }
    __syncthreads();  // the next unit writes the same shared memory
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_pool_kernel(const Wide<T>* partial, const int32_t* counts, int64_t parts, int64_t batch, int64_t width,
                       T* out) {
  using A = Wide<T>;
  const int64_t size = batch * width;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < size; i += step) {
    A sum = 0;
    int64_t count = 0;
    for (int64_t part = 0; part < parts; ++part) {
      sum += partial[part * size + i];
      count += counts[part * batch + i / width];
    }
    narrow(sum / static_cast<A>(count > 0 ? count : 1), out + i);
  }
}

// Kept tokens of every example; a warp each.
__global__ void __launch_bounds__(kThreads) count_kernel(Mask mask, int64_t batch, int64_t length, int32_t* counts) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  for (int64_t first = blockIdx.x * static_cast<int64_t>(kThreads / kWarp); first < batch; first += step) {
    const int64_t b = first + threadIdx.x / kWarp;
    int32_t count = 0;
    for (int64_t t = lane; b < batch && t < length; t += kWarp) {
      count += keeps(mask, b, t) ? 1 : 0;
    }
    count = lanes_reduce<kWarp>(count, Add{});
    if (lane == 0 && b < batch) {
      counts[b] = count;
    }
  }
}

template <class T>
struct PoolBackwardArgs {
  const T* grad;
  int64_t stride_b, stride_d;
  Mask mask;
  const int32_t* counts;  // null without a mask
  int64_t batch, length, width;
  int64_t part_length;
  T* out;  // [B, T, D]
};

// grad / count where kept, zero elsewhere: not a product, since infinity times zero would be NaN at masked tokens.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) pool_backward_kernel(PoolBackwardArgs<T> args) {
  using A = Wide<T>;
  const int64_t packs = (args.width + N - 1) / N;
  const int64_t tiles = (packs + blockDim.x - 1) / blockDim.x;
  const int64_t begin = blockIdx.y * args.part_length;
  const int64_t end = begin + args.part_length < args.length ? begin + args.part_length : args.length;
  for (int64_t unit = blockIdx.x; unit < args.batch * tiles; unit += gridDim.x) {
    const int64_t b = unit / tiles;
    const int64_t column = (unit % tiles * blockDim.x + threadIdx.x) * N;
    if (column >= args.width) {
      continue;
    }
    const int64_t count = args.counts != nullptr ? args.counts[b] : args.length;
    Pack<T, N> row, zeros;
#pragma unroll
    for (int v = 0; v < N; ++v) {
      const A g = widen(args.grad[b * args.stride_b + (column + v) * args.stride_d]);
      narrow(g / static_cast<A>(count > 0 ? count : 1), &row.at[v]);
      narrow(A(0), &zeros.at[v]);
    }
    for (int64_t t = begin + threadIdx.y; t < end; t += blockDim.y) {
      store<T, N>(args.out + (b * args.length + t) * args.width + column, keeps(args.mask, b, t) ? row : zeros);
    }
  }
}

void check_mask(const char* op, const MaybeTensor& mask, const Tensor& like, int64_t length) {
  if (!mask.has_value()) {
    return;
  }
  const auto dtype = mask->scalar_type();
  if (!is_mask_dtype(dtype)) {
    fail(std::string(op) + ": mask must be bool, integer or real floating-point, got " + dtype_name(dtype));
  }
  if (mask->dim() != 2 || mask->size(0) != like.size(0) || mask->size(1) != length) {
    fail(std::string(op) + ": mask must have shape [B, T] = " + shape_text({like.size(0), length}) + ", got " +
         shape_text(mask->sizes()));
  }
  if (!same_device(*mask, like)) {
    fail(std::string(op) + ": mask must be on the device of the other input, got another one");
  }
}

Mask read_mask(const MaybeTensor& mask) {
  if (!mask.has_value()) {
    return {nullptr, 0, 0, 1, false};
  }
  return {mask->const_data_ptr(), mask->stride(0), mask->stride(1), static_cast<int>(mask->element_size()),
          is_floating(mask->scalar_type())};
}

// Columns of a block: 32 packs, or 16 where the last tile would be left half empty.
dim3 pool_threads(int64_t packs) {
  return tile_threads(packs, ceil_div(packs, 16) * 16 < ceil_div(packs, 32) * 32 ? 16 : 32);
}

}  // namespace

Tensor masked_mean_pool(const Tensor& hidden, const MaybeTensor& mask) {
  const char* op = "masked_mean_pool";
  if (hidden.dim() != 3) {
    fail(std::string(op) + ": hidden must have 3 dimensions [B, T, D], got shape " + shape_text(hidden.sizes()));
  }
  const Dtype dtype = float_dtype(op, "hidden", hidden.scalar_type());
  const int64_t batch = hidden.size(0), length = hidden.size(1), width = hidden.size(2);
  check_mask(op, mask, hidden, length);
  const Scope scope(hidden);
  Tensor out = empty_on(hidden, {batch, width});
  if (batch == 0 || width == 0) {
    return out;
  }
  const cudaStream_t stream = current_stream(hidden);
  by_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kPack = kFull<T>;
    const bool packed = hidden.stride(2) == 1 && width % kPack == 0 && hidden.stride(0) % kPack == 0 &&
                        hidden.stride(1) % kPack == 0 && is_aligned(hidden.const_data_ptr(), 16);
    by_pack<T>(packed, [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      const int64_t packs = ceil_div(width, N);
      const dim3 threads = pool_threads(packs);
      const int64_t units = batch * ceil_div(packs, threads.x);
      const int64_t stride = threads.y * kRowsInFlight;
      const int64_t wanted = parts_for(units, ceil_div(length, 2 * stride), multiprocessors(hidden));
      const int64_t part_length = std::max<int64_t>(ceil_div(ceil_div(length, wanted), stride) * stride, 1);
      const int64_t parts = std::max<int64_t>(ceil_div(length, part_length), 1);
      std::optional<Tensor> partial, counts;
      PoolArgs<T> args{static_cast<const T*>(hidden.const_data_ptr()),
                       hidden.stride(0),
                       hidden.stride(1),
                       hidden.stride(2),
                       read_mask(mask),
                       batch,
                       length,
                       width,
                       part_length,
                       static_cast<T*>(out.mutable_data_ptr()),
                       nullptr,
                       nullptr};
      if (parts > 1) {
        partial = empty_on(hidden, {parts, batch, width},
                           dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float);
        counts = empty_on(hidden, {parts, batch}, ScalarType::Int);
        args.partial = static_cast<Wide<T>*>(partial->mutable_data_ptr());
        args.counts = static_cast<int32_t*>(counts->mutable_data_ptr());
      }
      const dim3 grid(blocks_for(units), static_cast<unsigned>(parts), 1);
      LEVI_FAST_LAUNCH((pool_kernel<T, N>), grid, threads, stream, args);
      if (parts > 1) {
        LEVI_FAST_LAUNCH((finish_pool_kernel<T>), blocks_for(ceil_div(batch * width, kThreads)), dim3(kThreads), stream,
                         args.partial, args.counts, parts, batch, width, args.out);
      }
    });
  });
  check_launch(op);
  return out;
}

Tensor masked_mean_pool_backward(const Tensor& grad, const MaybeTensor& mask, int64_t length) {
  const char* op = "masked_mean_pool_backward";
  if (grad.dim() != 2) {
    fail(std::string(op) + ": grad must have 2 dimensions [B, D], got shape " + shape_text(grad.sizes()));
  }
  if (length < 0) {
    fail(std::string(op) + ": length must be at least 0, got " + std::to_string(length));
  }
  const Dtype dtype = float_dtype(op, "grad", grad.scalar_type());
  const int64_t batch = grad.size(0), width = grad.size(1);
  check_mask(op, mask, grad, length);
  const Scope scope(grad);
  Tensor out = empty_on(grad, {batch, length, width});
  if (batch == 0 || length == 0 || width == 0) {
    return out;
  }
  const cudaStream_t stream = current_stream(grad);
  std::optional<Tensor> counts;
  if (mask.has_value()) {
    counts = empty_on(grad, {batch}, ScalarType::Int);
    LEVI_FAST_LAUNCH(count_kernel, blocks_for(ceil_div(batch, kThreads / kWarp)), dim3(kThreads), stream,
                     read_mask(mask), batch, length, static_cast<int32_t*>(counts->mutable_data_ptr()));
  }
  by_dtype(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    by_pack<T>(width % kFull<T> == 0, [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      const int64_t packs = ceil_div(width, N);
      const dim3 threads = pool_threads(packs);
      const int64_t units = batch * ceil_div(packs, threads.x);
      const int64_t wanted = parts_for(units, ceil_div(length, threads.y), 4 * multiprocessors(grad));
      const int64_t part_length = ceil_div(length, wanted);
      const PoolBackwardArgs<T> args{static_cast<const T*>(grad.const_data_ptr()),
                                     grad.stride(0),
                                     grad.stride(1),
                                     read_mask(mask),
                                     counts ? static_cast<const int32_t*>(counts->const_data_ptr()) : nullptr,
                                     batch,
                                     length,
                                     width,
                                     part_length,
                                     static_cast<T*>(out.mutable_data_ptr())};
      const dim3 grid(blocks_for(units), static_cast<unsigned>(ceil_div(length, part_length)), 1);
      LEVI_FAST_LAUNCH((pool_backward_kernel<T, N>), grid, threads, stream, args);
    });
  });
  check_launch(op);
  return out;
}

}  // namespace cuda
}  // namespace levi_fast
