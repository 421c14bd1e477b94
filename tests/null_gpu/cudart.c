/* A CUDA runtime for a device that is not there: one sm_90 with the memory of an H200, whose
 * memory is host memory, whose copies copy and whose kernels do nothing.
 *
 * What the CUDA provider of onnxruntime asks for and this file does not define gets a weak stub
 * from build.py that returns 0 (success). The declarations follow the headers of the
 * nvidia-cuda-runtime 13.0.96 wheel (driver_types.h, cuda_runtime_api.h); the __cuda* ones are what
 * nvcc's generated code calls (crt/host_runtime.h).
 *
 * Read from the environment, once:
 *   NULL_GPU_DRIVER   version the driver reports (13000); below 13000 every call fails as it would
 *   NULL_GPU_DEVICES  number of devices (1)
 *   NULL_GPU_MEMORY   bytes on the device (139.8 GiB)
 *   NULL_GPU_SM       compute capability times ten (90)
 *   NULL_GPU_TRACE    a file that gets the mangled name of every kernel launched, one per line
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef int cudaError_t;
typedef struct { unsigned x, y, z; } dim3;

enum { /* enum cudaError */
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorStreamCaptureUnsupported = 900,
};

static int driver = 13000, devices = 1, sm = 90;
static size_t memory = (size_t)143156 << 20, used;
static FILE *trace;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread cudaError_t last;

static long from_environment(const char *name, long otherwise) {
    const char *value = getenv(name);
    return value && *value ? atol(value) : otherwise;
}

__attribute__((constructor)) static void read_environment(void) {
    driver = (int)from_environment("NULL_GPU_DRIVER", driver);
    devices = (int)from_environment("NULL_GPU_DEVICES", devices);
    memory = (size_t)from_environment("NULL_GPU_MEMORY", (long)memory);
    sm = (int)from_environment("NULL_GPU_SM", sm);
    if (getenv("NULL_GPU_TRACE")) trace = fopen(getenv("NULL_GPU_TRACE"), "a");
}

static cudaError_t say(cudaError_t error) {
    if (error) last = error;
    return error;
}

/* What every call says where no device can be had. */
static cudaError_t device_error(void) {
    if (driver < 13000) return say(cudaErrorInsufficientDriver);
    if (devices < 1) return say(cudaErrorNoDevice);
    return cudaSuccess;
}
#define NEEDS_DEVICE() do { cudaError_t e = device_error(); if (e) return e; } while (0)

/* Errors. */
const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    default: return "cudaErrorUnknown";
    }
}
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    default: return "unknown error";
    }
}
cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}

/* Versions and devices. */
cudaError_t cudaDriverGetVersion(int *version) { *version = driver; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) {
    *count = 0;
    NEEDS_DEVICE();
    *count = devices;
    return cudaSuccess;
}
static __thread int current;
cudaError_t cudaGetDevice(int *device) {
    NEEDS_DEVICE();
    *device = current;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    NEEDS_DEVICE();
    if (device < 0 || device >= devices) return say(cudaErrorInvalidDevice);
    current = device;
    return cudaSuccess;
}

/* Shared memory that a block can opt in to and that an SM has, KiB (CUDA programming guide,
 * "technical specifications per compute capability"); 1 KiB of it is the system's. */
static int shared_kib(void) {
    switch (sm) {
    case 75: return 64;
    case 80: case 87: return 164;
    case 86: case 89: case 120: return 100;
    default: return 228;
    }
}

