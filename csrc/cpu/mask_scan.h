// Reading a mask: see Mask in masked_mean_pool.h. In an anonymous namespace for the reason given in vec.h.
#pragma once

#include "masked_mean_pool.h"

namespace levi_fast {
namespace {

template <class Word>
inline bool nonzero(const void* data, int64_t offset, bool floating) {
  Word word;
  __builtin_memcpy(&word, static_cast<const Word*>(data) + offset, sizeof(Word));
  // Shifting the sign out leaves exactly "is it a zero of either sign"; NaN counts as nonzero, as in PyTorch.
  return static_cast<Word>(floating ? static_cast<Word>(word << 1) : word) != 0;
}

// Calls take(t, keep) for t in [begin, end) until it returns false; returns where it stopped.
template <class Word, class F>
inline int64_t scan_words(const Mask& mask, int64_t b, int64_t begin, int64_t end, F& take) {
  int64_t t = begin;
  int64_t offset = b * mask.stride_b + begin * mask.stride_t;
  for (; t < end; ++t, offset += mask.stride_t) {
    if (!take(t, nonzero<Word>(mask.data, offset, mask.floating))) {
      return t + 1;
    }
  }
  return t;
}

template <class F>
inline int64_t scan(const Mask& mask, int64_t b, int64_t begin, int64_t end, F take) {
  if (mask.data == nullptr) {
    for (int64_t t = begin; t < end; ++t) {
      if (!take(t, true)) {
        return t + 1;
      }
    }
    return end;
  }
  switch (mask.itemsize) {
    case 1:
      return scan_words<uint8_t>(mask, b, begin, end, take);
    case 2:
      return scan_words<uint16_t>(mask, b, begin, end, take);
    case 4:
      return scan_words<uint32_t>(mask, b, begin, end, take);
    default:
      return scan_words<uint64_t>(mask, b, begin, end, take);
  }
}

template <class Word>
inline int64_t count_words(const Mask& mask, int64_t b, int64_t length) {
  const int64_t offset = b * mask.stride_b;
  int64_t kept = 0;
  if (mask.stride_t == 1 && !mask.floating) {  // the compiler makes vectors of this one
    for (int64_t t = 0; t < length; ++t) {
      kept += nonzero<Word>(mask.data, offset + t, false);
    }
    return kept;
  }
  for (int64_t t = 0; t < length; ++t) {
    kept += nonzero<Word>(mask.data, offset + t * mask.stride_t, mask.floating);
  }
  return kept;
}

// How many tokens example `b` keeps.
inline int64_t count_kept(const Mask& mask, int64_t b, int64_t length) {
  if (mask.data == nullptr) {
    return length;
  }
  switch (mask.itemsize) {
    case 1:
      return count_words<uint8_t>(mask, b, length);
    case 2:
      return count_words<uint16_t>(mask, b, length);
    case 4:
      return count_words<uint32_t>(mask, b, length);
    default:
      return count_words<uint64_t>(mask, b, length);
  }
}

}  // namespace
}  // namespace levi_fast
