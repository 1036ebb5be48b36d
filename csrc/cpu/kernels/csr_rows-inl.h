// The row loop of csr_conv2d: all filters of a chunk over one panel, for one block of output
// positions. Included by csr_conv2d-inl.h, whose header explains the plan.
//
// A loop is put together from where the nonzeros come from (Streamed, Stored) and where the sums go
// (ToPartial, ToTiles, ToPixels: sinks-inl.h).
#pragma once
#include <stddef.h>

#include "cpu/csr_plan.h"
#include "cpu/kernels/sinks-inl.h"

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
  if constexpr (cpu::block_is_legal(NY, NX, Weights::template max_vectors<MaxVectors>())) {
    return &csr_rows<V, Weights, Sink, NY, NX>;
  } else {
    return nullptr;
  }
}

#define SPARSECNN_CELL(NY, NX) row_kernel<V, Weights, Sink, MaxVectors, NY, NX>()

template <class V, class Weights, class Sink, int MaxVectors>
RowKernel<V, Weights, Sink> find_row_kernel(int32_t ny, int32_t nx) {
  static constexpr RowKernel<V, Weights, Sink> table[cpu::kMaxNy + 1][cpu::kMaxNx + 1] =
      SPARSECNN_ROWS_OF(SPARSECNN_CELL);
  return table[ny][nx];
}

template <class V, class Weights, class Sink, int MaxVectors>
RowKernel<V, Weights, Sink> find_pixel_kernel(int32_t nx) {
  static constexpr RowKernel<V, Weights, Sink> table[cpu::kMaxNx + 1] =
      SPARSECNN_ROW_OF(SPARSECNN_CELL, 1);
  return table[nx];
}

#undef SPARSECNN_CELL

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
