// What the glue of all convolutions does: geometry, their common tensors, threads and scratch.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "ops/check.h"

namespace sparsecnn::ops {

using Ints = std::vector<int64_t>;

struct Geometry {
  Ints kernel_size, stride, padding, dilation;  // 2, 2, 4 (top, bottom, left, right), 2 ints
  int64_t groups;
};

// Refuses what would make a kernel read outside an input of `size` (n, c, h, w).
inline ConvShape conv_shape(const char* op, const int64_t (&size)[4], int64_t k,
                            const Geometry& g) {
  STD_TORCH_CHECK(g.kernel_size.size() == 2 && g.stride.size() == 2 && g.dilation.size() == 2 &&
                      g.padding.size() == 4,
                  op,
                  ": expected kernel_size, stride, dilation of length 2 and padding of length 4");
  for (int i = 0; i < 2; ++i) {
    STD_TORCH_CHECK(g.kernel_size[i] > 0 && g.stride[i] > 0 && g.dilation[i] > 0, op,
                    ": expected kernel_size, stride and dilation >= 1, got ", g.kernel_size[i],
                    ", ", g.stride[i], ", ", g.dilation[i]);
  }
  ConvShape s{};
  s.n = size[0], s.c = size[1], s.h = size[2], s.w = size[3];
  s.k = k;
  s.r = g.kernel_size[0], s.s = g.kernel_size[1];
  s.stride_h = g.stride[0], s.stride_w = g.stride[1];
  s.pad_top = g.padding[0], s.pad_left = g.padding[2];
  s.dil_h = g.dilation[0], s.dil_w = g.dilation[1];
  s.groups = g.groups;
  STD_TORCH_CHECK(s.groups >= 1 && s.c % s.groups == 0 && s.k % s.groups == 0, op,
                  ": expected groups to divide C = ", s.c, " and K = ", s.k, ", got ", s.groups);
  s.p = conv_out_extent(s.h, g.padding[0], g.padding[1], s.dil_h, s.r, s.stride_h);
  s.q = conv_out_extent(s.w, g.padding[2], g.padding[3], s.dil_w, s.s, s.stride_w);
  STD_TORCH_CHECK(s.p > 0 && s.q > 0, op, ": expected a kernel that fits the padded input, got (",
                  s.r, ", ", s.s, ") with dilation (", s.dil_h, ", ", s.dil_w, ") on (", s.h, ", ",
                  s.w, ")");
  return s;
}

// A weight's own shape is the op's to check.
inline ConvShape conv_shape(const char* op, const Tensor& x, int64_t k, const Geometry& g) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": expected x with 4 dimensions (N, C, H, W), got ", x.dim());
  return conv_shape(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, k, g);
}

// Keeps alive what the pointers of a ConvParams point to.
struct ConvTensors {
  Tensor x, y;
  std::optional<Tensor> bias, residual;
};

// Checks bias and residual, brings all into the layout of x, allocates y and fills `p`.
inline ConvTensors fill_conv(const char* op, const ConvShape& s, const Tensor& x,
                             const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& residual, const Name& activation,
                             ConvParams& p) {
  p.shape = s;
  p.dtype = dtype_of(x, op);
  p.layout = layout_of(x);
  p.activation = activation_of(activation.text, op);
  ConvTensors t{to_layout(x, p.layout), Tensor(), std::nullopt, std::nullopt};
  p.bias = p.residual = nullptr;
  if (bias) {
    check_same(*bias, x, op, "bias");
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == s.k, op, ": expected bias of shape (", s.k,
                    ",)");
    t.bias = as_contiguous(*bias);
    p.bias = t.bias->const_data_ptr();
  }
  if (residual) {
    check_same(*residual, x, op, "residual");
    STD_TORCH_CHECK(residual->dim() == 4 && residual->size(0) == s.n && residual->size(1) == s.k &&
                        residual->size(2) == s.p && residual->size(3) == s.q,
                    op, ": expected residual of the output's shape (", s.n, ", ", s.k, ", ", s.p,
                    ", ", s.q, ")");
    t.residual = to_layout(*residual, p.layout);
    p.residual = t.residual->const_data_ptr();
  }
  t.y = empty_like_layout(x, {s.n, s.k, s.p, s.q}, p.layout);
  p.x = t.x.const_data_ptr();
  p.y = t.y.mutable_data_ptr();
  return t;
}

// Scratch of the calling thread, 4096-byte aligned, kept between calls: fresh memory would be paged
// in again by every call, which costs more than packing a small layer. It only grows, to a few
// hundred KB per worker.
inline char* thread_scratch(const char* op, int64_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  const size_t wanted = (static_cast<size_t>(bytes) + 4095) / 4096 * 4096;
  if (buffer.size < wanted) {
    std::free(buffer.data);
    buffer.size = 0;
    buffer.data = std::aligned_alloc(4096, wanted);
    STD_TORCH_CHECK(buffer.data != nullptr, op, ": could not allocate ", wanted,
                    " bytes of scratch");
    buffer.size = wanted;
  }
  return static_cast<char*>(buffer.data);
}

// The CPU kernels compute in float32 or float64 and store no float16.
inline void check_cpu_dtype(const char* op, DType dtype) {
  STD_TORCH_CHECK(dtype != DType::kFloat16, op,
                  ": expected float32, bfloat16 or float64 on the CPU, got float16");
}

// The threads a plan is made for and run_items runs it with.
inline int64_t cpu_threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Cuts [0, items) into even shares, at most one a thread, and calls fn(begin, end, scratch) for
// each, in parallel, with `thread_bytes` of scratch that no other share sees.
template <class Fn>
void run_items(const char* op, int64_t threads, int64_t items, int64_t thread_bytes, Fn&& fn) {
  const int64_t workers = std::min(threads, items);
  char* const base = thread_scratch(op, workers * thread_bytes);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) {
      fn(items * w / workers, items * (w + 1) / workers, base + w * thread_bytes);
    }
  });
}

}  // namespace sparsecnn::ops
