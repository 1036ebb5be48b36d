// How one chain_conv2d call is cut into work: decided once per call, read by all threads.
//
// A thread walks its share of an image in bands of output rows. For a band it computes, stage after
// stage, the rows of every intermediate that are still missing, into rings of rows in its scratch;
// so within a share no row is computed twice, and between two shares only the halo is. The bands
// are as high as the rings may be to stay in the second-level cache, because a block of weights is
// used for all pixels of a band once it is loaded.
#pragma once
#include <cstdint>

#include "core/params.h"

namespace sparsecnn::cpu {

// What the planner has to know of an instruction set.
struct ChainMachine {
  int32_t lanes;          // of a vector of accumulators
  int32_t tile_vectors;   // vectors of channels in a register tile
  int32_t element_bytes;  // of an accumulator
};

// The input of a stage: where it lies and how it is padded. Rows are kept in a ring; a row is
// `pad_left` zero pixels, the W pixels of the image and zero pixels up to `row`.
struct ChainBuffer {
  int64_t rows;      // of the ring; 0: x is read where it is
  int64_t pad_left;  // zero pixels in front of a row
  int64_t pixels;    // of a row, zeros included
  int64_t pixel;     // elements between pixels
  int64_t row;       // elements between rows
  int64_t offset;    // bytes into the thread's scratch
};

struct ChainPlan {
  int64_t n;                           // images as the kernel sees them
  ConvShape shape[kMaxChainStages];    // of the stages, likewise
  ChainBuffer input[kMaxChainStages];  // of each stage
  // Whether a dense stage's weight is read where it lies: stored (R, S, C, K), whole vectors, in
  // the type of accumulation and at a pitch that does not fold its rows onto a few cache sets.
  bool direct[kMaxChainStages];
  int64_t x_image, x_channel, x_row, x_pixel;  // elements between images, channels, ... of x
  int64_t y_image;                             // elements between images of y
  int64_t band;                                // output rows of a band
  int64_t row_parts;                           // shares of an image's output rows ...
  int64_t slab_parts;                          // ... and of the last stage's output channels
  int64_t items;                               // n * row_parts * slab_parts
  int64_t slab_offset;   // bytes into the scratch: packed weights of a register tile
  int64_t table_offset;  // addresses of filter rows, for each output row of a band
  int64_t out_offset;    // a band of outputs waiting for their transposition (NCHW)
  int64_t out_pixel;     // elements between its pixels
  int64_t thread_bytes;
};

ChainPlan plan_chain(const ChainConv2dParams& params, const ChainMachine& machine, int64_t threads);

}  // namespace sparsecnn::cpu
