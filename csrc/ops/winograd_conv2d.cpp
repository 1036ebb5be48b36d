// winograd_conv2d: schema, checks, allocation.
#include "core/winograd_tiles.h"
#include "cpu/kernel_table.h"
#include "ops/conv.h"

namespace sparsecnn::ops {
namespace {

constexpr const char* kOp = "winograd_conv2d";

Tensor winograd_conv2d_cpu(const Tensor& x, const Tensor& values, std::optional<Tensor> col_idx,
                           std::optional<Tensor> row_ptr, std::optional<Tensor> bias,
                           std::optional<Tensor> residual, int64_t filters, int64_t tile,
                           Ints padding, int64_t groups, Name activation) {
  STD_TORCH_CHECK(tile == 2 || tile == 4, kOp, ": expected tile 2 or 4, got ", tile);
  STD_TORCH_CHECK(filters >= 0, kOp, ": expected filters >= 0, got ", filters);
  const ConvShape s = conv_shape(kOp, x, filters, {{3, 3}, {1, 1}, padding, {1, 1}, groups});
  check_same(values, x, kOp, "values");
  STD_TORCH_CHECK(col_idx.has_value() == row_ptr.has_value(), kOp,
                  ": expected col_idx and row_ptr both or neither");
  const int64_t taps = winograd_taps(static_cast<int32_t>(tile));
  const int64_t blocks = s.groups * winograd_blocks(s.filters_per_group());
  const int64_t channels = s.channels_per_group(), rows = blocks * taps * kWinogradBlock;
  STD_TORCH_CHECK(channels < INT32_MAX && rows < INT32_MAX && values.numel() < INT32_MAX, kOp,
                  ": expected fewer than 2^31 channels, rows and values");
  const Tensor stored = as_contiguous(values);
  std::optional<Tensor> cols, ends;
  if (col_idx) {
    cols = index_array(*col_idx, x, kOp, "col_idx");
    ends = index_array(*row_ptr, x, kOp, "row_ptr");
    STD_TORCH_CHECK(values.dim() == 1 && cols->numel() == values.numel(), kOp,
                    ": expected values and col_idx 1-d and of one length, got ", values.numel(),
                    " and ", cols->numel());
    STD_TORCH_CHECK(ends->numel() == rows + 1, kOp, ": expected row_ptr of length ", rows + 1,
                    ", got ", ends->numel());
  } else {
    STD_TORCH_CHECK(values.dim() == 4 && values.size(0) == blocks && values.size(1) == taps &&
                        values.size(2) == channels && values.size(3) == kWinogradBlock,
                    kOp, ": expected values of shape (", blocks, ", ", taps, ", ", channels, ", ",
                    kWinogradBlock, ")");
  }
  WinogradConv2dParams params{};
  const ConvTensors tensors = fill_conv(kOp, s, x, bias, residual, activation, params);
  params.tile = static_cast<int32_t>(tile);
  params.values = stored.const_data_ptr();
  check_cpu_dtype(kOp, params.dtype);
  const cpu::WinogradKernels& table = cpu::kernels().winograd;
  if (cols) {
    params.col_idx = indices_of(*cols);
    params.row_ptr = indices_of(*ends);
    STD_TORCH_CHECK(table.is_sound(params.col_idx, cols->numel(), params.row_ptr, rows,
                                   static_cast<int32_t>(channels)),
                    kOp,
                    ": expected a sound weight, got corrupt col_idx or row_ptr; "
                    "WinogradWeight.validate() says which");
  }
  if (tensors.y.numel() == 0) return tensors.y;

  const int64_t threads = cpu_threads();
  const cpu::WinogradPlan plan = cpu::winograd_plan(
      params, stored.numel(), params.dtype == DType::kFloat64 ? table.of_double : table.of_float,
      threads);
  run_items(kOp, threads, plan.items, plan.thread_bytes,
            [&](int64_t begin, int64_t end, char* scratch) {
              table.conv2d(params, plan, begin, end, scratch);
            });
  return tensors.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsecnn, m) {
  m.def(
      "winograd_conv2d(Tensor x, Tensor values, Tensor? col_idx, Tensor? row_ptr, Tensor? bias, "
      "Tensor? residual, int filters, int tile, int[] padding, int groups, str activation) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CPU, m) {
  m.impl("winograd_conv2d", TORCH_BOX(&winograd_conv2d_cpu));
}

}  // namespace sparsecnn::ops
