// The register tile of the dense kernels: a matrix product of M pixels and N vectors of channels,
//   acc[m][n] = init[n] + sum over filter rows r, taps s, channels c of
//               pixel_m[r][s * tap + c] * weight[(r * S + s) * C + c][n]
// in that order, whatever the tile, so that an output has the same bits in every tile shape.
//
// Lanes are output channels: a weight vector is loaded once and meets M pixels, each a scalar that
// the load broadcasts. Per channel that is N + M loads for M * N FMAs; with 14 x 2 (AVX-512) the
// FMAs are the bound. Pixels are addressed from one base pointer in three: x86 offers base + 0, 1
// or 2 times a register, so 14 pixels cost five pointers instead of 14, and the compiled loop holds
// 28 FMAs, 16 loads and 7 scalar instructions.
//
// Measured (Zen 4, roof 117 GFLOP/s, operands in L2): 14x2 106-117 GFLOP/s at 64 channels and more;
// 9x3 107-117, no better; 14x1 104-108 (a load for each FMA); 7x2 108-113.
//
// The lines of the output are prefetched for writing while the tile sums: large outputs went from
// 61 to 80 % of the roof (16>96 channels on 112x112) and from 84 to 94 % (64>256 on 56x56).
#pragma once
#include <stddef.h>

#include "cpu/kernels/epilogue-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// Filter rows and taps that every output of a run has in common.
template <class T>
struct DenseTaps {
  const char* const* rows;  // (R): a run's first pixel at tap 0 of a filter row; null: only zeros
  int64_t r, s, c;
  ptrdiff_t tap;           // bytes between taps of a row
  ptrdiff_t pixel;         // bytes between output pixels
  ptrdiff_t weight_pitch;  // elements between channels
};

// M pixels at a fixed distance.
template <int M>
struct PixelBases {
  static constexpr int kBases = (M + 2) / 3;
  const char* base[kBases];

  SPARSECNN_INLINE PixelBases(const char* first, ptrdiff_t pixel) {
#pragma GCC unroll 8
    for (int i = 0; i < kBases; ++i) base[i] = first + 3 * i * pixel;
  }
  template <class T>
  SPARSECNN_INLINE const T* at(int m, ptrdiff_t pixel, ptrdiff_t offset = 0) const {
    return reinterpret_cast<const T*>(base[m / 3] + (m % 3) * pixel + offset);
  }
  SPARSECNN_INLINE void advance(ptrdiff_t bytes) {
#pragma GCC unroll 8
    for (int i = 0; i < kBases; ++i) base[i] += bytes;
  }
};

// Calls step(pixels, weights) for every row of weights, in order, `first` bytes into the run.
template <class T, int M, class Step>
SPARSECNN_INLINE void for_channels(const DenseTaps<T>& taps, ptrdiff_t first, const T* weight,
                                   Step&& step) {
  const ptrdiff_t pixel = taps.pixel, pitch = taps.weight_pitch;
  const int64_t channels = taps.c;
  for (int64_t r = 0; r < taps.r; ++r) {
    const char* const row = taps.rows[r];
    if (row == nullptr) {
      weight += taps.s * channels * pitch;
      continue;
    }
    for (int64_t s = 0; s < taps.s; ++s) {
      PixelBases<M> x(row + first + s * taps.tap, pixel);
      for (int64_t c = 0; c < channels; ++c) {
        step(x, weight);
        x.advance(sizeof(T));
        weight += pitch;
      }
    }
  }
}

// Where the outputs of a run go: rows of `q` pixels, the run's first pixel at column 0.
template <class S>
struct OutputRows {
  S* y;
  const S* residual;     // at the same distances, or null
  int64_t q;             // pixels of a row
  ptrdiff_t pixel, row;  // elements between pixels, rows
  Activation activation;
};

// The first pixel of a tile.
struct TilePosition {
  ptrdiff_t input;  // bytes from the run's first pixel
  int64_t q;        // column
  ptrdiff_t row;    // elements from the run's first output row to this pixel's
};

// The epilogue of a tile whose pixels share a row, with whole vectors and no residual.
template <class V, class S, int M, int N, class Activate>
SPARSECNN_INLINE void store_plain(typename V::reg (&acc)[M][N], S* y, ptrdiff_t pixel,
                                  Activate&& activate) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      store_some<V>(y + n * V::L, activate(acc[m][n]), kAllLanes<V::L>);
    }
    y += pixel;
  }
}

