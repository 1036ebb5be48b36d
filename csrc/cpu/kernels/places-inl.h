// Where the lanes of a block are in input and output, and which input the next block wants to find
// in the cache. Included by tiles-inl.h.
#pragma once
#include <stddef.h>

#include "cpu/kernels/epilogue-inl.h"
#include "cpu/kernels/prefetcher-inl.h"
#include "cpu/tile_plan.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

using cpu::TilePlan;

// Inputs that large are prefetched block by block.
constexpr int64_t kPrefetchedBytes = 1 << 20;

template <class V, class S>
class TilePlaces {
 protected:
  using T = typename V::T;
  using reg = typename V::reg;
  static constexpr int L = V::L;

  // One lane of the current block.
  struct Lane {
    int64_t image, tile_y, tile_x;
    bool active;             // its image and tile exist
    int64_t in_row, in_col;  // input position of packed row 0, column 0; may lie in the padding
  };

  const ConvParams& params_;
  const TilePlan& plan_;
  const ConvShape& s_;
  T* const panel_;
  const Finish<V, S> finish_;
  Lane lane_[L];
  int64_t y0_ = 0, x0_ = 0;  // first output position of the block inside a tile
  // The placed block's input, for a Prefetcher.
  static constexpr int32_t kMaxRows = 128;
  int64_t row_[kMaxRows];
  Prefetcher listed_{};

  TilePlaces(const ConvParams& params, const TilePlan& plan, char* scratch)
      : params_(params),
        plan_(plan),
        s_(plan.shape),
        panel_(reinterpret_cast<T*>(scratch + plan.panel_offset)),
        finish_{static_cast<S*>(params.y), static_cast<const S*>(params.residual),
                params.activation} {}

  // Output column of a lane's position x, and the step between positions.
  int64_t out_col(const Lane& l, int64_t x) const {
    return plan_.interleaved ? (x0_ + x) * L + l.tile_x : l.tile_x * plan_.tile_w + x0_ + x;
  }
  int64_t out_row(const Lane& l, int64_t y) const { return l.tile_y * plan_.tile_h + y0_ + y; }

  // Block b along images, rows and columns.
  void place_block(int64_t b) {
    const int64_t block_x = b % plan_.blocks_x, block_y = b / plan_.blocks_x % plan_.blocks_y;
    const int64_t image_group = b / plan_.blocks_x / plan_.blocks_y;
    y0_ = block_y * plan_.super_y * plan_.ny;
    x0_ = block_x * plan_.super_x * plan_.nx;
    for (int64_t l = 0; l < L; ++l) {
      Lane& lane = lane_[l];
      lane.tile_x = l % plan_.lx;
      lane.tile_y = l / plan_.lx % plan_.ly;
      lane.image = image_group * plan_.ln + l / (plan_.lx * plan_.ly);
      lane.in_row = out_row(lane, 0) * s_.stride_h - s_.pad_top;
      lane.in_col = out_col(lane, 0) * s_.stride_w - s_.pad_left;
      lane.active = lane.image < s_.n && out_row(lane, 0) < s_.p && out_col(lane, 0) < s_.q;
    }
  }

  // Small inputs are in L2 already: there the prefetches only cost.
  bool worth_prefetching() const {
    if (params_.layout == Layout::kNHWC || plan_.in_place) return false;
    if (!plan_.interleaved && plan_.blocks_x > 1) return false;  // whole rows are listed
    return s_.n * s_.c * s_.h * s_.w * static_cast<int64_t>(sizeof(S)) > kPrefetchedBytes;
  }

  // The channels of a group that the weight reads, from the first-th on.
  ChannelList channels_of(int64_t group, int64_t first = 0) const {
    return {plan_.channel ? plan_.channel + group * plan_.channels + first : nullptr};
  }

  // The first input channel that places of that list are counted from.
  int64_t first_channel(int64_t group, int64_t first = 0) const {
    return group * s_.channels_per_group() + (plan_.channel ? 0 : first);
  }

