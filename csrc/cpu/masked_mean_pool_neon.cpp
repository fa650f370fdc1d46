// Compiled with this instruction set's flags (CMakeLists.txt) and called only where the machine has it.
#define LEVI_FAST_ISA_NEON 1
#include "masked_mean_pool_forward.h"

namespace levi_fast {
extern const PoolForwardTable kPoolForwardNeon = make_table<Widths<Neon, One<float>>>();
}  // namespace levi_fast