// Residual, activation and store of a tile. The plain case of the short activations is unrolled;
// for the others the sums go through memory, where one loop finds them.
template <class V, class S, int M, int N>
SPARSECNN_INLINE void store_tile(typename V::reg (&acc)[M][N], const OutputRows<S>& rows,
                                 TilePosition from, uint32_t last_mask) {
  using reg = typename V::reg;
  const OutputRows<S> out = rows;  // a copy: the stores could overwrite the original
  S* y = out.y + from.row + from.q * out.pixel;
  if (out.residual == nullptr && last_mask == kAllLanes<V::L> && from.q + M <= out.q) {
    const auto as = [&](auto constant) __attribute__((always_inline)) {
      store_plain<V, S, M, N>(acc, y, out.pixel, [](reg v) __attribute__((always_inline)) {
        return activate<V>(v, decltype(constant)::value);
      });
    };
    switch (out.activation) {
      case Activation::kNone:
        return as(ActivationConstant<Activation::kNone>{});
      case Activation::kRelu:
        return as(ActivationConstant<Activation::kRelu>{});
      case Activation::kRelu6:
        return as(ActivationConstant<Activation::kRelu6>{});
      case Activation::kSilu:
      case Activation::kHardswish:
        break;
    }
  }
  alignas(64) typename V::T sums[M * N * V::L];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) V::store(sums + (m * N + n) * V::L, acc[m][n]);
  }
  const S* residual = out.residual ? out.residual + (y - out.y) : nullptr;
  int64_t q = from.q;
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const uint32_t mask = n + 1 == N ? last_mask : kAllLanes<V::L>;
      reg v = V::load(sums + (m * N + n) * V::L);
      if (residual) v = V::add(v, load_some<V>(residual + n * V::L, mask));
      store_some<V>(y + n * V::L, activate<V>(v, out.activation), mask);
    }
    ptrdiff_t step = out.pixel;
    if (++q == out.q) {
      q = 0;
      step += out.row - out.q * out.pixel;
    }
    y += step;
    if (residual) residual += step;
  }
}

// A run of pixels that one block of weights meets.
template <class V, class S>
struct DenseRun {
  DenseTaps<typename V::T> taps;
  const typename V::T* weight;
  const typename V::T* bias;  // (N * L)
  uint32_t last_mask;         // channels of the last vector that exist
  OutputRows<S> out;
};

template <class V, class S, int M, int N>
SPARSECNN_INLINE void prefetch_outputs(const OutputRows<S>& out, TilePosition from) {
  const S* const y = out.y + from.row + from.q * out.pixel;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) __builtin_prefetch(y + m * out.pixel + n * V::L, 1);
  }
}

template <class V, class S, int M, int N>
void dense_tile(const DenseRun<V, S>& run, TilePosition from) {
  using T = typename V::T;
  using reg = typename V::reg;
  reg acc[M][N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const reg b = V::load(run.bias + n * V::L);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) acc[m][n] = b;
  }
  prefetch_outputs<V, S, M, N>(run.out, from);
  const ptrdiff_t pixel = run.taps.pixel;
  for_channels<T, M>(run.taps, from.input, run.weight,
                     [&](const PixelBases<M>& x, const T* weight) __attribute__((always_inline)) {
                       reg w[N];
#pragma GCC unroll 4
                       for (int n = 0; n < N; ++n) w[n] = V::load_any(weight + n * V::L);
#pragma GCC unroll 16
                       for (int m = 0; m < M; ++m) {
                         const reg v = V::set1(*x.template at<T>(m, pixel));
#pragma GCC unroll 4
                         for (int n = 0; n < N; ++n) acc[m][n] = V::fmadd(v, w[n], acc[m][n]);
                       }
                     });
  store_tile<V, S, M, N>(acc, run.out, from, run.last_mask);
}

