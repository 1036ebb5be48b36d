// depthwise_conv2d in NCHW: lanes are output columns. depthwise_conv2d-inl.h has the story.
#pragma once
#include "cpu/kernels/depthwise_common-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// Tiles of output rows of one plane, side by side: L columns of each row; or, in a pair, L/2
// columns of each and of the rows Tile further down.
template <class T>
struct NchwTile {
  const T* x;             // input row of the first output row and the first tap, column 0
  ptrdiff_t pitch;        // elements between input rows
  uint64_t rows, rows_2;  // bit i: input row i (of the lower rows of a pair) is inside the image
  int64_t top, height;    // image row that x is at, H
  int64_t first, width;   // image column of the first output's first tap, W
  int64_t vectors;        // tiles
  const uint32_t* masks;  // (vectors, taps, 2): columns inside the image, of both loads of a tap
  const T* weights;       // (R, S)
  int64_t filter_rows, taps;
  int64_t stride_h, stride_w, dil_h, dil_w;
  T bias;
  int64_t y, y_pitch;  // element of the first output, elements between output rows
  uint32_t mask;       // output columns of the last tile
  int64_t below;       // rows of the lower half of a pair that exist
};

// The filter taps of `Count` neighbouring columns from `s` on: one load of every input row for all
// of them feeds the R output rows whose window covers it. x: the first output's first tap.
template <class V, int R, int Stride, int Tile, bool Pair, int Count>
SPARSECNN_INLINE void nchw_taps(const NchwTile<typename V::T>& t, const typename V::T* x_first,
                                const uint32_t* masks, int64_t s, typename V::reg (&acc)[Tile]) {
  using reg = typename V::reg;
  constexpr int L = V::L;
  constexpr int Rows = (Tile - 1) * Stride + R;
  const uint32_t mask = masks[2 * s];
  [[maybe_unused]] const uint32_t rest = masks[2 * s + 1];
  reg w[Count][R];
#pragma GCC unroll 2
  for (int c = 0; c < Count; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[c][r] = V::set1(t.weights[r * t.taps + s + c]);
  }
  const typename V::T* p = x_first + s * t.dil_w;
  const ptrdiff_t pitch = t.pitch, below = Tile * Stride * t.pitch;
  const uint64_t either = t.rows | t.rows_2;
#pragma GCC unroll 64
  for (int i = 0; i < Rows; ++i, p += pitch) {
    // Said to be likely: else the compiler moves the arithmetic out of line and spills for it.
    if (__builtin_expect((either >> i & 1u) != 0, 1)) {
      reg x[Count];
      if constexpr (Pair) {
        const uint32_t upper = t.rows >> i & 1u ? mask : 0, lower = t.rows_2 >> i & 1u ? mask : 0;
        if constexpr (Stride == 1) {
          constexpr uint32_t kHalf = kAllLanes<L / 2>;
          x[0] = V::load_pair(p, upper & kHalf, p + below, lower & kHalf);
        } else {
          const reg a = V::load_mask(p, upper), b = V::load_mask(p + below, lower);
          x[0] = V::even(a, b);
          if constexpr (Count == 2) x[1] = V::odd(a, b);
        }
      } else if constexpr (Stride == 1) {
        x[0] = V::load_mask(p, mask);
      } else {
        const reg a = V::load_mask(p, mask), b = V::load_mask(p + L, rest);
        x[0] = V::even(a, b);
        if constexpr (Count == 2) x[1] = V::odd(a, b);
      }
#pragma GCC unroll 2
      for (int c = 0; c < Count; ++c) {
        keep(x[c]);
#pragma GCC unroll 8
        for (int r = R - 1; r >= 0; --r) {
          const int o = (i - r) / Stride;
          if (i >= r && (i - r) % Stride == 0 && o < Tile) {
            acc[o] = V::fmadd(x[c], w[c][r], acc[o]);
          }
        }
      }
    }
  }
}

