// Large blocks of memory, kept when they are given back so that the next step finds them again.
//
// The system hands out fresh memory page by page, each with a fault and a zeroing: for a gradient written once that costs
// as much as writing it two or three times. A training step asks for the same sizes as the step before, so a block given
// back is kept for the next request of exactly its size. At most kKeptBytes are kept, oldest ones leave first, and a
// block that many requests passed by leaves too. Blocks are not initialised.
#pragma once

#include <cstddef>
#include <cstdint>

namespace levi_fast {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kSmallestKept = 64 * 1024;                     // less comes from malloc's heap without a fault
constexpr std::size_t kKeptBytes = std::size_t{512} * 1024 * 1024;
constexpr int64_t kKeptRequests = 256;

void* take_block(std::size_t bytes);  // throws std::bad_alloc
void give_block(void* block);         // null is fine
std::size_t kept_bytes();
void release_kept();

// Uninitialised floats, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t floats) {
    if (floats > 0) {
      data_ = static_cast<float*>(take_block(static_cast<std::size_t>(floats) * sizeof(float)));
    }
  }
  ~Buffer() { give_block(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const { return data_; }

 private:
  float* data_ = nullptr;
};

}  // namespace levi_fast
