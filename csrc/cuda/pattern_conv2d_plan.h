// How pattern_conv2d*.cu cut a convolution into blocks: plain host arithmetic, no CUDA.
//
// A block owns `slots` slots of up to `rows` filters, each slot from one filter group, of one group
// of the convolution, and a tile of tile_p x tile_q outputs of one image. The host knows neither
// the sizes of the filter groups nor their columns, so that a block finds its slots itself
// (pattern_conv2d_blocks.cuh) and the plan only bounds how many blocks have any.
//
// The staged input tile has staged_h x staged_w pixels in rows of `pitch` places. With a horizontal
// stride the columns of a row are stored phase by phase (column w at w % phases * phase_w +
// w / phases), so that neighbouring outputs always read neighbouring places.
#pragma once
#include <cstdint>

#include "core/params.h"

namespace sparsecnn::cuda {

struct PatternPlan {
  int64_t n, h, w, p, q;  // after folding a pointwise problem into rows of pixels
  int64_t stride_h, stride_w, pad_top, pad_left;
  int64_t x_n, x_c, x_h, x_w;  // element strides of the input
  int64_t y_n, y_k, y_p, y_q;  // and of output and residual
  int64_t work;                // blocks' worth: n * groups * tiles_p * tiles_q * slabs
  int64_t groups, tiles_p, tiles_q, slabs;
  int32_t channels_last;      // channels are the fastest axis
  int32_t channels, filters;  // per group of the convolution
  int32_t taps, filter_w;     // R * S, S
  int32_t tile_q_log2;
  int32_t staged_w, area;              // staged pixels: of a row, of the tile
  int32_t row_step, col_step;          // input rows per staged row, input columns per staged column
  int32_t row_stride;                  // staged rows from one output row to the next
  int32_t phases, phase_w, pitch;      // see above
  int32_t places;                      // staged_h * pitch
  int32_t dil_row, dil_w;              // places per filter row, staged columns per filter column
  int32_t chunk;                       // channels staged at a time
  int32_t channel_pitch, pixel_pitch;  // elements of the tile from one channel or pixel to the next
  int32_t input_vectors, value_vectors;  // 16 bytes: of eight channels, of eight filters
  int32_t list;                          // columns that a list of a chunk has room for
  int32_t table_at, pixels_at, tile_at, tile_bytes, smem_bytes;  // in shared memory, bytes
};

// Lanes that must not meet in a bank: 32 that read a word each, or 8 that read 16 bytes.
struct PatternBlock {
  int pixels, slots, rows, lanes;
};

// Most slots that the filter groups of one group of the convolution can make: with m groups,
// sum of ceil(rows / per slot) <= m + (filters - m) / per slot, which grows with m.
inline int64_t most_slots(const PatternConv2dParams& params, int64_t rows) {
  const ConvShape& s = params.shape;
  const int64_t filters = s.filters_per_group();
  int64_t most = params.filter_groups - (s.groups - 1);
  if (most > filters) most = filters;
  if (most < 1) most = 1;
  return most + (filters - most) / rows;
}

// Folds what does not need two spatial axes. A pointwise convolution (1x1, stride 1, no padding)
// sees its pixels as one row; with channels last, or images of one pixel, the batch joins that row.
inline PatternPlan fold_pattern(const PatternConv2dParams& params) {
  const ConvShape& s = params.shape;
  const bool nhwc = params.layout == Layout::kNHWC;
  PatternPlan t{};
  t.n = s.n, t.h = s.h, t.w = s.w, t.p = s.p, t.q = s.q;
  t.stride_h = s.stride_h, t.stride_w = s.stride_w, t.pad_top = s.pad_top, t.pad_left = s.pad_left;
  t.groups = s.groups;
  t.channels = static_cast<int32_t>(s.channels_per_group());
  t.filters = static_cast<int32_t>(s.filters_per_group());
  t.taps = static_cast<int32_t>(s.r * s.s), t.filter_w = static_cast<int32_t>(s.s);
  t.channels_last = nhwc;
  t.x_n = s.c * s.h * s.w, t.y_n = s.k * s.p * s.q;
  const bool pointwise = s.r == 1 && s.s == 1 && s.stride_h == 1 && s.stride_w == 1 &&
                         s.pad_top == 0 && s.pad_left == 0 && s.p == s.h && s.q == s.w;
  if (pointwise) {
    t.w = t.q = s.h * s.w;
    t.h = t.p = 1;
    if (nhwc || t.w == 1) {
      t.channels_last = 1;
      t.w = t.q = t.w * s.n;
      t.n = 1;
    }
  }
  t.x_c = t.channels_last ? 1 : s.h * s.w, t.y_k = t.channels_last ? 1 : s.p * s.q;
  t.x_w = t.channels_last ? s.c : 1, t.y_q = t.channels_last ? s.k : 1;
  t.x_h = t.w * t.x_w, t.y_p = t.q * t.y_q;
  return t;
}

// Lays the pixels of a tile out for one tile_q. False where the numbers are too large to be staged.
inline bool lay_out_pixels(const ConvShape& s, PatternBlock block, int64_t tile_q, PatternPlan* t,
                           bool* conflict_free) {
  constexpr int64_t kMost = 1 << 16;  // places; more would not fit into any shared memory
  const int64_t lanes_q = tile_q < block.lanes ? tile_q : block.lanes;
  const int64_t tile_p = block.pixels / tile_q;
  // A filter of extent 1 leaves gaps between the inputs that it reads: they are not staged.
  const int64_t row_stride = s.r == 1 ? 1 : s.stride_h, phases = s.s == 1 ? 1 : s.stride_w;
  if (row_stride > kMost || phases > kMost || s.stride_h > (1 << 24) || s.stride_w > (1 << 24))
    return false;
  if (s.r > 1 && s.dil_h > kMost / (s.r - 1)) return false;
  if (s.s > 1 && s.dil_w > kMost / (s.s - 1)) return false;
  const int64_t staged_h = (tile_p - 1) * row_stride + (s.r == 1 ? 0 : (s.r - 1) * s.dil_h) + 1;
  const int64_t staged_w = (tile_q - 1) * phases + (s.s == 1 ? 0 : (s.s - 1) * s.dil_w) + 1;
  const int64_t phase_w = (staged_w + phases - 1) / phases;
  int64_t pitch = phases * phase_w;
  // Neighbours of a row lie side by side; the next output row has to begin an odd multiple of them
  // further, so that the lanes cover all banks once.
  *conflict_free = lanes_q == block.lanes;
  for (int64_t wider = pitch; !*conflict_free && wider < pitch + 2 * lanes_q; ++wider)
    if (row_stride * wider % (2 * lanes_q) == lanes_q) pitch = wider, *conflict_free = true;
  if (staged_h * pitch > kMost) return false;
  t->tile_q_log2 = 0;
  while ((int64_t{1} << t->tile_q_log2) < tile_q) ++t->tile_q_log2;
  t->staged_w = static_cast<int32_t>(staged_w);
  t->area = static_cast<int32_t>(staged_h * staged_w);
  t->row_step = static_cast<int32_t>(s.r == 1 ? s.stride_h : 1);
  t->col_step = static_cast<int32_t>(s.s == 1 ? s.stride_w : 1);
  t->row_stride = static_cast<int32_t>(row_stride), t->phases = static_cast<int32_t>(phases);
  t->phase_w = static_cast<int32_t>(phase_w), t->pitch = static_cast<int32_t>(pitch);
  t->places = static_cast<int32_t>(staged_h * pitch);
  // With a single filter row or column the dilation multiplies zero and may be anything.
  t->dil_row = static_cast<int32_t>(s.r == 1 ? 0 : s.dil_h * pitch);
  t->dil_w = static_cast<int32_t>(s.s == 1 ? 0 : s.dil_w);
  t->tiles_p = (t->p + tile_p - 1) / tile_p, t->tiles_q = (t->q + tile_q - 1) / tile_q;
  return true;
}

// Chooses the pixel tile that needs the fewest blocks, counting a tile whose lanes meet in a bank
// twice, then the smallest staged area; fit(plan) lays out shared memory or says that it cannot.
// False if no tile fits.
template <class Fit>
inline bool plan_pattern(const PatternConv2dParams& params, PatternBlock block, PatternPlan* plan,
                         Fit fit) {
  const PatternPlan base = fold_pattern(params);
  int64_t best_cost = -1, best_places = 0;
  for (int64_t tile_q = block.pixels < 4 ? block.pixels : 4; tile_q <= block.pixels; tile_q *= 2) {
    PatternPlan t = base;
    bool conflict_free = false;
    if (!lay_out_pixels(params.shape, block, tile_q, &t, &conflict_free) || !fit(&t)) continue;
    const int64_t cost = t.tiles_p * t.tiles_q * (conflict_free ? 1 : 2);
    if (best_cost < 0 || cost < best_cost || (cost == best_cost && t.places < best_places)) {
      best_cost = cost, best_places = t.places;
      *plan = t;
    }
  }
  plan->slabs = (most_slots(params, block.rows) + block.slots - 1) / block.slots;
  plan->work = base.n * base.groups * plan->tiles_p * plan->tiles_q * plan->slabs;
  return best_cost >= 0;
}

}  // namespace sparsecnn::cuda
