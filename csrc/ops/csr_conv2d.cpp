// csr_conv2d and the gradient for its values: schemas, checks, allocation, choice of device.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "cpu/csr_program.h"
#include "cpu/kernel_table.h"
#include "ops/check.h"
#include "ops/cuda_stream.h"

namespace sparsecnn::ops {
namespace {

constexpr const char* kOp = "csr_conv2d";

using Ints = std::vector<int64_t>;

struct Geometry {
  Ints kernel_size, stride, padding, dilation;
  int64_t groups;
};

// Fills everything but the pointers; refuses what would make a kernel read outside its tensors.
ConvShape make_shape(const Tensor& x, const Tensor& col_idx, const Tensor& row_ptr,
                     const Geometry& g) {
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": expected x with 4 dimensions (N, C, H, W), got ", x.dim());
  STD_TORCH_CHECK(g.kernel_size.size() == 2 && g.stride.size() == 2 && g.dilation.size() == 2 &&
                      g.padding.size() == 4,
                  kOp,
                  ": expected kernel_size, stride, dilation of length 2 and padding of length 4");
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(g.kernel_size[i] > 0 && g.stride[i] > 0 && g.dilation[i] > 0, kOp,
                    ": expected kernel_size, stride and dilation >= 1, got ", g.kernel_size[i],
                    ", ", g.stride[i], ", ", g.dilation[i]);
  }
  STD_TORCH_CHECK(row_ptr.dim() == 1 && col_idx.dim() == 1 &&
                      row_ptr.scalar_type() == ScalarType::Int &&
                      col_idx.scalar_type() == ScalarType::Int,
                  kOp, ": expected col_idx and row_ptr to be 1-d int32 tensors");
  STD_TORCH_CHECK(row_ptr.size(0) >= 1, kOp, ": expected row_ptr with K + 1 entries, got 0");
  STD_TORCH_CHECK(col_idx.device() == x.device() && row_ptr.device() == x.device(), kOp,
                  ": expected col_idx and row_ptr on the device of x");
  ConvShape s{};
  const auto size = x.sizes();
  s.n = size[0], s.c = size[1], s.h = size[2], s.w = size[3];
  s.k = row_ptr.size(0) - 1;
  s.r = g.kernel_size[0], s.s = g.kernel_size[1];
  s.stride_h = g.stride[0], s.stride_w = g.stride[1];
  s.pad_top = g.padding[0], s.pad_left = g.padding[2];
  s.dil_h = g.dilation[0], s.dil_w = g.dilation[1];
  s.groups = g.groups;
  STD_TORCH_CHECK(s.groups >= 1 && s.c % s.groups == 0 && s.k % s.groups == 0, kOp,
                  ": expected groups to divide C = ", s.c, " and K = ", s.k, ", got ", s.groups);
  s.p = conv_out_extent(s.h, g.padding[0], g.padding[1], s.dil_h, s.r, s.stride_h);
  s.q = conv_out_extent(s.w, g.padding[2], g.padding[3], s.dil_w, s.s, s.stride_w);
  STD_TORCH_CHECK(s.p > 0 && s.q > 0, kOp, ": expected a kernel that fits the padded input, got (",
                  s.r, ", ", s.s, ") with dilation (", s.dil_h, ", ", s.dil_w, ") on (", s.h, ", ",
                  s.w, ")");
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

// Scratch of the calling thread, kept between calls: fresh memory would be paged in again by every
// call, which costs more than packing a small layer. It only grows, to a few hundred KB per worker.
char* thread_scratch(int64_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  const size_t wanted = (static_cast<size_t>(bytes) + 4095) / 4096 * 4096;
  if (buffer.size < wanted) {
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = std::aligned_alloc(4096, wanted);
    STD_TORCH_CHECK(buffer.data != nullptr, kOp, ": could not allocate ", wanted,
                    " bytes of scratch");
    buffer.size = wanted;
  }
  return static_cast<char*>(buffer.data);
}

struct Call {
  Tensor x, values, col_idx, row_ptr, y;
  std::optional<Tensor> bias, residual;
  CsrConv2dParams params;
};

Call prepare(const Tensor& x, const Tensor& values, const Tensor& col_idx, const Tensor& row_ptr,
             const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
             const Geometry& geometry, const std::string& activation) {
  const ConvShape s = make_shape(x, col_idx, row_ptr, geometry);
  check_same(values, x, kOp, "values");
  STD_TORCH_CHECK(values.dim() == 1 && values.numel() == col_idx.numel(), kOp,
                  ": expected values and col_idx of one length, got ", values.numel(), " and ",
                  col_idx.numel());
  const Layout layout = layout_of(x);
  Call call{to_layout(x, layout),
            as_contiguous(values),
            as_contiguous(col_idx),
            as_contiguous(row_ptr),
            Tensor(),
            std::nullopt,
            std::nullopt,
            {}};
  CsrConv2dParams& p = call.params;
  p.shape = s;
  p.dtype = dtype_of(x, kOp);
  p.layout = layout;
  p.activation = activation_of(activation, kOp);
  if (bias) {
    check_same(*bias, x, kOp, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == s.k, kOp, ": expected bias of shape (",
                    s.k, ",)");
    call.bias = as_contiguous(*bias);
    p.bias = call.bias->const_data_ptr();
  }
  if (residual) {
    check_same(*residual, x, kOp, "residual");
    STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == s.n && residual->size(1) == s.k &&
                        residual->size(2) == s.p && residual->size(3) == s.q,
                    kOp, ": expected residual of the output's shape (", s.n, ", ", s.k, ", ", s.p,
                    ", ", s.q, ")");
    call.residual = to_layout(*residual, layout);
    p.residual = call.residual->const_data_ptr();
  }
  call.y = empty_like_layout(x, {s.n, s.k, s.p, s.q}, layout);
  p.x = call.x.const_data_ptr();
  p.values = call.values.const_data_ptr();
  p.col_idx = static_cast<const int32_t*>(call.col_idx.const_data_ptr());
  p.row_ptr = static_cast<const int32_t*>(call.row_ptr.const_data_ptr());
  p.y = call.y.mutable_data_ptr();
  return call;
}

