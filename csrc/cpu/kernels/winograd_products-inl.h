// The products of winograd_conv2d: for one tap, M[k][tile] = sum over c of U[k][c] * V[c][tile],
// with U dense or in CSR. Vectors are tiles, so every load is aligned and a weight is broadcast.
// Sums run over ascending channels in one chain, whatever the number of vectors.
#pragma once
#include <stddef.h>

#include "core/winograd_tiles.h"
#include "cpu/vec.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

constexpr int kBlock = kWinogradBlock;

// F filters of a block, N vectors. Per channel N vector loads and F broadcasts for F * N FMAs.
template <class V, class S, int F, int N>
SPARSECNN_INLINE void dense_products(const typename V::T* in, const S* weight, int64_t channels,
                                     typename V::T* out) {
  using reg = typename V::reg;
  constexpr int L = V::L;
  reg acc[F][N];
#pragma GCC unroll 8
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) acc[f][n] = V::zero();
  }
  for (int64_t c = 0; c < channels; ++c, in += N * L, weight += kBlock) {
    reg v[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      v[n] = V::load(in + n * L);
      keep(v[n]);
    }
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
      const reg w = V::set1(to_acc(weight[f]));
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[f][n] = V::fmadd(w, v[n], acc[f][n]);
    }
  }
#pragma GCC unroll 8
  for (int f = 0; f < F; ++f) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) V::store(out + (f * N + n) * L, acc[f][n]);
  }
}

// R rows of a block side by side, so that few vectors still keep the FMA units busy: as far as the
// shortest row together, then each to its end.
template <class V, class S, int N, int R>
SPARSECNN_INLINE void sparse_rows(const typename V::T* in, const S* values, const int32_t* col,
                                  const int32_t* row_ptr, typename V::T* out) {
  using reg = typename V::reg;
  constexpr int L = V::L;
  const auto step = [&](reg(&acc)[N], int32_t i) __attribute__((always_inline)) {
    const reg w = V::set1(to_acc(values[i]));
    const typename V::T* const v = in + static_cast<ptrdiff_t>(col[i]) * (N * L);
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) acc[n] = V::fmadd(w, V::load(v + n * L), acc[n]);
  };
  reg acc[R][N];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) acc[r][n] = V::zero();
  }
  int32_t together = row_ptr[1] - row_ptr[0];
#pragma GCC unroll 4
  for (int r = 1; r < R; ++r) {
    const int32_t length = row_ptr[r + 1] - row_ptr[r];
    together = length < together ? length : together;
  }
  if (R > 1) {
    for (int32_t i = 0; i < together; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) step(acc[r], row_ptr[r] + i);
    }
  } else {
    together = 0;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    for (int32_t i = row_ptr[r] + together; i < row_ptr[r + 1]; ++i) step(acc[r], i);
#pragma GCC unroll 6
    for (int n = 0; n < N; ++n) V::store(out + (r * N + n) * L, acc[r][n]);
  }
}

// One block of filters of one tap.
template <class V, class S, int F, int N>
void dense_block(const typename V::T* in, const S* weight, int64_t channels, typename V::T* out) {
#pragma GCC unroll 8
  for (int f = 0; f < kBlock; f += F) {
    dense_products<V, S, F, N>(in, weight + f, channels, out + f * (N * V::L));
  }
}

template <class V, class S, int N>
void sparse_block(const typename V::T* in, const S* values, const int32_t* col,
                  const int32_t* row_ptr, typename V::T* out) {
  constexpr int R = N == 1 ? 4 : N <= 3 ? 2 : 1;
  // The block's rows of the next tap follow in memory; between them come other blocks.
  const int32_t ahead = row_ptr[kBlock] - row_ptr[0];
  for (int f = 0; f < kBlock; f += R) {
    for (int32_t i = row_ptr[f]; i < row_ptr[f + R]; i += 16) {
      __builtin_prefetch(values + i + ahead);
      __builtin_prefetch(col + i + ahead);
    }
    sparse_rows<V, S, N, R>(in, values, col, row_ptr + f, out + f * (N * V::L));
  }
}

template <class V, class S>
using DenseBlock = void (*)(const typename V::T*, const S*, int64_t, typename V::T*);
template <class V, class S>
using SparseBlock = void (*)(const typename V::T*, const S*, const int32_t*, const int32_t*,
                             typename V::T*);

// The body for n vectors; Max is that of the instruction set.
template <class V, class S, int F, int Max>
DenseBlock<V, S> dense_block_for(int n) {
  static_assert(Max <= 3, "bodies below");
  if constexpr (Max >= 3) {
    if (n == 3) return &dense_block<V, S, F, 3>;
  }
  return n == 2 ? &dense_block<V, S, F, 2> : &dense_block<V, S, F, 1>;
}

template <class V, class S, int Max>
SparseBlock<V, S> sparse_block_for(int n) {
  static_assert(Max == 6, "bodies below");
  static constexpr SparseBlock<V, S> body[7] = {nullptr,
                                                &sparse_block<V, S, 1>,
                                                &sparse_block<V, S, 2>,
                                                &sparse_block<V, S, 3>,
                                                &sparse_block<V, S, 4>,
                                                &sparse_block<V, S, 5>,
                                                &sparse_block<V, S, 6>};
  return body[n];
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