template <class V, class S, int R, int Stride, int Tile, bool Pair>
void nchw_fixed(const NchwTile<typename V::T>& t, const TileFinish<V, S>& finish) {
  const typename V::T* x = t.x + t.first;
  const uint32_t* masks = t.masks;
  const typename V::reg bias = V::set1(t.bias);
  for (int64_t v = 0; v < t.vectors; ++v, x += V::L * Stride, masks += 2 * t.taps) {
    typename V::reg acc[Tile];
#pragma GCC unroll 16
    for (int o = 0; o < Tile; ++o) acc[o] = bias;
    int64_t s = 0;
    if constexpr (Stride == 2) {
      for (; s + 1 < t.taps; s += 2) nchw_taps<V, R, Stride, Tile, Pair, 2>(t, x, masks, s, acc);
    }
    for (; s < t.taps; ++s) nchw_taps<V, R, Stride, Tile, Pair, 1>(t, x, masks, s, acc);
    const int64_t y = t.y + v * V::L;
    const uint32_t mask = v + 1 < t.vectors ? kAllLanes<V::L> : t.mask;
    if constexpr (Pair) {
      finish.pairs(acc, y, t.y_pitch, Tile * t.y_pitch, t.below, mask);
    } else {
      finish(acc, y, t.y_pitch, mask);
    }
  }
}

// Any filter: a load per FMA. Stride is 1, 2, or 0 for what takes a load per lane.
template <class V, class S, int Stride, int Tile>
void nchw_any(const NchwTile<typename V::T>& t, const TileFinish<V, S>& finish) {
  using reg = typename V::reg;
  using T = typename V::T;
  constexpr int L = V::L;
  for (int64_t v = 0; v < t.vectors; ++v) {
    const uint32_t* const masks = t.masks + v * 2 * t.taps;
    reg acc[Tile];
#pragma GCC unroll 16
    for (int o = 0; o < Tile; ++o) acc[o] = V::set1(t.bias);
    for (int64_t r = 0; r < t.filter_rows; ++r) {
      for (int64_t s = 0; s < t.taps; ++s) {
        const reg w = V::set1(t.weights[r * t.taps + s]);
        const int64_t column = t.first + v * L * t.stride_w + s * t.dil_w;
        const uint32_t mask = masks[2 * s], rest = masks[2 * s + 1];
        const T* const p = t.x + r * t.dil_h * t.pitch + column;
#pragma GCC unroll 16
        for (int o = 0; o < Tile; ++o) {
          const int64_t h = t.top + o * t.stride_h + r * t.dil_h;
          if (h < 0 || h >= t.height) continue;
          const T* const row = p + o * t.stride_h * t.pitch;
          reg x;
          if constexpr (Stride == 1) {
            x = V::load_mask(row, mask);
          } else if constexpr (Stride == 2) {
            x = V::even(V::load_mask(row, mask), V::load_mask(row + L, rest));
          } else {
            alignas(64) T lanes[L];
            for (int l = 0; l < L; ++l) {
              const int64_t at = column + l * t.stride_w;
              lanes[l] = at >= 0 && at < t.width ? row[l * t.stride_w] : T(0);
            }
            x = V::load(lanes);
          }
          acc[o] = V::fmadd(x, w, acc[o]);
        }
      }
    }
    const uint32_t mask = v + 1 < t.vectors ? kAllLanes<L> : t.mask;
    finish(acc, t.y + v * L, t.y_pitch, mask);
  }
}

template <class V, class S>
using NchwFunction = void (*)(const NchwTile<typename V::T>&, const TileFinish<V, S>&);

// The function for a filter of `height` rows at a stride; null where there is none.
template <class V, class S, bool Pair, int Tile>
NchwFunction<V, S> nchw_fixed_of_tile(int64_t height, int64_t stride) {
  if constexpr (kFixedFilters<V>) {
    if (height == 3 && stride == 1) return nchw_fixed<V, S, 3, 1, Tile, Pair>;
    if (height == 3 && stride == 2) return nchw_fixed<V, S, 3, 2, Tile, Pair>;
    if (height == 5 && stride == 1) return nchw_fixed<V, S, 5, 1, Tile, Pair>;
    if (height == 5 && stride == 2) return nchw_fixed<V, S, 5, 2, Tile, Pair>;
    if (height == 7 && stride == 1) return nchw_fixed<V, S, 7, 1, Tile, Pair>;
  }
  return nullptr;
}

template <class V, class S, int Tile>
NchwFunction<V, S> nchw_any_of_tile(int64_t stride) {
  if (stride == 1) return nchw_any<V, S, 1, Tile>;
  if (stride == 2) return nchw_any<V, S, 2, Tile>;
  return nchw_any<V, S, 0, Tile>;
}

