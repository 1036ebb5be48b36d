// Kernels for any machine: what the compiler's baseline offers (SSE2 on x86-64).
#define SPARSECNN_ISA isa_scalar
#define SPARSECNN_ISA_NAME "scalar"
#define SPARSECNN_TABLE kScalarKernels
#define SPARSECNN_MAX_VECTORS 12
#include "cpu/kernels/table-inl.h"
