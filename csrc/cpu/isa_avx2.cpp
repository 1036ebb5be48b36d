// Kernels for AVX2 + FMA: 8 lanes, 16 registers.
#if defined(__x86_64__)
#define SPARSECNN_ISA isa_avx2
#define SPARSECNN_ISA_AVX2
#define SPARSECNN_ISA_NAME "avx2"
#define SPARSECNN_TABLE kAvx2Kernels
#define SPARSECNN_MAX_VECTORS 14
#include "cpu/kernels/table-inl.h"
#endif
