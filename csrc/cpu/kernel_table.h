// The kernels of one instruction set, and the choice of the set. The glue calls kernels() once per
// op call; inside a kernel nothing is dispatched any more.
#pragma once
#include <cstdint>

#include "core/params.h"
#include "cpu/chain_plan.h"
#include "cpu/csr_plan.h"
#include "cpu/depthwise_plan.h"
#include "cpu/pattern_plan.h"
#include "cpu/pointwise_plan.h"
#include "cpu/winograd_plan.h"

namespace sparsecnn::cpu {

struct CsrKernels {
  TileMachine of_float;   // float32 and bfloat16 storage
  TileMachine of_double;  // float64 storage
  // Items [begin, end) of the plan; `scratch` is this thread's plan.thread_bytes, 64-byte aligned.
  // False when col_idx is corrupt; nothing outside the tensors is touched.
  bool (*conv2d)(const CsrConv2dParams&, const CsrPlan&, int64_t begin, int64_t end, void* scratch);
  // Stored positions [begin, end); NCHW only.
  void (*grad_values)(const CsrConv2dGradValuesParams&, int64_t begin, int64_t end);
  HashFunction content_hash;
};

struct ChainKernels {
  ChainMachine of_float;   // float32 and bfloat16 storage
  ChainMachine of_double;  // float64 storage
  // Items [begin, end) of the plan; `scratch` is this thread's plan.thread_bytes, 64-byte aligned.
  void (*conv2d)(const ChainConv2dParams&, const ChainPlan&, int64_t begin, int64_t end,
                 void* scratch);
};

struct PointwiseKernels {
  // Items [begin, end) of a plan by planes; float32 and float64. Other plans are chains.
  void (*planes)(const PointwiseConv2dParams&, const PointwisePlan&, int64_t begin, int64_t end,
                 void* scratch);
};

struct DepthwiseKernels {
  DepthwiseMachine of_float;   // float32 and bfloat16 storage
  DepthwiseMachine of_double;  // float64 storage
  // Items [begin, end) of the plan; `scratch` is this thread's plan.thread_bytes, 64-byte aligned.
  void (*conv2d)(const DepthwiseConv2dParams&, const DepthwisePlan&, int64_t begin, int64_t end,
                 void* scratch);
};

struct PatternKernels {
  TileMachine of_float;   // float32 and bfloat16 storage
  TileMachine of_double;  // float64 storage
  // Items [begin, end) of the plan; `scratch` as in CsrKernels.
  void (*conv2d)(const PatternConv2dParams&, const PatternPlan&, int64_t begin, int64_t end,
                 void* scratch);
  HashFunction content_hash;
};

struct WinogradKernels {
  WinogradMachine of_float;   // float32 and bfloat16 storage
  WinogradMachine of_double;  // float64 storage
  // Items [begin, end) of the plan; `scratch` is this thread's plan.thread_bytes, 64-byte aligned.
  void (*conv2d)(const WinogradConv2dParams&, const WinogradPlan&, int64_t begin, int64_t end,
                 void* scratch);
  // Whether row_ptr ascends from 0 to nnz and every column is within [0, columns).
  bool (*is_sound)(const int32_t* col_idx, int64_t nnz, const int32_t* row_ptr, int64_t rows,
                   int32_t columns);
};

// One member per kernel unit, which defines it in the namespace of the instruction set.
struct KernelTable {
  const char* isa;
  const CsrKernels& csr;
  const ChainKernels& chain;
  const DepthwiseKernels& depthwise;
  const PatternKernels& pattern;
  const PointwiseKernels& pointwise;
  const WinogradKernels& winograd;
};

// The table in force: the best set that processor and operating system support, unless
// SPARSECNN_ISA or set_isa() lowered it.
const KernelTable& kernels();

// False (and no change) when the name is unknown or the machine cannot run it.
bool set_isa(const char* name);
bool isa_is_supported(const char* name);

}  // namespace sparsecnn::cpu
