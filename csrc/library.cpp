// The library as torch and its loader see it: op schemas, and the C entry points for the choice of instruction set.
#include "library.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>

#include "memory.h"
#include "schemas.h"

namespace levi_fast {
namespace {

std::atomic<int> current{-1};  // -1: not chosen yet

}  // namespace

Isa current_isa() {
  int isa = current.load(std::memory_order_relaxed);
  if (isa < 0) {
    Isa chosen;
    std::string error;
    if (!choose_isa(std::getenv("LEVI_FAST_CPU_ISA"), &chosen, &error)) {
      fail("LEVI_FAST_CPU_ISA: " + error);
    }
    isa = static_cast<int>(chosen);
    current.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

std::string set_isa(const char* name) {
  Isa chosen;
  std::string error;
  if (choose_isa(name, &chosen, &error)) {
    current.store(static_cast<int>(chosen), std::memory_order_relaxed);
  }
  return error;
}

}  // namespace levi_fast

// A fragment, not STABLE_TORCH_LIBRARY: Python adds fakes and gradients to the same namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(levi_fast, m) {
  for (const char* schema : levi_fast::kSchemas) {
    m.def(schema);
  }
}

// For kernels/native.py, through ctypes. Both write a NUL-terminated text of at most `capacity` bytes.
namespace {

void write_text(const std::string& text, char* out, int capacity) {
  if (capacity > 0) {
    out[text.copy(out, static_cast<std::size_t>(capacity) - 1)] = '\0';
  }
}

}  // namespace

extern "C" {

// The instruction set in use; 0, or 1 with the reason in `out`.
__attribute__((visibility("default"))) int levi_fast_cpu_isa(char* out, int capacity) {
  try {
    write_text(levi_fast::isa_name(levi_fast::current_isa()), out, capacity);
    return 0;
  } catch (const std::exception& error) {
    write_text(error.what(), out, capacity);
    return 1;
  }
}

// Changes it for the whole process; 0, or 1 with the reason in `out`.
__attribute__((visibility("default"))) int levi_fast_set_cpu_isa(const char* name, char* out, int capacity) {
  const std::string error = levi_fast::set_isa(name);
  write_text(error, out, capacity);
  return error.empty() ? 0 : 1;
}

// Memory kept for the next step: how many bytes, and an end to it.
__attribute__((visibility("default"))) std::size_t levi_fast_kept_bytes() { return levi_fast::kept_bytes(); }
__attribute__((visibility("default"))) void levi_fast_release_kept() { levi_fast::release_kept(); }

}  // extern "C"
