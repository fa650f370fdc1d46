// AVX-512 with its bf16 dot products: the bf16 kernels again, for machines that have them.
#define LEVI_FAST_ISA_AVX512 1
#define LEVI_FAST_BF16_DOT 1
#include "layerwise_ensemble_kernels.h"

namespace levi_fast {
extern const EnsembleKernels kEnsembleAvx512Bf16 = ensemble_entry<bf16>();
}  // namespace levi_fast
