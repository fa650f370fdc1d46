#include "isa.h"

#include <cstring>
#include <initializer_list>

namespace levi_fast {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kNeon:
      return "neon";
    default:
      return "scalar";
  }
}

bool isa_compiled(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
#if defined(LEVI_FAST_HAVE_AVX2)
    case Isa::kAvx2:
      return true;
#endif
#if defined(LEVI_FAST_HAVE_AVX512)
    case Isa::kAvx512:
      return true;
#endif
#if defined(LEVI_FAST_HAVE_NEON)
    case Isa::kNeon:
      return true;
#endif
    default:
      return false;
  }
}

bool isa_supported(Isa isa) {
  if (!isa_compiled(isa)) {
    return false;
  }
#if defined(__x86_64__) || defined(_M_X64)
  // The builtin also asks the operating system (XGETBV), so a kernel that does not save the wide registers counts as
  // no support. The lists are exactly what the files are compiled with.
  __builtin_cpu_init();
  if (isa == Isa::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  }
  if (isa == Isa::kAvx512) {
    return isa_supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return true;  // NEON is part of every AArch64 CPU
}

Isa detect_isa() {
  for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kNeon}) {
    if (isa_supported(isa)) {
      return isa;
    }
  }
  return Isa::kScalar;
}

bool choose_isa(const char* name, Isa* chosen, std::string* error) {
  if (name == nullptr || *name == '\0' || std::strcmp(name, "auto") == 0) {
    *chosen = detect_isa();
    return true;
  }
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (std::strcmp(name, isa_name(isa)) != 0) {
      continue;
    }
    if (!isa_compiled(isa)) {
      *error = std::string("CPU instruction set '") + name + "' is not part of this build of levi_fast";
      return false;
    }
    if (!isa_supported(isa)) {
      *error = std::string("CPU instruction set '") + name + "' is not supported by this machine";
      return false;
    }
    *chosen = isa;
    return true;
  }
  *error = std::string("CPU instruction set must be one of auto, scalar, avx2, avx512, neon; got '") + name + "'";
  return false;
}

}  // namespace levi_fast