struct cudaDeviceProp {
    char name[256];
    char uuid[16];
    char luid[8];
    unsigned luidDeviceNodeMask;
    size_t totalGlobalMem, sharedMemPerBlock;
    int regsPerBlock, warpSize;
    size_t memPitch;
    int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
    size_t totalConstMem;
    int major, minor;
    size_t textureAlignment, texturePitchAlignment;
    int multiProcessorCount, integrated, canMapHostMemory;
    int textures[39]; /* maxTexture1D .. maxSurfaceCubemapLayered */
    size_t surfaceAlignment;
    int concurrentKernels, ECCEnabled, pciBusID, pciDeviceID, pciDomainID, tccDriver;
    int asyncEngineCount, unifiedAddressing, memoryBusWidth, l2CacheSize;
    int persistingL2CacheMaxSize, maxThreadsPerMultiProcessor;
    int streamPrioritiesSupported, globalL1CacheSupported, localL1CacheSupported;
    size_t sharedMemPerMultiprocessor;
    int regsPerMultiprocessor, managedMemory, isMultiGpuBoard, multiGpuBoardGroupID;
    int hostNativeAtomicSupported, pageableMemoryAccess, concurrentManagedAccess;
    int computePreemptionSupported, canUseHostPointerForRegisteredMem, cooperativeLaunch;
    size_t sharedMemPerBlockOptin;
    int pageableMemoryAccessUsesHostPageTables, directManagedMemAccessFromHost;
    int maxBlocksPerMultiProcessor, accessPolicyMaxWindowSize;
    size_t reservedSharedMemPerBlock;
    int hostRegisterSupported, sparseCudaArraySupported, hostRegisterReadOnlySupported;
    int timelineSemaphoreInteropSupported, memoryPoolsSupported, gpuDirectRDMASupported;
    unsigned gpuDirectRDMAFlushWritesOptions;
    int gpuDirectRDMAWritesOrdering;
    unsigned memoryPoolSupportedHandleTypes;
    int deferredMappingCudaArraySupported, ipcEventSupported, clusterLaunch;
    int rest[64]; /* unifiedFunctionPointers .. reserved */
};
_Static_assert(sizeof(struct cudaDeviceProp) == 1008, "driver_types.h of CUDA 13.0");

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    NEEDS_DEVICE();
    if (device < 0 || device >= devices) return say(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200 (null)");
    p->totalGlobalMem = memory;
    p->sharedMemPerBlock = 48 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->memPitch = 2147483647;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->totalConstMem = 64 << 10;
    p->major = sm / 10;
    p->minor = sm % 10;
    p->textureAlignment = p->surfaceAlignment = 512;
    p->texturePitchAlignment = 32;
    p->multiProcessorCount = 132;
    p->canMapHostMemory = p->concurrentKernels = p->ECCEnabled = p->unifiedAddressing = 1;
    p->asyncEngineCount = 3;
    p->memoryBusWidth = 6144;
    p->l2CacheSize = 60 << 20;
    p->persistingL2CacheMaxSize = 30 << 20;
    p->maxThreadsPerMultiProcessor = 2048;
    p->streamPrioritiesSupported = p->globalL1CacheSupported = p->localL1CacheSupported = 1;
    p->sharedMemPerMultiprocessor = (size_t)shared_kib() << 10;
    p->managedMemory = p->computePreemptionSupported = p->cooperativeLaunch = 1;
    p->sharedMemPerBlockOptin = (size_t)(shared_kib() - 1) << 10;
    p->maxBlocksPerMultiProcessor = 32;
    p->accessPolicyMaxWindowSize = 134213632;
    p->reservedSharedMemPerBlock = 1024;
    p->hostRegisterSupported = p->memoryPoolsSupported = p->ipcEventSupported = 1;
    p->clusterLaunch = sm >= 90;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, int attribute, int device) {
    struct cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch (attribute) { /* enum cudaDeviceAttr */
    case 1: *value = p.maxThreadsPerBlock; break;
    case 2: case 3: case 4: *value = p.maxThreadsDim[attribute - 2]; break;
    case 5: case 6: case 7: *value = p.maxGridSize[attribute - 5]; break;
    case 8: *value = (int)p.sharedMemPerBlock; break;
    case 9: *value = (int)p.totalConstMem; break;
    case 10: *value = p.warpSize; break;
    case 11: *value = (int)p.memPitch; break;
    case 12: *value = p.regsPerBlock; break;
    case 13: *value = 1980000; break; /* clock, kHz */
    case 16: *value = p.multiProcessorCount; break;
    case 36: *value = 3201000; break; /* memory clock, kHz */
    case 37: *value = p.memoryBusWidth; break;
    case 38: *value = p.l2CacheSize; break;
    case 39: *value = p.maxThreadsPerMultiProcessor; break;
    case 40: *value = p.asyncEngineCount; break;
    case 75: *value = p.major; break;
    case 76: *value = p.minor; break;
    case 81: *value = (int)p.sharedMemPerMultiprocessor; break;
    case 82: *value = p.regsPerMultiprocessor; break;
    case 97: *value = (int)p.sharedMemPerBlockOptin; break;
    case 106: *value = p.maxBlocksPerMultiProcessor; break;
    case 108: *value = p.persistingL2CacheMaxSize; break;
    case 109: *value = p.accessPolicyMaxWindowSize; break;
    case 111: *value = (int)p.reservedSharedMemPerBlock; break;
    case 120: *value = p.clusterLaunch; break;
    case 18: case 19: case 31: case 32: case 41: case 78: case 79: case 80: case 83: case 90:
    case 95: case 115:
        *value = attribute != 18; break; /* what it can do; 18: not integrated */
    default: *value = 0;
    }
    return cudaSuccess;
}