  // The rows of one channel of a group that the placed block reads.
  void list_rows(int64_t group) {
    const int64_t size = sizeof(S), plane = s_.h * s_.w;
    listed_ = {};
    listed_.first = reinterpret_cast<const char*>(static_cast<const S*>(params_.x) +
                                                  first_channel(group) * plane);
    listed_.channel = channels_of(group);
    listed_.rows = row_;
    listed_.pitch = plane * size;
    if (plan_.interleaved) {
      const int64_t p0 = x0_ * L, pixels = int64_t{plan_.nx} * plan_.super_x * L;
      listed_.row_bytes = (p0 + pixels < s_.w ? pixels : s_.w - p0) * size;
      row_[listed_.count++] = (lane_[0].image * s_.c * plane + p0) * size;
      return;
    }
    listed_.row_bytes = s_.w * size;
    for (int l = 0; l < L; ++l) {
      const Lane& lane = lane_[l];
      if (!lane.active || lane.tile_x != 0) continue;
      for (int64_t i = 0; i < plan_.rows && listed_.count < kMaxRows; ++i) {
        const int64_t h = lane.in_row + plan_.row_source[i];
        if (h >= 0 && h < s_.h) {
          row_[listed_.count++] = (lane.image * s_.c * plane + h * s_.w) * size;
        }
      }
    }
  }

  // Prefetches the listed rows in so many visits of this block.
  Prefetcher prefetch_listed(int64_t visits) const {
    Prefetcher p = listed_;
    p.channels = p.count == 0 ? 0 : plan_.channels;
    visits *= plan_.channel_blocks * plan_.super_y * plan_.super_x;
    p.per_visit = (p.channels * p.count + visits - 1) / visits;
    return p;
  }

  // An image read in place is prefetched panel by panel: the next one of this block, or the first
  // of the next block.
  Prefetcher prefetch_in_place(int64_t b, int64_t group, int64_t x0, int64_t visits) {
    const bool last = b + 1 == plan_.channel_blocks;
    const int64_t first = last ? 0 : (b + 1) * plan_.channel_block;
    const int64_t left = plan_.channels - first;
    row_[0] = 0;
    const int64_t size = sizeof(T);
    Prefetcher p{};
    p.first = reinterpret_cast<const char*>(in_place(group, first, last ? x0 + plan_.nx : x0));
    p.channel = channels_of(group, first);
    p.channels = left < plan_.channel_block ? left : plan_.channel_block;
    p.rows = row_;
    p.count = 1;
    p.row_bytes = plan_.nx * L * size;
    p.pitch = s_.w * size;
    p.per_visit = (p.channels + visits - 1) / visits;
    return p;
  }

  // Where the rows of a block go: per output row and lane, for filter k0; masks of nx bits.
  void place_rows(int64_t k0, int64_t* offset, uint32_t* mask) const {
    for (int64_t y = 0; y < plan_.ny; ++y) {
      for (int l = 0; l < L; ++l, ++offset, ++mask) {
        const Lane& lane = lane_[l];
        const int64_t p = out_row(lane, y), q = out_col(lane, 0);
        int64_t n = plan_.tile_w - x0_ < plan_.nx ? plan_.tile_w - x0_ : plan_.nx;
        n = n < s_.q - q ? n : s_.q - q;
        const bool inside = lane.active && y0_ + y < plan_.tile_h && p < s_.p;
        *mask = inside && n > 0 ? (1u << n) - 1u : 0;
        *offset = ((lane.image * s_.k + k0) * s_.p + p) * s_.q + q;
      }
    }
  }

  // NCHW, lanes = neighbouring pixels, whole vectors and S = T: the image itself is the panel.
  const T* in_place(int64_t group, int64_t first, int64_t vector) const {
    return static_cast<const T*>(params_.x) +
           (lane_[0].image * s_.c + first_channel(group, first)) * s_.w + vector * L;
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
