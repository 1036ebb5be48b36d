// What the kernels of winograd_conv2d share: how the outputs are cut into tiles, the transforms of
// F(2x2, 3x3) and F(4x4, 3x3) (matrices and points: core/winograd_tiles.h), their way from x and to
// y.
//
// The tiles of all images are numbered one after the other, (n, tile row, tile column), and a block
// takes kTiles of them: small maps fill it with the tiles of several images. Where a tile lies is
// worked out once for a block and kept in shared memory (TilePlace).
#pragma once
#include "core/winograd_tiles.h"
#include "cuda/launch.cuh"

namespace sparsecnn::cuda {

// The block of a launcher: kFilters of one convolution group and kTiles.
struct WinogradPlan {
  TensorStrides x, y;
  int64_t tiles_x, tiles_y, tiles;  // tiles_x * tiles_y of an image, all of them
  int64_t work;                     // blocks' worth: slabs * groups * runs of kTiles tiles
  int32_t channels, filters;        // of a group
  int32_t blocks;                   // of 8 filters, of a group
  int32_t slabs;                    // of kFilters filters, of a group
  int32_t nhwc;
  int32_t vectors_in;   // the weight may be read by 16 bytes
  int32_t vectors_out;  // a row of a tile is whole and aligned in y and residual
  int32_t pairs_in;     // two neighbouring channels of x may be read at once (channels last)
  int32_t chunk_log2;   // channels transformed at a time
};

template <typename T>
WinogradPlan winograd_plan(const WinogradConv2dParams& params, int filters, int tiles) {
  const ConvShape& s = params.shape;
  const int64_t m = params.tile;
  WinogradPlan plan{};
  plan.x = strides_of(params.layout, s.c, s.h, s.w);
  plan.y = strides_of(params.layout, s.k, s.p, s.q);
  plan.tiles_x = ceil_div(s.q, m), plan.tiles_y = ceil_div(s.p, m);
  plan.tiles = s.n * plan.tiles_y * plan.tiles_x;
  plan.blocks = static_cast<int32_t>(winograd_blocks(s.filters_per_group()));
  plan.slabs = static_cast<int32_t>(ceil_div(plan.blocks * kWinogradBlock, filters));
  plan.work = plan.slabs * s.groups * ceil_div(plan.tiles, tiles);
  plan.channels = static_cast<int32_t>(s.channels_per_group());
  plan.filters = static_cast<int32_t>(s.filters_per_group());
  plan.nhwc = params.layout == Layout::kNHWC;
  plan.vectors_in = aligned(params.values);
  const auto row = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % (m * sizeof(T)); };
  plan.vectors_out = !plan.nhwc && s.q % m == 0 && row(params.y) == 0 && row(params.residual) == 0;
  plan.pairs_in = plan.nhwc && plan.channels % 2 == 0 &&
                  reinterpret_cast<uintptr_t>(params.x) % (2 * sizeof(T)) == 0;
  return plan;
}

// What a block works on: its group, first filter of the group and first tile.
struct WinogradItem {
  int64_t tile;
  int group, slab;
};

// Slabs run fastest: blocks in flight together read the same tiles, from L2.
__device__ __forceinline__ WinogradItem winograd_item(const WinogradPlan& plan, int64_t groups,
                                                      int64_t work, int tiles) {
  int64_t group, slab;
  const int64_t run = divide(divide(work, plan.slabs, &slab), groups, &group);
  return {run * tiles, static_cast<int>(group), static_cast<int>(slab)};
}

struct alignas(16) TilePlace {
  int64_t x, y;     // elements to the tile's first pixel of channel 0; in x it may lie outside
  uint32_t inside;  // bit r: row r of the input tile is in the image; bit 8 + j: column j
  int32_t rows, columns;  // of the tile that exist in y
};

// Threads below kTiles write the places of the tiles from `first` on.
template <int M, int kTiles>
__device__ __forceinline__ void place_tiles(const ConvShape& s, const WinogradPlan& plan,
                                            int64_t first, TilePlace* places) {
  if (threadIdx.x >= kTiles) return;
  TilePlace place{};  // beyond the last tile: no input, no output
  const int64_t at = first + threadIdx.x;
  if (at < plan.tiles) {
    int64_t tx, ty;
    const int64_t n = divide(divide(at, plan.tiles_x, &tx), plan.tiles_y, &ty);
    const int64_t p = ty * M, q = tx * M, row = p - s.pad_top, col = q - s.pad_left;
    place.x = n * plan.x.n + row * plan.x.h + col * plan.x.w;
    place.y = n * plan.y.n + p * plan.y.h + q * plan.y.w;
    for (int i = 0; i < M + 2; ++i) {
      if (row + i >= 0 && row + i < s.h) place.inside |= 1u << i;
      if (col + i >= 0 && col + i < s.w) place.inside |= 256u << i;
    }
    place.rows = static_cast<int32_t>(s.p - p < M ? s.p - p : M);
    place.columns = static_cast<int32_t>(s.q - q < M ? s.q - q : M);
  }
  places[threadIdx.x] = place;
}

