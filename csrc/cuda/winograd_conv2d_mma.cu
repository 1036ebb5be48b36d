// winograd_conv2d with a dense weight in 16 bits and tiles of 2 x 2, on tensor cores.
//
// Formula, tiles and layouts: winograd_conv2d.cu, winograd_tiles.cuh. T is half or bfloat16. The
// transformed input is rounded to T, one rounding more than in the other kernels; sums are float,
// in the order of the tensor cores. A transformed pixel may be four times as large as x: half takes
// a quarter of it, exactly, so that no finite x overflows.
//
// A block owns 64 filters of one group, 32 tiles and all 16 taps: 16 warps, one a tap, each
// multiplies 64 filters x 16 channels by 16 channels x 32 tiles a chunk (m16n8k16; 64 sums a
// thread); where there are few tiles, 16 filters x 16 tiles. Shared memory holds two chunks of each
// operand:
//   weight [tap][block][channel][8 filters], the format's own order: it is copied asynchronously as
//          it is, and ldmatrix transposes its 8 x 8 squares of 128 bytes,
//   input  [tap][tile][channel], in rows of 24 elements: ldmatrix of 8 rows meets all banks once.
// Eight warps transform, a thread a tile and two channels: while they do, the other eight multiply.
// The pixels of a chunk are fetched two chunks ahead, its weight one. At the end the taps meet in
// shared memory, 16 filters at a time.
//
// Bound (derived): a chunk is 16 * kFilters / 16 * 4 MMAs, 256 at 64 filters, of 2048 multiply-adds
// each, against about 8 * 150 warp instructions of the transform: some 400 clocks of the tensor
// cores of an SM (at the rate that mma.sync reaches on sm_90) and 300 of its schedulers, side by
// side. Shared memory delivers 6 matrices of ldmatrix a warp for 16 MMAs: 384 clocks, as much as
// the products. Ceiling against the direct convolution: 2.25 times the rate of the products. GPU
// timings have not been taken.
//
// Paper: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
#include "cuda/mma.cuh"
#include "cuda/winograd_tiles.cuh"

namespace sparsecnn::cuda {
namespace {

constexpr int kTaps = 16, kChunk = 16, kPairs = kChunk / 2;
constexpr int kThreads = kTaps * kWarpLanes;
constexpr int kInputPitch = kChunk + 8;  // elements of T
constexpr int kRound = 16;               // filters that end together

template <typename T>
inline constexpr float kShrink = 1.f;
template <>
inline constexpr float kShrink<__half> = 0.25f;

template <int kFilters, int kTiles>
struct MmaBlock {
  static constexpr int kPlaceBytes = kTiles * static_cast<int>(sizeof(TilePlace));
  static constexpr int kInput = kTaps * kTiles * kInputPitch;  // elements of T, of a chunk
  static constexpr int kWeight = kTaps * kFilters * kChunk;    // likewise
  static constexpr int kBytes = kPlaceBytes + 2 * 2 * (kInput + kWeight);
  static_assert(kRound * kTaps * kTilePitch<kTiles> * 4 <= kBytes - kPlaceBytes);
  static_assert(kFilters % kRound == 0 && kTiles % 16 == 0 && kTiles * kPairs <= kThreads);
};

template <typename T>
using Pair = Packed<T, 2>;

// The pixels of a tile of channels c and c + 1, c even; `x` is channel 0 of the group.
template <typename T>
__device__ __forceinline__ void load_pairs(const T* __restrict__ x, const WinogradPlan& plan,
                                           const TilePlace& place, int c, Pair<T> (&d)[4][4]) {
  const uint32_t inside = c < plan.channels ? place.inside : 0;
  const bool second = c + 1 < plan.channels;
  const T zero = from_float<T>(0.f);
  int64_t at = place.x + c * plan.x.c;
#pragma unroll
  for (int r = 0; r < 4; ++r, at += plan.x.h) {
    const bool row = inside >> r & 1;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool pixel = row && (inside >> (8 + j) & 1);
      d[r][j] = {{zero, zero}};
      if (plan.pairs_in) {
        if (pixel) d[r][j] = *reinterpret_cast<const Pair<T>*>(x + at + j * plan.x.w);
      } else {
        if (pixel) d[r][j].v[0] = x[at + j * plan.x.w];
        if (pixel && second) d[r][j].v[1] = x[at + j * plan.x.w + plan.x.c];
      }
    }
  }
}

template <typename T, int kTiles>
__device__ __forceinline__ void store_pairs(const Pair<T> (&pixels)[4][4], T* to) {
  float d[2][4][4];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t)
      d[e][t / 4][t % 4] = kShrink<T> * to_float(pixels[t / 4][t % 4].v[e]);
    winograd_input_2d<2>(d[e]);
  }
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    const Pair<T> pair{{from_float<T>(d[0][t / 4][t % 4]), from_float<T>(d[1][t / 4][t % 4])}};
    *reinterpret_cast<Pair<T>*>(to + t * (kTiles * kInputPitch)) = pair;
  }
}

