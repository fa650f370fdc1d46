// A server without Python: loads a package that `levi-fast export --format aoti` wrote and prints its logits.
//
//   host PACKAGE LIBRARY|- [DTYPE DIMENSIONS FILE]...
//
// LIBRARY is liblevi_fast.so for packages with fused ops. Every input is a raw file, e.g. `int64 2x9 ids.bin`.
#include <dlfcn.h>

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

static std::vector<int64_t> dimensions(const std::string& text) {
  std::vector<int64_t> sizes;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, 'x');) sizes.push_back(std::stoll(part));
  return sizes;
}

static at::Tensor read_tensor(const std::string& dtype, const std::string& shape, const std::string& file) {
  auto type = dtype == "int64" ? at::kLong : dtype == "float32" ? at::kFloat : throw std::runtime_error(dtype);
  at::Tensor tensor = at::empty(dimensions(shape), at::TensorOptions().dtype(type));
  std::ifstream stream(file, std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(stream), {}};
  if (bytes.size() != tensor.nbytes()) throw std::runtime_error(file + ": other size than its dimensions say");
  std::copy(bytes.begin(), bytes.end(), static_cast<char*>(tensor.data_ptr()));
  return tensor;
}

int main(int count, char** words) {
  if (count < 3 || count % 3) {
    std::fprintf(stderr, "usage: host PACKAGE LIBRARY|- [DTYPE DIMENSIONS FILE]...\n");
    return 2;
  }
  try {
    if (std::string(words[2]) != "-" && !dlopen(words[2], RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
    torch::inductor::AOTIModelPackageLoader model(words[1]);
    std::vector<at::Tensor> inputs;
    for (int at = 3; at < count; at += 3) inputs.push_back(read_tensor(words[at], words[at + 1], words[at + 2]));
    at::Tensor logits = model.run(inputs).at(0).to(at::kFloat).contiguous();
    for (int64_t place = 0; place < logits.numel(); ++place) std::printf("%.9g\n", logits.data_ptr<float>()[place]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
