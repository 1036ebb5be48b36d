// The register tile of depthwise stages: M pixels of one vector of channels,
//   acc[m] = bias + sum over filter rows r, taps s of pixel_m[r][s * tap] * weight[r * S + s].
//
// Lanes are channels, so every load is a whole vector of one pixel and no tap is unaligned. An FMA
// may take its pixel from memory, one load beside one FMA a cycle. Rows of 3 and 5 taps keep a
// pixel in a register for all its taps instead: 19 cycles for a vector of 3x3 outputs became 16
// (Zen 4, in L1; 9 FMAs). What is left over the FMAs is fixed, about 100 cycles a tile of 14: sums
// in, sums out, a call.
#pragma once
#include "cpu/kernels/dense_tile-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

template <class V, class S>
struct WindowRun {
  DenseTaps<typename V::T> taps;  // c and weight_pitch unused
  ptrdiff_t channel;              // bytes from a pixel to this vector of its channels
  const typename V::T* weight;    // (R * S, L)
  const typename V::T* bias;      // (L)
  uint32_t mask;                  // channels that exist
  OutputRows<S> out;
};

// One filter row of S taps, neighbouring pixels for a stride of Step: a pixel is loaded once and
// meets all taps that want it. S = 0: any filter, a load for every tap.
template <class V, int M, int S, int Step>
SPARSECNN_INLINE void window_row(typename V::reg (&acc)[M][1], const char* row, ptrdiff_t tap,
                                 const typename V::T* weight) {
  using reg = typename V::reg;
  constexpr int kPixels = (M - 1) * Step + S;
  const PixelBases<kPixels> x(row, tap);
  reg w[S];
#pragma GCC unroll 8
  for (int s = 0; s < S; ++s) w[s] = V::load(weight + s * V::L);
#pragma GCC unroll 32
  for (int j = 0; j < kPixels; ++j) {
    const reg v = V::load_any(x.template at<typename V::T>(j, tap));
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      if ((j - s) % Step == 0 && j >= s && (j - s) / Step < M) {
        const int m = (j - s) / Step < M && j >= s ? (j - s) / Step : 0;
        acc[m][0] = V::fmadd(w[s], v, acc[m][0]);
      }
    }
  }
}

template <class V, class S, int M, int Taps, int Step>
void window_tile(const WindowRun<V, S>& run, TilePosition from) {
  using T = typename V::T;
  using reg = typename V::reg;
  const ptrdiff_t pixel = run.taps.pixel, tap = run.taps.tap, input = from.input + run.channel;
  const T* weight = run.weight;
  reg acc[M][1];
  const reg b = V::load(run.bias);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) acc[m][0] = b;
  for (int64_t r = 0; r < run.taps.r; ++r, weight += run.taps.s * V::L) {
    const char* const row = run.taps.rows[r];
    if (row == nullptr) continue;
    if constexpr (Taps > 0) {
      window_row<V, M, Taps, Step>(acc, row + input, tap, weight);
    } else {
      PixelBases<M> x(row + input, pixel);
      for (int64_t s = 0; s < run.taps.s; ++s) {
        const reg w = V::load(weight + s * V::L);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          acc[m][0] = V::fmadd(w, V::load_any(x.template at<T>(m, pixel)), acc[m][0]);
        }
        x.advance(tap);
      }
    }
  }
  store_tile<V, S, M, 1>(acc, run.out, from, run.mask);
}

template <class V, class S, int Taps, int Step>
struct WindowCell {
  using Kernel = void (*)(const WindowRun<V, S>&, TilePosition);
  template <int M>
  static constexpr Kernel kernel() {
    return &window_tile<V, S, M, Taps, Step>;
  }
};

template <class V, class S, int Taps, int Step, int MaxM>
SPARSECNN_INLINE void window_tiles(const WindowRun<V, S>& run, int64_t pixels) {
  for_tiles<MaxM>(pixels, run.taps.pixel, run.out,
                  [&](int64_t m, TilePosition at) __attribute__((always_inline)) {
                    TileTable<WindowCell<V, S, Taps, Step>, MaxM>::table[m](run, at);
                  });
}

// A row of pixels. The filters of most depthwise layers have tiles of their own.
template <class V, class S, int MaxM>
SPARSECNN_INLINE void window_run(const WindowRun<V, S>& run, int64_t pixels) {
  constexpr int kHalf = MaxM > 7 ? 7 : MaxM;  // twice the pixels to address
  const bool neighbours = run.taps.pixel == run.taps.tap;
  if (run.taps.s == 3 && neighbours) return window_tiles<V, S, 3, 1, MaxM>(run, pixels);
  if (run.taps.s == 5 && neighbours) return window_tiles<V, S, 5, 1, MaxM>(run, pixels);
  if (run.taps.s == 3 && run.taps.pixel == 2 * run.taps.tap) {
    return window_tiles<V, S, 3, 2, kHalf>(run, pixels);
  }
  window_tiles<V, S, 0, 1, MaxM>(run, pixels);
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
