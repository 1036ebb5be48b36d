// pattern_conv2d: schema, checks, allocation.
#include "cpu/kernel_table.h"
#include "cpu/pattern_program.h"
#include "ops/conv.h"
#include "ops/cuda_stream.h"

namespace sparsecnn::ops {
namespace {

constexpr const char* kOp = "pattern_conv2d";
constexpr const char* kUnsound =
    ": expected a sound weight, got corrupt arrays; PatternWeight.validate() says which";

struct Call {
  ConvTensors tensors;
  Tensor values, columns, filters, group_rows, group_columns;
  PatternConv2dParams params;
};

Call prepare(const Tensor& x, const Tensor& values, const Tensor& columns, const Tensor& filters,
             const Tensor& group_rows, const Tensor& group_columns,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
             const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
             int64_t groups, const Name& activation) {
  Call call{{},
            values,
            index_array(columns, x, kOp, "columns"),
            index_array(filters, x, kOp, "filters"),
            index_array(group_rows, x, kOp, "group_rows"),
            index_array(group_columns, x, kOp, "group_columns"),
            {}};
  const ConvShape s =
      conv_shape(kOp, x, call.filters.numel(), {kernel_size, stride, padding, dilation, groups});
  const int64_t ends = call.group_rows.numel();
  STD_TORCH_CHECK(ends >= 1 && ends == call.group_columns.numel(), kOp,
                  ": expected group_rows and group_columns of one length >= 1, got ", ends, " and ",
                  call.group_columns.numel());
  check_same(values, x, kOp, "values");
  STD_TORCH_CHECK(values.dim() == 1, kOp, ": expected values a 1-d tensor");
  STD_TORCH_CHECK(s.columns() < INT32_MAX && call.columns.numel() < INT32_MAX && s.k < INT32_MAX,
                  kOp, ": expected fewer than 2^31 columns and filters");
  call.values = as_contiguous(values);
  call.tensors = fill_conv(kOp, s, x, bias, residual, activation, call.params);
  call.params.values = call.values.const_data_ptr();
  call.params.columns = indices_of(call.columns);
  call.params.filters = indices_of(call.filters);
  call.params.group_rows = indices_of(call.group_rows);
  call.params.group_columns = indices_of(call.group_columns);
  call.params.filter_groups = ends - 1;
  return call;
}

Tensor pattern_conv2d_cpu(const Tensor& x, const Tensor& values, const Tensor& columns,
                          const Tensor& filters, const Tensor& group_rows,
                          const Tensor& group_columns, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, Ints kernel_size, Ints stride,
                          Ints padding, Ints dilation, int64_t groups, Name, Name activation) {
  Call call = prepare(x, values, columns, filters, group_rows, group_columns, bias, residual,
                      kernel_size, stride, padding, dilation, groups, activation);
  const PatternConv2dParams& params = call.params;
  check_cpu_dtype(kOp, params.dtype);
  if (call.tensors.y.numel() == 0) return call.tensors.y;

  const cpu::PatternKernels& table = cpu::kernels().pattern;
  const int64_t threads = cpu_threads();
  const std::shared_ptr<const cpu::PatternProgram> program =
      cpu::pattern_program(params, call.values.numel(), call.columns.numel(),
                           params.dtype == DType::kFloat64 ? table.of_double : table.of_float,
                           static_cast<int32_t>(threads), table.content_hash);
  STD_TORCH_CHECK(program != nullptr, kOp, kUnsound);
  const cpu::PatternPlan& plan = program->plan;
  run_items(kOp, threads, plan.items, plan.thread_bytes,
            [&](int64_t begin, int64_t end, char* scratch) {
              table.conv2d(params, plan, begin, end, scratch);
            });
  return call.tensors.y;
}

#ifdef SPARSECNN_CUDA
Tensor pattern_conv2d_cuda(const Tensor& x, const Tensor& values, const Tensor& columns,
                           const Tensor& filters, const Tensor& group_rows,
                           const Tensor& group_columns, std::optional<Tensor> bias,
                           std::optional<Tensor> residual, Ints kernel_size, Ints stride,
                           Ints padding, Ints dilation, int64_t groups, Name pattern,
                           Name activation) {
  const CudaGuard guard(x);
  Call call = prepare(x, values, columns, filters, group_rows, group_columns, bias, residual,
                      kernel_size, stride, padding, dilation, groups, activation);
  const PatternConv2dParams& params = call.params;
  check_cuda_dtype(kOp, params.dtype);
  // What lies in the arrays is not looked at: the host would have to wait for it.
  STD_TORCH_CHECK(
      params.shape.k == 0 || (params.filter_groups >= 1 && params.filter_groups <= params.shape.k),
      kOp, kUnsound);
  // The name of the pattern is all that the host can know of what lies there.
  const int64_t bytes =
      pattern.text == "2:4" ? cuda::pattern_conv2d_2_4_workspace_bytes(params) : 0;
  if (bytes > 0) {
    Tensor workspace =
        torch::stable::empty({bytes}, ScalarType::Byte, torch::headeronly::Layout::Strided,
                             x.device(), false, MemoryFormat::Contiguous);
    guard.check(cuda::pattern_conv2d_2_4(params, workspace.mutable_data_ptr(), guard.stream()),
                kOp);
  } else {
    guard.check(cuda::pattern_conv2d(params, guard.stream()), kOp);
  }
  return call.tensors.y;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsecnn, m) {
  m.def(
      "pattern_conv2d(Tensor x, Tensor values, Tensor columns, Tensor filters, Tensor group_rows, "
      "Tensor group_columns, Tensor? bias, Tensor? residual, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups, str pattern, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CPU, m) {
  m.impl("pattern_conv2d", TORCH_BOX(&pattern_conv2d_cpu));
}

#ifdef SPARSECNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CUDA, m) {
  m.impl("pattern_conv2d", TORCH_BOX(&pattern_conv2d_cuda));
}
#endif

}  // namespace sparsecnn::ops