/* Memory. Every allocation is listed, so that pointers into it are known for the device's. */
struct block { char *at; size_t size; int kind; struct block *next; }; /* kind: cudaMemoryType */
enum { HOST = 1, DEVICE = 2 };
static struct block *blocks;
static int capturing, capture_mode; /* enum cudaStreamCaptureMode: 2 = relaxed */

static size_t pages(size_t size) { return (size + 4095) & ~(size_t)4095; }

static cudaError_t allocate(void **pointer, size_t size, int kind) {
    NEEDS_DEVICE();
    *pointer = NULL;
    if (!size) return cudaSuccess;
    pthread_mutex_lock(&lock);
    int over = kind == DEVICE && used + size > memory;
    char *at = over ? MAP_FAILED : mmap(NULL, pages(size), PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at != MAP_FAILED) {
        struct block *b = malloc(sizeof *b);
        *b = (struct block){at, size, kind, blocks};
        blocks = b;
        if (kind == DEVICE) used += size;
        *pointer = at;
    }
    pthread_mutex_unlock(&lock);
    return *pointer ? cudaSuccess : say(cudaErrorMemoryAllocation);
}

static cudaError_t release(void *pointer) {
    if (!pointer) return cudaSuccess;
    cudaError_t error = cudaErrorInvalidValue;
    pthread_mutex_lock(&lock);
    for (struct block **b = &blocks; *b; b = &(*b)->next) {
        struct block *found = *b;
        if (found->at != pointer) continue;
        *b = found->next;
        if (found->kind == DEVICE) used -= found->size;
        munmap(found->at, pages(found->size));
        free(found);
        error = cudaSuccess;
        break;
    }
    pthread_mutex_unlock(&lock);
    return say(error);
}

cudaError_t cudaMalloc(void **pointer, size_t size) {
    /* As the real one: no allocation while a stream is captured, except in the relaxed mode. */
    if (capturing && capture_mode != 2) return say(cudaErrorStreamCaptureUnsupported);
    return allocate(pointer, size, DEVICE);
}
cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t size, void *pool, void *stream) {
    (void)pool, (void)stream;
    return allocate(pointer, size, DEVICE);
}
cudaError_t cudaMallocHost(void **pointer, size_t size) { return allocate(pointer, size, HOST); }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    (void)flags;
    return allocate(pointer, size, HOST);
}
cudaError_t cudaFree(void *pointer) { return release(pointer); }
cudaError_t cudaFreeAsync(void *pointer, void *stream) { (void)stream; return release(pointer); }
cudaError_t cudaFreeHost(void *pointer) { return release(pointer); }

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    NEEDS_DEVICE();
    *total = memory;
    *available = memory - used;
    return cudaSuccess;
}

