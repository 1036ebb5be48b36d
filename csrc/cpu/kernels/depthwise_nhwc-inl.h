// depthwise_conv2d in NHWC: lanes are output channels. depthwise_conv2d-inl.h has the story.
#pragma once
#include "cpu/kernels/depthwise_common-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// How a vector of input values, one per output channel, comes from a pixel.
template <class V, class S>
struct LoadAll {
  static constexpr bool kWhole = true, kPlain = true;  // all lanes are outputs
  SPARSECNN_INLINE typename V::reg operator()(const S* p) const {
    return V::load_mask(p, kAllLanes<V::L>);
  }
};
template <class V, class S>
struct LoadSome {  // the last channels
  static constexpr bool kWhole = false, kPlain = true;
  uint32_t mask;
  SPARSECNN_INLINE typename V::reg operator()(const S* p) const { return V::load_mask(p, mask); }
};
template <class V, class S>
struct LoadRepeated {  // K / C outputs read one channel
  static constexpr bool kWhole = false, kPlain = false;
  uint32_t mask;
  const int32_t* lane;  // lane of the loaded vector that each output reads
  SPARSECNN_INLINE typename V::reg operator()(const S* p) const {
    return V::permute(V::load_mask(p, mask), lane);
  }
};

// A tile of output columns of one row, for some vectors of channels one after the other.
template <class V, class S>
struct NhwcTile {
  const S* x;                    // first channel at the first row in use, column 0 of the tile
  ptrdiff_t row, pixel;          // elements from one input row in use, column to the next
  const typename V::T* bias;     // (L) of the first vector of channels, then its taps
  const typename V::T* weights;  // first row in use: (rows, taps, L)
  ptrdiff_t block;               // elements to bias and weights of the next vector of channels
  int64_t rows;                  // of the filter that lie inside the image
  int64_t vectors;               // of channels
  uint64_t columns;              // bit j: column j of the tile is inside the image (fixed filters)
  int64_t first, width;          // column of the image where the tile begins, W
  int64_t taps, stride, dilation;
  int64_t y, y_pixel;  // element of the first output, elements to the next
  uint32_t mask;       // output channels, where they do not fill a vector
  const S* next;       // like x, where the tile below begins to read new rows; null for not yet
};

// Filters of Width columns, no dilation. Each input vector is loaded once per filter row and feeds
// the outputs whose window covers it, from registers; so a tap costs an FMA and little else.
template <class V, class S, class Load, int Width, int Stride, int Tile>
void nhwc_fixed(const NhwcTile<V, S>& t, const Load& load, const TileFinish<V, S>& finish) {
  using reg = typename V::reg;
  const S* x = t.x;
  const typename V::T* bias = t.bias;
  const typename V::T* weights = t.weights;
  int64_t y = t.y, line = 0;
  const S* ahead = t.next;
  const ptrdiff_t pixel = t.pixel;
  const uint64_t columns = t.columns;
  const uint32_t mask = Load::kWhole ? kAllLanes<V::L> : t.mask;
  for (int64_t v = 0; v < t.vectors; ++v, x += V::L, y += V::L) {
    reg acc[Tile];
    if (t.next != nullptr) {
      for (int j = 0; j < Tile * Stride; ++j, ahead += V::L) {
        __builtin_prefetch(ahead);
        if (Stride == 2) __builtin_prefetch(ahead + t.row);
        if (++line == t.vectors) line = 0, ahead += pixel - t.vectors * V::L;
      }
    }
    const reg start = V::load(bias);
#pragma GCC unroll 16
    for (int q = 0; q < Tile; ++q) acc[q] = start;
    const S* row = x;
    const typename V::T* taps = weights;
    for (int64_t r = 0; r < t.rows; ++r, row += t.row, taps += Width * V::L) {
      reg w[Width];
#pragma GCC unroll 8
      for (int s = 0; s < Width; ++s) w[s] = V::load(taps + s * V::L);
      const S* p = row;
#pragma GCC unroll 64
      for (int j = 0; j < (Tile - 1) * Stride + Width; ++j, p += pixel) {
        // Said to be likely: else the compiler moves the arithmetic out of line and spills for it.
        if (__builtin_expect((columns >> j & 1u) != 0, 1)) {
          reg in = load(p);
          keep(in);
#pragma GCC unroll 8
          for (int s = Width - 1; s >= 0; --s) {
            const int q = (j - s) / Stride;
            if (j >= s && (j - s) % Stride == 0 && q < Tile) acc[q] = V::fmadd(in, w[s], acc[q]);
          }
        }
      }
    }
    finish(acc, y, t.y_pixel, mask);
    bias += t.block, weights += t.block;
  }
}