// B^T d and A^T m of one column or row. The points of F(4) come in pairs +-p: what is even in p and
// what is odd is computed once.
template <int M>
__device__ __forceinline__ void winograd_input(float (&d)[M + 2]) {
  if constexpr (M == 2) {
    const float first = d[0] - d[2], last = d[1] - d[3];
    const float sum = d[1] + d[2], difference = d[2] - d[1];
    d[0] = first, d[1] = sum, d[2] = difference, d[3] = last;
  } else {
    constexpr float a = kWinogradNear, b = kWinogradFar, a2 = a * a, b2 = b * b;
    const float even_a = fmaf(d[2], -b2, d[4]), odd_a = fmaf(d[1], -b2, d[3]);
    const float even_b = fmaf(d[2], -a2, d[4]), odd_b = fmaf(d[1], -a2, d[3]);
    d[0] = fmaf(d[0], a2 * b2, fmaf(d[2], -(a2 + b2), d[4]));
    d[5] = fmaf(d[1], a2 * b2, fmaf(d[3], -(a2 + b2), d[5]));
    d[1] = fmaf(odd_a, a, even_a), d[2] = fmaf(odd_a, -a, even_a);
    d[3] = fmaf(odd_b, b, even_b), d[4] = fmaf(odd_b, -b, even_b);
  }
}

template <int M>
__device__ __forceinline__ void winograd_output(const float (&m)[M + 2], float (&y)[M]) {
  if constexpr (M == 2) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = m[1] - (m[2] + m[3]);
  } else {
    constexpr float a = kWinogradNear, b = kWinogradFar, a2 = a * a, b2 = b * b;
    const float sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const float sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = fmaf(difference_a, a, difference_b * b);
    y[2] = fmaf(sum_a, a2, sum_b * b2);
    y[3] = fmaf(difference_a, a2 * a, fmaf(difference_b, b2 * b, m[5]));
  }
}

// Both passes on a tile in registers.
template <int M>
__device__ __forceinline__ void winograd_input_2d(float (&d)[M + 2][M + 2]) {
#pragma unroll
  for (int j = 0; j < M + 2; ++j) {
    float column[M + 2];
#pragma unroll
    for (int i = 0; i < M + 2; ++i) column[i] = d[i][j];
    winograd_input<M>(column);
#pragma unroll
    for (int i = 0; i < M + 2; ++i) d[i][j] = column[i];
  }
#pragma unroll
  for (int i = 0; i < M + 2; ++i) winograd_input<M>(d[i]);
}

// The pixels of a tile of 4 x 4 and one channel, which starts at x[at]; zeros outside the image.
template <typename T>
__device__ __forceinline__ void load_tile(const T* __restrict__ x, int64_t at,
                                          const WinogradPlan& plan, uint32_t inside, T (&d)[4][4]) {
  const T zero = from_float<T>(0.f);
#pragma unroll
  for (int r = 0; r < 4; ++r, at += plan.x.h) {
    const bool row = inside >> r & 1;
    if (plan.nhwc) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        d[r][j] = row && (inside >> (8 + j) & 1) ? x[at + j * plan.x.w] : zero;
    } else {  // the distances of columns are constants: they take no arithmetic
#pragma unroll
      for (int j = 0; j < 4; ++j) d[r][j] = row && (inside >> (8 + j) & 1) ? x[at + j] : zero;
    }
  }
}

// Which (tile, channel) of a chunk is number `i`: lanes read neighbouring pixels, or channels.
template <int kTiles>
__device__ __forceinline__ void split_item(const WinogradPlan& plan, int chunk_log2, int i,
                                           int* tile, int* channel) {
  *tile = plan.nhwc ? i >> chunk_log2 : i % kTiles;
  *channel = plan.nhwc ? i & ((1 << chunk_log2) - 1) : i / kTiles;
}

// The transformed tiles in shared memory, [tap][channel of the chunk][tile], in rows of kTiles + 4:
// then neither lanes along the tiles nor lanes along the channels meet in a bank, and vectors of
// four tiles stay aligned.
template <int kTiles>
inline constexpr int kTilePitch = kTiles + 4;

template <int M, int kTiles>
__device__ __forceinline__ void store_transformed(float (&d)[M + 2][M + 2], float* v,
                                                  int chunk_log2, int channel, int tile) {
  winograd_input_2d<M>(d);
  v += channel * kTilePitch<kTiles> + tile;
#pragma unroll
  for (int t = 0; t < (M + 2) * (M + 2); ++t)
    v[t * (kTilePitch<kTiles> << chunk_log2)] = d[t / (M + 2)][t % (M + 2)];
}

