// pattern_conv2d of one instruction set.
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/kernels/hash-inl.h"
#include "cpu/kernels/pattern_conv2d-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {
namespace {

void conv2d(const PatternConv2dParams& params, const cpu::PatternPlan& plan, int64_t begin,
            int64_t end, void* scratch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return pattern_conv2d_typed<VecFloat, float, SPARSECNN_MAX_VECTORS, SPARSECNN_REGISTERS>(
          params, plan, begin, end, scratch);
    case DType::kBFloat16:
      return pattern_conv2d_typed<VecFloat, bf16, SPARSECNN_MAX_VECTORS, SPARSECNN_REGISTERS>(
          params, plan, begin, end, scratch);
    case DType::kFloat64:
      return pattern_conv2d_typed<VecDouble, double, cpu::kDoubleVectors, cpu::kDoubleRegisters>(
          params, plan, begin, end, scratch);
    case DType::kFloat16:
      return;  // refused by the glue: no CPU kernel
  }
}

}  // namespace

extern const cpu::PatternKernels pattern_kernels;
const cpu::PatternKernels pattern_kernels = {
    {VecFloat::L, SPARSECNN_MAX_VECTORS, SPARSECNN_REGISTERS, cpu::kPanelBytes},
    {VecDouble::L, cpu::kDoubleVectors, cpu::kDoubleRegisters, cpu::kPanelBytes},
    &conv2d,
    &content_hash,
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
