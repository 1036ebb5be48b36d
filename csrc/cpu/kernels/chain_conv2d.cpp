// chain_conv2d of one instruction set.
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/kernels/chain_conv2d-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {
namespace {

// Pixels of a register tile of two vectors of channels. AVX-512 has registers for 28 sums, two
// weights and a broadcast pixel; narrower sets have 16 registers for the same.
constexpr int kTilePixels = SPARSECNN_MAX_VECTORS >= 28 ? 14 : SPARSECNN_MAX_VECTORS / 2 - 1;
constexpr int kDoublePixels = 3;
constexpr int32_t kTileVectors = 2;

template <class V, class S, int Pixels>
void run(const ChainConv2dParams& params, const cpu::ChainPlan& plan, int64_t begin, int64_t end,
         void* scratch) {
  Chain<V, S, Pixels>(params, plan, static_cast<char*>(scratch)).run(begin, end);
}

void conv2d(const ChainConv2dParams& params, const cpu::ChainPlan& plan, int64_t begin, int64_t end,
            void* scratch) {
  switch (params.dtype) {
    case DType::kFloat32:
      return run<VecFloat, float, kTilePixels>(params, plan, begin, end, scratch);
    case DType::kBFloat16:
      return run<VecFloat, bf16, kTilePixels>(params, plan, begin, end, scratch);
    case DType::kFloat64:
      return run<VecDouble, double, kDoublePixels>(params, plan, begin, end, scratch);
    case DType::kFloat16:
      return;  // refused by the glue: no CPU kernel
  }
}

}  // namespace

extern const cpu::ChainKernels chain_kernels;
const cpu::ChainKernels chain_kernels = {
    {VecFloat::L, kTileVectors, sizeof(float)},
    {VecDouble::L, kTileVectors, sizeof(double)},
    &conv2d,
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
