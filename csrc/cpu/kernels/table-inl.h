// Fills the kernel table of one instruction set; the last thing an isa_*.cpp includes.
// SPARSECNN_TABLE names the table, SPARSECNN_MAX_VECTORS the accumulators its registers hold.
#pragma once
#include "cpu/kernel_table.h"
#include "cpu/kernels/csr_conv2d-inl.h"
#include "cpu/kernels/csr_conv2d_grad_values-inl.h"
#include "cpu/kernels/hash-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {
namespace {

constexpr int32_t kDoubleVectors = 8;
constexpr int64_t kPanelBytes = 24 << 10;  // three quarters of a 32 KB L1; the rest is partial sums

bool csr_conv2d(const CsrConv2dParams& params, const CsrPlan& plan, int64_t begin, int64_t end,
                void* scratch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return csr_conv2d_typed<VecFloat, float, SPARSECNN_MAX_VECTORS>(params, plan, begin, end,
                                                                      scratch);
    case DType::kBFloat16:
      return csr_conv2d_typed<VecFloat, bf16, SPARSECNN_MAX_VECTORS>(params, plan, begin, end,
                                                                     scratch);
    case DType::kFloat64:
      return csr_conv2d_typed<VecDouble, double, kDoubleVectors>(params, plan, begin, end, scratch);
    case DType::kFloat16:
      break;  // refused by the glue: no CPU kernel
  }
  return false;
}

void csr_conv2d_grad_values(const CsrConv2dGradValuesParams& params, int64_t begin, int64_t end) {
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
}  // namespace SPARSECNN_ISA

namespace cpu {

extern const KernelTable SPARSECNN_TABLE;
const KernelTable SPARSECNN_TABLE = {
    SPARSECNN_ISA_NAME,
    {SPARSECNN_ISA::VecFloat::L, SPARSECNN_MAX_VECTORS, SPARSECNN_ISA::kPanelBytes},
    {SPARSECNN_ISA::VecDouble::L, SPARSECNN_ISA::kDoubleVectors, SPARSECNN_ISA::kPanelBytes},
    &SPARSECNN_ISA::csr_conv2d,
    &SPARSECNN_ISA::csr_conv2d_grad_values,
    &SPARSECNN_ISA::content_hash,
};

}  // namespace cpu
}  // namespace sparsecnn
