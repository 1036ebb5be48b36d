// csr_conv2d of one instruction set.
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/kernels/csr_conv2d-inl.h"
#include "cpu/kernels/csr_conv2d_grad_values-inl.h"
#include "cpu/kernels/hash-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {
namespace {

bool conv2d(const CsrConv2dParams& params, const cpu::CsrPlan& plan, int64_t begin, int64_t end,
            void* scratch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return csr_conv2d_typed<VecFloat, float, SPARSECNN_MAX_VECTORS>(params, plan, begin, end,
                                                                      scratch);
    case DType::kBFloat16:
      return csr_conv2d_typed<VecFloat, bf16, SPARSECNN_MAX_VECTORS>(params, plan, begin, end,
                                                                     scratch);
    case DType::kFloat64:
      return csr_conv2d_typed<VecDouble, double, cpu::kDoubleVectors>(params, plan, begin, end,
                                                                      scratch);
    case DType::kFloat16:
      break;  // refused by the glue: no CPU kernel
  }
  return false;
}

void grad_values(const CsrConv2dGradValuesParams& params, int64_t begin, int64_t end) {
  switch (params.dtype) {
    case DType::kFloat32:
      return csr_conv2d_grad_values_typed<VecFloat, float>(params, begin, end);
    case DType::kBFloat16:
      return csr_conv2d_grad_values_typed<VecFloat, bf16>(params, begin, end);
    case DType::kFloat64:
      return csr_conv2d_grad_values_typed<VecDouble, double>(params, begin, end);
    case DType::kFloat16:
      return;  // refused by the glue: no CPU kernel
  }
}

}  // namespace

extern const cpu::CsrKernels csr_kernels;
const cpu::CsrKernels csr_kernels = {
    {VecFloat::L, SPARSECNN_MAX_VECTORS, SPARSECNN_REGISTERS, cpu::kPanelBytes},
    {VecDouble::L, cpu::kDoubleVectors, cpu::kDoubleRegisters, cpu::kPanelBytes},
    &conv2d,
    &grad_values,
    &content_hash,
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