struct cudaPointerAttributes { int type, device; void *devicePointer, *hostPointer; };
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *pointer) {
    NEEDS_DEVICE();
    *a = (struct cudaPointerAttributes){0, -2, NULL, (void *)pointer};
    pthread_mutex_lock(&lock);
    for (struct block *b = blocks; b; b = b->next)
        if ((char *)pointer >= b->at && (char *)pointer < b->at + b->size) {
            a->type = b->kind;
            a->device = 0;
            a->devicePointer = (void *)pointer;
            a->hostPointer = b->kind == HOST ? (void *)pointer : NULL;
        }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(void **pool, const void *properties) {
    (void)properties;
    NEEDS_DEVICE();
    *pool = (void *)&memory;
    return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(void *pool, int attribute, void *value) {
    (void)pool;
    if (attribute <= 3) *(int *)value = 0;
    else *(uint64_t *)value = attribute == 4 ? 0 : used;
    return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t size) {
    NEEDS_DEVICE();
    if (size && (!to || !from)) return say(cudaErrorInvalidValue);
    memmove(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    (void)kind;
    if (capturing) return say(cudaErrorStreamCaptureUnsupported);
    return copy(to, from, size);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    (void)kind, (void)stream;
    return copy(to, from, size);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, int kind, void *stream) {
    (void)kind, (void)stream;
    NEEDS_DEVICE();
    for (size_t row = 0; row < height; row++)
        memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t size) {
    NEEDS_DEVICE();
    memset(to, value, size);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, void *stream) {
    (void)stream;
    return cudaMemset(to, value, size);
}
cudaError_t cudaMemcpyFromSymbol(void *to, const void *symbol, size_t size, size_t offset,
                                 int kind) {
    (void)symbol, (void)offset, (void)kind; /* a variable of a kernel's: nothing wrote it */
    memset(to, 0, size);
    return cudaSuccess;
}

/* Streams, events, capture: names for things that are always done. That a graph is captured shows
 * that nothing in it allocates or waits. What a copy into pageable memory does under a capture is
 * not imitated: operators that read sizes from the device (NonZero) pass here. */
static cudaError_t handle(void **made) {
    NEEDS_DEVICE();
    *made = malloc(16);
    return cudaSuccess;
}
static cudaError_t drop(void *made) { free(made); return cudaSuccess; }
cudaError_t cudaStreamCreate(void **stream) { return handle(stream); }
cudaError_t cudaStreamCreateWithFlags(void **stream, unsigned flags) {
    (void)flags;
    return handle(stream);
}
cudaError_t cudaStreamDestroy(void *stream) { return drop(stream); }
cudaError_t cudaEventCreate(void **event) { return handle(event); }
cudaError_t cudaEventCreateWithFlags(void **event, unsigned flags) {
    (void)flags;
    return handle(event);
}
cudaError_t cudaEventDestroy(void *event) { return drop(event); }
cudaError_t cudaEventElapsedTime(float *ms, void *start, void *end) {
    (void)start, (void)end;
    *ms = 0.001f; /* not 0: tuners divide by it */
    return cudaSuccess;
}
/* Waiting for a stream that is captured, or for the device under a capture, is an error. */
cudaError_t cudaStreamSynchronize(void *stream) {
    (void)stream;
    NEEDS_DEVICE();
    return capturing ? say(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) { return cudaStreamSynchronize(NULL); }

cudaError_t cudaStreamBeginCapture(void *stream, int mode) {
    (void)stream;
    NEEDS_DEVICE();
    capturing = 1;
    capture_mode = mode;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(void *stream, int *status) {
    (void)stream;
    *status = capturing; /* enum cudaStreamCaptureStatus: 0 none, 1 active */
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(void *stream, void **graph) {
    (void)stream;
    capturing = 0;
    return handle(graph);
}
cudaError_t cudaGraphInstantiate(void **ready, void *graph, unsigned long long flags) {
    (void)graph, (void)flags;
    return handle(ready);
}
cudaError_t cudaGraphDestroy(void *graph) { return drop(graph); }
cudaError_t cudaGraphExecDestroy(void *ready) { return drop(ready); }
static void note(const char *name) {
    if (!trace) return;
    pthread_mutex_lock(&lock);
    fprintf(trace, "%s\n", name);
    fflush(trace);
    pthread_mutex_unlock(&lock);
}
cudaError_t cudaGraphLaunch(void *ready, void *stream) {
    (void)ready, (void)stream;
    NEEDS_DEVICE();
    note("cudaGraphLaunch");
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(void *stream, void (*call)(void *), void *data) {
    (void)stream;
    call(data);
    return cudaSuccess;
}

/* Kernels: nvcc registers each by the address of its host stub; launching one names it. */
struct kernel { const void *stub; const char *name; };
static struct kernel *kernels;
static size_t n_kernels, room;

void **__cudaRegisterFatBinary(void *binary) { (void)binary; return calloc(1, sizeof(void *)); }
void __cudaRegisterFatBinaryEnd(void **registered) { (void)registered; }
void __cudaUnregisterFatBinary(void **registered) { free(registered); }
void __cudaRegisterFunction(void **registered, const char *stub, char *function, const char *name,
                            int limit, void *tid, void *bid, dim3 *block, dim3 *grid, int *size) {
    (void)registered, (void)function, (void)limit, (void)tid, (void)bid;
    (void)block, (void)grid, (void)size;
    if (!trace) return;
    if (n_kernels == room) {
        room = room ? 2 * room : 4096;
        kernels = realloc(kernels, room * sizeof *kernels);
    }
    kernels[n_kernels++] = (struct kernel){stub, name};
}
static cudaError_t launch(const void *stub) {
    NEEDS_DEVICE();
    if (!trace) return cudaSuccess;
    for (size_t i = 0; i < n_kernels; i++)
        if (kernels[i].stub == stub) {
            note(kernels[i].name);
            return cudaSuccess;
        }
    note("a kernel without a name");
    return cudaSuccess;
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } call;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    call.grid = grid, call.block = block, call.shared = shared, call.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream) {
    *grid = call.grid, *block = call.block, *shared = call.shared, *stream = call.stream;
    return cudaSuccess;
}
cudaError_t __cudaGetKernel(const void **kernel, const void *stub) {
    *kernel = stub;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                               size_t shared, void *stream) {
    (void)grid, (void)block, (void)arguments, (void)shared, (void)stream;
    return launch(kernel);
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                             size_t shared, void *stream) {
    return __cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                        size_t shared, void *stream) {
    return __cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const void *configuration, const void *kernel, void **arguments) {
    (void)configuration, (void)arguments;
    return launch(kernel);
}

struct cudaFuncAttributes { /* the head of it */
    size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
    int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA;
    int maxDynamicSharedSizeBytes, preferredShmemCarveout;
};
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *stub) {
    (void)stub;
    NEEDS_DEVICE();
    *a = (struct cudaFuncAttributes){0, 0, 0, 1024, 64, sm, sm, 0, (shared_kib() - 1) << 10, -1};
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks_, const void *stub, int threads, size_t shared, unsigned flags) {
    (void)stub, (void)flags;
    NEEDS_DEVICE();
    size_t by_threads = 2048 / (threads > 0 ? threads : 1);
    size_t by_shared = ((size_t)shared_kib() << 10) / (shared + 1024);
    *blocks_ = (int)(by_threads < by_shared ? by_threads : by_shared);
    return cudaSuccess;
}
cudaError_t cudaLibraryLoadData(void **library, ...) { return handle(library); }
cudaError_t cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    (void)library, (void)name;
    return handle(kernel);
}
static long nothing(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags, int *status) {
    (void)symbol, (void)version, (void)flags;
    NEEDS_DEVICE();
    *function = (void *)nothing;
    if (status) *status = 0; /* cudaDriverEntryPointSuccess */
    return cudaSuccess;
}
