// depthwise_conv2d: schema, checks, allocation. The gradients are those of a dense convolution.
#include "cpu/kernel_table.h"
#include "ops/conv.h"
#include "ops/cuda_stream.h"

namespace sparsecnn::ops {
namespace {

constexpr const char* kOp = "depthwise_conv2d";

struct Call {
  ConvTensors tensors;
  Tensor weight;
  DepthwiseConv2dParams params;
};

Call prepare(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& residual, const Ints& stride, const Ints& padding,
             const Ints& dilation, const Name& activation) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1, kOp,
                  ": expected weight of shape (K, 1, R, S)");
  check_same(weight, x, kOp, "weight");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0, kOp,
                  ": expected x with 4 dimensions (N, C, H, W) and at least one channel");
  const ConvShape s =
      conv_shape(kOp, x, weight.size(0),
                 {{weight.size(2), weight.size(3)}, stride, padding, dilation, x.size(1)});
  Call call{{}, as_contiguous(weight), {}};
  call.tensors = fill_conv(kOp, s, x, bias, residual, activation, call.params);
  call.params.weight = call.weight.const_data_ptr();
  return call;
}

Tensor depthwise_conv2d_cpu(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                            std::optional<Tensor> residual, Ints stride, Ints padding,
                            Ints dilation, Name activation) {
  Call call = prepare(x, weight, bias, residual, stride, padding, dilation, activation);
  const DepthwiseConv2dParams& params = call.params;
  check_cpu_dtype(kOp, params.dtype);
  if (call.tensors.y.numel() == 0) return call.tensors.y;

  const cpu::DepthwiseKernels& table = cpu::kernels().depthwise;
  const int64_t threads = cpu_threads();
  const cpu::DepthwisePlan plan = cpu::depthwise_plan(
      params, params.dtype == DType::kFloat64 ? table.of_double : table.of_float, threads);
  run_items(kOp, threads, plan.items, plan.thread_bytes,
            [&](int64_t begin, int64_t end, char* scratch) {
              table.conv2d(params, plan, begin, end, scratch);
            });
  return call.tensors.y;
}

#ifdef SPARSECNN_CUDA
Tensor depthwise_conv2d_cuda(const Tensor& x, const Tensor& weight, std::optional<Tensor> bias,
                             std::optional<Tensor> residual, Ints stride, Ints padding,
                             Ints dilation, Name activation) {
  const CudaGuard guard(x);
  Call call = prepare(x, weight, bias, residual, stride, padding, dilation, activation);
  check_cuda_dtype(kOp, call.params.dtype);
  guard.check(cuda::depthwise_conv2d(call.params, guard.stream()), kOp);
  return call.tensors.y;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsecnn, m) {
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, "
      "int[] padding, int[] dilation, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d_cpu));
}

#ifdef SPARSECNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d_cuda));
}
#endif

}  // namespace sparsecnn::ops
