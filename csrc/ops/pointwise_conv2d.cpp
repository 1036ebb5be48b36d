// pointwise_conv2d: schema, checks, allocation.
#include "cpu/kernel_table.h"
#include "ops/conv.h"
#include "ops/cuda_stream.h"

namespace sparsecnn::ops {
namespace {

constexpr const char* kOp = "pointwise_conv2d";

struct Call {
  ConvTensors tensors;
  PointwiseConv2dParams params;
};

Call prepare(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& residual, const Ints& stride, const Name& activation,
             bool allow_tf32) {
  check_same(weight, x, kOp, "weight");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1, kOp,
                  ": expected weight of shape (K, C, 1, 1), got ", weight.dim(), " dimensions");
  const ConvShape s = conv_shape(kOp, x, weight.size(0), {{1, 1}, stride, {0, 0, 0, 0}, {1, 1}, 1});
  STD_TORCH_CHECK(weight.size(1) == s.c, kOp, ": expected a weight for the ", s.c,
                  " channels of x, got ", weight.size(1));
  STD_TORCH_CHECK(s.c > 0, kOp, ": expected x with channels, got none");
  Call call{};
  call.tensors = fill_conv(kOp, s, x, bias, residual, activation, call.params);
  call.params.weight = weight.const_data_ptr();
  call.params.weight_stride[0] = weight.strides()[0];
  call.params.weight_stride[1] = weight.strides()[1];
  call.params.allow_tf32 = allow_tf32;
  return call;
}

Tensor pointwise_conv2d_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                            std::optional<Tensor> residual, Ints stride, Name activation,
                            bool allow_tf32) {
  const Call call = prepare(x, weight, bias, residual, stride, activation, allow_tf32);
  const PointwiseConv2dParams& params = call.params;
  check_cpu_dtype(kOp, params.dtype);
  if (call.tensors.y.numel() == 0) return call.tensors.y;

  const cpu::KernelTable& table = cpu::kernels();
  const int64_t threads = cpu_threads();
  const cpu::PointwisePlan plan = cpu::plan_pointwise(
      params, params.dtype == DType::kFloat64 ? table.chain.of_double : table.chain.of_float,
      threads);
  run_items(kOp, threads, plan.items, plan.thread_bytes,
            [&](int64_t begin, int64_t end, char* scratch) {
              if (plan.planes) {
                table.pointwise.planes(params, plan, begin, end, scratch);
              } else {
                table.chain.conv2d(plan.chain_params, plan.chain, begin, end, scratch);
              }
            });
  return call.tensors.y;
}

#ifdef SPARSECNN_CUDA
Tensor pointwise_conv2d_cuda(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                             std::optional<Tensor> residual, Ints stride, Name activation,
                             bool allow_tf32) {
  const CudaGuard guard(x);
  const Call call = prepare(x, weight, bias, residual, stride, activation, allow_tf32);
  check_cuda_dtype(kOp, call.params.dtype);
  guard.check(cuda::pointwise_conv2d(call.params, guard.stream()), kOp);
  return call.tensors.y;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsecnn, m) {
  m.def(
      "pointwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, "
      "str activation, bool allow_tf32=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CPU, m) {
  m.impl("pointwise_conv2d", TORCH_BOX(&pointwise_conv2d_cpu));
}

#ifdef SPARSECNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CUDA, m) {
  m.impl("pointwise_conv2d", TORCH_BOX(&pointwise_conv2d_cuda));
}
#endif

}  // namespace sparsecnn::ops
