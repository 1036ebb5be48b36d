// The two sides of a panel (cpu/tile_plan.h): pack brings input pixels into lanes, unpack takes
// output lanes back to NHWC pixels and finishes them (NCHW outputs leave from the row loop,
// sinks-inl.h). Included by tiled_conv2d-inl.h.
//
// Packing reads every input vector once per item and writes panel vectors. Both sides are
// transposes of L x L blocks, or of half that width; in pointwise NCHW layers, where lanes are
// neighbouring pixels, packing is a copy or nothing at all. Rows lie a plane apart, which no
// hardware prefetcher follows: prefetching them took packing and unpacking from 33 % to 23 % of a
// 3x3 layer at 90 % (64 channels, 56x56).
#pragma once
#include <stddef.h>

#include "cpu/kernels/places-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// Distances of the software prefetches, in channels, filters and vectors; measured on Zen 4.
constexpr int64_t kPrefetchIn = 4, kPrefetchOut = 2, kPrefetchPixels = 64;

template <class V, class S>
class Tiles : protected TilePlaces<V, S> {
 protected:
  using Base = TilePlaces<V, S>;
  using Lane = typename Base::Lane;
  using T = typename V::T;
  using reg = typename V::reg;
  using Base::channels_of;
  using Base::finish_;
  using Base::first_channel;
  using Base::L;
  using Base::lane_;
  using Base::out_col;
  using Base::out_row;
  using Base::panel_;
  using Base::params_;
  using Base::plan_;
  using Base::s_;
  using Base::x0_;
  using Base::y0_;

  Tiles(const ConvParams& params, const TilePlan& plan, char* scratch)
      : Base(params, plan, scratch) {}

  // Channels [first, first + channels) of those that the weight reads of a group.
  void pack(int64_t group, int64_t first, int64_t channels) {
    const int64_t c0 = first_channel(group, first);
    const ChannelList list = channels_of(group, first);
    if (params_.layout == Layout::kNHWC) {
      pack_nhwc(c0, list, channels);
    } else if (plan_.interleaved) {
      pack_pixels(c0, list, channels);
    } else {
      pack_nchw(c0, list, channels);
    }
  }

  // NCHW, lanes = tiles: rows of L lanes, L columns each, transposed to columns of L lanes.
  void pack_nchw(int64_t c0, ChannelList list, int64_t channels) {
    const int64_t plane = s_.h * s_.w;
    const S* const x = static_cast<const S*>(params_.x) + c0 * plane;
    bool narrow = false;  // the last columns, if they fill no more than half a register
    for (int64_t j0 = 0; j0 < plan_.span; j0 += narrow ? L / 2 : L) {
      narrow = plan_.span - j0 <= L / 2;
      uint32_t mask[L];
      int64_t offset[L];
      for (int l = 0; l < L; ++l) {
        const Lane& lane = lane_[l];
        const int64_t hi = s_.w - lane.in_col < plan_.span ? s_.w - lane.in_col : plan_.span;
        mask[l] = lane.active ? range_mask<L>(j0, -lane.in_col, hi) : 0;
        offset[l] = lane.image * s_.c * plane + lane.in_row * s_.w + lane.in_col + j0;
      }
      const int64_t columns = plan_.span - j0 < L ? plan_.span - j0 : L;
      const int32_t* slot = plan_.col_slot + j0;
      // With a stride, slots may be out of order between two matching ends.
      bool in_order = columns == L && slot[0] >= 0;
      for (int j = 1; j < L && in_order; ++j) in_order = slot[j] == slot[0] + j;
      const int64_t channel = plan_.channel_pitch * L;
      for (int64_t i = 0; i < plan_.rows; ++i) {
        const int64_t row = plan_.row_source[i];
        uint32_t row_mask[L];
        uint32_t any = 0;
        for (int l = 0; l < L; ++l) {
          const int64_t h = lane_[l].in_row + row;
          row_mask[l] = h >= 0 && h < s_.h ? mask[l] : 0;
          any |= row_mask[l];
        }
        T* out = panel_ + i * plan_.cols * L;
        const auto in_channel = [&](int64_t c) {
          return x + row * s_.w + list[c < channels ? c : channels - 1] * plane;
        };
        if (narrow) {
          for (int64_t c = 0; c < channels; ++c, out += channel) {
            const S* const in = in_channel(c);
            const S* const ahead = in_channel(c + kPrefetchIn);
            reg r[L / 2];
#pragma GCC unroll 8
            for (int l = 0; l < L / 2; ++l) {
              __builtin_prefetch(ahead + offset[l]);
              __builtin_prefetch(ahead + offset[l + L / 2]);
              r[l] = V::load_pair(in + offset[l], row_mask[l], in + offset[l + L / 2],
                                  row_mask[l + L / 2]);
            }
            V::transpose_pairs(r);
#pragma GCC unroll 8
            for (int j = 0; j < L / 2; ++j) {
              if (j < columns && slot[j] >= 0) V::store(out + slot[j] * L, r[j]);
            }
          }
          continue;
        }
        for (int64_t c = 0; c < channels; ++c, out += channel) {
          const S* const in = in_channel(c);
          const S* const ahead = in_channel(c + kPrefetchIn);
          reg r[L];
          if (any) {
#pragma GCC unroll 16
            for (int l = 0; l < L; ++l) __builtin_prefetch(ahead + offset[l]);
#pragma GCC unroll 16
            for (int l = 0; l < L; ++l) r[l] = V::load_mask(in + offset[l], row_mask[l]);
            V::transpose(r);
          } else {
#pragma GCC unroll 16
            for (int l = 0; l < L; ++l) r[l] = V::zero();
          }
          if (in_order) {
#pragma GCC unroll 16
            for (int j = 0; j < L; ++j) V::store(out + (slot[0] + j) * L, r[j]);
          } else {
#pragma GCC unroll 16
            for (int j = 0; j < L; ++j) {
              if (j < columns && slot[j] >= 0) V::store(out + slot[j] * L, r[j]);
            }
          }
        }
      }
    }
  }

