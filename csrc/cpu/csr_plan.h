// How one csr_conv2d call is cut into work: decided once per call by the glue's thread, read by
// all.
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

// Entries past the end of the bounds table that the kernel may read.
inline constexpr int64_t kBoundsPad = 4;

struct CsrPlan {
  // The convolution as the kernel sees it: a pointwise layer (1x1, stride 1, no padding) is
  // collapsed to one row of pixels, and in NHWC to one image.
  ConvShape shape;
  int32_t lanes;             // L
  int32_t ln, ly, lx;        // lanes over images, output rows, output columns; ln*ly*lx = L
  bool interleaved;          // lane l holds pixel position*L + l (pointwise only), else tiles
  bool in_place;             // interleaved, and the image itself serves as the panel
  int64_t tile_h, tile_w;    // output positions of one lane
  int32_t ny, nx;            // block of output positions held in registers: ny * nx vectors
  int32_t super_y, super_x;  // blocks that share one packing
  int64_t image_groups, blocks_y, blocks_x;  // items along images, rows, columns
  int32_t rows, cols;      // packed input rows and columns of super_y * super_x blocks
  int32_t span;            // source columns between the first and the last packed one, + 1
  int64_t channel_pitch;   // vectors between channels of a panel: rows * cols and what keeps a
                           // block's channels out of each other's cache sets
  int64_t scratch_budget;  // bytes of scratch that one thread should stay within
  int64_t channel_block;   // input channels per panel
  int64_t channel_blocks;
  int64_t filter_chunks;      // chunks of output channels per group, balanced by nonzeros
  int64_t max_chunk_filters;  // filters in the largest chunk
  int64_t items;              // image_groups * blocks_y * blocks_x * groups * filter_chunks
  // Whether the weight is copied into the order in which the kernel reads it (cpu/csr_program.h);
  // not worth it where each nonzero is used for a vector or two, as in a linear layer.
  bool streamed;
  // Tables, owned by the program.
  int32_t* tap_offset;   // (channel_block * R * S): element offset of a column in the panel
  int32_t* row_source;   // (rows): input row relative to the first row of the block
  int32_t* col_source;   // (cols): input column, likewise
  int32_t* col_slot;     // (span): packed column of a source column, or -1
  int64_t* chunk_begin;  // (groups * filter_chunks + 1): first filter of each chunk
  const void* entries;   // CsrEntry<float or double>, if streamed: chunk by chunk, panel by panel
  const int64_t* panel_entries;  // (chunks, panels): first entry of a chunk's part of a panel
  const int32_t* counts;         // (chunks, panels, filters of the chunk): entries of each filter
  // Per-thread scratch, in bytes from the thread's base.
  int64_t panel_offset, partial_offset, bias_offset, bounds_offset, thread_bytes;
};

// One nonzero in the order of the kernel: its value in the type of accumulation and the distance
// in bytes of its tap's first vector from the start of the panel.
template <class T>
struct CsrEntry {
  T value;
  int32_t offset;
};

// Hash of `bytes` bytes; each 8-byte word enters by an invertible step.
using HashFunction = uint64_t (*)(const void* data, int64_t bytes, uint64_t seed);

// A weight is read as it is stored where the output has no more than so many vectors.
inline constexpr int32_t kStoredVectors = 2;

// Registers a block may use and its legal shapes depend on the instruction set.
struct CsrMachine {
  int32_t lanes;
  int32_t max_vectors;  // accumulators that fit beside the weight and the operand
  int64_t panel_bytes;  // L1 budget of a panel
};

// Block shapes the kernels are compiled for: every one fits in registers, and together they tile
// maps of 7, 14, 28, 56, 112 and 224 without a remainder.
inline constexpr int32_t kMaxNy = 7;
inline constexpr int32_t kMaxNx = 14;

constexpr bool csr_block_is_legal(int32_t ny, int32_t nx, int32_t max_vectors) {
  const bool height = ny == 1 || ny == 2 || ny == 3 || ny == 4 || ny == 7;
  const bool width = (nx >= 1 && nx <= 8) || nx == 10 || nx == 12 || nx == 14;
  return height && width && ny * nx <= max_vectors;
}

// Chooses lanes, block, channel block and chunks by a cost model in cycles. The program fills the
// rest: pitch, items, chunks, pointers, scratch. nnz is row_ptr[K].
CsrPlan csr_plan(const CsrConv2dParams& params, int64_t nnz, const CsrMachine& machine,
                 int32_t threads);

// Bytes of a panel of so many channels, at most, and of what a filter of a chunk takes beside it:
// partial sums, bias, bounds.
inline constexpr int64_t kPitchPads = 16;  // channel pitches that are tried
int64_t csr_panel_bytes(const CsrPlan& plan, int64_t channels, int64_t element_bytes);
int64_t csr_filter_bytes(const CsrPlan& plan, int64_t panels, int64_t element_bytes);

// Whether x starts at a cache line; the choice of a plan may depend on it.
inline bool csr_is_aligned(const CsrConv2dParams& params) {
  return reinterpret_cast<uintptr_t>(params.x) % 64 == 0;
}

// Positions along one axis of the input that the taps of n consecutive outputs touch, each once;
// returns how many. Writes them to `source` and, per tap, the index of its first position to
// `tap_index`; both may be null.
int32_t csr_pack_axis(int64_t taps, int64_t dilation, int64_t stride, int64_t n, int32_t* source,
                      int32_t* tap_index);

}  // namespace sparsecnn::cpu
