// liblevi_fast_cuda.so as torch sees it, and who serves an op on a GPU.
//
// The library defines every op of csrc/schemas.h once more under a name of its own, torch.ops.levi_fast_cuda.*, and
// implements it there for CUDA. It does not touch levi_fast::* when it is loaded: there Python may have put the Triton
// kernels under CUDA, and a second kernel for the same key would replace them, in whatever order the two came.
//
// levi_fast_cuda_serve(), called once, registers the same functions for levi_fast::* on CUDA. It has two callers:
//   - kernels/cuda_dispatch.py, where Triton does not serve, so that a call reaches C++ without any Python;
//   - a C++ program without Python, after it has loaded liblevi_fast.so (which defines the schemas) and this library.
// An op served there has no gradient of its own: gradients are registered from Python; C++ calls the *_backward ops.
//
// The tests build these files for the CPU (csrc/cuda/device.h says how) under a third name, and ask for the CPU key.
#include "cuda/ops.h"
#include "schemas.h"

#if defined(LEVI_FAST_CUDA_EMULATION)
#define LEVI_FAST_CUDA_NAMESPACE levi_fast_cuda_emulated
#define LEVI_FAST_CUDA_KEY CPU
#else
#define LEVI_FAST_CUDA_NAMESPACE levi_fast_cuda
#define LEVI_FAST_CUDA_KEY CUDA
#endif

namespace {

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("masked_mean_pool", TORCH_BOX(&levi_fast::cuda::masked_mean_pool));
  m.impl("masked_mean_pool_backward", TORCH_BOX(&levi_fast::cuda::masked_mean_pool_backward));
  m.impl("layerwise_ensemble", TORCH_BOX(&levi_fast::cuda::layerwise_ensemble));
  m.impl("layerwise_ensemble_backward", TORCH_BOX(&levi_fast::cuda::layerwise_ensemble_backward));
  m.impl("layerwise_loss", TORCH_BOX(&levi_fast::cuda::layerwise_loss));
  m.impl("layerwise_loss_backward", TORCH_BOX(&levi_fast::cuda::layerwise_loss_backward));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(LEVI_FAST_CUDA_NAMESPACE, m) {
  for (const char* schema : levi_fast::kSchemas) {
    m.def(schema);
  }
}

STABLE_TORCH_LIBRARY_IMPL(LEVI_FAST_CUDA_NAMESPACE, LEVI_FAST_CUDA_KEY, m) { implement(m); }

extern "C" {

// All schemas, one a line, so that Python can refuse a library of another version before an op is called.
__attribute__((visibility("default"))) const char* levi_fast_cuda_schemas() {
  static const std::string text = [] {
    std::string lines;
    for (const char* schema : levi_fast::kSchemas) {
      lines += std::string(schema) + "\n";
    }
    return lines;
  }();
  return text.c_str();
}

// Serves levi_fast::* on CUDA from now on; a second call does nothing. 0, or 1 where torch refused.
__attribute__((visibility("default"))) int levi_fast_cuda_serve() {
  try {
    using torch::stable::detail::StableLibrary;
    static StableLibrary* const library = [] {
      auto* made = new StableLibrary(StableLibrary::Kind::IMPL, "levi_fast", "CUDA", __FILE__, __LINE__);
      implement(*made);
      return made;  // for the process: what serves is never taken back
    }();
    return library == nullptr ? 1 : 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // extern "C"