// Any filter: a load per FMA, all of them aligned where the channels are.
template <class V, class S, class Load, int Tile>
void nhwc_any(const NhwcTile<V, S>& t, const Load& load, const TileFinish<V, S>& finish) {
  using reg = typename V::reg;
  const ptrdiff_t step = t.stride * t.pixel;
  const int64_t reach = (Tile - 1) * t.stride;
  const uint32_t mask = Load::kWhole ? kAllLanes<V::L> : t.mask;
  for (int64_t v = 0; v < t.vectors; ++v) {
    reg acc[Tile];
    const reg start = V::load(t.bias + v * t.block);
#pragma GCC unroll 16
    for (int q = 0; q < Tile; ++q) acc[q] = start;
    const S* row = t.x + v * V::L;
    const typename V::T* weights = t.weights + v * t.block;
    for (int64_t r = 0; r < t.rows; ++r, row += t.row) {
      for (int64_t s = 0; s < t.taps; ++s, weights += V::L) {
        reg w = V::load(weights);
        keep(w);
        const int64_t column = t.first + s * t.dilation;
        const S* const p = row + s * t.dilation * t.pixel;
        if (column >= 0 && column + reach < t.width) {
#pragma GCC unroll 16
          for (int q = 0; q < Tile; ++q) acc[q] = V::fmadd(load(p + q * step), w, acc[q]);
        } else {
#pragma GCC unroll 16
          for (int q = 0; q < Tile; ++q) {
            const int64_t at = column + q * t.stride;
            if (at >= 0 && at < t.width) acc[q] = V::fmadd(load(p + q * step), w, acc[q]);
          }
        }
      }
    }
    finish(acc, t.y + v * V::L, t.y_pixel, mask);
  }
}

template <class V, class S, class Load>
using NhwcFunction = void (*)(const NhwcTile<V, S>&, const Load&, const TileFinish<V, S>&);

template <class V, class S, class Load, int Tile>
NhwcFunction<V, S, Load> nhwc_of_tile(int64_t width, int64_t stride, bool fixed) {
  // Bodies of their own where the time goes: each takes a second to compile.
  constexpr bool kOften = Load::kWhole || (Load::kPlain && sizeof(S) == 4);
  if constexpr (kFixedFilters<V> && Tile > 1 && kOften) {
    if (fixed && width == 3 && stride == 1) return nhwc_fixed<V, S, Load, 3, 1, Tile>;
    if (fixed && width == 3 && stride == 2) return nhwc_fixed<V, S, Load, 3, 2, Tile>;
    if (fixed && width == 5 && stride == 1) return nhwc_fixed<V, S, Load, 5, 1, Tile>;
    if (fixed && width == 5 && stride == 2) return nhwc_fixed<V, S, Load, 5, 2, Tile>;
    if (fixed && width == 7 && stride == 1) return nhwc_fixed<V, S, Load, 7, 1, Tile>;
  }
  return nhwc_any<V, S, Load, Tile>;
}

// Tiles that the registers do not hold are not compiled: the plan asks for none.
template <class V, class S, class Load, int MaxTile>
NhwcFunction<V, S, Load> find_nhwc(int32_t tile, int64_t width, int64_t stride, bool fixed) {
  if constexpr (MaxTile >= 14) {
    if (tile == 14) return nhwc_of_tile<V, S, Load, 14>(width, stride, fixed);
  }
  if constexpr (MaxTile >= 8) {
    if (tile == 8) return nhwc_of_tile<V, S, Load, 8>(width, stride, fixed);
    if (tile == 7) return nhwc_of_tile<V, S, Load, 7>(width, stride, fixed);
  }
  if (tile == 4) return nhwc_of_tile<V, S, Load, 4>(width, stride, fixed);
  return nhwc_of_tile<V, S, Load, 1>(width, stride, fixed);
}

template <class V, class S, int MaxTile>
class DepthwiseNhwc {
  using T = typename V::T;
  static constexpr int L = V::L;

  const DepthwiseConv2dParams& params_;
  const cpu::DepthwisePlan& plan_;
  const ConvShape& s_;
  const TileFinish<V, S> finish_;
  T* const weights_;  // of the chunk: per vector of channels (bias, taps)[L]

 public:
  DepthwiseNhwc(const DepthwiseConv2dParams& params, const cpu::DepthwisePlan& plan, char* scratch)
      : params_(params),
        plan_(plan),
        s_(params.shape),
        finish_(params),
        weights_(reinterpret_cast<T*>(scratch)) {}

  void run(int64_t begin, int64_t end) {
    int64_t packed = -1;
    while (begin < end) {
      const int64_t row = begin % s_.p;
      const int64_t chunk = begin / s_.p % plan_.chunks, image = begin / s_.p / plan_.chunks;
      const int64_t rows = s_.p - row < end - begin ? s_.p - row : end - begin;
      if (packed != chunk) pack(chunk);
      packed = chunk;
      if (s_.k == s_.c) {
        run_rows<false>(image, chunk, row, row + rows);
      } else {
        run_rows<true>(image, chunk, row, row + rows);
      }
      begin += rows;
    }
  }

 private:
  int64_t channels_of(int64_t chunk, int64_t* first) const {
    *first = chunk * plan_.chunk_vectors * L;
    const int64_t left = s_.k - *first, most = plan_.chunk_vectors * L;
    return left < most ? left : most;
  }

