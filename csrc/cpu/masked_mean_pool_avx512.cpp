// Compiled with this instruction set's flags (CMakeLists.txt) and called only where the machine has it.
#define LEVI_FAST_ISA_AVX512 1
#include "masked_mean_pool_forward.h"

namespace levi_fast {
extern const PoolForwardTable kPoolForwardAvx512 = make_table<Widths<Avx512Pair, Avx512, Avx2, One<float>>>();
}  // namespace levi_fast
