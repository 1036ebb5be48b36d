// What the row loops of csr_conv2d and pattern_conv2d have in common: what they are called with,
// where the sums go, and tables of their instances by block shape. Block height and width are
// compile-time, so that the sums are registers.
#pragma once
#include <stddef.h>

#include "cpu/kernels/tiles-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// What the row loop needs, gathered so that its signature stays short.
template <class V>
struct RowArgs {
  const typename V::T* panel;
  ptrdiff_t row_pitch;        // elements between packed rows
  const typename V::T* bias;  // (filters of the chunk)
  bool first_panel;           // start from the bias, not from the partial sums
  int64_t filters;            // of the chunk
  typename V::T* partial;     // (filters, NY, NX, L)
  Prefetcher* prefetcher;
};

// Where the sums of a filter go: back to the partial sums ...
template <class V>
struct ToPartial {
  template <int NY, int NX>
  SPARSECNN_INLINE void store(typename V::reg (&acc)[NY][NX], typename V::T* partial, int64_t) {
#pragma GCC unroll 8
    for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
      for (int x = 0; x < NX; ++x) V::store(partial + (y * NX + x) * V::L, acc[y][x]);
    }
  }
};

// ... or, from the last panel of an NCHW layer, finished to the output: lanes that are tiles are
// transposed back to rows of pixels while they are in registers ...
template <class V, class S>
struct ToTiles {
  const Finish<V, S>& finish;
  const int64_t* offset;  // (NY, L): of a lane's row in filter 0
  const uint32_t* mask;   // (NY, L): its pixels
  int64_t plane;          // elements between filters

  ToTiles row(int64_t y) const { return {finish, offset + y * V::L, mask + y * V::L, plane}; }

  template <int NY, int NX>
  SPARSECNN_INLINE void store(typename V::reg (&acc)[NY][NX], typename V::T*, int64_t f) {
    constexpr int L = V::L, H = L / 2;
    S* const y0 = finish.y + f * plane;
#pragma GCC unroll 8
    for (int y = 0; y < NY; ++y) {
      const int64_t* const to = offset + y * L;
      const uint32_t* const m = mask + y * L;
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) __builtin_prefetch(y0 + to[l] + kPrefetchOut * plane, 1);
      if constexpr (NX <= H) {
        typename V::reg r[H];
#pragma GCC unroll 8
        for (int j = 0; j < H; ++j) r[j] = j < NX ? acc[y][j < NX ? j : 0] : V::zero();
        V::transpose_pairs(r);
#pragma GCC unroll 8
        for (int l = 0; l < H; ++l) {
          if (m[l] | m[l + H]) {
            finish.pair(r[l], to[l] + f * plane, m[l], to[l + H] + f * plane, m[l + H]);
          }
        }
      } else {
#pragma GCC unroll 16
        for (int x0 = 0; x0 < NX; x0 += L) {
          typename V::reg r[L];
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) {
            r[j] = x0 + j < NX ? acc[y][x0 + j < NX ? x0 + j : 0] : V::zero();
          }
          V::transpose(r);
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) {
            const uint32_t now = m[l] >> x0 & ((1u << L) - 1u);
            if (now) finish(r[l], to[l] + f * plane + x0, now);
          }
        }
      }
    }
  }
};

// ... and lanes that are pixels are stored as they are.
template <class V, class S>
struct ToPixels {
  const Finish<V, S>& finish;
  int64_t offset, pitch;  // of the block's first pixel in filter 0; elements between filters
  int64_t pixels;         // left in the row of pixels

  ToPixels row(int64_t) const { return *this; }

  template <int NY, int NX>
  SPARSECNN_INLINE void store(typename V::reg (&acc)[NY][NX], typename V::T*, int64_t f) {
    static_assert(NY == 1, "a row of pixels");
#pragma GCC unroll 16
    for (int x = 0; x < NX; ++x) {
      const uint32_t mask = range_mask<V::L>(x * V::L, 0, pixels);
      if (mask) finish(acc[0][x], offset + f * pitch + x * V::L, mask);
    }
  }
};

// An initializer of a row of a table [ny][nx]: CELL(NY, NX) for every width that may be legal.
#define SPARSECNN_ROW_OF(CELL, NY)                                    \
  {nullptr,      CELL(NY, 1), CELL(NY, 2),  CELL(NY, 3), CELL(NY, 4), \
   CELL(NY, 5),  CELL(NY, 6), CELL(NY, 7),  CELL(NY, 8), nullptr,     \
   CELL(NY, 10), nullptr,     CELL(NY, 12), nullptr,     CELL(NY, 14)}
// And of all heights.
#define SPARSECNN_ROWS_OF(CELL) \
  {{},                          \
   SPARSECNN_ROW_OF(CELL, 1),   \
   SPARSECNN_ROW_OF(CELL, 2),   \
   SPARSECNN_ROW_OF(CELL, 3),   \
   SPARSECNN_ROW_OF(CELL, 4),   \
   {},                          \
   {},                          \
   SPARSECNN_ROW_OF(CELL, 7)}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