  void pack(int64_t chunk) {
    int64_t k0;
    const int64_t channels = channels_of(chunk, &k0), taps = s_.r * s_.s;
    const S* const weight = static_cast<const S*>(params_.weight);
    const S* const bias = static_cast<const S*>(params_.bias);
    T* out = weights_;
    for (int64_t c = 0; c < channels; c += L) {
      const uint32_t mask = range_mask<L>(c, 0, channels);
      V::store(out, bias ? V::load_mask(bias + k0 + c, mask) : V::zero());
      out += L;
      for (int64_t tap = 0; tap < taps; tap += L) {
        const uint32_t row_mask = range_mask<L>(tap, 0, taps);
        typename V::reg r[L];
        for (int l = 0; l < L; ++l) {
          const bool inside = c + l < channels;
          r[l] = inside ? V::load_mask(weight + (k0 + c + l) * taps + tap, row_mask) : V::zero();
        }
        V::transpose(r);
        for (int l = 0; l < L && tap + l < taps; ++l, out += L) V::store(out, r[l]);
      }
    }
  }

  template <bool Repeated>
  void run_rows(int64_t image, int64_t chunk, int64_t row_begin, int64_t row_end) {
    int64_t k0;
    const int64_t channels = channels_of(chunk, &k0), taps = s_.r * s_.s;
    const int64_t multiplier = s_.k / s_.c;
    const bool fixed = s_.dil_w == 1;
    const auto all = find_nhwc<V, S, LoadAll<V, S>, MaxTile>(plan_.tile, s_.s, s_.stride_w, fixed);
    const auto some =
        find_nhwc<V, S, LoadSome<V, S>, MaxTile>(plan_.tile, s_.s, s_.stride_w, fixed);
    const auto repeated = nhwc_repeated();
    const S* const x = static_cast<const S*>(params_.x);
    NhwcTile<V, S> t;
    t.row = s_.dil_h * s_.w * s_.c;
    t.pixel = s_.c;
    t.block = (taps + 1) * L;
    t.width = s_.w, t.taps = s_.s, t.stride = s_.stride_w, t.dilation = s_.dil_w;
    t.y_pixel = s_.k;
    // Columns outside rows, channels inside them: what the next row reads again is in L1.
    for (int64_t q = 0; q < s_.q; q += plan_.tile) {
      const int64_t q0 = q + plan_.tile <= s_.q ? q : s_.q - plan_.tile;
      t.first = q0 * s_.stride_w - s_.pad_left;
      t.columns = 0;
      const int64_t reach = (plan_.tile - 1) * s_.stride_w + s_.s;
      for (int64_t j = 0; fixed && j < reach && j < 64; ++j) {
        t.columns |= uint64_t(t.first + j >= 0 && t.first + j < s_.w) << j;
      }
      for (int64_t p = row_begin; p < row_end; ++p) {
        const int64_t top = p * s_.stride_h - s_.pad_top;
        const Taps inside = taps_inside(top, s_.dil_h, s_.r, s_.h);
        t.rows = inside.last - inside.first;
        const int64_t y = ((image * s_.p + p) * s_.q + q0) * s_.k + k0;
        const int64_t h = image * s_.h + top + inside.first * s_.dil_h;
        const S* const from = x + (h * s_.w + t.first) * s_.c;
        t.bias = weights_;
        t.weights = weights_ + (1 + inside.first * s_.s) * L;
        t.y = y;
        if constexpr (Repeated) {
          t.vectors = 1;
          for (int64_t c = 0; c < channels; c += L, t.bias += t.block, t.weights += t.block) {
            int32_t lane[L];
            const int64_t k = k0 + c, input = k / multiplier;
            t.mask = range_mask<L>(c, 0, channels);
            const int64_t last = (k + __builtin_popcount(t.mask) - 1) / multiplier;
            for (int l = 0; l < L; ++l) {
              const int64_t at = (k + l) / multiplier;
              lane[l] = static_cast<int32_t>((at < last ? at : last) - input);
            }
            t.x = from + input;
            t.y = y + c;
            repeated(t, {range_mask<L>(0, 0, last - input + 1), lane}, finish_);
          }
        } else {
          t.x = from + k0;
          // All of them exist but those below the image, and a prefetch may miss.
          t.next = plan_.prefetch ? t.x + t.rows * t.row : nullptr;
          t.vectors = channels / L;
          if (t.vectors > 0) all(t, {}, finish_);
          if (channels % L != 0) {
            const int64_t done = t.vectors;
            t.mask = range_mask<L>(0, 0, channels % L);
            t.x += done * L, t.y += done * L;
            t.bias += done * t.block, t.weights += done * t.block;
            t.vectors = 1;
            some(t, {t.mask}, finish_);
          }
        }
      }
    }
  }

  auto nhwc_repeated() const {
    using Repeat = LoadRepeated<V, S>;
    if constexpr (MaxTile >= 14) {
      if (plan_.tile == 14) return nhwc_any<V, S, Repeat, 14>;
    }
    if constexpr (MaxTile >= 8) {
      if (plan_.tile == 8) return nhwc_any<V, S, Repeat, 8>;
      if (plan_.tile == 7) return nhwc_any<V, S, Repeat, 7>;
    }
    return plan_.tile == 4 ? nhwc_any<V, S, Repeat, 4> : nhwc_any<V, S, Repeat, 1>;
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
