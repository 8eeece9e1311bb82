// blockify and its kin on CUDA: every dtype of 1 to 16 bytes, any strides, one pass over memory.
#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <string>

#include "blockify_ops.h"

namespace nest_fast {
namespace {

constexpr int kThreads = 256;

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T element[kWidth];
};

// One thread moves one vector of the output at a time. `step` is the input's stride from element to element in it.
template <typename T, int kWidth, bool kAdd>
__global__ void __launch_bounds__(kThreads)
    fill_kernel(const __grid_constant__ IndexMap map, int64_t step, const T* in, const T* pos, T* out) {
  using V = Vector<T, kWidth>;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < map.numel(); i += stride) {
    const Offsets at = map.at(i);
    V x;
    if (step == 1) {
      x = *reinterpret_cast<const V*>(in + at.in);
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x.element[k] = in[at.in + k * step];
    }
    if constexpr (kAdd) {
      const V p = *reinterpret_cast<const V*>(pos + at.pos);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) x.element[k] = x.element[k] + p.element[k];
    }
    *reinterpret_cast<V*>(out + at.out) = x;
  }
}

// Whether vectors of `width` elements start where the hardware can load them: 16 bytes on a 16-byte address, and so on.
template <typename T>
bool aligned(const IndexMap& map, int64_t width, const T* in, const T* pos, const T* out) {
  const auto whole = [&](const T* p) { return reinterpret_cast<uintptr_t>(p) % (width * sizeof(T)) == 0; };
  const int last = map.rank() - 1;
  const bool vector_in = map.dim(last).in == 1;
  if (map.dim(last).size % width || map.dim(last).pos > 1) return false;
  if (!whole(pos) || !whole(out) || (vector_in && !whole(in))) return false;
  for (int d = 0; d < last; ++d) {
    if (map.dim(d).pos % width || map.dim(d).out % width || (vector_in && map.dim(d).in % width)) return false;
  }
  return true;
}

template <typename T, int kWidth, bool kAdd>
void launch(IndexMap map, const T* in, const T* pos, T* out, cudaStream_t stream) {
  if constexpr (kWidth > 1) {
    if (!aligned(map, kWidth, in, pos, out)) return launch<T, kWidth / 2, kAdd>(map, in, pos, out, stream);
  }
  const int last = map.rank() - 1;
  const int64_t step = map.dim(last).in;
  map.vectorize(kWidth);
  if (step != 1) {  // channels first: neighbouring threads read along the dimension that is contiguous in the input
    for (int d = 0; d < last; ++d) {
      if (map.dim(d).in == 1) {
        map.move(d, last);
        break;
      }
    }
  }
  const int64_t blocks = std::min<int64_t>((map.numel() + kThreads - 1) / kThreads, INT32_MAX);
  fill_kernel<T, kWidth, kAdd><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(map, step, in, pos, out);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "blockify: the CUDA kernel was not launched: ", cudaGetErrorString(error));
}

template <typename T, bool kAdd>
void fill_with(const IndexMap& map, const Tensor& in, const std::optional<Tensor>& pos, const Tensor& out) {
  const torch::stable::accelerator::DeviceGuard guard(in.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(in.get_device_index(), &stream));
  launch<T, 16 / sizeof(T), kAdd>(map, static_cast<const T*>(in.const_data_ptr()),
                                  pos ? static_cast<const T*>(pos->const_data_ptr()) : nullptr,
                                  static_cast<T*>(out.mutable_data_ptr()), static_cast<cudaStream_t>(stream));
}

void fill(IndexMap map, const Tensor& in, const std::optional<Tensor>& pos, const Tensor& out) {
  if (pos) {
    switch (in.scalar_type()) {
      case ScalarType::Float: return fill_with<float, true>(map, in, pos, out);
      case ScalarType::Double: return fill_with<double, true>(map, in, pos, out);
      case ScalarType::Half: return fill_with<c10::Half, true>(map, in, pos, out);
      case ScalarType::BFloat16: return fill_with<c10::BFloat16, true>(map, in, pos, out);
      default: STD_TORCH_CHECK(false, "pos_embed: expected float64, float32, float16 or bfloat16");
    }
  }
  switch (in.element_size()) {
    case 1: return fill_with<uint8_t, false>(map, in, pos, out);
    case 2: return fill_with<uint16_t, false>(map, in, pos, out);
    case 4: return fill_with<uint32_t, false>(map, in, pos, out);
    case 8: return fill_with<uint64_t, false>(map, in, pos, out);
    case 16: return fill_with<uint4, false>(map, in, pos, out);
    default: STD_TORCH_CHECK(false, "x: expected elements of 1, 2, 4, 8 or 16 bytes");
  }
}

// Why `device`, which is the current one or has a context, cannot run what is here, or "": it needs machine code or PTX
// for the device, and a driver that is new enough for the runtime. One kernel answers for all.
std::string cuda_why_not(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, fill_kernel<uint32_t, 1, false>);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // else the next launch would find it
  return cudaGetErrorString(error);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nest_fast, CUDA, m) { register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(nest_fast, CompositeExplicitAutograd, m) { m.impl("cuda_why_not", TORCH_BOX(&cuda_why_not)); }

}  // namespace nest_fast
