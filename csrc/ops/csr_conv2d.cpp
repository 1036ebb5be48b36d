// csr_conv2d and the gradient for its values: schemas, checks, allocation, choice of device.
#include <algorithm>
#include <atomic>

#include "cpu/csr_program.h"
#include "cpu/kernel_table.h"
#include "ops/conv.h"
#include "ops/cuda_stream.h"

namespace sparsecnn::ops {
namespace {

constexpr const char* kOp = "csr_conv2d";

// Fills everything but the pointers; refuses what would make a kernel read outside its tensors.
ConvShape make_shape(const Tensor& x, const Tensor& col_idx, const Tensor& row_ptr,
                     const Geometry& geometry) {
  STD_TORCH_CHECK(row_ptr.dim() == 1 && col_idx.dim() == 1 &&
                      row_ptr.scalar_type() == ScalarType::Int &&
                      col_idx.scalar_type() == ScalarType::Int,
                  kOp, ": expected col_idx and row_ptr to be 1-d int32 tensors");
  STD_TORCH_CHECK(row_ptr.size(0) >= 1, kOp, ": expected row_ptr with K + 1 entries, got 0");
  STD_TORCH_CHECK(col_idx.device() == x.device() && row_ptr.device() == x.device(), kOp,
                  ": expected col_idx and row_ptr on the device of x");
  const ConvShape s = conv_shape(kOp, x, row_ptr.size(0) - 1, geometry);
  STD_TORCH_CHECK(s.columns() < INT32_MAX && col_idx.numel() < INT32_MAX, kOp,
                  ": expected fewer than 2^31 columns and nonzeros");
  return s;
}

// Row pointers bound every read of the CSR arrays. Columns are checked where they are first read.
void check_rows(const int32_t* row_ptr, int64_t k, int64_t nnz) {
  bool ok = row_ptr[0] == 0 && row_ptr[k] == nnz;
  for (int64_t i = 0; i < k; ++i) ok &= row_ptr[i] <= row_ptr[i + 1];
  STD_TORCH_CHECK(ok, kOp, ": expected row_ptr to rise from 0 to nnz = ", nnz,
                  ", got a corrupt array ending in ", row_ptr[k]);
}

struct Call {
  ConvTensors tensors;
  Tensor values, col_idx, row_ptr;
  CsrConv2dParams params;
};

Call prepare(const Tensor& x, const Tensor& values, const Tensor& col_idx, const Tensor& row_ptr,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
             const Geometry& geometry, const Name& activation) {
  const ConvShape s = make_shape(x, col_idx, row_ptr, geometry);
  check_same(values, x, kOp, "values");
  STD_TORCH_CHECK(values.dim() == 1 && values.numel() == col_idx.numel(), kOp,
                  ": expected values and col_idx of one length, got ", values.numel(), " and ",
                  col_idx.numel());
  Call call{{}, as_contiguous(values), as_contiguous(col_idx), as_contiguous(row_ptr), {}};
  call.tensors = fill_conv(kOp, s, x, bias, residual, activation, call.params);
  CsrConv2dParams& p = call.params;
  p.values = call.values.const_data_ptr();
  p.col_idx = static_cast<const int32_t*>(call.col_idx.const_data_ptr());
  p.row_ptr = static_cast<const int32_t*>(call.row_ptr.const_data_ptr());
  return call;
}

Tensor csr_conv2d_cpu(const Tensor& x, const Tensor& values, const Tensor& col_idx,
                      const Tensor& row_ptr, std::optional<Tensor> bias,
                      std::optional<Tensor> residual, Ints kernel_size, Ints stride, Ints padding,
                      Ints dilation, int64_t groups, Name activation) {
  Call call = prepare(x, values, col_idx, row_ptr, bias, residual,
                      {kernel_size, stride, padding, dilation, groups}, activation);
  const CsrConv2dParams& params = call.params;
  check_cpu_dtype(kOp, params.dtype);
  check_rows(params.row_ptr, params.shape.k, call.col_idx.numel());
  if (call.tensors.y.numel() == 0) return call.tensors.y;

  const cpu::CsrKernels& table = cpu::kernels().csr;
  const int64_t threads = cpu_threads();
  const std::shared_ptr<const cpu::CsrProgram> program =
      cpu::csr_program(params, call.col_idx.numel(),
                       params.dtype == DType::kFloat64 ? table.of_double : table.of_float,
                       static_cast<int32_t>(threads), table.content_hash);
  std::atomic<bool> sound{program != nullptr};
  if (program) {
    const cpu::CsrPlan& plan = program->plan;
    run_items(kOp, threads, plan.items, plan.thread_bytes,
              [&](int64_t begin, int64_t end, char* scratch) {
                if (!table.conv2d(params, plan, begin, end, scratch)) sound = false;
              });
  }
  STD_TORCH_CHECK(sound, kOp, ": expected col_idx ascending in each row within [0, ",
                  params.shape.columns(),
                  "), got a corrupt array; CSRWeight.validate() says where");
  return call.tensors.y;
}

struct GradCall {
  Tensor x, grad_y, col_idx, row_ptr, grad;
  CsrConv2dGradValuesParams params;
};

GradCall prepare_grad(const Tensor& grad_y, const Tensor& x, const Tensor& col_idx,
                      const Tensor& row_ptr, const Geometry& geometry, Layout layout) {
  const ConvShape s = make_shape(x, col_idx, row_ptr, geometry);
  check_same(grad_y, x, kOp, "grad_y");
  STD_TORCH_CHECK(grad_y.dim() == 4 && grad_y.size(0) == s.n && grad_y.size(1) == s.k &&
                      grad_y.size(2) == s.p && grad_y.size(3) == s.q,
                  kOp, ": expected grad_y of the output's shape (", s.n, ", ", s.k, ", ", s.p, ", ",
                  s.q, ")");
  GradCall call{to_layout(x, layout),
                to_layout(grad_y, layout),
                as_contiguous(col_idx),
                as_contiguous(row_ptr),
                torch::stable::new_empty(x, {col_idx.numel()}),
                {}};
  CsrConv2dGradValuesParams& p = call.params;
  p.shape = s;
  p.dtype = dtype_of(x, kOp);
  p.layout = layout;
  p.x = call.x.const_data_ptr();
  p.grad_y = call.grad_y.const_data_ptr();
  p.col_idx = static_cast<const int32_t*>(call.col_idx.const_data_ptr());
  p.row_ptr = static_cast<const int32_t*>(call.row_ptr.const_data_ptr());
  p.grad_values = call.grad.mutable_data_ptr();
  return call;
}

Tensor csr_conv2d_grad_values_cpu(const Tensor& grad_y, const Tensor& x, const Tensor& col_idx,
                                  const Tensor& row_ptr, Ints kernel_size, Ints stride,
                                  Ints padding, Ints dilation, int64_t groups) {
  GradCall call = prepare_grad(grad_y, x, col_idx, row_ptr,
                               {kernel_size, stride, padding, dilation, groups}, Layout::kNCHW);
  const CsrConv2dGradValuesParams& params = call.params;
  check_cpu_dtype(kOp, params.dtype);
  const int64_t nnz = call.col_idx.numel(), columns = params.shape.columns();
  check_rows(params.row_ptr, params.shape.k, nnz);
  bool in_range = true;  // here a column is an address
  for (int64_t i = 0; i < nnz; ++i) {
    in_range &= static_cast<uint32_t>(params.col_idx[i]) < static_cast<uint32_t>(columns);
  }
  STD_TORCH_CHECK(in_range, kOp, ": expected col_idx in [0, ", columns, ")");
  const auto kernel = cpu::kernels().csr.grad_values;
  // A position is a dot product over the whole output map: a few of them are worth a thread.
  const int64_t grain = std::max<int64_t>(
      1, 32768 / std::max<int64_t>(1, params.shape.n * params.shape.p * params.shape.q));
  torch::stable::parallel_for(0, nnz, grain, [&](int64_t b, int64_t e) { kernel(params, b, e); });
  return call.grad;
}

#ifdef SPARSECNN_CUDA
Tensor csr_conv2d_cuda(const Tensor& x, const Tensor& values, const Tensor& col_idx,
                       const Tensor& row_ptr, std::optional<Tensor> bias,
                       std::optional<Tensor> residual, Ints kernel_size, Ints stride, Ints padding,
                       Ints dilation, int64_t groups, Name activation) {
  const CudaGuard guard(x);
  Call call = prepare(x, values, col_idx, row_ptr, bias, residual,
                      {kernel_size, stride, padding, dilation, groups}, activation);
  check_cuda_dtype(kOp, call.params.dtype);
  guard.check(cuda::csr_conv2d(call.params, guard.stream()), kOp);
  return call.tensors.y;
}

Tensor csr_conv2d_grad_values_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& col_idx,
                                   const Tensor& row_ptr, Ints kernel_size, Ints stride,
                                   Ints padding, Ints dilation, int64_t groups) {
  const CudaGuard guard(x);
  GradCall call = prepare_grad(grad_y, x, col_idx, row_ptr,
                               {kernel_size, stride, padding, dilation, groups}, layout_of(x));
  check_cuda_dtype(kOp, call.params.dtype);
  guard.check(cuda::csr_conv2d_grad_values(call.params, guard.stream()), kOp);
  return call.grad;
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(sparsecnn, m) {
  m.def(
      "csr_conv2d(Tensor x, Tensor values, Tensor col_idx, Tensor row_ptr, Tensor? bias, "
      "Tensor? residual, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int groups, str activation) -> Tensor");
  m.def(
      "csr_conv2d_grad_values(Tensor grad_y, Tensor x, Tensor col_idx, Tensor row_ptr, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CPU, m) {
  m.impl("csr_conv2d", TORCH_BOX(&csr_conv2d_cpu));
  m.impl("csr_conv2d_grad_values", TORCH_BOX(&csr_conv2d_grad_values_cpu));
}

#ifdef SPARSECNN_CUDA
STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CUDA, m) {
  m.impl("csr_conv2d", TORCH_BOX(&csr_conv2d_cuda));
  m.impl("csr_conv2d_grad_values", TORCH_BOX(&csr_conv2d_grad_values_cuda));
}
#endif

}  // namespace sparsecnn::ops
