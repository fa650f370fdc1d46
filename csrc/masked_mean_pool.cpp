// masked_mean_pool on CPU as torch sees it: input checks, allocation, division of the work among threads.
// The checks repeat kernels/masked_mean_pool.py word for word (a test compares them): a C++ caller has only these.
#include "cpu/masked_mean_pool.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "library.h"
#include "tensor_utils.h"

namespace levi_fast {
namespace {

using torch::stable::Tensor;

// Below this much memory traffic, waking other threads costs more than it saves (an OpenMP region is a few
// microseconds; one core reads about this much in that time).
constexpr int64_t kBytesPerThread = 128 * 1024;

// What a thread takes at a time. Less than this, and taking it costs more than an even end of the work gains.
constexpr int64_t kBytesPerShare = 512 * 1024;

// Up to this much per thread, the work is divided once and evenly: with so few shares, the last one would keep the other
// threads waiting.
constexpr int64_t kBytesToBalance = 16 * kBytesPerShare;

// A result larger than this cannot still be in cache when its reader comes.
constexpr int64_t kStreamBytes = 64 * 1024 * 1024;

void check_mask(const char* op, const std::optional<Tensor>& mask, int64_t batch, int64_t length) {
  if (!mask.has_value()) {
    return;
  }
  const auto dtype = mask->scalar_type();
  if (!is_mask_dtype(dtype)) {
    fail(std::string(op) + ": mask must be bool, integer or real floating-point, got " + dtype_name(dtype));
  }
  if (mask->dim() != 2 || mask->size(0) != batch || mask->size(1) != length) {
    fail(std::string(op) + ": mask must have shape [B, T] = " + shape_text({batch, length}) + ", got " +
         shape_text(mask->sizes()));
  }
  if (!mask->is_cpu()) {
    fail(std::string(op) + ": mask must be on the device of the other input, cpu, got another one");
  }
}

Mask read_mask(const std::optional<Tensor>& mask) {
  if (!mask.has_value()) {
    return {nullptr, 0, 0, 1, false};
  }
  const auto dtype = mask->scalar_type();
  return {mask->const_data_ptr(), mask->stride(0), mask->stride(1), static_cast<int>(mask->element_size()),
          is_floating(dtype)};
}

// Every thread gets one stretch with an equal part of the kept tokens; where a border falls into an example, its columns
// are divided. For tensors too small to be cut into many shares.
void pool_balanced(const PoolForward& args, const PoolForwardTable& table, PoolForwardFn kernel, int64_t threads) {
  constexpr int64_t kColumns = 64;  // a border falls on a multiple of this
  std::vector<int64_t> before(static_cast<std::size_t>(args.batch) + 1);  // columns of kept tokens up to an example
  for (int64_t b = 0; b < args.batch; ++b) {
    before[b + 1] = before[b] + std::max<int64_t>(table.kept(args.mask, b, args.length), 1) * args.width;
  }
  const auto border = [&](int64_t thread) {  // the example and its column where a thread's stretch begins
    const int64_t at = before[args.batch] * thread / threads;
    const int64_t b = std::upper_bound(before.begin(), before.end(), at) - before.begin() - 1;
    if (b >= args.batch) {
      return PoolUnit{args.batch, 0, 0};
    }
    const int64_t column = (at - before[b]) * args.width / (before[b + 1] - before[b]) / kColumns * kColumns;
    return PoolUnit{b, column, args.width};
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    PoolUnit unit = border(first);
    const PoolUnit stop = border(last);
    const auto more = [&](const PoolUnit& at) { return at.b < stop.b || (at.b == stop.b && at.begin < stop.begin); };
    while (more(unit)) {
      if (unit.b == stop.b) {
        unit.end = stop.begin;
      }
      const PoolUnit next{unit.b + 1, 0, args.width};
      kernel(args, unit, more(next) ? &next : nullptr);
      unit = next;
    }
  });
}

Tensor masked_mean_pool(const Tensor& hidden, const std::optional<Tensor>& mask) {
  const char* op = "masked_mean_pool";
  if (hidden.dim() != 3) {
    fail(std::string(op) + ": hidden must have 3 dimensions [B, T, D], got shape " + shape_text(hidden.sizes()));
  }
  const Dtype dtype = float_dtype(op, "hidden", hidden.scalar_type());
  const int64_t batch = hidden.size(0);
  const int64_t length = hidden.size(1);
  const int64_t width = hidden.size(2);
  check_mask(op, mask, batch, length);

  Tensor out = empty_like_dtype(hidden, {batch, width});
  if (batch == 0 || width == 0) {
    return out;
  }
  const PoolForward args{hidden.const_data_ptr(), hidden.stride(0), hidden.stride(1), hidden.stride(2), read_mask(mask),
                         batch,                   length,           width,            out.mutable_data_ptr()};
  const PoolForwardTable& table = pool_forward_table(current_isa());
  const PoolForwardFn kernel = table.by_dtype[static_cast<int>(dtype)];

  // Work is cut by example and by columns. Whole rows read best, so columns are cut only as far as the accumulators or
  // idle threads ask for it; 64 columns (whole cache lines for every dtype) are the least.
  const int64_t bytes = batch * length * width * static_cast<int64_t>(hidden.element_size());
  const int64_t threads =
      bytes < 2 * kBytesPerThread
          ? 1
          : std::min<int64_t>(torch::stable::get_num_threads(), bytes / kBytesPerThread);
  if (threads > 1 && width <= kMaxTile && bytes <= kBytesToBalance * threads) {
    pool_balanced(args, table, kernel, threads);
    return out;
  }
  const int64_t wanted_tiles = std::max<int64_t>((width + kMaxTile - 1) / kMaxTile, (threads + batch - 1) / batch);
  const int64_t tile = std::max<int64_t>(64, ((width + wanted_tiles - 1) / wanted_tiles + 63) / 64 * 64);
  const int64_t tiles = (width + tile - 1) / tile;
  const auto unit_of = [&](int64_t i) {
    const int64_t column = i % tiles * tile;
    return PoolUnit{i / tiles, column, std::min(column + tile, width)};
  };
  const auto work = [&](int64_t begin, int64_t end) {
    PoolUnit unit = unit_of(begin);
    for (int64_t i = begin; i < end; ++i) {
      const PoolUnit next = unit_of(i + 1);
      kernel(args, unit, i + 1 < end ? &next : nullptr);
      unit = next;
    }
  };
  const int64_t units = batch * tiles;
  if (threads == 1) {
    work(0, units);
  } else {
    // Examples differ in length, so a thread that is done early takes more. Neighbours stay together: each unit asks for
    // the next one's first rows.
    const int64_t share = std::clamp<int64_t>(units * kBytesPerShare / bytes, 1, (units + threads - 1) / threads);
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (int64_t begin = next.fetch_add(share); begin < units; begin = next.fetch_add(share)) {
        work(begin, std::min(begin + share, units));
      }
    });
  }
  return out;
}