// Tiles that the registers do not hold are not compiled: the plan asks for none.
template <class V, class S, bool Pair, int MaxTile>
NchwFunction<V, S> find_nchw(int32_t tile, int64_t height, int64_t stride, bool fixed) {
  const auto choose = [&](auto chosen) {
    constexpr int Tile = decltype(chosen)::value;
    if (fixed) return nchw_fixed_of_tile<V, S, Pair, Tile>(height, stride);
    return nchw_any_of_tile<V, S, Tile>(stride);
  };
  if constexpr (MaxTile >= 14) {
    if (tile == 14) return choose(TileOf<14>{});
  }
  if constexpr (MaxTile >= 8) {
    if (tile == 8) return choose(TileOf<8>{});
    if (tile == 7) return choose(TileOf<7>{});
  }
  return tile == 4 ? choose(TileOf<4>{}) : choose(TileOf<1>{});
}

template <class V, class S, int MaxTile>
class DepthwiseNchw {
  using T = typename V::T;
  static constexpr int L = V::L;

  const DepthwiseConv2dParams& params_;
  const cpu::DepthwisePlan& plan_;
  const ConvShape& s_;
  const TileFinish<V, S> finish_;
  T* const weights_;  // of the plane, in the type of accumulation
  uint32_t* const masks_;
  T* const rows_;  // input rows of a tile in that type, where it is not that of storage
  NchwTile<T> tile_;
  const int64_t multiplier_;  // K / C

  struct Plane {
    int64_t image, k, channel, band;
    int64_t of_channel = 0;  // k - channel * multiplier
  };

 public:
  DepthwiseNchw(const DepthwiseConv2dParams& params, const cpu::DepthwisePlan& plan, char* scratch)
      : params_(params),
        plan_(plan),
        s_(params.shape),
        finish_(params),
        weights_(reinterpret_cast<T*>(scratch + plan.weight_offset)),
        masks_(reinterpret_cast<uint32_t*>(scratch + plan.mask_offset)),
        rows_(reinterpret_cast<T*>(scratch + plan.rows_offset)),
        multiplier_(params.shape.k / params.shape.c) {}

  void run(int64_t begin, int64_t end) {
    NchwTile<T>& t = tile_;
    t.pitch = t.width = s_.w;
    t.height = s_.h;
    t.filter_rows = s_.r, t.taps = s_.s;
    t.stride_h = s_.stride_h, t.stride_w = s_.stride_w, t.dil_h = s_.dil_h, t.dil_w = s_.dil_w;
    t.y_pitch = s_.q;
    // A fixed filter moves on by equal strides, and horizontally thinned rows have no dilation.
    const bool known = s_.stride_h == 1 ? s_.r == 3 || s_.r == 5 || s_.r == 7
                                        : s_.stride_h == 2 && s_.dil_w == 1 && s_.r < 7 && s_.r % 2;
    const bool fixed =
        kFixedFilters<V> && known && s_.r > 1 && s_.dil_h == 1 && s_.stride_h == s_.stride_w;
    const auto full = find_nchw<V, S, false, MaxTile>(plan_.full_tile, s_.r, s_.stride_w, fixed);
    const auto pair = find_nchw<V, S, true, MaxTile>(plan_.pair_tile, s_.r, s_.stride_w, fixed);
    const int64_t rest = s_.q % L;
    set_masks();
    // Counted on instead of divided anew: a plane of 7x7 takes less time than the divisions.
    Plane at{begin / plan_.bands / s_.k, begin / plan_.bands % s_.k, 0, begin % plan_.bands};
    at.channel = at.k / multiplier_;
    at.of_channel = at.k % multiplier_;
    for (int64_t item = begin; item < end; ++item, next(at)) {
      int64_t row_begin = 0, row_end = s_.p;
      if (plan_.bands > 1) {
        row_begin = s_.p * at.band / plan_.bands;
        row_end = s_.p * (at.band + 1) / plan_.bands;
      }
      const bool paired = fixed && rest > 0 && rest <= L / 2 && row_end - row_begin > 1;
      const int64_t columns = paired ? s_.q - rest : s_.q;
      set_plane(at.k);
      if (columns > 0) {
        t.vectors = (columns + L - 1) / L;
        t.masks = masks_;
        t.mask = range_mask<L>((t.vectors - 1) * L, 0, columns);
        run_rows(full, plan_.full_tile, false, at, row_begin, row_end, 0);
      }
      if (paired) {
        t.vectors = 1;
        t.masks = masks_ + s_.q / L * 2 * s_.s;
        t.mask = range_mask<L>(0, 0, rest);
        run_rows(pair, plan_.pair_tile, true, at, row_begin, row_end, columns);
      }
    }
  }