// The weight of channels [c0, c0 + kChunk) of the filters of a slab; zeros where there is none.
template <typename T, int kFilters>
__device__ __forceinline__ void copy_weight(const T* __restrict__ values, const WinogradPlan& plan,
                                            int block0, int blocks, int c0, T* to) {
  constexpr int kRows = kTaps * (kFilters / kWinogradBlock) * kChunk;  // of 16 bytes
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    const int c = i % kChunk, block = i / kChunk % (kFilters / kWinogradBlock);
    const int tap = i / (kChunk * (kFilters / kWinogradBlock));
    const bool inside = block < blocks && c0 + c < plan.channels;
    const int64_t row = (block0 + block) * kTaps + tap;
    const int64_t from = (row * plan.channels + c0 + c) * kWinogradBlock;
    T* at = to + i * kWinogradBlock;
    if (plan.vectors_in) {
      copy_async<16>(at, inside ? values + from : values, inside);
    } else {
      for (int e = 0; e < kWinogradBlock; ++e)
        at[e] = inside ? values[from + e] : from_float<T>(0.f);
    }
  }
  copy_async_commit();
}

template <typename T, int kFilters, int kTiles>
__global__ void __launch_bounds__(kThreads, 1)
    winograd_conv2d_mma(const WinogradConv2dParams prm, const WinogradPlan plan) {
  using B = MmaBlock<kFilters, kTiles>;
  constexpr int kSlices = kFilters / 16;  // m16 tiles of filters
  DYN_SMEM(float, smem);
  TilePlace* places = reinterpret_cast<TilePlace*>(smem);
  T* input = reinterpret_cast<T*>(smem + B::kPlaceBytes / 4);
  T* weight = input + 2 * B::kInput;
  float* exchange = smem + B::kPlaceBytes / 4;
  const T* values = static_cast<const T*>(prm.values);
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  // Threads that transform: neighbouring lanes have neighbouring channels, or 8 neighbouring tiles
  // of 4 pairs, which write to different banks.
  const bool transforms = threadIdx.x < kTiles * kPairs;
  const int pair = plan.nhwc ? threadIdx.x % kPairs : threadIdx.x / 8 % kPairs;
  const int tile = plan.nhwc ? threadIdx.x / kPairs % kTiles
                             : threadIdx.x % 8 + threadIdx.x / (8 * kPairs) % (kTiles / 8) * 8;
  T* const own = input + tile * kInputPitch + 2 * pair;
  // What this lane addresses for ldmatrix: of the weight, as [channel][filter], square lane / 8 has
  // 8 filters and 8 channels; of the input two squares of channels of 8 tiles, then the next tiles.
  const int weight_row = (lane / 8 % 2 * kChunk + lane % 8 + lane / 16 * 8) * kWinogradBlock;
  const int input_row = (lane % 8 + lane / 16 * 8) * kInputPitch + lane / 8 % 2 * 8;

  for (int64_t work = blockIdx.x; work < plan.work; work += gridDim.x) {
    const WinogradItem item = winograd_item(plan, prm.shape.groups, work, kTiles);
    const T* x = static_cast<const T*>(prm.x) + item.group * plan.channels * plan.x.c;
    const int slab0 = item.slab * (kFilters / kWinogradBlock);
    const int block0 = item.group * plan.blocks + slab0, blocks = plan.blocks - slab0;
    __syncthreads();  // the item before is done with shared memory
    place_tiles<2, kTiles>(prm.shape, plan, item.tile, places);
    __syncthreads();

    float sum[kSlices][kTiles / 8][4];
#pragma unroll
    for (int s = 0; s < kSlices; ++s)
#pragma unroll
      for (int t = 0; t < kTiles / 8; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[s][t][i] = 0.f;

    Pair<T> pixels[4][4];
    if (plan.channels > 0) {
      copy_weight<T, kFilters>(values, plan, block0, blocks, 0, weight);
      if (transforms) {
        load_pairs<T>(x, plan, places[tile], 2 * pair, pixels);
        store_pairs<T, kTiles>(pixels, own);
        load_pairs<T>(x, plan, places[tile], kChunk + 2 * pair, pixels);
      }
    }
    int buffer = 0;
    for (int c0 = 0; c0 < plan.channels; c0 += kChunk, buffer ^= 1) {
      copy_async_wait<0>();
      __syncthreads();  // what all have copied and transformed is there; the other buffers are free
      if (c0 + kChunk < plan.channels) {
        copy_weight<T, kFilters>(values, plan, block0, blocks, c0 + kChunk,
                                 weight + (buffer ^ 1) * B::kWeight);
        if (transforms) {
          store_pairs<T, kTiles>(pixels, own + (buffer ^ 1) * B::kInput);
          load_pairs<T>(x, plan, places[tile], c0 + 2 * kChunk + 2 * pair, pixels);
        }
      }
      const T* w = weight + buffer * B::kWeight + warp * (kFilters * kChunk) + weight_row;
      const T* v = input + buffer * B::kInput + warp * (kTiles * kInputPitch) + input_row;
      uint32_t b[kTiles / 16][4];
#pragma unroll
      for (int t = 0; t < kTiles / 16; ++t) ldmatrix_x4(b[t], v + t * 16 * kInputPitch);
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, w + s * 16 * kChunk);
#pragma unroll
        for (int t = 0; t < kTiles / 8; ++t) {
          const uint32_t half[2] = {b[t / 2][t % 2 * 2], b[t / 2][t % 2 * 2 + 1]};
          mma_16x8x16<T>(sum[s][t], a, half);
        }
      }
    }

    // The taps of kRound filters at a time: [tap][filter][tile].
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      __syncthreads();
#pragma unroll
      for (int t = 0; t < kTiles / 8; ++t)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int f = lane / 4 + 8 * half, at = t * 8 + lane % 4 * 2;
          const Packed<float, 2> sums{{sum[s][t][2 * half], sum[s][t][2 * half + 1]}};
          *reinterpret_cast<Packed<float, 2>*>(exchange + (warp * kRound + f) * kTilePitch<kTiles> +
                                               at) = sums;
        }
      __syncthreads();
      if (threadIdx.x >= kRound * kTiles) continue;
      const int f = plan.nhwc ? threadIdx.x % kRound : threadIdx.x / kTiles;
      const int t = plan.nhwc ? threadIdx.x / kRound : threadIdx.x % kTiles;
      const int filter = item.slab * kFilters + s * kRound + f;
      if (filter < plan.filters)
        finish_tile<T, 2>(prm, plan, places[t], item.group * plan.filters + filter,
                          exchange + f * kTilePitch<kTiles> + t, kRound * kTilePitch<kTiles>,
                          1.f / kShrink<T>);
    }
  }
}

