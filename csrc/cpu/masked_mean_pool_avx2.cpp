// Compiled with this instruction set's flags (CMakeLists.txt) and called only where the machine has it.
#define LEVI_FAST_ISA_AVX2 1
#include "masked_mean_pool_forward.h"

namespace levi_fast {
extern const PoolForwardTable kPoolForwardAvx2 = make_table<Widths<Avx2, One<float>>>();
}  // namespace levi_fast
