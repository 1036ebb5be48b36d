// pointwise_conv2d of one instruction set.
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/kernels/pointwise_conv2d-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {
namespace {

constexpr int kTileFilters = SPARSECNN_MAX_VECTORS >= 28 ? 14 : SPARSECNN_MAX_VECTORS / 2 - 1;
constexpr int kDoubleFilters = 3;

void planes(const PointwiseConv2dParams& params, const cpu::PointwisePlan& plan, int64_t begin,
            int64_t end, void* scratch) {
  char* const base = static_cast<char*>(scratch);
  if (params.dtype == DType::kFloat64) {
    pointwise_planes<VecDouble, kDoubleFilters>(params, plan, begin, end, base);
  } else {
    pointwise_planes<VecFloat, kTileFilters>(params, plan, begin, end, base);
  }
}

}  // namespace

extern const cpu::PointwiseKernels pointwise_kernels;
const cpu::PointwiseKernels pointwise_kernels = {&planes};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
