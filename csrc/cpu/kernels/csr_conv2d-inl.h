// csr_conv2d on the CPU: y = act(conv(x, W) + bias + residual), W in CSR over (K, C/G * R * S).
//
// The plan (cpu/csr_plan.h) says how the call is cut, the program
// (cpu/csr_program.h) holds the weight in the order of the loop.
//
// Who owns what. An item is (super-block of output positions) x (group) x (chunk of filters). A
// block is ny * nx output positions of each of L lanes, so ny * nx vectors, held in registers; the
// blocks of a super-block share one packing. For one item:
//   for each panel (block of input channels):
//     pack it: [channel][packed row][packed column][L lanes]; what one block touches is about 24 KB
//     for each block of the super-block, for each filter k of the chunk (csr_rows-inl.h):
//       load the partial sums of k (or its bias), walk the nonzeros of k that fall in this panel:
//       broadcast the weight, ny * nx FMAs whose memory operand is an aligned vector of the panel
//   from the last panel, NCHW: transpose lanes back to pixels in registers, add residual, activate,
//   store; NHWC: the same from the partial sums, filters instead of pixels.
// A pointwise NCHW layer whose planes are whole vectors is not packed: the image is the panel. Each
// output is one chain of FMAs in ascending column order whatever the cut: results do not depend on
// the number of threads.
//
// The bound. One FMA with an L1 operand per cycle; a core of the Zen 4 server this was measured on
// does 115 GFLOP/s with operands in registers. The row loop alone, from L1, one thread: 89 GFLOP/s
// on 3x3 64>64 @56 at 90 %, 87 on 128>128 @28, 85 on 512>512 @7 (23 % of whose lanes are padding);
// 92, 91 and 84 at 80 %; 81, 81 and 80 at 95 %. What is left of a call at 90 %, 64>64 @56: packing
// 41 us, storing about 30, Python and dispatcher 20, of 360.
//
// Tried and lost, one thread, 90 % (figures of one run each, interleaved):
//   - walking plain CSR, prefetching three filters ahead, a table from column to address: 71
//     GFLOP/s where the stream does 82-89 (64>64 @56), 72 against 85 (512>512 @7).
//   - packing every block by itself: packing a 3x3 block of rows three times over; sharing it
//     between blocks took 128>128 @28 from 0.47 to 0.42 ms.
//   - packing pointwise layers: 256>64 @56 0.28 ms, in place 0.20; a third of it was the copy.
//   - storing all partial sums and transposing them afterwards: 64>64 @56 0.379 ms, from registers
//     0.357; 512>512 @7 0.470 against 0.444.
//   - prefetching the next block's input when it is in L2 anyway: slower by what it executes; from
//     1 MB on it wins (batch 16: stride 2 128>128 @56 8.85 to 7.85 ms, 64>64 @56 7.2 to 6.7).
//   - prefetching a whole block of an image read in place instead of panel by panel: 256>64 @56
//     0.24 against 0.20 ms.
//   - filters sorted by their number of nonzeros in the panel, so that loop exits are predicted:
//     geometric mean over seven layers 4.83x dense sorted, 5.03x as they are.
//   - 2, 3, 4 filters side by side (more independent chains): 0.96, 1.02, 1.03 of the time over
//     eight cases; the loop waits for L1, not for the FMA latency.
//   - 28 accumulators instead of 14 for 64>64 @56: 76-78 GFLOP/s against 89; twice the partial sums
//     stream through L1 and evict the panel.
// Shifted loads from unpacked rows were not built: the aligned panel also absorbs stride, padding,
// dilation and tails.
#pragma once
#include <stddef.h>

#include "cpu/kernels/csr_rows-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

template <class V, class S>
class CsrConv2d : private CsrTiles<V, S> {
  using Base = CsrTiles<V, S>;
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
  using Base::prefetch_rows;
  using Base::s_;
  using Base::unpack;
  using Base::worth_prefetching;
  using Base::x0_;
  using Base::y0_;

