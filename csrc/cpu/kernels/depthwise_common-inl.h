// What both layouts of depthwise_conv2d share: the end of an output vector, and finding a tile.
#pragma once
#include <stddef.h>

#include "core/params.h"
#include "cpu/depthwise_plan.h"
#include "cpu/kernels/epilogue-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// The end of a tile. Where there is no residual and the activation is a clamp (none, relu, relu6)
// it is two instructions a vector, since a depthwise output is as few as 9 FMAs. All else goes
// through memory to one function: inlined into every tile it was three quarters of the code.
template <class V, class S>
class TileFinish {
  using T = typename V::T;
  using reg = typename V::reg;
  static constexpr int L = V::L;

  Finish<V, S> general_;
  T low_, high_;
  bool clamps_;

 public:
  explicit TileFinish(const ConvParams& p)
      : general_{static_cast<S*>(p.y), static_cast<const S*>(p.residual), p.activation},
        low_(p.activation == Activation::kNone ? T(-INFINITY) : T(0)),
        high_(p.activation == Activation::kRelu6 ? T(6) : T(INFINITY)),
        clamps_(p.residual == nullptr && p.activation <= Activation::kRelu6) {}

  // Vectors `step` elements apart, the first at y.
  template <int Tile>
  SPARSECNN_INLINE void operator()(const reg (&acc)[Tile], int64_t y, int64_t step,
                                   uint32_t mask) const {
    if (clamps_) {
      S* out = general_.y + y;
      const reg low = V::set1(low_), high = V::set1(high_);
#pragma GCC unroll 16
      for (int i = 0; i < Tile; ++i, out += step) {
        V::store_mask(out, V::min(high, V::max(low, acc[i])), mask);  // keeps a NaN
      }
    } else {
      alignas(64) T buffer[Tile * L];
#pragma GCC unroll 16
      for (int i = 0; i < Tile; ++i) V::store(buffer + i * L, acc[i]);
      rows(buffer, Tile, y, step, mask);
    }
  }

  // The same for pairs of rows, of which the lower is `lower` elements on and exists `below` times.
  template <int Tile>
  SPARSECNN_INLINE void pairs(const reg (&acc)[Tile], int64_t y, int64_t step, int64_t lower,
                              int64_t below, uint32_t mask) const {
    if (clamps_) {
      S* out = general_.y + y;
      const reg low = V::set1(low_), high = V::set1(high_);
#pragma GCC unroll 16
      for (int i = 0; i < Tile; ++i, out += step) {
        V::store_pair(out, mask, out + lower, i < below ? mask : 0,
                      V::min(high, V::max(low, acc[i])));
      }
    } else {
      alignas(64) T buffer[Tile * L];
#pragma GCC unroll 16
      for (int i = 0; i < Tile; ++i) V::store(buffer + i * L, acc[i]);
      row_pairs(buffer, Tile, y, step, lower, below, mask);
    }
  }

 private:
  __attribute__((noinline)) void rows(const T* buffer, int count, int64_t y, int64_t step,
                                      uint32_t mask) const {
    for (int i = 0; i < count; ++i) general_(V::load(buffer + i * L), y + i * step, mask);
  }
  __attribute__((noinline)) void row_pairs(const T* buffer, int count, int64_t y, int64_t step,
                                           int64_t lower, int64_t below, uint32_t mask) const {
    for (int i = 0; i < count; ++i, y += step) {
      general_.pair(V::load(buffer + i * L), y, mask, y + lower, i < below ? mask : 0);
    }
  }
};

// Where a span of `filter` taps `dilation` apart, the first at `position`, lies within [0, size).
struct Taps {
  int64_t first, last;  // taps [first, last)
};

SPARSECNN_INLINE Taps taps_inside(int64_t position, int64_t dilation, int64_t filter,
                                  int64_t size) {
  Taps t{0, filter};
  if (position < 0) t.first = (-position + dilation - 1) / dilation;
  if (position + (filter - 1) * dilation >= size) {
    t.last = position >= size ? 0 : (size - 1 - position) / dilation + 1;
  }
  if (t.first > t.last) t.first = t.last;
  return t;
}

// Whether filters of 3, 5 and 7 get bodies of their own: in doubles and without wide vectors they
// gain little, and each takes seconds to compile.
template <class V>
constexpr bool kFixedFilters = sizeof(typename V::T) == 4 && V::L > 4;

// A number of the tile as a type, to choose a template by.
template <int Tile>
struct TileOf {
  static constexpr int value = Tile;
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
