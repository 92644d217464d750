// As much of CUDA's driver as Triton's launcher needs, on a machine without a GPU: it accepts every launch, runs nothing,
// and keeps the last launches with the bytes of their parameters.
#include "cuda.h"
#include <string.h>

enum { LAUNCHES = 64, PARAMETERS = 128, BYTES = 2048, FUNCTIONS = 512 };

// A loaded kernel: what `describe` said of it.
typedef struct {
  int parameters;
  int size[PARAMETERS];
} Function;

typedef struct {
  Function* function;
  unsigned grid[3], block[3], shared;
  void* stream;
  unsigned attributes;
  int bytes;
  unsigned char data[BYTES];  // the parameters, one after the other
} Launch;

static Function functions[FUNCTIONS];
static int loaded;
static Launch launches[LAUNCHES];
static long launched;

void describe(Function* function, int parameters, const int* size) {
  function->parameters = parameters;
  memcpy(function->size, size, parameters * sizeof *size);
}
long launch_count(void) { return launched; }
const Launch* launch_at(long index) { return &launches[index % LAUNCHES]; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
  Launch* launch = &launches[launched++ % LAUNCHES];
  launch->function = (Function*)function;
  launch->grid[0] = config->gridDimX, launch->grid[1] = config->gridDimY, launch->grid[2] = config->gridDimZ;
  launch->block[0] = config->blockDimX, launch->block[1] = config->blockDimY, launch->block[2] = config->blockDimZ;
  launch->shared = config->sharedMemBytes;
  launch->stream = config->hStream;
  launch->attributes = config->numAttrs;
  launch->bytes = 0;
  for (int i = 0; i < launch->function->parameters; i++) {
    const int size = launch->function->size[i];
    if (launch->bytes + size > BYTES) return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(launch->data + launch->bytes, parameters[i], size);
    launch->bytes += size;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (loaded == FUNCTIONS) return CUDA_ERROR_OUT_OF_MEMORY;
  *module = (CUmodule)&functions[loaded++];
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 132;  // an H100's
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)functions;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return cuDeviceGet(device, 0); }
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** data, CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; i++) memcpy(data[i], &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  memcpy(data, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "an error of the stand-in";
  return CUDA_SUCCESS;
}
