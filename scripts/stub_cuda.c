// A libcuda.so.1 that launches nothing: it answers what Triton's CUDA driver asks, and keeps what the last launch was.
#include <cuda.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define MAX_PARAMETERS 128
#define MAX_FUNCTIONS 8

// What the device is; set from outside.
API struct {
  int capability[2];
  int shared_bytes;                // that a block may have
  int functions;                   // loaded so far
  int local_bytes[MAX_FUNCTIONS];  // of each, what the compiler spilled; none of those after
} stub_device = {{9, 0}, 232448};

// Sizes in bytes of the parameters of the next launch, which the driver is not told; set from outside.
API struct {
  int count;
  int sizes[MAX_PARAMETERS];
} stub_parameters;

API struct {
  unsigned long long launches;  // so far
  unsigned grid[3], block[3], shared;
  unsigned long long values[MAX_PARAMETERS];
} stub_launched;

static int context;

API CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "error of the stub driver";
  return CUDA_SUCCESS;
}
API CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int *version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = stub_device.capability[0]; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = stub_device.capability[1]; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = stub_device.shared_bytes; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext current) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *primary, CUdevice device) { return cuCtxGetCurrent(primary); }

API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
API CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)(size_t)++stub_device.functions;
  return CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  size_t n = (size_t)function - 1;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = n < MAX_FUNCTIONS ? stub_device.local_bytes[n] : 0; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  int all = stub_device.shared_bytes;
  return attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > all ? CUDA_ERROR_INVALID_VALUE
                                                                                     : CUDA_SUCCESS;
}
API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
API CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}
API CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

// Every pointer is the device's, those of tensors on the CPU too.
API CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

// A tensor map is the address of its tensor.
API CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                    const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                    const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                    CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof *map);
  map->opaque[0] = (cuuint64_t)address;
  return CUDA_SUCCESS;
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  memcpy(stub_launched.grid, grid, sizeof grid);
  memcpy(stub_launched.block, block, sizeof block);
  stub_launched.shared = config->sharedMemBytes;
  for (int n = 0; n < stub_parameters.count; ++n) {
    stub_launched.values[n] = 0;
    memcpy(&stub_launched.values[n], parameters[n], stub_parameters.sizes[n]);
  }
  stub_launched.launches++;
  return CUDA_SUCCESS;
}
