// winograd_conv2d: schema, checks, allocation.
#include "core/winograd_tiles.h"
#include "cpu/kernel_table.h"
#include "ops/conv.h"
#include "ops/cuda_stream.h"

namespace sparsecnn::ops {
namespace {

constexpr const char* kOp = "winograd_conv2d";

struct Call {
  ConvTensors tensors;
  Tensor values;
  std::optional<Tensor> col_idx, row_ptr;
  int64_t rows;  // of the sparse weight
  WinogradConv2dParams params;
};

// Everything but the contents of the index arrays.
Call prepare(const Tensor& x, const Tensor& values, const std::optional<Tensor>& col_idx,
             const std::optional<Tensor>& row_ptr, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& residual, int64_t filters, int64_t tile,
             const Ints& padding, int64_t groups, const Name& activation) {
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
  Call call{{}, as_contiguous(values), std::nullopt, std::nullopt, rows, {}};
  if (col_idx) {
    call.col_idx = index_array(*col_idx, x, kOp, "col_idx");
    call.row_ptr = index_array(*row_ptr, x, kOp, "row_ptr");
    STD_TORCH_CHECK(values.dim() == 1 && call.col_idx->numel() == values.numel(), kOp,
                    ": expected values and col_idx 1-d and of one length, got ", values.numel(),
                    " and ", call.col_idx->numel());
    STD_TORCH_CHECK(call.row_ptr->numel() == rows + 1, kOp, ": expected row_ptr of length ",
                    rows + 1, ", got ", call.row_ptr->numel());
    call.params.col_idx = indices_of(*call.col_idx);
    call.params.row_ptr = indices_of(*call.row_ptr);
  } else {
    STD_TORCH_CHECK(values.dim() == 4 && values.size(0) == blocks && values.size(1) == taps &&
                        values.size(2) == channels && values.size(3) == kWinogradBlock,
                    kOp, ": expected values of shape (", blocks, ", ", taps, ", ", channels, ", ",
                    kWinogradBlock, ")");
  }
  call.tensors = fill_conv(kOp, s, x, bias, residual, activation, call.params);
  call.params.tile = static_cast<int32_t>(tile);
  call.params.values = call.values.const_data_ptr();
  return call;
}

Tensor winograd_conv2d_cpu(const Tensor& x, const Tensor& values, std::optional<Tensor> col_idx,
                           std::optional<Tensor> row_ptr, std::optional<Tensor> bias,
                           std::optional<Tensor> residual, int64_t filters, int64_t tile,
                           Ints padding, int64_t groups, Name activation) {
  Call call = prepare(x, values, col_idx, row_ptr, bias, residual, filters, tile, padding, groups,
                      activation);
  const WinogradConv2dParams& params = call.params;
  check_cpu_dtype(kOp, params.dtype);
  const cpu::WinogradKernels& table = cpu::kernels().winograd;
  if (call.col_idx) {
    const auto channels = static_cast<int32_t>(params.shape.channels_per_group());
    STD_TORCH_CHECK(
        table.is_sound(params.col_idx, call.col_idx->numel(), params.row_ptr, call.rows, channels),
        kOp,
        ": expected a sound weight, got corrupt col_idx or row_ptr; "
        "WinogradWeight.validate() says which");
  }
  if (call.tensors.y.numel() == 0) return call.tensors.y;

  const int64_t threads = cpu_threads();
  const cpu::WinogradPlan plan = cpu::winograd_plan(
      params, call.values.numel(),
      params.dtype == DType::kFloat64 ? table.of_double : table.of_float, threads);
  run_items(kOp, threads, plan.items, plan.thread_bytes,
            [&](int64_t begin, int64_t end, char* scratch) {
              table.conv2d(params, plan, begin, end, scratch);
            });
  return call.tensors.y;
}

#ifdef SPARSECNN_CUDA
// The contents of the index arrays are not looked at: that would make the host wait.
Tensor winograd_conv2d_cuda(const Tensor& x, const Tensor& values, std::optional<Tensor> col_idx,
                            std::optional<Tensor> row_ptr, std::optional<Tensor> bias,
                            std::optional<Tensor> residual, int64_t filters, int64_t tile,
                            Ints padding, int64_t groups, Name activation) {
  const CudaGuard guard(x);
  Call call = prepare(x, values, col_idx, row_ptr, bias, residual, filters, tile, padding, groups,
                      activation);
  check_cuda_dtype(kOp, call.params.dtype);
  guard.check(cuda::winograd_conv2d(call.params, guard.stream()), kOp);
  return call.tensors.y;
}
#endif

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

#ifdef SPARSECNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CUDA, m) {
  m.impl("winograd_conv2d", TORCH_BOX(&winograd_conv2d_cuda));
}
#endif

}  // namespace sparsecnn::ops
