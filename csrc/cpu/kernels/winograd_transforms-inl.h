// The transforms of F(m x m, 3 x 3) on vectors whose lanes are tiles; matrices and points in
// core/winograd_tiles.h. In 1-d, F(2) takes 4 additions in and 4 out; F(4) 12 operations in and 14
// out, since the points come in pairs +-p: what is even in p and what is odd is computed once.
#pragma once
#include "core/winograd_tiles.h"
#include "cpu/vec.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

template <class V, int M>
struct WinogradTransform;

template <class V>
struct WinogradTransform<V, 2> {
  using reg = typename V::reg;
  // d := B^T d, n elements of a tile's column or row.
  static SPARSECNN_INLINE void input(reg (&d)[4]) {
    const reg minus = V::set1(-1);
    const reg first = V::fmadd(d[2], minus, d[0]), last = V::fmadd(d[3], minus, d[1]);
    const reg sum = V::add(d[1], d[2]), difference = V::fmadd(d[1], minus, d[2]);
    d[0] = first;
    d[1] = sum;
    d[2] = difference;
    d[3] = last;
  }
  // y = A^T m.
  static SPARSECNN_INLINE void output(const reg (&m)[4], reg (&y)[2]) {
    const reg minus = V::set1(-1);
    y[0] = V::add(m[0], V::add(m[1], m[2]));
    y[1] = V::fmadd(V::add(m[2], m[3]), minus, m[1]);
  }
};

template <class V>
struct WinogradTransform<V, 4> {
  using T = typename V::T;
  using reg = typename V::reg;
  static constexpr double a = kWinogradNear, b = kWinogradFar, a2 = a * a, b2 = b * b;

  static SPARSECNN_INLINE reg constant(double v) { return V::set1(static_cast<T>(v)); }

  static SPARSECNN_INLINE void input(reg (&d)[6]) {
    const reg minus_a2 = constant(-a2), minus_b2 = constant(-b2);
    const reg product = constant(a2 * b2), minus_sum = constant(-(a2 + b2));
    const reg even_a = V::fmadd(d[2], minus_b2, d[4]), odd_a = V::fmadd(d[1], minus_b2, d[3]);
    const reg even_b = V::fmadd(d[2], minus_a2, d[4]), odd_b = V::fmadd(d[1], minus_a2, d[3]);
    d[0] = V::fmadd(d[0], product, V::fmadd(d[2], minus_sum, d[4]));
    d[5] = V::fmadd(d[1], product, V::fmadd(d[3], minus_sum, d[5]));
    d[1] = V::fmadd(odd_a, constant(a), even_a);
    d[2] = V::fmadd(odd_a, constant(-a), even_a);
    d[3] = V::fmadd(odd_b, constant(b), even_b);
    d[4] = V::fmadd(odd_b, constant(-b), even_b);
  }

  static SPARSECNN_INLINE void output(const reg (&m)[6], reg (&y)[4]) {
    const reg minus = V::set1(-1);
    const reg sum_a = V::add(m[1], m[2]), difference_a = V::fmadd(m[2], minus, m[1]);
    const reg sum_b = V::add(m[3], m[4]), difference_b = V::fmadd(m[4], minus, m[3]);
    y[0] = V::add(m[0], V::add(sum_a, sum_b));
    y[1] = V::fmadd(difference_a, constant(a), V::mul(difference_b, constant(b)));
    y[2] = V::fmadd(sum_a, constant(a2), V::mul(sum_b, constant(b2)));
    y[3] = V::fmadd(difference_a, constant(a2 * a), V::fmadd(difference_b, constant(b2 * b), m[5]));
  }
};

// One vector of tiles: B^T d B from `tile`, whose pixels lie tile_pitch elements apart, to `out`,
// whose taps lie out_pitch apart.
template <class V, int M>
SPARSECNN_INLINE void transform_input(const typename V::T* tile, int64_t tile_pitch,
                                      typename V::T* out, int64_t out_pitch) {
  using reg = typename V::reg;
  constexpr int kA = M + 2;
  reg rows[kA][kA];  // [column][row] after the first pass
#pragma GCC unroll 6
  for (int j = 0; j < kA; ++j) {
#pragma GCC unroll 6
    for (int i = 0; i < kA; ++i) rows[j][i] = V::load(tile + (i * kA + j) * tile_pitch);
    WinogradTransform<V, M>::input(rows[j]);
  }
#pragma GCC unroll 6
  for (int i = 0; i < kA; ++i) {
    reg d[kA];
#pragma GCC unroll 6
    for (int j = 0; j < kA; ++j) d[j] = rows[j][i];
    WinogradTransform<V, M>::input(d);
#pragma GCC unroll 6
    for (int j = 0; j < kA; ++j) V::store(out + (i * kA + j) * out_pitch, d[j]);
  }
}

// One vector of tiles: A^T m A + bias from products whose taps lie pitch elements apart, to `tile`.
template <class V, int M>
SPARSECNN_INLINE void transform_output(const typename V::T* products, int64_t pitch,
                                       typename V::T bias, typename V::T* tile,
                                       int64_t tile_pitch) {
  using reg = typename V::reg;
  constexpr int kA = M + 2;
  reg rows[kA][M];
#pragma GCC unroll 6
  for (int j = 0; j < kA; ++j) {
    reg m[kA];
#pragma GCC unroll 6
    for (int i = 0; i < kA; ++i) m[i] = V::load(products + (i * kA + j) * pitch);
    WinogradTransform<V, M>::output(m, rows[j]);
  }
  const reg b = V::set1(bias);
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) {
    reg m[kA], y[M];
#pragma GCC unroll 6
    for (int j = 0; j < kA; ++j) m[j] = rows[j][i];
    WinogradTransform<V, M>::output(m, y);
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) V::store(tile + (i * M + j) * tile_pitch, V::add(y[j], b));
  }
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
