// How a winograd_conv2d call is cut into work. Lanes are tiles: the tiles of all images, in order,
// fill vectors without gaps, whatever the map's size. An item is a run of a few vectors of tiles of
// one convolution group, and a chunk of its filters; each item transforms its own input.
#pragma once
#include <cstdint>

#include "core/params.h"
#include "core/winograd_tiles.h"

namespace sparsecnn::cpu {

// Channels or filters that lie in plain order together (NCHW; in NHWC a vector of them): vectors
// that were stored in pieces are not read before the pieces have left the store queue.
inline constexpr int kWinogradPlanes = 2;

struct WinogradPlan {
  int32_t lanes;             // L
  int64_t tiles_y, tiles_x;  // of an image
  int64_t tiles;             // of all images
  int64_t vectors;           // ceil(tiles / L)
  int64_t runs;              // items along the tiles, of nearly equal size
  int64_t blocks;            // of filters, of a convolution group
  int64_t chunks;            // items along the blocks, likewise
  int64_t items;             // groups * chunks * runs
  int32_t max_vectors;       // vectors of the largest run
  int64_t filters;           // that meet a transformed input together, at most
  // Elements between taps of the transformed input and of the products; a line more than the data,
  // so that the taps do not fold onto one cache set.
  int64_t input_pitch, product_pitch;
  int64_t tile_pitch;  // elements between pixels of a tile in plain order, a vector of overrun each
  // Per-thread scratch, in bytes from the thread's base: transformed input, products, one tile of
  // input or output in plain order.
  int64_t product_offset, tile_offset, thread_bytes;
};

struct WinogradMachine {
  int32_t lanes;
  int32_t dense_vectors;   // vectors of a run that the register tile of the dense products takes
  int32_t sparse_vectors;  // and of the sparse ones
  int64_t element_bytes;
};

// `stored` values of the weight.
WinogradPlan winograd_plan(const WinogradConv2dParams& params, int64_t stored,
                           const WinogradMachine& machine, int64_t threads);

}  // namespace sparsecnn::cpu
