// What both layouts of depthwise_conv2d share: the end of an output vector, and finding a tile.
#pragma once
#include <stddef.h>

#include "core/params.h"
#include "cpu/depthwise_plan.h"
#include "cpu/kernels/epilogue-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// Finish where there is no residual and the activation is a clamp (none, relu, relu6), without a
// branch: a depthwise output is as few as 9 FMAs, so the end of it counts.
template <class V, class S>
struct ClampFinish {
  S* y;
  typename V::T low, high;

  explicit ClampFinish(const ConvParams& p)
      : y(static_cast<S*>(p.y)),
        low(p.activation == Activation::kNone ? typename V::T(-INFINITY) : typename V::T(0)),
        high(p.activation == Activation::kRelu6 ? typename V::T(6) : typename V::T(INFINITY)) {}

  // The bound comes first: a NaN in v is kept.
  SPARSECNN_INLINE typename V::reg clamp(typename V::reg v) const {
    return V::min(V::set1(high), V::max(V::set1(low), v));
  }
  SPARSECNN_INLINE void operator()(typename V::reg v, int64_t offset, uint32_t mask) const {
    V::store_mask(y + offset, clamp(v), mask);
  }
  SPARSECNN_INLINE void pair(typename V::reg v, int64_t lo, uint32_t mask_lo, int64_t hi,
                             uint32_t mask_hi) const {
    V::store_pair(y + lo, mask_lo, y + hi, mask_hi, clamp(v));
  }
};

// Either end of a tile, chosen once per tile.
template <class V, class S>
struct TileFinish {
  Finish<V, S> general;
  ClampFinish<V, S> clamp;
  bool clamps;

  explicit TileFinish(const ConvParams& p)
      : general{static_cast<S*>(p.y), static_cast<const S*>(p.residual), p.activation},
        clamp(p),
        clamps(p.residual == nullptr && p.activation <= Activation::kRelu6) {}

  // each(finish) for all vectors of the tile.
  template <class Each>
  SPARSECNN_INLINE void operator()(Each&& each) const {
    if (clamps) {
      each(clamp);
    } else {
      each(general);
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

// A number of the tile as a type, to choose a template by.
template <int Tile>
struct TileOf {
  static constexpr int value = Tile;
};

template <int L>
constexpr uint32_t kAllLanes = L == 32 ? ~0u : (1u << L) - 1u;

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
