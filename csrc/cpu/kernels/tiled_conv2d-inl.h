// A convolution panel by panel: the loop that csr_conv2d and pattern_conv2d share. The plan
// (cpu/tile_plan.h) says how the call is cut.
//
// Who owns what. An item is (super-block of output positions) x (group) x (chunk of filters). A
// block is ny * nx output positions of each of L lanes, so ny * nx vectors, held in registers; the
// blocks of a super-block share one packing. For one item:
//   for each panel (block of input channels):
//     pack it: [channel][packed row][packed column][L lanes]; what one block touches is about 24 KB
//     for each block of the super-block, for each filter of the chunk (the op's row loop):
//       load its partial sums (or its bias), add what the panel has for it
//   from the last panel, NCHW: transpose lanes back to pixels in registers, add residual, activate,
//   store; NHWC: the same from the partial sums, filters instead of pixels.
// A pointwise NCHW layer whose planes are whole vectors is not packed: the image is the panel.
#pragma once
#include <stddef.h>

#include "cpu/kernels/sinks-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// Which weights a call of the row loop multiplies.
struct ChunkPanel {
  int64_t chunk, k0, panel;  // over all groups; its first filter; block of input channels
};

template <class V, class S>
class TiledConv2d : private Tiles<V, S> {
  using Base = Tiles<V, S>;
  using T = typename V::T;
  using Base::finish_;
  using Base::in_place;
  using Base::L;
  using Base::lane_;
  using Base::list_rows;
  using Base::pack;
  using Base::panel_;
  using Base::params_;
  using Base::place_block;
  using Base::place_rows;
  using Base::plan_;
  using Base::prefetch_in_place;
  using Base::prefetch_listed;
  using Base::s_;
  using Base::unpack;
  using Base::worth_prefetching;
  using Base::x0_;
  using Base::y0_;

  T* const partial_;
  T* const bias_;  // of the chunk, zeros where there is none

 public:
  TiledConv2d(const ConvParams& params, const TilePlan& plan, char* scratch)
      : Base(params, plan, scratch),
        partial_(reinterpret_cast<T*>(scratch + plan.partial_offset)),
        bias_(reinterpret_cast<T*>(scratch + plan.bias_offset)) {}

  // Items [begin, end). `rows` is the op's row loop: new_chunk(chunk, k0, filters) -> bool is told
  // when the chunk changes and may refuse, visits(chunk, filters) says how often a panel's loop
  // calls the prefetcher, rows(args, ChunkPanel, sink) adds a panel.
  template <class Rows>
  bool run(int64_t begin, int64_t end, Rows& rows) {
    const bool nhwc = params_.layout == Layout::kNHWC;
    int64_t row_offset[cpu::kMaxNy * L];
    uint32_t row_mask[cpu::kMaxNy * L];
    int64_t current = -1;  // chunk whose bias is loaded
    int64_t packed = -1;   // the (block, group) whose only panel is packed, when there is one panel
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item % plan_.filter_chunks;
      const int64_t block_and_group = item / plan_.filter_chunks;
      const int64_t group = block_and_group % s_.groups;
      const int64_t following = block_and_group + 1;
      const bool prefetch = following * plan_.filter_chunks < end && worth_prefetching();
      if (prefetch) {
        place_block(following / s_.groups);
        list_rows(following % s_.groups);
      }
      place_block(block_and_group / s_.groups);
      const int64_t y0 = y0_, x0 = x0_;

      const int64_t chunk_index = group * plan_.filter_chunks + chunk;
      const int64_t k0 = plan_.chunk_begin[chunk_index];
      const int64_t filters = plan_.chunk_begin[chunk_index + 1] - k0;
      if (filters == 0) continue;
      const int32_t* const filter_of = plan_.filter_of ? plan_.filter_of + k0 : nullptr;
      if (current != chunk_index) {
        if (!rows.new_chunk(chunk_index, k0, filters)) return false;
        const S* const bias = static_cast<const S*>(params_.bias);
        for (int64_t f = 0; f < filters; ++f) {
          bias_[f] = bias ? T(to_acc(bias[filter_of ? filter_of[f] : k0 + f])) : T(0);
        }
        current = chunk_index;
      }
      const int64_t base_filter = filter_of ? 0 : k0;  // which filters are counted from
      const ptrdiff_t filter = static_cast<ptrdiff_t>(plan_.ny) * plan_.nx * L;
      const int64_t visits = rows.visits(chunk_index, filters);
      Prefetcher prefetcher = prefetch ? prefetch_listed(visits) : Prefetcher{};
      RowArgs<V> args{};
      args.prefetcher = &prefetcher;
      args.row_pitch = static_cast<ptrdiff_t>(plan_.cols) * L;
      args.bias = bias_;
      args.filters = filters;
      for (int64_t b = 0; b < plan_.channel_blocks; ++b) {
        const int64_t c0 = b * plan_.channel_block, left = plan_.channels - c0;
        const T* panel = panel_;
        if (plan_.in_place) {
          panel = in_place(group, c0, x0);
          prefetcher = prefetch_in_place(b, group, x0, visits);
        } else if (plan_.channel_blocks > 1 || packed != block_and_group) {
          pack(group, c0, left < plan_.channel_block ? left : plan_.channel_block);
          packed = block_and_group;
        }
        args.first_panel = b == 0;
        for (int64_t i = 0; i < plan_.super_y * plan_.super_x; ++i) {
          const int64_t y = i / plan_.super_x * plan_.ny, x = i % plan_.super_x * plan_.nx;
          if (y0 + y >= plan_.tile_h || x0 + x >= plan_.tile_w) continue;
          args.panel = panel + (y * plan_.cols + x) * L;
          args.partial = partial_ + i * filters * filter;
          const ChunkPanel at{chunk_index, k0, b};
          if (nhwc || b < plan_.channel_blocks - 1) {
            rows(args, at, ToPartial<V>{});
          } else if (plan_.interleaved) {
            const int64_t p0 = (x0 + x) * L;
            const int64_t row = lane_[0].image * s_.k + base_filter;
            rows(args, at, ToPixels<V, S>{finish_, row * s_.q + p0, s_.q, s_.q - p0});
          } else {
            y0_ = y0 + y;
            x0_ = x0 + x;
            place_rows(base_filter, row_offset, row_mask);
            rows(args, at, ToTiles<V, S>{finish_, row_offset, row_mask, s_.p * s_.q});
          }
        }
      }
      for (int64_t i = 0; nhwc && i < plan_.super_y * plan_.super_x; ++i) {
        y0_ = y0 + i / plan_.super_x * plan_.ny;
        x0_ = x0 + i % plan_.super_x * plan_.nx;
        if (y0_ >= plan_.tile_h || x0_ >= plan_.tile_w) continue;
        unpack(partial_ + i * filters * filter, k0, filters);
      }
    }
    return true;
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