  T* const partial_;
  T* const bias_;          // of the chunk, zeros where there is none
  int32_t* const bounds_;  // (panels + 1, filters), for weights that are not streamed

 public:
  CsrConv2d(const CsrConv2dParams& params, const CsrPlan& plan, char* scratch)
      : Base(params, plan, scratch),
        partial_(reinterpret_cast<T*>(scratch + plan.partial_offset)),
        bias_(reinterpret_cast<T*>(scratch + plan.bias_offset)),
        bounds_(reinterpret_cast<int32_t*>(scratch + plan.bounds_offset)) {}

  // False, with part of the output unwritten, when col_idx is not ascending within its range.
  template <int MaxVectors>
  bool run(int64_t begin, int64_t end) {
    if (plan_.streamed) {
      const auto* const entries = static_cast<const cpu::CsrEntry<T>*>(plan_.entries);
      return run<MaxVectors, Streamed<T>>(
          begin, end, [](int64_t, int64_t) { return true; },
          [&](int64_t chunk, int64_t k0, int64_t panel, int64_t filters) -> Streamed<T> {
            return {entries + plan_.panel_entries[chunk * plan_.channel_blocks + panel],
                    plan_.counts + k0 * plan_.channel_blocks + panel * filters};
          });
    }
    return run<MaxVectors, Stored<T, S>>(
        begin, end, [&](int64_t k0, int64_t filters) { return find_bounds(k0, filters); },
        [&](int64_t, int64_t, int64_t panel, int64_t filters) -> Stored<T, S> {
          const int32_t* const first = bounds_ + panel * filters;
          return {static_cast<const S*>(params_.values), params_.col_idx,
                  plan_.tap_offset - panel * plan_.channel_block * s_.r * s_.s, first,
                  first + filters};
        });
  }

 private:
  // new_chunk(k0, filters) -> bool is told when the chunk changes; weights(chunk, k0, panel,
  // filters) are its nonzeros in a panel.
  template <int MaxVectors, class Weights, class NewChunk, class GetWeights>
  bool run(int64_t begin, int64_t end, NewChunk&& new_chunk, GetWeights&& weights) {
    const bool nhwc = params_.layout == Layout::kNHWC;
    const auto rows = find_row_kernel<V, Weights, ToPartial<V>, MaxVectors>(plan_.ny, plan_.nx);
    const auto tile_rows =
        find_row_kernel<V, Weights, ToTiles<V, S>, MaxVectors>(plan_.ny, plan_.nx);
    const auto pixel_rows = find_pixel_kernel<V, Weights, ToPixels<V, S>, MaxVectors>(plan_.nx);
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
        list_rows(following % s_.groups * s_.channels_per_group());
      }
      place_block(block_and_group / s_.groups);
      const int64_t y0 = y0_, x0 = x0_;

