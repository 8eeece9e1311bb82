// Runs an AOTInductor package of a NesT without Python: libtorch and nest_fast's compiled extension are all it needs.
//
//   run_nest model.pt2 _C_cpu.abi3.so images.pt
//
// images.pt is a float tensor (B, C, H, W) from torch.save; a line of logits is printed for each image.

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

at::Tensor read_tensor(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::jit::pickle_load(bytes).toTensor();
}

void run(const char* package, const char* extension, const char* images) {
  // Loading it registers nest_fast's operations, which the package calls by name; before the package, which looks them
  // up when it is loaded. Next to the Python package: nest_fast/_C_cpu.abi3.so.
  if (dlopen(extension, RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());

  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader model(package);
  const at::Tensor logits = model.run({read_tensor(images)}).at(0).to(at::kFloat).contiguous();
  for (int64_t i = 0; i < logits.size(0); ++i)
    for (int64_t j = 0; j < logits.size(1); ++j)
      std::printf("%.9g%c", logits.const_data_ptr<float>()[i * logits.size(1) + j], j + 1 < logits.size(1) ? ' ' : '\n');
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s model.pt2 _C_cpu.abi3.so images.pt\n", argv[0]);
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[0], error.what());
    return 1;
  }
}
