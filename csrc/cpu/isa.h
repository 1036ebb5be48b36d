// The instruction set a kernel unit is compiled for. Every csrc/cpu/kernels/*.cpp is compiled once
// per instruction set, with its flags and one of these macros (setup.py); what it defines lands in
// the namespace SPARSECNN_ISA, and cpu/dispatch.cpp puts the parts together.
//
// SPARSECNN_MAX_VECTORS: accumulators that the registers hold beside operands and addresses.
// SPARSECNN_REGISTERS: accumulators and operands that they hold together.
#pragma once

#if defined(SPARSECNN_ISA_AVX512)  // F, BW, VL, DQ: 16 lanes, 32 registers
#define SPARSECNN_ISA isa_avx512
#define SPARSECNN_MAX_VECTORS 28
#define SPARSECNN_REGISTERS 32
#elif defined(SPARSECNN_ISA_AVX2)  // with FMA: 8 lanes, 16 registers
#define SPARSECNN_ISA isa_avx2
#define SPARSECNN_MAX_VECTORS 14
#define SPARSECNN_REGISTERS 16
#else  // what the compiler's baseline offers (SSE2 on x86-64)
#define SPARSECNN_ISA isa_scalar
#define SPARSECNN_MAX_VECTORS 12
#define SPARSECNN_REGISTERS 15
#endif
