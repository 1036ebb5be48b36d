// How csr_conv2d.cu cuts a convolution into blocks: plain host arithmetic, no CUDA.
//
// A block owns `warps * rows` filters of one group and 32 * pixels outputs of one image, arranged
// as tile_p x tile_q. Its lanes spread over the columns first:
//   lanes_q  = min(tile_q, 32) lanes side by side, segments = tile_q / lanes_q,
//   pixel i of lane l: column (i % segments) * lanes_q + l % lanes_q,
//                      row    (l / lanes_q) * (pixels / segments) + i / segments.
// The staged input tile of one channel has staged_h x staged_w elements, `pitch` floats per row.
// With a horizontal stride its columns are stored phase by phase (column w at
// (w % phases) * phase_w + w / phases), so that neighbouring lanes always read neighbouring words.
#pragma once
#include <cstdint>

#include "core/params.h"

namespace sparsecnn::cuda {

// Shape of a block: template arguments of the kernel.
struct BlockShape {
  int pixels;  // per lane
  int rows;    // filters per warp
  int warps;
  constexpr int filters() const { return rows * warps; }
  constexpr int threads() const { return warps * 32; }
  constexpr int tile_pixels() const { return pixels * 32; }
};

struct TilePlan {
  int64_t n, h, w, p, q;  // after folding a pointwise problem into rows of pixels
  int64_t stride_h, stride_w, pad_top, pad_left;
  int64_t x_n, x_c, x_h, x_w;  // element strides of the input
  int64_t y_n, y_k, y_p, y_q;  // and of output and residual
  int64_t work;                // blocks' worth of work: n * groups * tiles * filter_blocks
  int64_t tiles_p, tiles_q, groups, filter_blocks;
  int32_t channels_last;            // channels are the fastest axis
  int32_t channels, filters;        // per group
  int32_t taps, filter_w;           // R * S, S
  int32_t tile_p, tile_q;           // outputs per block
  int32_t lanes_q_log2, segments;   // see above
  int32_t staged_h, staged_w;       // input elements per channel and block
  int32_t row_step, col_step;       // input rows per staged row, input columns per staged column
  int32_t row_stride;               // staged rows from one output row to the next
  int32_t phases, phase_w;          // column phases of a staged row
  int32_t pitch, channel_pitch;     // floats
  int32_t dil_row, dil_w;           // floats per filter row, staged columns per filter column
  int32_t chunk;                    // channels staged at a time
  int32_t stage_lanes_log2;         // threads side by side along the fastest axis when staging
  int32_t tile_floats, smem_bytes;  // shared memory: tile, then everything
};

// One entry {value, offset} per lane, double use: see the kernel.
inline constexpr int64_t kEntryBytes = 8;

constexpr int32_t ceil_log2(int64_t v, int32_t limit) {
  int32_t bits = 0;
  while (bits < limit && (int64_t{1} << bits) < v) ++bits;
  return bits;
}

// Folds what does not need two spatial axes. A pointwise convolution (1x1, stride 1, no padding)
// sees its pixels as one row; with channels last, or single-pixel images, the batch joins that row.
inline void fold_pixels(const CsrConv2dParams& params, TilePlan* t) {
  const ConvShape& s = params.shape;
  const bool nhwc = params.layout == Layout::kNHWC;
  t->channels_last = nhwc;
  t->n = s.n, t->h = s.h, t->w = s.w, t->p = s.p, t->q = s.q;
  t->x_n = s.c * s.h * s.w, t->y_n = s.k * s.p * s.q;
  t->x_c = nhwc ? 1 : s.h * s.w, t->y_k = nhwc ? 1 : s.p * s.q;
  t->x_w = nhwc ? s.c : 1, t->y_q = nhwc ? s.k : 1;
  const bool pointwise = s.r == 1 && s.s == 1 && s.stride_h == 1 && s.stride_w == 1 &&
                         s.pad_top == 0 && s.pad_left == 0 && s.p == s.h && s.q == s.w;
  if (pointwise) {
    t->w = t->q = s.h * s.w;
    t->h = t->p = 1;
    if (nhwc || t->w == 1) {
      t->channels_last = 1;
      t->x_c = t->y_k = 1, t->x_w = s.c, t->y_q = s.k;
      t->w = t->q = t->w * s.n;
      t->n = 1;
    }
  }
  t->x_h = t->w * t->x_w, t->y_p = t->q * t->y_q;
}

// Lays the staged tile out for one tile_q. False if not even one channel fits into `smem_limit`.
inline bool lay_out_tile(const ConvShape& s, BlockShape block, int64_t tile_q, int64_t smem_limit,
                         TilePlan* t, bool* conflict_free) {
  const int64_t lanes_q = tile_q < 32 ? tile_q : 32;
  const int64_t segments = tile_q / lanes_q;
  const int64_t tile_p = block.tile_pixels() / tile_q;
  // A filter of extent 1 leaves gaps between the inputs that it reads: they are not staged.
  const int64_t row_stride = s.r == 1 ? 1 : s.stride_h;
  const int64_t phases = s.s == 1 ? 1 : s.stride_w;
  const int64_t staged_h = (tile_p - 1) * row_stride + (s.r - 1) * s.dil_h + 1;
  const int64_t staged_w = (tile_q - 1) * phases + (s.s - 1) * s.dil_w + 1;
  const int64_t phase_w = (staged_w + phases - 1) / phases;
  const int64_t fixed_bytes = block.warps * 32 * kEntryBytes;
  const int64_t floats = (smem_limit - fixed_bytes) / 4;
  if (staged_h > floats || phases * phase_w > floats) return false;
  // Groups of lanes_q lanes start (pixels / segments) output rows apart; they cover all 32 banks
  // once if and only if that distance is an odd multiple of lanes_q.
  int64_t pitch = phases * phase_w;
  *conflict_free = lanes_q == 32;
  for (int64_t wider = pitch; !*conflict_free && wider < pitch + 2 * lanes_q; ++wider) {
    const int64_t distance = block.pixels / segments * row_stride * wider;
    if (distance % (2 * lanes_q) == lanes_q) pitch = wider, *conflict_free = true;
  }
  // Odd, so that staging with lanes along the channels (channels last) meets no conflict either.
  const int64_t channel_pitch = (staged_h * pitch) | 1;
  const int64_t channel_floats = channel_pitch + s.r * s.s;
  if (channel_floats > floats) return false;
  const int64_t most = floats / channel_floats, channels = s.channels_per_group();
  const int64_t chunks = (channels + most - 1) / most;
  const int64_t chunk = (channels + chunks - 1) / chunks;
  // The epilogue for channels last transposes 32 pixels of all filters inside the tile.
  const int64_t transposed = block.filters() * 33;
  int64_t tile_floats = chunk * channel_pitch;
  if (tile_floats < transposed) tile_floats = transposed;
  t->tile_p = static_cast<int32_t>(tile_p), t->tile_q = static_cast<int32_t>(tile_q);
  t->lanes_q_log2 = ceil_log2(lanes_q, 5), t->segments = static_cast<int32_t>(segments);
  t->staged_h = static_cast<int32_t>(staged_h), t->staged_w = static_cast<int32_t>(staged_w);
  t->row_stride = static_cast<int32_t>(row_stride), t->phases = static_cast<int32_t>(phases);
  t->phase_w = static_cast<int32_t>(phase_w), t->pitch = static_cast<int32_t>(pitch);
  t->channel_pitch = static_cast<int32_t>(channel_pitch);
  // With a single filter row or column the dilation multiplies zero and may be anything.
  t->dil_row = static_cast<int32_t>(s.r == 1 ? 0 : s.dil_h * pitch);
  t->dil_w = static_cast<int32_t>(s.s == 1 ? 0 : s.dil_w);
  t->chunk = static_cast<int32_t>(chunk);
  t->tile_floats = static_cast<int32_t>(tile_floats);
  t->smem_bytes = static_cast<int32_t>(fixed_bytes + 4 * (tile_floats + chunk * s.r * s.s));
  t->stage_lanes_log2 = ceil_log2(t->channels_last ? chunk : staged_w, 5);
  t->tiles_p = (t->p + tile_p - 1) / tile_p, t->tiles_q = (t->q + tile_q - 1) / tile_q;
  return true;
}

// Chooses the pixel tile that needs the fewest blocks, counting a tile whose lanes meet in a bank
// twice, then the smallest staged area. False if no tile fits: the caller takes the direct kernel.
inline bool plan_tiles(const CsrConv2dParams& params, BlockShape block, int64_t smem_limit,
                       TilePlan* plan) {
  const ConvShape& s = params.shape;
  TilePlan base{};
  fold_pixels(params, &base);
  base.stride_h = s.stride_h, base.stride_w = s.stride_w;
  base.pad_top = s.pad_top, base.pad_left = s.pad_left;
  base.groups = s.groups;
  base.channels = static_cast<int32_t>(s.channels_per_group());
  base.filters = static_cast<int32_t>(s.filters_per_group());
  base.taps = static_cast<int32_t>(s.r * s.s), base.filter_w = static_cast<int32_t>(s.s);
  base.filter_blocks = (s.filters_per_group() + block.filters() - 1) / block.filters();
  // What multiplies staged coordinates must be small enough for 32-bit products.
  if (s.stride_h > (1 << 24) || s.stride_w > (1 << 24)) return false;
  base.row_step = static_cast<int32_t>(s.r == 1 ? s.stride_h : 1);
  base.col_step = static_cast<int32_t>(s.s == 1 ? s.stride_w : 1);
  int64_t best_cost = -1, best_area = 0;
  for (int64_t tile_q = 4; tile_q <= block.tile_pixels(); tile_q *= 2) {
    TilePlan t = base;
    bool conflict_free = false;
    if (!lay_out_tile(s, block, tile_q, smem_limit, &t, &conflict_free)) continue;
    const int64_t cost = t.tiles_p * t.tiles_q * (conflict_free ? 1 : 2);
    if (best_cost < 0 || cost < best_cost || (cost == best_cost && t.channel_pitch < best_area)) {
      best_cost = cost, best_area = t.channel_pitch;
      *plan = t;
    }
  }
  plan->work = base.n * base.groups * plan->tiles_p * plan->tiles_q * base.filter_blocks;
  return best_cost >= 0;
}

}  // namespace sparsecnn::cuda