  // NCHW, lanes = neighbouring pixels: a plain copy.
  void pack_pixels(int64_t c0, ChannelList list, int64_t channels) {
    const S* const x = static_cast<const S*>(params_.x) + (lane_[0].image * s_.c + c0) * s_.w;
    T* out = panel_;
    const int64_t p0 = x0_ * L;
    const int64_t distance = kPrefetchPixels / plan_.cols + 1;
    for (int64_t c = 0; c < channels; ++c, out += plan_.channel_pitch * L) {
      const int64_t next = c + distance < channels ? c + distance : channels - 1;
      const S* const in = x + list[c] * s_.w;
      const S* const ahead = x + list[next] * s_.w;
      for (int64_t j = 0; j < plan_.cols; ++j) {
        const int64_t p = p0 + j * L;
        __builtin_prefetch(ahead + p);
        V::store(out + j * L, V::load_mask(in + p, range_mask<L>(p, 0, s_.w)));
      }
    }
  }

  // NHWC: L lanes, L channels each, transposed to channels of L lanes.
  void pack_nhwc(int64_t c0, ChannelList list, int64_t channels) {
    const S* const x = static_cast<const S*>(params_.x);
    const int64_t step = plan_.interleaved ? L : 1;
    const ptrdiff_t pitch = static_cast<ptrdiff_t>(plan_.channel_pitch) * L;
    for (int64_t j = 0; j < plan_.cols; ++j) {
      const int64_t col = plan_.col_source[j] * step;
      for (int64_t i = 0; i < plan_.rows; ++i) {
        const int64_t row = plan_.row_source[i];
        bool valid[L];
        int64_t offset[L];
        for (int l = 0; l < L; ++l) {
          const Lane& lane = lane_[l];
          const int64_t h = lane.in_row + row, w = lane.in_col + col;
          valid[l] = lane.active && h >= 0 && h < s_.h && w >= 0 && w < s_.w;
          offset[l] = ((lane.image * s_.h + h) * s_.w + w) * s_.c + c0;
        }
        T* const out = panel_ + (i * plan_.cols + j) * L;
        int64_t n;  // channels taken from L neighbouring ones
        for (int64_t c = 0; c < channels; c += n) {
          const int64_t c1 = list[c];
          n = channels - c < L ? channels - c : L;
          while (list.list && list[c + n - 1] >= c1 + L) --n;
          const uint32_t mask = range_mask<L>(0, 0, list[c + n - 1] + 1 - c1);
          reg r[L];
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) r[l] = V::load_mask(x + offset[l] + c1, valid[l] ? mask : 0);
          V::transpose(r);
          T* to = out + c * pitch;
          if (!list.list) {
#pragma GCC unroll 16
            for (int l = 0; l < L; ++l) {
              if (l < n) V::store(to + l * pitch, r[l]);
            }
            continue;
          }
          int64_t k = 0;
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) {
            if (k < n && list[c + k] == c1 + l) {
              V::store(to, r[l]);
              to += pitch;
              ++k;
            }
          }
        }
      }
    }
  }

  // The filters of a chunk in ascending order: their places among its sums, and themselves.
  struct FilterOrder {
    const int32_t* by_filter;  // null where places ascend with filters
    const int32_t* filter_of;
    SPARSECNN_INLINE int64_t place(int64_t i) const { return by_filter ? by_filter[i] : i; }
    SPARSECNN_INLINE int64_t filter(int64_t i) const {
      return by_filter ? filter_of[by_filter[i]] : i;
    }
  };

  // Stores a vector of the i-th of them and its followers; neighbours in the output together.
  SPARSECNN_INLINE void finish_filters(reg v, int64_t offset, const FilterOrder& order, int64_t i,
                                       int64_t n) {
    for (int64_t j = 0; j < n;) {
      const int64_t first = order.filter(i + j);
      int64_t end = j + 1;
      while (end < n && order.filter(i + end) == first + end - j) ++end;
      finish_(v, offset + first - j, range_mask<L>(0, j, end));
      j = end;
    }
  }

  // NHWC: the sums of one block, (filters, ny, nx, L), to filters k0 and following. NCHW layers
  // store from the row loop instead.
  void unpack(const T* sums, int64_t k0, int64_t filters) {
    constexpr int H = L / 2;
    const ptrdiff_t filter = static_cast<ptrdiff_t>(plan_.ny) * plan_.nx * L;
    const bool moved = plan_.filter_of != nullptr;
    const FilterOrder order{moved ? plan_.by_filter + k0 : nullptr, plan_.filter_of + k0};
    const int64_t first = moved ? 0 : k0;
    for (int64_t y = 0; y < plan_.ny && y0_ + y < plan_.tile_h; ++y) {
      for (int64_t x = 0; x < plan_.nx && x0_ + x < plan_.tile_w; ++x) {
        int64_t offset[L];
        bool inside[L];
        for (int l = 0; l < L; ++l) {
          const Lane& lane = lane_[l];
          const int64_t p = out_row(lane, y), q = out_col(lane, x);
          inside[l] = lane.active && p < s_.p && q < s_.q;
          offset[l] = ((lane.image * s_.p + p) * s_.q + q) * s_.k + first;
        }
        const T* in = sums + (y * plan_.nx + x) * L;
        int64_t k = 0;
        for (; k + (moved ? 0 : H) < filters; k += L) {
          const int64_t n = filters - k < L ? filters - k : L;
          const uint32_t mask = range_mask<L>(0, 0, n);
          reg r[L];
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) {
            r[j] = j < n ? V::load(in + order.place(k + j) * filter) : V::zero();
          }
          V::transpose(r);
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) {
            if (!inside[l]) continue;
            if (moved) {
              finish_filters(r[l], offset[l], order, k, n);
            } else {
              finish_(r[l], offset[l] + k, mask);
            }
          }
        }
        if (k >= filters) continue;
        const uint32_t mask = range_mask<L>(0, 0, filters - k);
        reg r[H];
#pragma GCC unroll 8
        for (int j = 0; j < H; ++j) {
          r[j] = k + j < filters ? V::load(in + (k + j) * filter) : V::zero();
        }
        V::transpose_pairs(r);
#pragma GCC unroll 8
        for (int l = 0; l < H; ++l) {
          finish_.pair(r[l], offset[l] + k, inside[l] ? mask : 0, offset[l + H] + k,
                       inside[l + H] ? mask : 0);
        }
      }
    }
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
