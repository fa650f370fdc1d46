// Small helpers over torch::stable::Tensor: names as Python prints them, dtype groups, allocation.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <string>

#include "cpu/common.h"
#include "library.h"
#include "memory.h"

namespace levi_fast {

inline std::string dtype_name(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::UInt16:
      return "uint16";
    case ScalarType::UInt32:
      return "uint32";
    case ScalarType::UInt64:
      return "uint64";
    default: {
      // Python's names for the rest (float8_e5m2, ...) are these in lower case.
      std::string name = torch::headeronly::toString(dtype);
      for (char& c : name) {
        c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
      }
      return name;
    }
  }
}

inline bool is_floating(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 || dtype == ScalarType::Float ||
         dtype == ScalarType::Double;
}

inline bool is_mask_dtype(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long:
      return true;
    default:
      return is_floating(dtype);
  }
}

inline Dtype float_dtype(const char* op, const char* argument, torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      fail(std::string(op) + ": " + argument + " must be float32, bfloat16, float16 or float64, got " +
           dtype_name(dtype));
  }
}

inline std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

inline std::string shape_text(std::initializer_list<int64_t> shape) {
  return shape_text(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()));
}

inline int32_t like_dtype(const torch::stable::Tensor& like) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return dtype;
}

// An uninitialised contiguous CPU tensor of a dtype in the C shim's numbering. Straight through that shim:
// torch::stable::empty looks the operator up by name at every call, which costs more than pooling a short sentence.
inline torch::stable::Tensor empty_of(int32_t dtype, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  constexpr std::size_t kMost = 8;  // dimensions; no result here has more than three
  if (sizes.size() > kMost) {
    fail("a result of " + std::to_string(sizes.size()) + " dimensions cannot be made");
  }
  std::array<int64_t, kMost> strides{};
  int64_t stride = 1;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor empty_like_dtype(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_of(like_dtype(like), torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

// The same in memory that is kept for the next step when the tensor dies: for what a training step makes anew each time
// (gradients, saved activations), not for what a user may gather by the thousand.
inline torch::stable::Tensor empty_kept(const torch::stable::Tensor& like, std::initializer_list<int64_t> sizes) {
  std::size_t bytes = like.element_size();
  for (int64_t size : sizes) {
    bytes *= static_cast<std::size_t>(size);
  }
  if (bytes < kSmallestKept) {
    return empty_like_dtype(like, sizes);
  }
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    strides.at(i) = stride;
    stride *= sizes.begin()[i];
  }
  void* block = take_block(bytes);
  AtenTensorHandle handle;
  const auto error =
      torch_from_blob(block, static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(), 0, like_dtype(like),
                      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
                      [](void* data, void*) { give_block(data); }, nullptr);
  if (error != AOTI_TORCH_SUCCESS) {
    give_block(block);
  }
  TORCH_ERROR_CODE_CHECK(error);
  return torch::stable::Tensor(handle);
}

}  // namespace levi_fast
