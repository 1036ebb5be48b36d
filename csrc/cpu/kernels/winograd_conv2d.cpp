// winograd_conv2d of one instruction set.
#include "cpu/isa.h"
#include "cpu/kernel_table.h"
#include "cpu/kernels/winograd_conv2d-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {
namespace {

// The register tile of the dense products: filters and vectors of tiles.
constexpr int kFilters = SPARSECNN_MAX_VECTORS >= 28 ? 8 : 4;
constexpr int kVectors = SPARSECNN_REGISTERS >= 16 ? 3 : 2;
constexpr int kDoubleFilters = 4, kDoubleVectors = 2;

void conv2d(const WinogradConv2dParams& params, const cpu::WinogradPlan& plan, int64_t begin,
            int64_t end, void* scratch) {
  char* const base = static_cast<char*>(scratch);
  if (params.dtype == DType::kFloat64) {
    winograd_items<VecDouble, double, kDoubleFilters, kDoubleVectors>(params, plan, begin, end,
                                                                      base);
  } else if (params.dtype == DType::kBFloat16) {
    winograd_items<VecFloat, bf16, kFilters, kVectors>(params, plan, begin, end, base);
  } else {
    winograd_items<VecFloat, float, kFilters, kVectors>(params, plan, begin, end, base);
  }
}

bool is_sound(const int32_t* col_idx, int64_t nnz, const int32_t* row_ptr, int64_t rows,
              int32_t columns) {
  if (row_ptr[0] != 0 || row_ptr[rows] != nnz) return false;
  uint32_t wrong = 0;
  for (int64_t r = 0; r < rows; ++r) wrong |= row_ptr[r] > row_ptr[r + 1];
  if (wrong != 0) return false;
  // As unsigned, what is negative is large.
  const uint32_t bound = static_cast<uint32_t>(columns);
  for (int64_t i = 0; i < nnz; ++i) wrong |= static_cast<uint32_t>(col_idx[i]) >= bound;
  return wrong == 0;
}

}  // namespace

extern const cpu::WinogradKernels winograd_kernels;
const cpu::WinogradKernels winograd_kernels = {
    {VecFloat::L, kVectors, kSparseVectors, sizeof(float)},
    {VecDouble::L, kDoubleVectors, kSparseVectors, sizeof(double)},
    &conv2d,
    &is_sound};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
