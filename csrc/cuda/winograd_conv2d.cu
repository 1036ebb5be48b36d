// winograd_conv2d with a dense weight, and the choice of kernel.
//
//   y = act(A^T [ sum over c of U[k][c] . (B^T d[c] B) ] A + bias + residual)
//
// for every m x m tile of outputs, m = 2 or 4 (core/winograd_tiles.h): a 3x3 convolution of stride
// 1 with 2.25 or 4 times fewer products. Fused: transform, products and inverse transform are one
// kernel, and only x, the weight and y touch device memory.
//
// Data layout: x, residual and y are NCHW or channels last; the weight is (blocks of 8 filters,
// taps, channels, 8). Storage is float, half or bfloat16. Three kernels:
//   winograd_conv2d_dense   here: float arithmetic; m = 4, and m = 2 in float,
//   winograd_conv2d_mma     winograd_conv2d_mma.cu: m = 2 in 16 bits, on tensor cores,
//   winograd_conv2d_sparse  winograd_conv2d_sparse.cu: weights in CSR.
//
// Dense kernel. A block owns 32 filters of one group, all their taps and 32 (m = 2) or 16 (m = 4)
// tiles, as numbered in winograd_tiles.cuh. A warp owns 2 (6) taps, and of each a lane 4 filters x
// 8 (4) tiles: 64 (96) sums, and the outer product of a channel reads 3 (2) vectors of shared
// memory for 32 (16) multiply-adds. The block walks the channels in chunks of 4 to 16: the
// transformed tiles and the weight of a chunk lie in shared memory, the weight copied
// asynchronously a chunk ahead; m = 2 also reads the next pixels ahead, into registers. At the end
// the taps meet in shared memory, 8 filters at a time.
//
// Few tiles: 8 filters x 16 tiles, so that four or eight times as many blocks share the work.
//
// Bound (derived): multiply-adds. A chunk of m = 2 takes 512 multiply-adds of a thread against some
// 100 instructions for its tile; 78 KB and 128 registers (58 to 70 KB and 168 with 192 threads)
// leave two blocks to an SM, one multiplies while the other waits. Each slab of 32 filters
// transforms the tiles again, out of L2. Sums are float, one chain of fused multiply-adds by
// ascending channels. GPU timings have not been taken.
//
// Papers: Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016; Yan et al.,
// "Optimizing Batched Winograd Convolution on GPUs", PPoPP 2020 (the block of a fused kernel).
#include "cuda/entry.h"
#include "cuda/mma.cuh"
#include "cuda/winograd_tiles.cuh"

namespace sparsecnn::cuda {
namespace {

template <typename T, int M, int kFilters, int kTiles>
struct DenseBlock {
  static constexpr int kTaps = winograd_taps(M);
  static constexpr int kWarps = M == 2 ? 8 : 6, kOwn = kTaps / kWarps;  // taps of a warp
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kLaneFilters = kFilters / 8, kLaneTiles = kTiles / 4;
  // m = 2: a thread has a tile and channel of a chunk. m = 4: half a chunk where the weight of 36
  // taps would leave one block to an SM.
  static constexpr int kChunkLog2 =
      M == 2 ? (kTiles == 32 ? 3 : 4) : (kFilters == 32 && sizeof(T) == 4 ? 2 : 3);
  static constexpr int kChunk = 1 << kChunkLog2;
  static constexpr int kAhead = M == 2 ? 2 : 1;  // buffers of transformed tiles
  // The weight in shared memory is [tap][channel][filter], its rows a vector or two longer than the
  // filters, so that 8 lanes write their vectors into different banks.
  static constexpr int kWeightPitch = kFilters + 8;
  static constexpr int kWeight = kTaps * kChunk * kWeightPitch;       // T
  static constexpr int kInput = kTaps * kChunk * kTilePitch<kTiles>;  // floats
  static constexpr int kRound = 8;                                    // filters that end together
  static constexpr int kExchange = kTaps * kRound * kTilePitch<kTiles>;  // floats
  static constexpr int kPlaceBytes = kTiles * static_cast<int>(sizeof(TilePlace));
  static constexpr int kWorkBytes = kAhead * kInput * 4 + 2 * kWeight * static_cast<int>(sizeof(T));
  static constexpr int kBytes = kPlaceBytes + kWorkBytes;
  static_assert(kFilters % kRound == 0 && kTaps % kWarps == 0 && kExchange * 4 <= kWorkBytes);
};

// The weight of channels [c0, c0 + kChunk) of the filters of a slab; zeros where there is none.
template <typename T, class B, int kFilters>
__device__ __forceinline__ void copy_weight(const T* __restrict__ values, const WinogradPlan& plan,
                                            int block0, int blocks, int c0, T* to) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T)), kParts = kWinogradBlock / kVector;
  constexpr int kPieces = B::kTaps * (kFilters / kWinogradBlock) * B::kChunk * kParts;
