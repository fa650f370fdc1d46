// See host.h.
#include "cuda/host.h"

#if !defined(LEVI_FAST_CUDA_EMULATION)
#include <dlfcn.h>

#include <atomic>
#endif

namespace levi_fast {
namespace cuda {

#if defined(LEVI_FAST_CUDA_EMULATION)

Scope::Scope(const Tensor&) : gradients_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }

cudaStream_t current_stream(const Tensor&) { return nullptr; }

int64_t multiprocessors(const Tensor&) { return 4; }

void check_launch(const char*) {}

#else

namespace {

// The one function that is not in libtorch_cpu.so, so it is looked up at the first call: this library can then be built
// against a CPU build of torch, and needs no library of a certain CUDA build to be linked.
using StreamGetter = AOTITorchError (*)(int32_t, void**);

StreamGetter stream_getter() {
  static const StreamGetter getter = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = dlsym(library != nullptr ? library : RTLD_DEFAULT, name);
    if (found == nullptr) {
      fail(std::string("levi_fast: ") + name + " not found: this torch has no CUDA");
    }
    return reinterpret_cast<StreamGetter>(found);
  }();
  return getter;
}

}  // namespace

Scope::Scope(const Tensor& tensor)
    : guard_(tensor.get_device_index()), gradients_(aoti_torch_grad_mode_is_enabled()) {
  aoti_torch_grad_mode_set_enabled(false);
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(stream_getter()(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

int64_t multiprocessors(const Tensor& tensor) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // zero until asked
  const int device = tensor.get_device_index();
  int count = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
      count = 1;
    }
    if (device < kDevices) {
      known[device].store(count, std::memory_order_relaxed);
    }
  }
  return count;
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    fail(std::string(op) + ": CUDA refused a launch: " + cudaGetErrorString(error));
  }
}

#endif

Scope::~Scope() { aoti_torch_grad_mode_set_enabled(gradients_); }

Tensor empty_on(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  const auto wanted =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));  // the shim's own numbering
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  wanted, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor restride(const Tensor& tensor, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                int64_t offset) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

void matmul_into(Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(a.dim() == 3 ? "aten::bmm" : "aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);  // takes the reference that the call returned
}

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_parts_kernel(const float* partial, int64_t parts, int64_t size, T* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < size; i += step) {
    Wide<T> total = 0;
    for (int64_t part = 0; part < parts; ++part) {
      total += partial[part * size + i];
    }
    narrow(total, out + i);
  }
}

}  // namespace

void sum_parts(const float* partial, int64_t parts, int64_t size, Tensor& out, cudaStream_t stream) {
  if (size == 0) {
    return;
  }
  by_dtype(float_dtype("levi_fast", "out", out.scalar_type()), [&](auto tag) {
    using T = typename decltype(tag)::type;
    LEVI_FAST_LAUNCH((sum_parts_kernel<T>), blocks_for(ceil_div(size, kThreads)), dim3(kThreads), stream, partial,
                     parts, size, static_cast<T*>(out.mutable_data_ptr()));
  });
}

}  // namespace cuda
}  // namespace levi_fast
