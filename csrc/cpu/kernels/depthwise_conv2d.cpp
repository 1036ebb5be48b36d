// depthwise_conv2d of one instruction set.
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/kernels/depthwise_conv2d-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {
namespace {

constexpr int32_t kFloatTile = SPARSECNN_MAX_VECTORS >= 28 ? 14 : 8;
constexpr int32_t kDoubleTile = 4;

void conv2d(const DepthwiseConv2dParams& params, const cpu::DepthwisePlan& plan, int64_t begin,
            int64_t end, void* scratch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return depthwise_conv2d_typed<VecFloat, float, kFloatTile>(params, plan, begin, end, scratch);
    case DType::kBFloat16:
      return depthwise_conv2d_typed<VecFloat, bf16, kFloatTile>(params, plan, begin, end, scratch);
    case DType::kFloat64:
      return depthwise_conv2d_typed<VecDouble, double, kDoubleTile>(params, plan, begin, end,
                                                                    scratch);
    case DType::kFloat16:
      return;  // refused by the glue: no CPU kernel
  }
}

}  // namespace

extern const cpu::DepthwiseKernels depthwise_kernels;
const cpu::DepthwiseKernels depthwise_kernels = {
    {VecFloat::L, kFloatTile},
    {VecDouble::L, kDoubleTile},
    &conv2d,
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
