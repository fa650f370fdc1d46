#include "memory.h"

#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace levi_fast {
namespace {

// Right before every block: its size.
struct alignas(kAlignment) Header {
  std::size_t bytes;
};

struct Kept {
  void* block;
  std::size_t bytes;
  int64_t since;  // the request after which it was given back
};

struct Store {
  std::mutex mutex;
  std::vector<Kept> kept;  // oldest first
  std::size_t bytes = 0;
  int64_t requests = 0;
};

// Never destroyed: tensors outlive static objects at exit.
Store& store() {
  static Store* const only = new Store;
  return *only;
}

Header* header_of(void* block) { return static_cast<Header*>(block) - 1; }

// Asks for 2 MiB pages: with 4 KiB ones, the first writing of a large block is mostly page faults.
void large_pages(void* start, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 2 * 1024 * 1024;
  const auto address = reinterpret_cast<std::uintptr_t>(start);
  const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)start, (void)bytes;
#endif
}

void* fresh(std::size_t bytes) {
  const std::size_t whole = bytes + sizeof(Header);
  void* start = ::operator new(whole, std::align_val_t{kAlignment});
  large_pages(start, whole);
  auto* header = new (start) Header{bytes};
  return header + 1;
}

void destroy(void* block) { ::operator delete(header_of(block), std::align_val_t{kAlignment}); }

// Takes the kept block at `i` out of the list; the caller holds the mutex.
void* remove(Store& all, std::size_t i) {
  void* block = all.kept[i].block;
  all.bytes -= all.kept[i].bytes;
  all.kept.erase(all.kept.begin() + static_cast<std::ptrdiff_t>(i));
  return block;
}

}  // namespace

void* take_block(std::size_t bytes) {
  if (bytes < kSmallestKept) {
    return fresh(bytes);
  }
  Store& all = store();
  void* stale = nullptr;
  {
    const std::lock_guard<std::mutex> guard(all.mutex);
    ++all.requests;
    for (std::size_t i = all.kept.size(); i-- > 0;) {  // the youngest first: it is the likeliest to be in cache
      if (all.kept[i].bytes == bytes) {
        return remove(all, i);
      }
    }
    if (!all.kept.empty() && all.requests - all.kept[0].since > kKeptRequests) {
      stale = remove(all, 0);
    }
  }
  if (stale != nullptr) {
    destroy(stale);
  }
  return fresh(bytes);
}

void give_block(void* block) {
  if (block == nullptr) {
    return;
  }
  const std::size_t bytes = header_of(block)->bytes;
  if (bytes < kSmallestKept || bytes > kKeptBytes) {
    destroy(block);
    return;
  }
  Store& all = store();
  const std::lock_guard<std::mutex> guard(all.mutex);
  while (!all.kept.empty() && all.bytes + bytes > kKeptBytes) {
    destroy(remove(all, 0));
  }
  all.kept.push_back({block, bytes, all.requests});
  all.bytes += bytes;
}

std::size_t kept_bytes() {
  Store& all = store();
  const std::lock_guard<std::mutex> guard(all.mutex);
  return all.bytes;
}

void release_kept() {
  Store& all = store();
  const std::lock_guard<std::mutex> guard(all.mutex);
  while (!all.kept.empty()) {
    destroy(remove(all, all.kept.size() - 1));
  }
}

}  // namespace levi_fast
