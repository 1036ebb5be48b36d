// Kernels for AVX-512 (F, BW, VL, DQ): 16 lanes, 32 registers.
#if defined(__x86_64__)
#define SPARSECNN_ISA isa_avx512
#define SPARSECNN_ISA_AVX512
#define SPARSECNN_ISA_NAME "avx512"
#define SPARSECNN_TABLE kAvx512Kernels
#define SPARSECNN_MAX_VECTORS 28
#include "cpu/kernels/table-inl.h"
#endif
