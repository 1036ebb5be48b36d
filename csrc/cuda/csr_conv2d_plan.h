// How csr_conv2d.cu cuts a convolution into blocks: plain host arithmetic, no CUDA.
//
// A block owns kBlockFilters filters of one group and kStrips tiles of tile_p x tile_q outputs, the
// strips, which follow one another in the order (image, row of tiles, column of tiles); a strip has
// `positions` = vectors * lanes outputs. Position i of a strip is output (i / tile_q, i % tile_q)
// of its tile; vector v of lane l is position v * lanes + l, in all strips at once.
// The staged input tile of one channel has staged_h x staged_w words, `pitch` words per row; a word
// holds the element of each strip. With a horizontal stride its columns are stored phase by phase
// (column w at (w % phases) * phase_w + w / phases), so that neighbouring lanes always read
// neighbouring words.
// With splits > 1 a cluster of that many blocks shares one piece of work, each taking
// split_channels of the input channels.
#pragma once
#include <cstdint>

#include "core/params.h"

namespace sparsecnn::cuda {

inline constexpr int kStrips = 4;         // 16 bytes of float: the widest load of shared memory
inline constexpr int kBlockFilters = 32;  // one for each lane of the warp that sorts them
inline constexpr int kMostSplits = 8;     // blocks of a cluster that every such GPU can schedule
inline constexpr int kBlocksPerSm = 2;    // one computes while the other stages

// Shape of a block: template arguments of the kernel.
struct BlockShape {
  int vectors;  // words per lane: kStrips outputs each
  int lanes;    // that share a stored entry: 32, or 16 where a warp applies two entries at once
  int rows;     // filters per warp
  int warps;
  constexpr int threads() const { return warps * 32; }
  constexpr int positions() const { return vectors * lanes; }
  constexpr int slots() const { return positions() * kStrips; }
};

// The largest applies a stored entry to 256 outputs, the others to 128 and 64, and have twice the
// warps, since they are for problems that leave an SM with one block.
inline constexpr BlockShape kLarge{2, 32, 4, 8}, kMedium{1, 32, 2, 16}, kSmall{1, 16, 2, 16};
inline constexpr BlockShape kShapes[] = {kLarge, kMedium, kSmall};

struct TilePlan {
  int64_t n, h, w, p, q;  // after folding a pointwise problem into rows of pixels
  int64_t stride_h, stride_w, pad_top, pad_left;
  int64_t x_n, x_c, x_h, x_w;       // element strides of the input,
  int64_t y_n, y_k, y_p, y_q;       // and of output and residual
  int64_t staged_row, staged_col;   // input elements from one staged row or column to the next
  int64_t tiles_p, tiles_q, tiles;  // of an image, and of all
  int64_t groups, filter_blocks;    // filter_blocks: of a group
  int64_t work;                     // clusters' worth of it
  int32_t channels_last;            // channels are the fastest axis
  int32_t channels, filters;        // per group
  int32_t taps, filter_w;           // R * S, S
  int32_t tile_p, tile_q_log2;      // outputs of a strip
  int32_t staged_h, staged_w;       // words per channel
  int32_t row_step, col_step;       // input rows per staged row, input columns per staged column
  int32_t row_stride;               // staged rows from one output row to the next
  int32_t phases, phase_w;          // column phases of a staged row
  int32_t pitch, channel_pitch;     // words
  int32_t dil_row, dil_w;           // words per filter row, staged columns per filter column
  int32_t splits, split_channels;   // blocks of a cluster, channels of each
  int32_t chunk;                    // channels staged at a time
  int32_t stage_positions;          // threads side by side when staging: along the tile,
  int32_t stage_channels;           // and along the channels
  int32_t tile_bytes, smem_bytes;   // shared memory: tile, then everything
};

// Where a block begins in shared memory: the strips and the sorted filters, see the kernel; behind
// it one entry {value, offset} per lane.
inline constexpr int64_t kHeaderBytes = 704, kEntryBytes = 8;

constexpr int32_t ceil_log2(int64_t v, int32_t limit) {
  int32_t bits = 0;
  while (bits < limit && (int64_t{1} << bits) < v) ++bits;
  return bits;
}

constexpr int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

// Lays the staged tile out for one tile_q. False if the tile of a channel has over `most` words.
inline bool lay_out_tile(const ConvShape& s, BlockShape block, int64_t element_bytes,
                         int64_t tile_q, int64_t most, TilePlan* t, bool* conflict_free) {
  const int64_t tile_p = block.positions() / tile_q;
  // A filter of extent 1 leaves gaps between the inputs that it reads: they are not staged.
  const int64_t row_stride = s.r == 1 ? 1 : s.stride_h;
  const int64_t phases = s.s == 1 ? 1 : s.stride_w;
  const int64_t staged_h = (tile_p - 1) * row_stride + (s.r - 1) * s.dil_h + 1;
  const int64_t staged_w = (tile_q - 1) * phases + (s.s - 1) * s.dil_w + 1;
  const int64_t phase_w = quotient_up(staged_w, phases);
  if (staged_h > most || phases * phase_w > most) return false;
  // Shared memory serves the words of 128 bytes at a time, of 8 or 16 lanes. Where those span
  // several rows of a tile, they cover all banks once if and only if the rows are an odd multiple
  // of tile_q apart.
  const int64_t together = 128 / (kStrips * element_bytes);
  int64_t pitch = phases * phase_w;
  *conflict_free = tile_q >= together;
  for (int64_t wider = pitch; !*conflict_free && wider < pitch + 2 * tile_q; ++wider)
    if (row_stride * wider % (2 * tile_q) == tile_q) pitch = wider, *conflict_free = true;
  // Odd, so that staging with lanes along the channels (channels last) meets no conflict either.
  const int64_t channel_pitch = (staged_h * pitch) | 1;
  if (channel_pitch > most) return false;
  t->tile_p = static_cast<int32_t>(tile_p), t->tile_q_log2 = ceil_log2(tile_q, 31);
  t->staged_h = static_cast<int32_t>(staged_h), t->staged_w = static_cast<int32_t>(staged_w);
  t->row_stride = static_cast<int32_t>(row_stride), t->phases = static_cast<int32_t>(phases);
  t->phase_w = static_cast<int32_t>(phase_w), t->pitch = static_cast<int32_t>(pitch);
  t->channel_pitch = static_cast<int32_t>(channel_pitch);
  // With a single filter row or column the dilation multiplies zero and may be anything.
  t->dil_row = static_cast<int32_t>(s.r == 1 ? 0 : s.dil_h * pitch);
  t->dil_w = static_cast<int32_t>(s.s == 1 ? 0 : s.dil_w);
  t->tiles_p = quotient_up(t->p, tile_p), t->tiles_q = quotient_up(t->q, tile_q);
  t->tiles = t->n * t->tiles_p * t->tiles_q;
  t->work = quotient_up(t->tiles, kStrips) * t->groups * t->filter_blocks;
  return true;
}

// Cuts the channels into splits and chunks that fit into shared memory. False if none does.
inline bool cut_channels(BlockShape block, int64_t element_bytes, int64_t splits,
                         int64_t smem_limit, TilePlan* t) {
  const int64_t fixed = kHeaderBytes + block.threads() * kEntryBytes;
  const int64_t word_bytes = kStrips * element_bytes;
  const int64_t most = (smem_limit - fixed) / (t->channel_pitch * word_bytes + 4 * t->taps);
  // The sums leave through the tile, one more column than slots: no bank conflict either way.
  const int64_t sums = int64_t{kBlockFilters} * (block.slots() + 1) * 4;
  if (most < 1 || fixed + sums > smem_limit) return false;
  const int64_t channels = quotient_up(t->channels, splits);
  const int64_t chunk = quotient_up(channels, quotient_up(channels, most));
  const int64_t tile = chunk * t->channel_pitch * word_bytes;
  const int64_t table = chunk * t->taps * 4;
  if (fixed + sums + table > smem_limit) return false;
  t->splits = static_cast<int32_t>(splits), t->split_channels = static_cast<int32_t>(channels);
  t->chunk = static_cast<int32_t>(chunk);
  t->tile_bytes = static_cast<int32_t>(tile > sums ? tile : sums);
  t->smem_bytes = static_cast<int32_t>(fixed + t->tile_bytes + table);
  const int64_t area = int64_t{t->staged_h} * t->staged_w;
  if (t->channels_last) {
    t->stage_channels = 1 << ceil_log2(chunk, 4);
    t->stage_positions = block.threads() / t->stage_channels;
  } else {
    t->stage_positions = static_cast<int32_t>(area < block.threads() ? area : block.threads());
    t->stage_channels = block.threads() / t->stage_positions;
  }
  return true;
}

// Clocks that the busiest SM is estimated to take, from counts of instructions and of accesses to
// shared memory and from latencies; not from measurements. The density is not known to the host:
// one weight in ten is assumed.
inline double estimated_clocks(const TilePlan& t, BlockShape block, int64_t element_bytes,
                               bool conflict_free, int64_t sm_count) {
  const double filters = static_cast<double>(t.filters) / static_cast<double>(t.filter_blocks);
  const double per_output = element_bytes == 4 ? (conflict_free ? 1. : 2.)   // bound by the memory,
                                               : (conflict_free ? .7 : 1.);  // by instructions
  const double per_entry = block.slots() / 32 * per_output + 1.5 * block.lanes / 32;
  const double staging = .25 * t.staged_h * t.staged_w;
  const double chunks = static_cast<double>(quotient_up(t.split_channels, t.chunk));
  const double work =
      t.split_channels * (.1 * filters * t.taps * per_entry + staging) + 300 * chunks;
  const double latency = 2000 + 1200 * chunks + (t.splits > 1 ? 1500 : 0);
  const int64_t blocks = quotient_up(t.work * t.splits, sm_count > 0 ? sm_count : 1);
  return static_cast<double>(blocks) * work +
         static_cast<double>(quotient_up(blocks, kBlocksPerSm)) * latency;
}

// Chooses shape (an index into kShapes), tile and splits. False if no tile fits: the caller takes
// the direct kernel. `most_splits` is 1 where there are no clusters.
inline bool plan_tiles(const CsrConv2dParams& params, int64_t element_bytes, int64_t sm_count,
                       int64_t smem_limit, int64_t most_splits, int* shape, TilePlan* plan) {
  const ConvShape& s = params.shape;
  TilePlan base{};
  fold_pixels(params, &base);
  base.stride_h = s.stride_h, base.stride_w = s.stride_w;
  base.pad_top = s.pad_top, base.pad_left = s.pad_left;
  base.groups = s.groups;
  base.channels = static_cast<int32_t>(s.channels_per_group());
  base.filters = static_cast<int32_t>(s.filters_per_group());
  base.taps = static_cast<int32_t>(s.r * s.s), base.filter_w = static_cast<int32_t>(s.s);
  base.filter_blocks = quotient_up(s.filters_per_group(), kBlockFilters);
  // What multiplies staged coordinates must be small enough for 32-bit products.
  if (s.stride_h > (1 << 24) || s.stride_w > (1 << 24)) return false;
  base.row_step = static_cast<int32_t>(s.r == 1 ? s.stride_h : 1);
  base.col_step = static_cast<int32_t>(s.s == 1 ? s.stride_w : 1);
  base.staged_row = base.row_step * base.x_h, base.staged_col = base.col_step * base.x_w;
  double least = -1;
  // A halo too large for half of an SM's shared memory gets all of it.
  for (int blocks = kBlocksPerSm; blocks > 0; --blocks) {
    const int64_t limit = blocks == 1 ? smem_limit : smem_limit / blocks - 1024;
    for (int i = 0; i < 3; ++i) {
      const BlockShape block = kShapes[i];
      for (int64_t tile_q = 1; tile_q <= block.positions(); tile_q *= 2) {
        TilePlan t = base;
        bool conflict_free = false;
        const int64_t words = limit / (kStrips * element_bytes);
        if (!lay_out_tile(s, block, element_bytes, tile_q, words, &t, &conflict_free)) continue;
        for (int64_t splits = 1; splits <= most_splits && splits <= t.channels; splits *= 2) {
          if (!cut_channels(block, element_bytes, splits, limit, &t)) continue;
          const double clocks = estimated_clocks(t, block, element_bytes, conflict_free, sm_count);
          if (least < 0 || clocks < least) least = clocks, *shape = i, *plan = t;
        }
      }
    }
    if (least >= 0) return true;
  }
  return false;
}

}  // namespace sparsecnn::cuda