// The same where no more than half of the last vector's channels exist: that half is computed in
// half registers, of which a cycle takes two.
template <class V, class S, int M, int N>
void dense_tile_half(const DenseRun<V, S>& run, TilePosition from) {
  using T = typename V::T;
  using reg = typename V::reg;
  using half = typename V::half;
  constexpr int kFull = N - 1;
  reg acc[M][N];  // the last one only in the end
  half tail[M];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    const reg b = V::load(run.bias + n * V::L);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      if (n < kFull) {
        acc[m][n] = b;
      } else {
        tail[m] = V::lower(b);
      }
    }
  }
  prefetch_outputs<V, S, M, N>(run.out, from);
  const ptrdiff_t pixel = run.taps.pixel;
  for_channels<T, M>(run.taps, from.input, run.weight,
                     [&](const PixelBases<M>& x, const T* weight) __attribute__((always_inline)) {
                       reg w[N];
#pragma GCC unroll 4
                       for (int n = 0; n < kFull; ++n) w[n] = V::load_any(weight + n * V::L);
                       const half last = V::load_half(weight + kFull * V::L);
#pragma GCC unroll 16
                       for (int m = 0; m < M; ++m) {
                         const reg v = V::set1(*x.template at<T>(m, pixel));
#pragma GCC unroll 4
                         for (int n = 0; n < kFull; ++n) acc[m][n] = V::fmadd(v, w[n], acc[m][n]);
                         tail[m] = V::fmadd_half(V::lower(v), last, tail[m]);
                       }
                     });
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) acc[m][kFull] = V::widen(tail[m]);
  store_tile<V, S, M, N>(acc, run.out, from, run.last_mask);
}

template <class V, class S>
using DenseTileKernel = void (*)(const DenseRun<V, S>&, TilePosition);

// Kernels of tiles of M = 1 to MaxM: table[M] is Cell::kernel<M>(), table[0] is null.
template <class Cell, int MaxM, int... M>
struct TileTable : TileTable<Cell, MaxM - 1, MaxM, M...> {};

template <class Cell, int... M>
struct TileTable<Cell, 0, M...> {
  static constexpr typename Cell::Kernel table[] = {nullptr, Cell::template kernel<M>()...};
};

template <class V, class S, int N, bool Half>
struct DenseCell {
  using Kernel = DenseTileKernel<V, S>;
  template <int M>
  static constexpr Kernel kernel() {
    if constexpr (Half && V::kHalves) {
      return &dense_tile_half<V, S, M, N>;
    } else {
      return &dense_tile<V, S, M, N>;
    }
  }
};

// The tiles for `filters` output channels, at most two vectors.
template <class V, class S, int MaxM>
SPARSECNN_INLINE const DenseTileKernel<V, S>* dense_tiles(int64_t filters) {
  const bool half = V::kHalves && (filters - 1) % V::L < V::L / 2;
  if (filters > V::L) {
    return half ? TileTable<DenseCell<V, S, 2, true>, MaxM>::table
                : TileTable<DenseCell<V, S, 2, false>, MaxM>::table;
  }
  return half ? TileTable<DenseCell<V, S, 1, true>, MaxM>::table
              : TileTable<DenseCell<V, S, 1, false>, MaxM>::table;
}

// All pixels of a run, in tiles of at most MaxM and of nearly equal size: tile(m, position).
template <int MaxM, class S, class Tile>
SPARSECNN_INLINE void for_tiles(int64_t pixels, ptrdiff_t pixel, const OutputRows<S>& out,
                                Tile&& tile) {
  const int64_t tiles = (pixels + MaxM - 1) / MaxM, size = pixels / tiles;
  int64_t larger = pixels - tiles * size;
  TilePosition at{0, 0, 0};
  for (int64_t t = 0; t < tiles; ++t, --larger) {
    const int64_t m = size + (larger > 0);
    tile(m, at);
    at.input += m * pixel;
    at.q += m;
    while (at.q >= out.q) {
      at.q -= out.q;
      at.row += out.row;
    }
  }
}

template <class V, class S, int MaxM>
SPARSECNN_INLINE void dense_run(const DenseRun<V, S>& run, int64_t pixels,
                                const DenseTileKernel<V, S>* tiles) {
  for_tiles<MaxM>(pixels, run.taps.pixel, run.out,
                  [&](int64_t m, TilePosition at)
                      __attribute__((always_inline)) { tiles[m](run, at); });
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
