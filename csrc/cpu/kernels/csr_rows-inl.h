// The row loop of csr_conv2d: all filters of a chunk over one panel, for one block of output
// positions. Included by csr_conv2d-inl.h, whose header explains the plan.
//
// A loop is put together from where the nonzeros come from (Streamed, Stored) and where the sums go
// (ToPartial, ToTiles, ToPixels); block height and width are compile-time, so that the sums are
// registers.
#pragma once
#include <stddef.h>

#include "cpu/kernels/csr_tiles-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// How many filters ahead unstreamed weights are prefetched; measured on Zen 4.
constexpr int64_t kPrefetchFilters = 3;
static_assert(kPrefetchFilters <= cpu::kBoundsPad, "the bounds are padded for the look-ahead");

// The nonzeros of one panel in the order of the kernel, filter after filter.
template <class T>
struct Streamed {
  const cpu::CsrEntry<T>* entry;
  const int32_t* counts;  // of each filter

  template <int MaxVectors>
  static constexpr int max_vectors() {
    return MaxVectors;
  }

  // Calls use(value, tap vectors) for every nonzero of the next filter.
  template <class Use>
  SPARSECNN_INLINE void filter(int64_t f, const T* panel, Use&& use) {
    for (const cpu::CsrEntry<T>* const end = entry + counts[f]; entry < end; ++entry) {
      use(entry->value,
          reinterpret_cast<const T*>(reinterpret_cast<const char*>(panel) + entry->offset));
    }
  }
};

// The same from plain CSR.
template <class T, class S>
struct Stored {
  const S* values;
  const int32_t* col_idx;
  const int32_t* tap_offset;  // by column, in elements
  const int32_t* begin;       // (filters): first entry of each filter in this panel
  const int32_t* end;         // (filters): one past the last

  template <int>
  static constexpr int max_vectors() {
    return cpu::kStoredVectors;
  }

  template <class Use>
  SPARSECNN_INLINE void filter(int64_t f, const T* panel, Use&& use) {
    // A filter touches a few lines of weights at an address no hardware prefetcher guesses. `begin`
    // is followed by kBoundsPad entries, so that looking ahead needs no test.
    const int64_t ahead = f + kPrefetchFilters;
    for (int32_t i = begin[ahead]; i < end[ahead]; i += 16) {
      __builtin_prefetch(values + i);
      __builtin_prefetch(col_idx + i);
    }
    for (int32_t i = begin[f]; i < end[f]; ++i) {
      use(static_cast<T>(to_acc(values[i])), panel + tap_offset[col_idx[i]]);
    }
  }
};

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

// All filters of the chunk over one panel, for one block of output positions.
template <class V, class Weights, class Sink, int NY, int NX>
void csr_rows(const RowArgs<V>& args, Weights weights, Sink sink) {
  using reg = typename V::reg;
  using T = typename V::T;
  const RowArgs<V> a = args;
  T* partial = a.partial;
  for (int64_t f = 0; f < a.filters; ++f, partial += NY * NX * V::L) {
    a.prefetcher->visit();
    reg acc[NY][NX];
    if (a.first_panel) {
      const reg b = V::set1(a.bias[f]);
#pragma GCC unroll 8
      for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) acc[y][x] = b;
      }
    } else {
#pragma GCC unroll 8
      for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) acc[y][x] = V::load(partial + (y * NX + x) * V::L);
      }
    }
    weights.filter(f, a.panel, [&](T value, const T* tap) __attribute__((always_inline)) {
      const reg w = V::set1(value);
#pragma GCC unroll 8
      for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) {
          acc[y][x] = V::fmadd(w, V::load(tap + y * a.row_pitch + x * V::L), acc[y][x]);
        }
      }
    });
    sink.template store<NY, NX>(acc, partial, f);
  }
}

template <class V, class Weights, class Sink>
using RowKernel = void (*)(const RowArgs<V>&, Weights, Sink);

template <class V, class Weights, class Sink, int MaxVectors, int NY, int NX>
constexpr RowKernel<V, Weights, Sink> row_kernel() {
  if constexpr (cpu::csr_block_is_legal(NY, NX, Weights::template max_vectors<MaxVectors>())) {
    return &csr_rows<V, Weights, Sink, NY, NX>;
  } else {
    return nullptr;
  }
}

#define SPARSECNN_CELL(NY, NX) row_kernel<V, Weights, Sink, MaxVectors, NY, NX>()
#define SPARSECNN_ROW(NY)  \
  {nullptr,                \
   SPARSECNN_CELL(NY, 1),  \
   SPARSECNN_CELL(NY, 2),  \
   SPARSECNN_CELL(NY, 3),  \
   SPARSECNN_CELL(NY, 4),  \
   SPARSECNN_CELL(NY, 5),  \
   SPARSECNN_CELL(NY, 6),  \
   SPARSECNN_CELL(NY, 7),  \
   SPARSECNN_CELL(NY, 8),  \
   nullptr,                \
   SPARSECNN_CELL(NY, 10), \
   nullptr,                \
   SPARSECNN_CELL(NY, 12), \
   nullptr,                \
   SPARSECNN_CELL(NY, 14)}

template <class V, class Weights, class Sink, int MaxVectors>
RowKernel<V, Weights, Sink> find_row_kernel(int32_t ny, int32_t nx) {
  static constexpr RowKernel<V, Weights, Sink> table[cpu::kMaxNy + 1][cpu::kMaxNx + 1] = {
      {}, SPARSECNN_ROW(1), SPARSECNN_ROW(2), SPARSECNN_ROW(3), SPARSECNN_ROW(4), {},
      {}, SPARSECNN_ROW(7)};
  return table[ny][nx];
}

template <class V, class Weights, class Sink, int MaxVectors>
RowKernel<V, Weights, Sink> find_pixel_kernel(int32_t nx) {
  static constexpr RowKernel<V, Weights, Sink> table[cpu::kMaxNx + 1] = SPARSECNN_ROW(1);
  return table[nx];
}

#undef SPARSECNN_ROW
#undef SPARSECNN_CELL

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
