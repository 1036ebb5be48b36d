// The register tile of depthwise stages: M pixels of one vector of channels,
//   acc[m] = bias + sum over filter rows r, taps s of pixel_m[r][s * tap] * weight[r * S + s].
//
// Lanes are channels, so every load is a whole vector of one pixel and no tap is unaligned. Each
// FMA takes its pixel from memory, one load a cycle beside one FMA a cycle: the weight, held for
// all M pixels, is the only extra load. Keeping pixels in registers from tap to tap would save
// loads of which there are enough.
#pragma once
#include "cpu/kernels/dense_tile-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

template <class V, class S>
struct WindowRun {
  DenseTaps<typename V::T> taps;    // rows at this vector of channels; c and weight_pitch unused
  const typename V::T* weight;      // (R * S, L)
  const typename V::T* bias;        // (L)
  uint32_t mask;                    // channels that exist
  OutputRows<S> out;
};

template <class V, class S, int M>
void window_tile(const WindowRun<V, S>& run, int64_t first) {
  using T = typename V::T;
  using reg = typename V::reg;
  const ptrdiff_t pixel = run.taps.pixel;
  const T* weight = run.weight;
  reg acc[M][1];
  const reg b = V::load(run.bias);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) acc[m][0] = b;
  for (int64_t r = 0; r < run.taps.r; ++r) {
    const char* const row = run.taps.rows[r];
    if (row == nullptr) {
      weight += run.taps.s * V::L;
      continue;
    }
    PixelBases<M> x(row + first * pixel, pixel);
    for (int64_t s = 0; s < run.taps.s; ++s) {
      const reg w = V::load(weight);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        acc[m][0] = V::fmadd(w, V::load_any(x.template at<T>(m, pixel)), acc[m][0]);
      }
      x.advance(run.taps.tap);
      weight += V::L;
    }
  }
  store_tile<V, S, M, 1>(acc, run.out, first, run.mask);
}

template <class V, class S>
using WindowTileKernel = void (*)(const WindowRun<V, S>&, int64_t);

template <class V, class S, int MaxM, int M>
constexpr WindowTileKernel<V, S> window_tile_kernel() {
  if constexpr (M <= MaxM) {
    return &window_tile<V, S, M>;
  } else {
    return nullptr;
  }
}

#define SPARSECNN_CELL(M) window_tile_kernel<V, S, MaxM, M>()
template <class V, class S, int MaxM>
struct WindowTiles {
  static_assert(MaxM <= 14, "the table is that long");
  static constexpr WindowTileKernel<V, S> table[15] = {
      nullptr,            SPARSECNN_CELL(1),  SPARSECNN_CELL(2),  SPARSECNN_CELL(3),
      SPARSECNN_CELL(4),  SPARSECNN_CELL(5),  SPARSECNN_CELL(6),  SPARSECNN_CELL(7),
      SPARSECNN_CELL(8),  SPARSECNN_CELL(9),  SPARSECNN_CELL(10), SPARSECNN_CELL(11),
      SPARSECNN_CELL(12), SPARSECNN_CELL(13), SPARSECNN_CELL(14)};
};
#undef SPARSECNN_CELL

template <class V, class S, int MaxM>
SPARSECNN_INLINE void window_run(const WindowRun<V, S>& run, int64_t pixels) {
  const int64_t tiles = (pixels + MaxM - 1) / MaxM, size = pixels / tiles, larger = pixels % tiles;
  int64_t first = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t m = size + (t < larger);
    WindowTiles<V, S, MaxM>::table[m](run, first);
    first += m;
  }
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
