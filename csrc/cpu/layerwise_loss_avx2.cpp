// Compiled with this instruction set's flags (CMakeLists.txt) and called only where the machine has it.
#define LEVI_FAST_ISA_AVX2 1
#include "layerwise_loss_kernels.h"

namespace levi_fast {
extern const LossTable kLossAvx2 = loss_table();
}  // namespace levi_fast
