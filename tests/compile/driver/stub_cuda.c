/* A libcuda.so.1 without a GPU: modules load, launches are counted and noted and compute nothing, and tensor maps are
   held to the rules of the CUDA driver's manual (cuTensorMapEncodeTiled). Only what Triton's driver asks for. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda.h"
#undef cuCtxGetCurrent

#define MOST_PARAMETERS 256

static struct {
    long launches, tensor_maps;
    char name[256];
    unsigned grid[3], threads, shared;
    int wanted; /* parameters of a launch to keep */
    uint64_t parameters[MOST_PARAMETERS];
    CUresult next; /* of the next launch */
} stub;

long stub_launches(void) { return stub.launches; }
long stub_tensor_maps(void) { return stub.tensor_maps; }
const char *stub_name(void) { return stub.name; }
unsigned stub_grid(int axis) { return stub.grid[axis]; }
unsigned stub_threads(void) { return stub.threads; }
unsigned stub_shared(void) { return stub.shared; }
uint64_t stub_parameter(int i) { return stub.parameters[i]; }
void stub_keep(int parameters) { stub.wanted = parameters < MOST_PARAMETERS ? parameters : MOST_PARAMETERS; }
void stub_fail(int code) { stub.next = (CUresult)code; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "refused by the stub driver"; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int i) { *device = i; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext *context) { return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch ((int)attribute) { /* of an H100 */
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 232448; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1000;
    }
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = (CUmodule)1; return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)strdup(name);
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    *clusters = 1;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    CUresult result = stub.next;
    stub.next = CUDA_SUCCESS;
    if (result != CUDA_SUCCESS)
        return result;
    if (!config->gridDimX || !config->gridDimY || !config->gridDimZ || config->gridDimX > 2147483647u ||
        config->gridDimY > 65535 || config->gridDimZ > 65535 || config->sharedMemBytes > 232448)
        return CUDA_ERROR_INVALID_VALUE;
    stub.launches++;
    strncpy(stub.name, (const char *)function, sizeof stub.name - 1);
    stub.grid[0] = config->gridDimX;
    stub.grid[1] = config->gridDimY;
    stub.grid[2] = config->gridDimZ;
    stub.threads = config->blockDimX;
    stub.shared = config->sharedMemBytes;
    for (int i = 0; i < stub.wanted; i++)
        memcpy(&stub.parameters[i], parameters[i], sizeof(uint64_t));
    stub.wanted = 0;
    return CUDA_SUCCESS;
}

static unsigned bytes_of(CUtensorMapDataType type) {
    switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
    }
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    unsigned inner = box[0] * bytes_of(type);
    unsigned widest = swizzle == CU_TENSOR_MAP_SWIZZLE_32B   ? 32
                      : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                      : swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128
                                                              : 65536;
    memset(map, 0, sizeof *map);
    stub.tensor_maps++;
    if (rank < 1 || rank > 5 || (uintptr_t)address % 16 || inner % 16 || inner > widest)
        return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < rank; i++)
        if (!sizes[i] || sizes[i] > (1ull << 32) || !box[i] || box[i] > 256 || steps[i] < 1 || steps[i] > 8)
            return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i + 1 < rank; i++)
        if (strides[i] % 16 || strides[i] >= (1ull << 40))
            return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}