      const int64_t chunk_index = group * plan_.filter_chunks + chunk;
      const int64_t k0 = plan_.chunk_begin[chunk_index];
      const int64_t filters = plan_.chunk_begin[chunk_index + 1] - k0;
      if (filters == 0) continue;
      if (current != chunk_index) {
        if (!new_chunk(k0, filters)) return false;
        const S* const bias = static_cast<const S*>(params_.bias);
        for (int64_t f = 0; f < filters; ++f) bias_[f] = bias ? T(to_acc(bias[k0 + f])) : T(0);
        current = chunk_index;
      }
      const int64_t cg = s_.channels_per_group();
      const ptrdiff_t filter = static_cast<ptrdiff_t>(plan_.ny) * plan_.nx * L;
      Prefetcher prefetcher = prefetch ? prefetch_rows(filters) : Prefetcher{};
      RowArgs<V> args{};
      args.prefetcher = &prefetcher;
      args.row_pitch = static_cast<ptrdiff_t>(plan_.cols) * L;
      args.bias = bias_;
      args.filters = filters;
      for (int64_t b = 0; b < plan_.channel_blocks; ++b) {
        const int64_t c0 = b * plan_.channel_block;
        const int64_t c1 = c0 + plan_.channel_block < cg ? c0 + plan_.channel_block : cg;
        const T* panel = panel_;
        if (plan_.in_place) {
          panel = in_place(group * cg + c0, x0);
          prefetcher = prefetch_in_place(b, group * cg, x0, filters);
        } else if (plan_.channel_blocks > 1 || packed != block_and_group) {
          pack(group * cg + c0, c1 - c0);
          packed = block_and_group;
        }
        args.first_panel = b == 0;
        for (int64_t i = 0; i < plan_.super_y * plan_.super_x; ++i) {
          const int64_t y = i / plan_.super_x * plan_.ny, x = i % plan_.super_x * plan_.nx;
          if (y0 + y >= plan_.tile_h || x0 + x >= plan_.tile_w) continue;
          args.panel = panel + (y * plan_.cols + x) * L;
          args.partial = partial_ + i * filters * filter;
          const Weights nonzeros = weights(chunk_index, k0, b, filters);
          if (nhwc || b < plan_.channel_blocks - 1) {
            rows(args, nonzeros, {});
          } else if (plan_.interleaved) {
            const int64_t p0 = (x0 + x) * L;
            const int64_t row = lane_[0].image * s_.k + k0;
            pixel_rows(args, nonzeros, {finish_, row * s_.q + p0, s_.q, s_.q - p0});
          } else {
            y0_ = y0 + y;
            x0_ = x0 + x;
            place_rows(k0, row_offset, row_mask);
            tile_rows(args, nonzeros, {finish_, row_offset, row_mask, s_.p * s_.q});
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

  // Where each filter's nonzeros lie in each panel: row b of bounds_ holds the first entry of every
  // filter at or beyond panel b, so that rows b and b + 1 enclose what panel b multiplies.
  //
  // A column is used as an address, so this also checks that each row ascends within the range.
  bool find_bounds(int64_t k0, int64_t filters) {
    const int32_t* const col = params_.col_idx;
    const int32_t columns = static_cast<int32_t>(s_.columns());
    const int64_t panel_columns = plan_.channel_block * s_.r * s_.s;
    const int64_t panels = plan_.channel_blocks;
    for (int64_t f = 0; f < filters; ++f) {
      const int32_t row_begin = params_.row_ptr[k0 + f], row_end = params_.row_ptr[k0 + f + 1];
      // Negative once an entry leaves [0, columns); within it no difference overflows.
      int32_t bad = 0;
      for (int32_t i = row_begin; i < row_end; ++i) bad |= col[i] | (columns - 1 - col[i]);
      if (bad < 0) return false;
      for (int32_t i = row_begin; i + 1 < row_end; ++i) bad |= col[i + 1] - col[i] - 1;
      if (bad < 0) return false;
      int32_t* out = bounds_ + f;
      *out = row_begin;
      int64_t left = panels - 1;
      int64_t bound = panel_columns;
      for (int32_t i = row_begin; i < row_end && left > 0; i += kScan) {
        const int n = row_end - i < kScan ? row_end - i : kScan;
        uint32_t beyond = at_least(col + i, n, static_cast<int32_t>(bound));
        while (beyond != 0 && left > 0) {
          const int32_t position = i + __builtin_ctz(beyond);
          do {
            *(out += filters) = position;
            bound += panel_columns;
            --left;
          } while (left > 0 && col[position] >= bound);
          beyond = at_least(col + i, n, static_cast<int32_t>(bound));
        }
      }
      for (; left >= 0; --left) *(out += filters) = row_end;
    }
    // The last rows look ahead past the end: empty ranges.
    for (int64_t i = 0; i < cpu::kBoundsPad; ++i) bounds_[(panels + 1) * filters + i] = 0;
    return true;
  }
};

template <class V, class S, int MaxVectors>
bool csr_conv2d_typed(const CsrConv2dParams& params, const CsrPlan& plan, int64_t begin,
                      int64_t end, void* scratch) {
  return CsrConv2d<V, S>(params, plan, static_cast<char*>(scratch))
      .template run<MaxVectors>(begin, end);
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