Tensor masked_mean_pool_backward(const Tensor& grad, const std::optional<Tensor>& mask, int64_t length) {
  const char* op = "masked_mean_pool_backward";
  if (grad.dim() != 2) {
    fail(std::string(op) + ": grad must have 2 dimensions [B, D], got shape " + shape_text(grad.sizes()));
  }
  if (length < 0) {
    fail(std::string(op) + ": length must be at least 0, got " + std::to_string(length));
  }
  const Dtype dtype = float_dtype(op, "grad", grad.scalar_type());
  const int64_t batch = grad.size(0);
  const int64_t width = grad.size(1);
  check_mask(op, mask, batch, length);

  Tensor out = empty_kept(grad, {batch, length, width});
  const int64_t rows = batch * length;
  if (rows == 0 || width == 0) {
    return out;
  }
  const int64_t row_bytes = width * static_cast<int64_t>(grad.element_size());
  const PoolBackward args{grad.const_data_ptr(), grad.stride(0), grad.stride(1), read_mask(mask), length, width,
                          out.mutable_data_ptr(), rows * row_bytes >= kStreamBytes};
  const auto work = [&](int64_t begin, int64_t end) {
    while (begin < end) {  // rows of all examples, cut at the examples' borders
      const int64_t b = begin / length;
      const int64_t stop = std::min(end, (b + 1) * length);
      pool_backward(dtype, args, b, begin - b * length, stop - b * length);
      begin = stop;
    }
  };
  if (rows * row_bytes < 2 * kBytesPerThread) {
    work(0, rows);
  } else {
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kBytesPerThread / row_bytes), work);
  }
  return out;
}

}  // namespace
}  // namespace levi_fast

STABLE_TORCH_LIBRARY_IMPL(levi_fast, CPU, m) {
  m.impl("masked_mean_pool", TORCH_BOX(&levi_fast::masked_mean_pool));
  m.impl("masked_mean_pool_backward", TORCH_BOX(&levi_fast::masked_mean_pool_backward));
}