template <typename T, int kFilters, int kTiles>
cudaError_t launch_mma(const WinogradConv2dParams& params, cudaStream_t stream) {
  constexpr int kBytes = MmaBlock<kFilters, kTiles>::kBytes;
  const WinogradPlan plan = winograd_plan<T>(params, kFilters, kTiles);
  const cudaError_t error = allow_smem(winograd_conv2d_mma<T, kFilters, kTiles>, kBytes);
  if (error != cudaSuccess) return error;
  CUDA_LAUNCH((winograd_conv2d_mma<T, kFilters, kTiles>), grid_size(plan.work), kThreads, kBytes,
              stream, params, plan);
  return cudaGetLastError();
}

// The choice of winograd_conv2d.cu's launch_width; narrow also where shared memory is short (99 KB
// of sm_86 and sm_89).
template <typename T>
cudaError_t launch(const WinogradConv2dParams& params, cudaStream_t stream) {
  DeviceLimits limits{};
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  const bool wide = params.shape.filters_per_group() > 16 &&
                    limits.smem_optin_bytes >= MmaBlock<64, 32>::kBytes &&
                    winograd_plan<T>(params, 64, 32).work >= limits.sm_count;
  return wide ? launch_mma<T, 64, 32>(params, stream) : launch_mma<T, 16, 16>(params, stream);
}

}  // namespace

cudaError_t winograd_mma(const WinogradConv2dParams& params, cudaStream_t stream) {
  return params.dtype == DType::kFloat16 ? launch<__half>(params, stream)
                                         : launch<__nv_bfloat16>(params, stream);
}

}  // namespace sparsecnn::cuda
