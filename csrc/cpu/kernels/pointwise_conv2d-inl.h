// pointwise_conv2d on NCHW planes: y[k][p] = act(sum over c of W[k][c] * x[c][p] + b[k] + r[k][p]).
//
// A matrix product that needs no transposition: lanes are neighbouring pixels of a plane, and the
// register tile is that of the dense stages with the roles exchanged, M filters whose weights are
// broadcast against 2 vectors of pixels. (Channels_last, small maps and strides are a chain of one
// stage; cpu/pointwise_plan.cpp decides.)
//
// An item is a slab of 2 vectors of pixels of one image: its C rows, which lie a plane apart, are
// packed once (2 loads and 2 stores per channel against 2 * K FMAs) and meet all filters.
#pragma once
#include "cpu/kernels/dense_tile-inl.h"
#include "cpu/pointwise_plan.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

template <class V>
struct PlanesRun {
  const typename V::T* x;  // (C, N * L): the slab
  ptrdiff_t x_pitch;       // elements between channels
  int64_t c;
  const char* weight;         // filter 0
  ptrdiff_t filter, channel;  // bytes between filters, channels
  const typename V::T* bias;  // (K)
  uint32_t last_mask;         // pixels of the last vector that exist
};

template <class V, int M, int N>
void planes_tile(const PlanesRun<V>& run, int64_t k, const OutputRows<typename V::T>& out) {
  using T = typename V::T;
  using reg = typename V::reg;
  reg acc[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const reg b = V::set1(run.bias[k + m]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[m][n] = b;
  }
  const ptrdiff_t filter = run.filter, channel = run.channel;
  PixelBases<M> w(run.weight + k * filter, filter);
  const T* x = run.x;
  for (int64_t c = 0; c < run.c; ++c) {
    reg v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) v[n] = V::load_any(x + n * V::L);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const reg b = V::set1(*w.template at<T>(m, filter));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = V::fmadd(b, v[n], acc[m][n]);
    }
    w.advance(channel);
    x += run.x_pitch;
  }
  store_tile<V, T, M, N>(acc, out, TilePosition{0, k, 0}, run.last_mask);
}

template <class V, int N>
struct PlanesCell {
  using Kernel = void (*)(const PlanesRun<V>&, int64_t, const OutputRows<typename V::T>&);
  template <int M>
  static constexpr Kernel kernel() {
    return &planes_tile<V, M, N>;
  }
};

// Rows of a slab, zeros behind the last pixel.
template <class V>
SPARSECNN_INLINE void pack_slab(const typename V::T* x, int64_t channels, int64_t plane,
                                int64_t pixels, typename V::T* to) {
  constexpr int L = V::L;
  const uint32_t first = range_mask<L>(0, 0, pixels), second = range_mask<L>(L, 0, pixels);
  for (int64_t c = 0; c < channels; ++c, x += plane, to += 2 * L) {
    __builtin_prefetch(x + 8 * plane);
    __builtin_prefetch(x + 8 * plane + L);
    V::store(to, load_some<V>(x, first));
    V::store(to + L, load_some<V>(x + L, second));
  }
}

template <class V, int MaxM>
void pointwise_planes(const PointwiseConv2dParams& params, const cpu::PointwisePlan& plan,
                      int64_t begin, int64_t end, char* scratch) {
  using T = typename V::T;
  constexpr int64_t kWidth = 2 * V::L;
  const ConvShape& s = params.shape;
  T* const packed = reinterpret_cast<T*>(scratch);
  T* const bias = reinterpret_cast<T*>(scratch + plan.bias_offset);
  for (int64_t k = 0; k < s.k; ++k) {
    bias[k] = params.bias ? static_cast<const T*>(params.bias)[k] : T(0);
  }
  const int64_t tiles = (s.k + MaxM - 1) / MaxM, size = s.k / tiles, larger = s.k % tiles;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / plan.slabs, p = item % plan.slabs * kWidth;
    const int64_t pixels = plan.pixels - p < kWidth ? plan.pixels - p : kWidth;
    const T* const x = static_cast<const T*>(params.x) + n * s.c * plan.pixels + p;
    const bool in_place = plan.in_place && pixels == kWidth;
    if (!in_place) pack_slab<V>(x, s.c, plan.pixels, pixels, packed);
    const bool two = pixels > V::L;
    const PlanesRun<V> run{in_place ? x : packed,
                           in_place ? plan.pixels : kWidth,
                           s.c,
                           static_cast<const char*>(params.weight),
                           static_cast<ptrdiff_t>(params.weight_stride[0] * sizeof(T)),
                           static_cast<ptrdiff_t>(params.weight_stride[1] * sizeof(T)),
                           bias,
                           range_mask<V::L>(two ? V::L : 0, 0, pixels)};
    const int64_t at = n * s.k * plan.pixels + p;
    const OutputRows<T> out{static_cast<T*>(params.y) + at,
                            params.residual ? static_cast<const T*>(params.residual) + at : nullptr,
                            INT64_MAX,
                            plan.pixels,
                            0,
                            params.activation};
    int64_t k = 0;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t m = size + (t < larger);
      (two ? TileTable<PlanesCell<V, 2>, MaxM>::table
           : TileTable<PlanesCell<V, 1>, MaxM>::table)[m](run, k, out);
      k += m;
    }
  }
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
