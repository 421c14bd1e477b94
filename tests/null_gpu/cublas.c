/* cuBLAS and cublasLt for the null GPU: handles that are not null, an algorithm for every product,
 * products that are not computed. build.py's weak stubs (return 0, success) are the rest. */
#include <stdlib.h>
#include <string.h>

static int handle(void **made) { *made = calloc(1, 256); return 0; }
static int drop(void *made) { free(made); return 0; }

int cublasCreate_v2(void **made) { return handle(made); }
int cublasDestroy_v2(void *made) { return drop(made); }
int cublasGetMathMode(void *cublas, int *mode) { (void)cublas; *mode = 0; return 0; }
const char *cublasGetStatusName(int status) { (void)status; return "CUBLAS_STATUS_SUCCESS"; }
const char *cublasGetStatusString(int status) { (void)status; return "success"; }

int cublasLtCreate(void **made) { return handle(made); }
int cublasLtDestroy(void *made) { return drop(made); }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) {
    (void)compute, (void)scale;
    return handle(made);
}
int cublasLtMatmulDescDestroy(void *made) { return drop(made); }
int cublasLtMatmulPreferenceCreate(void **made) { return handle(made); }
int cublasLtMatmulPreferenceDestroy(void *made) { return drop(made); }
int cublasLtMatrixLayoutCreate(void **made, ...) { return handle(made); }
int cublasLtMatrixLayoutDestroy(void *made) { return drop(made); }
int cublasLtMatrixTransformDescCreate(void **made, int scale) { (void)scale; return handle(made); }
int cublasLtMatrixTransformDescDestroy(void *made) { return drop(made); }
/* The results are structures of the caller's: algorithm, workspace bytes (0), status (0), waves. */
int cublasLtMatmulAlgoGetHeuristic(void *lt, void *operation, void *a, void *b, void *c, void *d,
                                   void *preference, int asked, void *results, int *given) {
    (void)lt, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
    memset(results, 0, 96 * (size_t)asked); /* sizeof(cublasLtMatmulHeuristicResult_t) */
    *given = 1;
    return 0;
}
