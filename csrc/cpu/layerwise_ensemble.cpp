// Which of the ensemble's builds serves an instruction set.
#include "layerwise_ensemble.h"

namespace levi_fast {

const EnsembleKernels* ensemble_kernels(Isa isa, Dtype dtype) {
  if (dtype == Dtype::kFloat64) {
    return nullptr;
  }
  const EnsembleTable* table = &kEnsembleScalar;
  switch (isa) {
#if defined(LEVI_FAST_HAVE_AVX2)
    case Isa::kAvx2:
      table = &kEnsembleAvx2;
      break;
#endif
#if defined(LEVI_FAST_HAVE_AVX512)
    case Isa::kAvx512:
      if (dtype == Dtype::kBFloat16 && __builtin_cpu_supports("avx512bf16")) {
        return &kEnsembleAvx512Bf16;
      }
      table = &kEnsembleAvx512;
      break;
#endif
#if defined(LEVI_FAST_HAVE_NEON)
    case Isa::kNeon:
      table = &kEnsembleNeon;
      break;
#endif
    default:
      break;
  }
  return &table->by_dtype[static_cast<int>(dtype)];
}

}  // namespace levi_fast