// Transforms the channels [c0, c0 + chunk) of the block's tiles; zeros behind the last channel. `x`
// is channel 0 of the group. F(4)'s 36 values do not fit into the registers beside a kernel's sums:
// columns go first, through shared memory, then rows. Ends without a barrier.
template <typename T, int M, int kTiles, int kThreads>
__device__ __forceinline__ void stage_tiles(const T* __restrict__ x, const WinogradPlan& plan,
                                            const TilePlace* places, int c0, int chunk_log2,
                                            float* v) {
  constexpr int kA = M + 2;
  const int items = kTiles << chunk_log2, pitch = kTilePitch<kTiles> << chunk_log2;
  if constexpr (M == 2) {
#pragma unroll 1
    for (int i = threadIdx.x; i < items; i += kThreads) {
      int tile, channel;
      split_item<kTiles>(plan, chunk_log2, i, &tile, &channel);
      const uint32_t inside = c0 + channel < plan.channels ? places[tile].inside : 0;
      T pixels[4][4];
      load_tile<T>(x, places[tile].x + (c0 + channel) * plan.x.c, plan, inside, pixels);
      float d[4][4];
#pragma unroll
      for (int t = 0; t < 16; ++t) d[t / 4][t % 4] = to_float(pixels[t / 4][t % 4]);
      store_transformed<M, kTiles>(d, v, chunk_log2, channel, tile);
    }
  } else {
#pragma unroll 1
    for (int i = threadIdx.x; i < items * kA; i += kThreads) {
      int tile, channel;
      const int j = i / items;
      split_item<kTiles>(plan, chunk_log2, i - j * items, &tile, &channel);
      const uint32_t inside = c0 + channel < plan.channels ? places[tile].inside : 0;
      const bool column = inside >> (8 + j) & 1;
      int64_t at = places[tile].x + (c0 + channel) * plan.x.c + j * plan.x.w;
      float d[kA];
#pragma unroll
      for (int r = 0; r < kA; ++r, at += plan.x.h)
        d[r] = column && (inside >> r & 1) ? to_float(x[at]) : 0.f;
      winograd_input<M>(d);
      float* to = v + j * pitch + channel * kTilePitch<kTiles> + tile;
#pragma unroll
      for (int r = 0; r < kA; ++r) to[r * kA * pitch] = d[r];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < items * kA; i += kThreads) {
      const int r = i / items, rest = i - r * items;
      float* row = v + r * kA * pitch + rest / kTiles * kTilePitch<kTiles> + rest % kTiles;
      float d[kA];
#pragma unroll
      for (int j = 0; j < kA; ++j) d[j] = row[j * pitch];
      winograd_input<M>(d);
#pragma unroll
      for (int j = 0; j < kA; ++j) row[j * pitch] = d[j];
    }
  }
}

// Row r of a tile of outputs of filter k: y is that of place.y and channel 0.
template <typename T, int M>
__device__ __forceinline__ void store_row(const ConvParams& prm, const WinogradPlan& plan,
                                          const TilePlace& place, int64_t k, int r, float bias,
                                          const float (&y)[M]) {
  if (r >= place.rows) return;
  const int64_t at = place.y + k * plan.y.c + r * plan.y.h;
  T* out = static_cast<T*>(prm.y);
  const T* residual = static_cast<const T*>(prm.residual);
  if (plan.vectors_out) {
    Packed<T, M> more{}, row;
    if (residual) more = *reinterpret_cast<const Packed<T, M>*>(residual + at);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      float value = y[j] + bias;
      if (residual) value += to_float(more.v[j]);
      row.v[j] = from_float<T>(activate(prm.activation, value));
    }
    *reinterpret_cast<Packed<T, M>*>(out + at) = row;
    return;
  }
#pragma unroll
  for (int j = 0; j < M; ++j) {
    if (j >= place.columns) continue;
    float value = y[j] + bias;
    if (residual) value += to_float(residual[at + j * plan.y.w]);
    out[at + j * plan.y.w] = from_float<T>(activate(prm.activation, value));
  }
}

template <typename T>
__device__ __forceinline__ float bias_of(const ConvParams& prm, int64_t k) {
  return prm.bias ? to_float(static_cast<const T*>(prm.bias)[k]) : 0.f;
}

// A^T m A of the sums m that lie tap after tap, `pitch` floats apart, and the end of the tile.
template <typename T, int M>
__device__ __forceinline__ void finish_tile(const ConvParams& prm, const WinogradPlan& plan,
                                            const TilePlace& place, int64_t k, const float* sums,
                                            int pitch, float scale) {
  constexpr int kA = M + 2;
  float rows[M][kA];
#pragma unroll
  for (int j = 0; j < kA; ++j) {
    float m[kA], y[M];
#pragma unroll
    for (int i = 0; i < kA; ++i) m[i] = sums[(i * kA + j) * pitch];
    winograd_output<M>(m, y);
#pragma unroll
    for (int i = 0; i < M; ++i) rows[i][j] = y[i] * scale;
  }
  const float bias = bias_of<T>(prm, k);
#pragma unroll
  for (int i = 0; i < M; ++i) {
    float y[M];
    winograd_output<M>(rows[i], y);
    store_row<T, M>(prm, plan, place, k, i, bias, y);
  }
}

// The launchers of each kernel; one file each, because each has many instances.
cudaError_t winograd_dense(const WinogradConv2dParams& params, cudaStream_t stream);
cudaError_t winograd_sparse(const WinogradConv2dParams& params, cudaStream_t stream);
cudaError_t winograd_mma(const WinogradConv2dParams& params, cudaStream_t stream);

}  // namespace sparsecnn::cuda
