// Which of the loss's builds serves an instruction set.
#include "layerwise_loss.h"

namespace levi_fast {

const LossKernels& loss_kernels(Isa isa, Dtype dtype) {
  const LossTable* table = &kLossScalar;
  switch (isa) {
#if defined(LEVI_FAST_HAVE_AVX2)
    case Isa::kAvx2:
      table = &kLossAvx2;
      break;
#endif
#if defined(LEVI_FAST_HAVE_AVX512)
    case Isa::kAvx512:
      table = &kLossAvx512;
      break;
#endif
#if defined(LEVI_FAST_HAVE_NEON)
    case Isa::kNeon:
      table = &kLossNeon;
      break;
#endif
    default:
      break;
  }
  return table->by_dtype[static_cast<int>(dtype)];
}

}  // namespace levi_fast