#pragma unroll 1
  for (int i = threadIdx.x; i < kPieces; i += B::kThreads) {
    const int part = i % kParts * kVector, c = i / kParts % B::kChunk;
    const int row = i / (kParts * B::kChunk), tap = row % B::kTaps, block = row / B::kTaps;
    const bool inside = block < blocks && c0 + c < plan.channels;
    const int64_t row64 = (block0 + block) * B::kTaps + tap;
    const int64_t from = (row64 * plan.channels + c0 + c) * kWinogradBlock + part;
    T* at = to + (tap * B::kChunk + c) * B::kWeightPitch + block * kWinogradBlock + part;
    if (plan.vectors_in) {
      copy_async<16>(at, inside ? values + from : values, inside);
    } else {
      for (int e = 0; e < kVector; ++e) at[e] = inside ? values[from + e] : from_float<T>(0.f);
    }
  }
  copy_async_commit();
}

template <typename T, int M, int kFilters, int kTiles>
__global__ void __launch_bounds__(DenseBlock<T, M, kFilters, kTiles>::kThreads, 2)
    winograd_conv2d_dense(const WinogradConv2dParams prm, const WinogradPlan plan) {
  using B = DenseBlock<T, M, kFilters, kTiles>;
  constexpr int kLaneFilters = B::kLaneFilters, kLaneTiles = B::kLaneTiles;
  DYN_SMEM(float, smem);
  TilePlace* places = reinterpret_cast<TilePlace*>(smem);
  float* input = smem + B::kPlaceBytes / 4;
  T* weight = reinterpret_cast<T*>(input + B::kAhead * B::kInput);
  const T* values = static_cast<const T*>(prm.values);
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int filter = lane / 4 * kLaneFilters, tile = lane % 4 * kLaneTiles;

  for (int64_t work = blockIdx.x; work < plan.work; work += gridDim.x) {
    const WinogradItem item = winograd_item(plan, prm.shape.groups, work, kTiles);
    const T* x = static_cast<const T*>(prm.x) + item.group * plan.channels * plan.x.c;
    const int slab0 = item.slab * (kFilters / kWinogradBlock);
    const int block0 = item.group * plan.blocks + slab0, blocks = plan.blocks - slab0;
    __syncthreads();  // the item before is done with shared memory
    place_tiles<M, kTiles>(prm.shape, plan, item.tile, places);
    __syncthreads();

    float sum[B::kOwn][kLaneFilters][kLaneTiles];
#pragma unroll
    for (int o = 0; o < B::kOwn; ++o)
#pragma unroll
      for (int f = 0; f < kLaneFilters; ++f)
#pragma unroll
        for (int t = 0; t < kLaneTiles; ++t) sum[o][f][t] = 0.f;

    // m = 2: a thread has one tile and channel of each chunk, and its pixels come a chunk early.
    T pixels[4][4];
    int own_tile = 0, own_channel = 0;
    if constexpr (M == 2) {
      static_assert((kTiles << B::kChunkLog2) == B::kThreads);
      split_item<kTiles>(plan, B::kChunkLog2, threadIdx.x, &own_tile, &own_channel);
    }
    const auto load = [&](int c0) {
      const int c = c0 + own_channel;
      load_tile<T>(x, places[own_tile].x + c * plan.x.c, plan,
                   c < plan.channels ? places[own_tile].inside : 0, pixels);
    };
    const auto store = [&](float* to) {
      float d[4][4];
#pragma unroll
      for (int t = 0; t < 16; ++t) d[t / 4][t % 4] = to_float(pixels[t / 4][t % 4]);
      store_transformed<2, kTiles>(d, to, B::kChunkLog2, own_channel, own_tile);
    };
    if (plan.channels > 0) {
      copy_weight<T, B, kFilters>(values, plan, block0, blocks, 0, weight);
      if constexpr (M == 2) {
        load(0);
        store(input);
        load(B::kChunk);
      }
    }
    int buffer = 0;
    for (int c0 = 0; c0 < plan.channels; c0 += B::kChunk, buffer ^= 1) {
      const float* in = input + (M == 2 ? buffer * B::kInput : 0);
      if constexpr (M == 4) {
        __syncthreads();  // all have multiplied the chunk before
        stage_tiles<T, M, kTiles, B::kThreads>(x, plan, places, c0, B::kChunkLog2, input);
      }
      copy_async_wait<0>();
      __syncthreads();  // and what all have copied and transformed is there
      if (c0 + B::kChunk < plan.channels) {
        copy_weight<T, B, kFilters>(values, plan, block0, blocks, c0 + B::kChunk,
                                    weight + (buffer ^ 1) * B::kWeight);
        if constexpr (M == 2) {
          store(input + (buffer ^ 1) * B::kInput);
          load(c0 + 2 * B::kChunk);
        }
      }
#pragma unroll
      for (int o = 0; o < B::kOwn; ++o) {
        const int row = (warp * B::kOwn + o) * B::kChunk;
        const T* w = weight + buffer * B::kWeight + row * B::kWeightPitch + filter;
        const float* v = in + row * kTilePitch<kTiles> + tile;
#pragma unroll
        for (int c = 0; c < B::kChunk; ++c) {
          const auto a = *reinterpret_cast<const Packed<T, kLaneFilters>*>(w + c * B::kWeightPitch);
          const auto b =
              *reinterpret_cast<const Packed<float, kLaneTiles>*>(v + c * kTilePitch<kTiles>);
#pragma unroll
          for (int f = 0; f < kLaneFilters; ++f)
#pragma unroll
            for (int t = 0; t < kLaneTiles; ++t)
              sum[o][f][t] = fmaf(to_float(a.v[f]), b.v[t], sum[o][f][t]);
        }
      }
    }

    // The taps of kRound filters at a time: [tap][filter][tile].
#pragma unroll 1
    for (int first = 0; first < kFilters; first += B::kRound) {
      __syncthreads();
      if (filter / B::kRound == first / B::kRound) {
#pragma unroll
        for (int o = 0; o < B::kOwn; ++o)
#pragma unroll
          for (int f = 0; f < kLaneFilters; ++f) {
            const int row = (warp * B::kOwn + o) * B::kRound + filter % B::kRound + f;
            Packed<float, kLaneTiles> sums;
#pragma unroll
            for (int t = 0; t < kLaneTiles; ++t) sums.v[t] = sum[o][f][t];
            *reinterpret_cast<Packed<float, kLaneTiles>*>(input + row * kTilePitch<kTiles> + tile) =
                sums;
          }
      }
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < B::kRound * kTiles; i += B::kThreads) {
        const int f = plan.nhwc ? i % B::kRound : i / kTiles;
        const int t = plan.nhwc ? i / B::kRound : i % kTiles;
        const int k = item.slab * kFilters + first + f;
        if (k < plan.filters)
          finish_tile<T, M>(prm, plan, places[t], item.group * plan.filters + k,
                            input + f * kTilePitch<kTiles> + t, B::kRound * kTilePitch<kTiles>,
                            1.f);
      }
    }
  }
}

