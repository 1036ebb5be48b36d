// Gradient of csr_conv2d for its stored values on the CPU: for each stored position (k, c, r, s)
//   grad[i] = sum over n, p, q of grad_y[n, k, p, q] * x[n, c, p*stride + r*dil - pad, ...].
//
// A sampled product: nothing is computed for positions that were pruned. Each position is one dot
// product over the output map, four vector accumulators in fixed order, so it is deterministic and
// independent of the threads. NCHW only: the glue converts. The bound is two L1 / L2 loads per FMA;
// with 2 * nnz * N * P * Q FLOPs it is at best half of the forward kernel's rate.
#pragma once
#include <stddef.h>

#include "cpu/vec.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

template <class V, class S>
typename V::T dot_rows(const S* g, const S* x, int64_t rows, int64_t g_pitch, int64_t x_pitch,
                       int64_t n, int64_t x_step) {
  using T = typename V::T;
  using reg = typename V::reg;
  constexpr uint32_t all = (1u << V::L) - 1u;
  T tail = 0;
  reg a0 = V::zero(), a1 = V::zero(), a2 = V::zero(), a3 = V::zero();
  for (int64_t row = 0; row < rows; ++row, g += g_pitch, x += x_pitch) {
    if (x_step != 1) {
      for (int64_t i = 0; i < n; ++i) tail += to_acc(g[i]) * to_acc(x[i * x_step]);
      continue;
    }
    int64_t i = 0;
    for (; i + 4 * V::L <= n; i += 4 * V::L) {
      a0 = V::fmadd(V::load_mask(g + i, all), V::load_mask(x + i, all), a0);
      a1 = V::fmadd(V::load_mask(g + i + V::L, all), V::load_mask(x + i + V::L, all), a1);
      a2 = V::fmadd(V::load_mask(g + i + 2 * V::L, all), V::load_mask(x + i + 2 * V::L, all), a2);
      a3 = V::fmadd(V::load_mask(g + i + 3 * V::L, all), V::load_mask(x + i + 3 * V::L, all), a3);
    }
    for (; i < n; i += V::L) {
      const uint32_t mask = n - i >= V::L ? all : (1u << (n - i)) - 1u;
      a0 = V::fmadd(V::load_mask(g + i, mask), V::load_mask(x + i, mask), a0);
    }
  }
  alignas(64) T lanes[V::L];
  V::store(lanes, V::add(V::add(a0, a1), V::add(a2, a3)));
  for (int l = 0; l < V::L; ++l) tail += lanes[l];
  return tail;
}

// Output positions along one axis whose input position lies inside the image: [*lo, *hi).
inline void valid_outputs(int64_t out, int64_t in, int64_t offset, int64_t stride, int64_t* lo,
                          int64_t* hi) {
  *lo = offset >= 0 ? 0 : (-offset + stride - 1) / stride;
  *hi = in - offset <= 0 ? 0 : (in - offset - 1) / stride + 1;
  if (*hi > out) *hi = out;
  if (*lo > *hi) *lo = *hi;
}

template <class V, class S>
void csr_conv2d_grad_values_typed(const CsrConv2dGradValuesParams& params, int64_t begin,
                                  int64_t end) {
  using T = typename V::T;
  const ConvShape& s = params.shape;
  const S* const x = static_cast<const S*>(params.x);
  const S* const g = static_cast<const S*>(params.grad_y);
  S* const out = static_cast<S*>(params.grad_values);
  int64_t k = 0;
  for (int64_t i = begin; i < end; ++i) {
    while (params.row_ptr[k + 1] <= i) ++k;
    const int64_t column = params.col_idx[i];
    const int64_t c = k / s.filters_per_group() * s.channels_per_group() + column / (s.r * s.s);
    const int64_t h0 = column / s.s % s.r * s.dil_h - s.pad_top;
    const int64_t w0 = column % s.s * s.dil_w - s.pad_left;
    int64_t p0, p1, q0, q1;
    valid_outputs(s.p, s.h, h0, s.stride_h, &p0, &p1);
    valid_outputs(s.q, s.w, w0, s.stride_w, &q0, &q1);
    T sum = 0;
    if (p0 < p1 && q0 < q1) {
      for (int64_t n = 0; n < s.n; ++n) {
        sum += dot_rows<V, S>(
            g + ((n * s.k + k) * s.p + p0) * s.q + q0,
            x + ((n * s.c + c) * s.h + p0 * s.stride_h + h0) * s.w + q0 * s.stride_w + w0, p1 - p0,
            s.q, s.stride_h * s.w, q1 - q0, s.stride_w);
      }
    }
    out[i] = Convert<S>::from(sum);
  }
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
