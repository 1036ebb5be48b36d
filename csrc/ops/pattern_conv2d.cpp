// pattern_conv2d: schema, checks, allocation.
#include "cpu/kernel_table.h"
#include "cpu/pattern_program.h"
#include "ops/conv.h"

namespace sparsecnn::ops {
namespace {

constexpr const char* kOp = "pattern_conv2d";

Tensor pattern_conv2d_cpu(const Tensor& x, const Tensor& values, const Tensor& columns,
                          const Tensor& filters, const Tensor& group_rows,
                          const Tensor& group_columns, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, Ints kernel_size, Ints stride,
                          Ints padding, Ints dilation, int64_t groups, Name activation) {
  const Tensor cols = index_array(columns, x, kOp, "columns");
  const Tensor order = index_array(filters, x, kOp, "filters");
  const Tensor rows_of = index_array(group_rows, x, kOp, "group_rows");
  const Tensor columns_of = index_array(group_columns, x, kOp, "group_columns");
  const ConvShape s =
      conv_shape(kOp, x, order.numel(), {kernel_size, stride, padding, dilation, groups});
  STD_TORCH_CHECK(rows_of.numel() >= 1 && rows_of.numel() == columns_of.numel(), kOp,
                  ": expected group_rows and group_columns of one length >= 1, got ",
                  rows_of.numel(), " and ", columns_of.numel());
  check_same(values, x, kOp, "values");
  STD_TORCH_CHECK(values.dim() == 1, kOp, ": expected values a 1-d tensor");
  STD_TORCH_CHECK(s.columns() < INT32_MAX && cols.numel() < INT32_MAX && s.k < INT32_MAX, kOp,
                  ": expected fewer than 2^31 columns and filters");
  const Tensor stored = as_contiguous(values);
  PatternConv2dParams params;
  const ConvTensors tensors = fill_conv(kOp, s, x, bias, residual, activation, params);
  params.values = stored.const_data_ptr();
  params.columns = indices_of(cols);
  params.filters = indices_of(order);
  params.group_rows = indices_of(rows_of);
  params.group_columns = indices_of(columns_of);
  params.filter_groups = rows_of.numel() - 1;
  check_cpu_dtype(kOp, params.dtype);
  if (tensors.y.numel() == 0) return tensors.y;

  const cpu::PatternKernels& table = cpu::kernels().pattern;
  const int64_t threads = cpu_threads();
  const std::shared_ptr<const cpu::PatternProgram> program =
      cpu::pattern_program(params, stored.numel(), cols.numel(),
                           params.dtype == DType::kFloat64 ? table.of_double : table.of_float,
                           static_cast<int32_t>(threads), table.content_hash);
  STD_TORCH_CHECK(program != nullptr, kOp,
                  ": expected a sound weight, got corrupt arrays; PatternWeight.validate() says "
                  "which");
  const cpu::PatternPlan& plan = program->plan;
  run_items(kOp, threads, plan.items, plan.thread_bytes,
            [&](int64_t begin, int64_t end, char* scratch) {
              table.conv2d(params, plan, begin, end, scratch);
            });
  return tensors.y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsecnn, m) {
  m.def(
      "pattern_conv2d(Tensor x, Tensor values, Tensor columns, Tensor filters, Tensor group_rows, "
      "Tensor group_columns, Tensor? bias, Tensor? residual, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CPU, m) {
  m.impl("pattern_conv2d", TORCH_BOX(&pattern_conv2d_cpu));
}

}  // namespace sparsecnn::ops