template <typename T, int M, int kFilters, int kTiles>
cudaError_t launch_dense(const WinogradConv2dParams& params, cudaStream_t stream) {
  using B = DenseBlock<T, M, kFilters, kTiles>;
  const WinogradPlan plan = winograd_plan<T>(params, kFilters, kTiles);
  const cudaError_t error = allow_smem(winograd_conv2d_dense<T, M, kFilters, kTiles>, B::kBytes);
  if (error != cudaSuccess) return error;
  CUDA_LAUNCH((winograd_conv2d_dense<T, M, kFilters, kTiles>), grid_size(plan.work), B::kThreads,
              B::kBytes, stream, params, plan);
  return cudaGetLastError();
}

// Wide blocks reuse a transformed tile four times as often; narrow ones where there are so few that
// SMs would have none, or no more filters than that.
template <typename T, int M>
cudaError_t launch_width(const WinogradConv2dParams& params, cudaStream_t stream) {
  constexpr int kTiles = M == 2 ? 32 : 16;
  DeviceLimits limits{};
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  const bool wide = params.shape.filters_per_group() > 8 &&
                    winograd_plan<T>(params, 32, kTiles).work >= limits.sm_count;
  return wide ? launch_dense<T, M, 32, kTiles>(params, stream)
              : launch_dense<T, M, 8, 16>(params, stream);
}

}  // namespace

cudaError_t winograd_dense(const WinogradConv2dParams& params, cudaStream_t stream) {
  if (params.tile == 2) {
    return params.dtype == DType::kFloat32 ? launch_width<float, 2>(params, stream)
                                           : cudaErrorInvalidValue;
  }
  return with_storage(params.dtype, [&](auto storage) {
    return launch_width<typename decltype(storage)::type, 4>(params, stream);
  });
}

int32_t winograd_conv2d(const WinogradConv2dParams& params, void* stream) {
  const ConvShape& s = params.shape;
  if (s.n * s.k * s.p * s.q == 0) return cudaSuccess;
  if (params.tile != 2 && params.tile != 4) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  if (params.row_ptr != nullptr) return winograd_sparse(params, on);
  const bool half = params.dtype == DType::kFloat16 || params.dtype == DType::kBFloat16;
  return params.tile == 2 && half ? winograd_mma(params, on) : winograd_dense(params, on);
}

}  // namespace sparsecnn::cuda
