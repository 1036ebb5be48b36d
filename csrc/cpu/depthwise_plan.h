// How one depthwise_conv2d call is cut into work: decided once per call, read by all threads.
#pragma once
#include <cstdint>

#include "core/params.h"

namespace sparsecnn::cpu {

// What of the choice depends on the instruction set.
struct DepthwiseMachine {
  int32_t lanes;     // L
  int32_t max_tile;  // accumulators that fit beside a row of the filter and an operand
};

// Tiles the kernels are compiled for, widest first: output columns in NHWC, output rows in NCHW.
// Together they cut maps of 7, 14, 28, 56, 112 and 224 without a remainder; elsewhere the last tile
// is moved back over its neighbour, whose outputs it computes again to the same bits.
inline constexpr int32_t kDepthwiseTiles[] = {14, 8, 7, 4, 1};

struct DepthwisePlan {
  // NHWC: an item is an output row of a chunk of output channels, of (image, chunk, row).
  int64_t chunk_vectors, chunks;
  int32_t tile;  // output columns in registers
  // NCHW: an item is a band of output rows of an output plane, of (image, channel, band).
  int64_t bands;
  int32_t full_tile;  // output rows in registers, L columns of each
  int32_t pair_tile;  // the same where a vector holds L/2 columns of two rows that far apart
  // NCHW, small planes: an item is L channels of an image, computed as NHWC (`tile`).
  bool transposed;
  bool prefetch;  // NHWC, from memory: input in the order of memory, ahead of its row
  int64_t items;
  // Per-thread scratch, in bytes from the thread's base.
  int64_t weight_offset, mask_offset, rows_offset, rows_2_offset, thread_bytes;
};

DepthwisePlan depthwise_plan(const DepthwiseConv2dParams& params, const DepthwiseMachine& machine,
                             int64_t threads);

}  // namespace sparsecnn::cpu