 private:
  // Of every tile and tap, the columns inside the image: of L outputs, which is one load, or two
  // where the row is thinned out. A pair that loads L/2 columns of a row takes the lower half.
  void set_masks() {
    uint32_t* mask = masks_;
    for (int64_t q = 0; q < s_.q; q += L) {
      for (int64_t s = 0; s < s_.s; ++s, mask += 2) {
        const int64_t column = q * s_.stride_w - s_.pad_left + s * s_.dil_w;
        mask[0] = range_mask<L>(column, 0, s_.w);
        mask[1] = range_mask<L>(column + L, 0, s_.w);
      }
    }
  }

  // The next band, of the next output channel, of the next image.
  void next(Plane& at) const {
    if (++at.band < plan_.bands) return;
    at.band = 0;
    if (++at.k == s_.k)
      at.k = at.channel = at.of_channel = 0, ++at.image;
    else if (++at.of_channel == multiplier_)
      at.of_channel = 0, ++at.channel;
  }

  void set_plane(int64_t k) {
    const int64_t taps = s_.r * s_.s;
    const S* const weight = static_cast<const S*>(params_.weight) + k * taps;
    for (int64_t i = 0; i < taps; ++i) weights_[i] = to_acc(weight[i]);
    tile_.weights = weights_;
    tile_.bias = params_.bias ? T(to_acc(static_cast<const S*>(params_.bias)[k])) : T(0);
  }

  // Output rows [row_begin, row_end) of a plane from column q_begin on, tile by tile.
  void run_rows(NchwFunction<V, S> function, int64_t tile, bool pair, const Plane& at,
                int64_t row_begin, int64_t row_end, int64_t q_begin) {
    NchwTile<T>& t = tile_;
    const int64_t step = pair ? 2 * tile : tile;
    const int64_t reach = (tile - 1) * s_.stride_h + (s_.r - 1) * s_.dil_h + 1;
    for (int64_t row = row_begin; row < row_end; row += step) {
      // The last tile moves back over its neighbour, as far as the band reaches.
      const int64_t back = row + step <= row_end ? row : row_end - step;
      const int64_t p = back < row_begin ? row_begin : back;
      t.top = p * s_.stride_h - s_.pad_top;
      t.below = row_end - p - tile;
      t.rows = rows_inside(t.top, reach);
      t.rows_2 = pair ? rows_inside(t.top + tile * s_.stride_h, reach) : 0;
      const int64_t span = reach + (pair ? tile * s_.stride_h : 0);
      t.x = input_rows(at, t.top, t.top + span);
      t.first = q_begin * s_.stride_w - s_.pad_left;
      t.y = ((at.image * s_.k + at.k) * s_.p + p) * s_.q + q_begin;
      function(t, finish_);
    }
  }

  // Fixed filters only: those have at most 33 rows.
  uint64_t rows_inside(int64_t top, int64_t rows) const {
    const int64_t first = top < 0 ? -top : 0, below = s_.h - top;
    const int64_t last = rows < below ? rows : below;
    return last > first && last <= 64 ? (~uint64_t(0) >> (64 - (last - first))) << first : 0;
  }

  // Where image row `top` of a plane would be; rows [top, bottom) that exist may be read.
  const T* input_rows(const Plane& at, int64_t top, int64_t bottom) {
    const int64_t first = (at.image * s_.c + at.channel) * s_.h * s_.w;
    const S* const x = static_cast<const S*>(params_.x) + first;
    return converted(x, top, bottom);
  }
  const T* converted(const T* x, int64_t top, int64_t) { return x + top * s_.w; }
  template <class Short>
  const T* converted(const Short* x, int64_t top, int64_t bottom) {
    const int64_t from = top < 0 ? 0 : top, to = bottom > s_.h ? s_.h : bottom;
    const int64_t count = (to - from) * s_.w;
    for (int64_t i = 0; i < count; i += L) {
      const uint32_t mask = range_mask<L>(i, 0, count);
      V::store_mask(rows_ + i, V::load_mask(x + from * s_.w + i, mask), mask);
    }
    return rows_ + (top - from) * s_.w;
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
