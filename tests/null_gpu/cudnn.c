/* cuDNN for the null GPU: handles and descriptors that are not null, workspaces of no bytes. The
 * provider finds its functions by name (dlsym), so build.py reads the names of the weak stubs
 * (return 0, success) from the strings in the provider library. */
#include <stdint.h>
#include <stdlib.h>

size_t cudnnGetVersion(void) { return 91400; }
const char *cudnnGetErrorString(int status) { (void)status; return "CUDNN_STATUS_SUCCESS"; }
void cudnnGetLastErrorString(char *message, size_t room) { if (room) *message = 0; }

static int handle(void **made) { *made = calloc(1, 256); return 0; }
#define MADE(kind)                                       \
    int cudnnCreate##kind(void **made) { return handle(made); } \
    int cudnnDestroy##kind(void *made) { free(made); return 0; }
MADE()
MADE(ActivationDescriptor)
MADE(ConvolutionDescriptor)
MADE(DropoutDescriptor)
MADE(FilterDescriptor)
MADE(LRNDescriptor)
MADE(PoolingDescriptor)
MADE(ReduceTensorDescriptor)
MADE(RNNDataDescriptor)
MADE(RNNDescriptor)
MADE(TensorDescriptor)

/* The graph interface (fused attention, convolution): one engine for every graph, with no notes and
 * no workspace. Types are those of cudnnBackendAttributeType_t. */
int cudnnBackendCreateDescriptor(int kind, void **made) { (void)kind; return handle(made); }
int cudnnBackendDestroyDescriptor(void *made) { free(made); return 0; }
int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t asked, int64_t *given,
                             void *values) {
    (void)descriptor, (void)name;
    enum { INT64 = 3, DESCRIPTOR = 15, INT32 = 23 };
    if (type == INT64 && asked == 1) *(int64_t *)values = 0;
    if (type == INT32 && asked == 1) *(int32_t *)values = 0;
    if (given) *given = type == DESCRIPTOR || ((type == INT64 || type == INT32) && asked == 1);
    return 0;
}

int cudnnGetConvolutionForwardWorkspaceSize(void *cudnn, void *x, void *w, void *convolution,
                                            void *y, int algorithm, size_t *size) {
    (void)cudnn, (void)x, (void)w, (void)convolution, (void)y, (void)algorithm;
    *size = 0;
    return 0;
}
int cudnnGetReductionWorkspaceSize(void *cudnn, void *reduce, void *a, void *c, size_t *size) {
    (void)cudnn, (void)reduce, (void)a, (void)c;
    *size = 0;
    return 0;
}
int cudnnGetReductionIndicesSize(void *cudnn, void *reduce, void *a, void *c, size_t *size) {
    return cudnnGetReductionWorkspaceSize(cudnn, reduce, a, c, size);
}
