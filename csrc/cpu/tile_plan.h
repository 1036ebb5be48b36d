// How a convolution with a sparse weight is cut into work (csr_conv2d, pattern_conv2d): decided
// once per call by the glue's thread, read by all.
//
// The kernel never sees the image. It sees panels: for a block of input channels and a block of
// output positions, every input vector a tap may touch, packed so that the L lanes of a vector are
// L *places* of the output (tiles of one image, images of a batch, or neighbouring pixels of a
// pointwise layer) and a shift by one output position is a shift by one whole vector. Every load of
// the inner loop is therefore aligned, whatever the stride, padding or dilation.
#pragma once
#include <cstdint>

#include "core/params.h"

namespace sparsecnn::cpu {

inline constexpr int64_t kCacheLine = 64;
inline constexpr int64_t kL1Sets = 64;  // of every x86 core with 32 or 48 KB

struct TilePlan {
  // The convolution as the kernel sees it: a pointwise layer (1x1, stride 1, no padding) is
  // collapsed to one row of pixels, and in NHWC to one image.
  ConvShape shape;
  int32_t lanes;             // L
  int32_t ln, ly, lx;        // lanes over images, output rows, output columns; ln*ly*lx = L
  bool interleaved;          // lane l holds pixel position*L + l (pointwise only), else tiles
  bool in_place;             // interleaved, and the image itself serves as the panel
  int64_t tile_h, tile_w;    // output positions of one lane
  int32_t ny, nx;            // block of output positions held in registers: ny * nx vectors
  int32_t filter_block;      // filters held in registers together, if they share their columns
  int32_t super_y, super_x;  // blocks that share one packing
  int64_t image_groups, blocks_y, blocks_x;  // items along images, rows, columns
  int32_t rows, cols;      // packed input rows and columns of super_y * super_x blocks
  int32_t span;            // source columns between the first and the last packed one, + 1
  int64_t channel_pitch;   // vectors between channels of a panel: rows * cols and what keeps a
                           // block's channels out of each other's cache sets
  int64_t scratch_budget;  // bytes of scratch that one thread should stay within
  int64_t channels;        // input channels of a group that the weight reads
  int64_t channel_block;   // of them, per panel
  int64_t channel_blocks;
  int64_t filter_chunks;      // chunks of output channels per group, balanced by nonzeros
  int64_t max_chunk_filters;  // filters in the largest chunk
  int64_t items;              // image_groups * blocks_y * blocks_x * groups * filter_chunks
  // Whether the weight is copied into the order in which the kernel reads it (cpu/csr_program.h);
  // not worth it where each nonzero is used for a vector or two, as in a linear layer.
  bool streamed;
  // Tables, owned by the program.
  int32_t* tap_offset;         // (channel_block * R * S): element offset of a column in the panel
  int32_t* row_source;         // (rows): input row relative to the first row of the block
  int32_t* col_source;         // (cols): input column, likewise
  int32_t* col_slot;           // (span): packed column of a source column, or -1
  const int64_t* chunk_begin;  // (groups * filter_chunks + 1): first filter of a chunk
  const int32_t* channel;    // (groups, channels): ascending, of the group; null where all are read
  const int32_t* filter_of;  // (K): the filter at a place in the kernel's order; null where equal
  const int32_t* by_filter;  // (K): places in a chunk by ascending filter, where there is filter_of
  // Per-thread scratch, in bytes from the thread's base.
  int64_t panel_offset, partial_offset, bias_offset, thread_bytes;
};

// Registers a block may use and its legal shapes depend on the instruction set.
struct TileMachine {
  int32_t lanes;
  int32_t max_vectors;  // accumulators that fit beside the weight and the operand
  int32_t registers;    // accumulators, operands and weights that fit beside nothing
  int64_t panel_bytes;  // L1 budget of a panel
};

inline constexpr int32_t kDoubleVectors = 8, kDoubleRegisters = 16;
// Three quarters of a 32 KB L1; the rest is partial sums.
inline constexpr int64_t kPanelBytes = 24 << 10;

// What a weight asks for when filters are taken up to filter_block at a time: totals over all
// groups. A register block is up to filter_block filters that share their columns.
struct TileWork {
  int32_t filter_block;
  double blocks;   // register blocks
  double columns;  // kept columns, added over the register blocks
  double stored;   // weights
};

// Block shapes the kernels are compiled for: every one fits in registers, and together they tile
// maps of 7, 14, 28, 56, 112 and 224 without a remainder.
inline constexpr int32_t kMaxNy = 7;
inline constexpr int32_t kMaxNx = 14;
inline constexpr int32_t kMaxFilterBlock = 8;

constexpr bool block_is_legal(int32_t ny, int32_t nx, int32_t max_vectors) {
  const bool height = ny == 1 || ny == 2 || ny == 3 || ny == 4 || ny == 7;
  const bool width = (nx >= 1 && nx <= 8) || nx == 10 || nx == 12 || nx == 14;
  return height && width && ny * nx <= max_vectors;
}

// Vectors a block of several filters may have: the sums, the weights or the operands of one column,
// whichever are fewer, and one of the others.
constexpr int32_t max_block_vectors(int32_t filters, int32_t max_vectors, int32_t registers) {
  if (filters == 1) return max_vectors;
  int32_t n = 0;
  while (filters * (n + 1) + (filters < n + 1 ? filters : n + 1) + 1 <= registers) ++n;
  return n;
}

// Chooses lanes, block, channel block, chunks and one of the `options` for taking the filters, by
// a cost model in cycles. The program fills the rest: pitch, items, chunks, pointers, scratch.
// `channels` of a group are read; `streamed` is TilePlan's.
TilePlan tile_plan(const ConvParams& params, const TileWork* options, int32_t count,
                   int64_t channels, bool streamed, const TileMachine& machine, int32_t threads);

// Bytes of a panel of so many channels, at most, and of what a filter of a chunk takes beside it:
// partial sums, bias, bounds.
inline constexpr int64_t kPitchPads = 16;  // channel pitches that are tried
int64_t panel_bytes(const TilePlan& plan, int64_t channels, int64_t element_bytes);
int64_t filter_bytes(const TilePlan& plan, int64_t panels, int64_t element_bytes);

// Whether x starts at a cache line; the choice of a plan may depend on it.
inline bool is_aligned(const ConvParams& params) {
  return reinterpret_cast<uintptr_t>(params.x) % 64 == 0;
}

// Positions along one axis of the input that the taps of n consecutive outputs touch, each once;
// returns how many. Writes them to `source` and, per tap, the index of its first position to
// `tap_index`; both may be null.
int32_t pack_axis(int64_t taps, int64_t dilation, int64_t stride, int64_t n, int32_t* source,
                  int32_t* tap_index);

// Hash of `bytes` bytes; each 8-byte word enters by an invertible step.
using HashFunction = uint64_t (*)(const void* data, int64_t bytes, uint64_t seed);

}  // namespace sparsecnn::cpu