Tensor csr_conv2d_cpu(const Tensor& x, const Tensor& values, const Tensor& col_idx,
                      const Tensor& row_ptr, std::optional<Tensor> bias,
                      std::optional<Tensor> residual, Ints kernel_size, Ints stride, Ints padding,
                      Ints dilation, int64_t groups, Name activation) {
  Call call = prepare(x, values, col_idx, row_ptr, bias, residual,
                      {kernel_size, stride, padding, dilation, groups}, activation.text);
  const CsrConv2dParams& params = call.params;
  STD_TORCH_CHECK(params.dtype != DType::kFloat16, kOp,
                  ": expected float32, bfloat16 or float64 on the CPU, got float16");
  check_rows(params.row_ptr, params.shape.k, call.col_idx.numel());
  if (call.y.numel() == 0) return call.y;

  const cpu::KernelTable& table = cpu::kernels();
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  const std::shared_ptr<const cpu::CsrProgram> program =
      cpu::csr_program(params, call.col_idx.numel(),
                       params.dtype == DType::kFloat64 ? table.csr_double : table.csr_float,
                       static_cast<int32_t>(threads), table.content_hash);
  std::atomic<bool> sound{program != nullptr};
  if (program) {
    const cpu::CsrPlan& plan = program->plan;
    const int64_t workers = std::min(threads, plan.items);
    char* const base = thread_scratch(workers * plan.thread_bytes);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
      for (int64_t w = first; w < last; ++w) {
        if (!table.csr_conv2d(params, plan, plan.items * w / workers,
                              plan.items * (w + 1) / workers, base + w * plan.thread_bytes)) {
          sound = false;
        }
      }
    });
  }
  STD_TORCH_CHECK(sound, kOp, ": expected col_idx ascending in each row within [0, ",
                  params.shape.columns(),
                  "), got a corrupt array; CSRWeight.validate() says where");
  return call.y;
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
  STD_TORCH_CHECK(params.dtype != DType::kFloat16, kOp,
                  ": expected float32, bfloat16 or float64 on the CPU, got float16");
  const int64_t nnz = call.col_idx.numel(), columns = params.shape.columns();
  check_rows(params.row_ptr, params.shape.k, nnz);
  bool in_range = true;  // here a column is an address
  for (int64_t i = 0; i < nnz; ++i) {
    in_range &= static_cast<uint32_t>(params.col_idx[i]) < static_cast<uint32_t>(columns);
  }
  STD_TORCH_CHECK(in_range, kOp, ": expected col_idx in [0, ", columns, ")");
  const auto kernel = cpu::kernels().csr_conv2d_grad_values;
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
                      {kernel_size, stride, padding, dilation, groups}, activation.text);
  STD_TORCH_CHECK(call.params.dtype != DType::kFloat64, kOp,
                  ": expected float32, float16 or bfloat16 on CUDA, got float64");
  guard.check(cuda::csr_conv2d(call.params, guard.stream()), kOp);
  return call.y;
}

Tensor csr_conv2d_grad_values_cuda(const Tensor& grad_y, const Tensor& x, const Tensor& col_idx,
                                   const Tensor& row_ptr, Ints kernel_size, Ints stride,
                                   Ints padding, Ints dilation, int64_t groups) {
  const CudaGuard guard(x);
  GradCall call = prepare_grad(grad_y, x, col_idx, row_ptr,
                               {kernel_size, stride, padding, dilation, groups}, layout_of(x));
  STD_TORCH_CHECK(call.params.dtype != DType::kFloat64, kOp,
                  ": expected float32, float16 or bfloat16 on CUDA, got float64");
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
