// Runs the kernels' C++ tests and says which instruction sets they ran on.
#include "support.h"

#include <cstdlib>

int main() {
  using namespace levi_fast;
  test_masked_mean_pool();
  test_layerwise_loss();
  test_layerwise_ensemble();
  std::string ran;
  for (Isa isa : isas()) {
    ran += std::string(" ") + isa_name(isa);
  }
  std::printf("%d checks, %d failed; instruction sets run:%s\n", checks, failures, ran.c_str());
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
