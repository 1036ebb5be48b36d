// pattern_conv2d of a 2:4 weight on sparse tensor cores (mma.sp, sm_80 and later), float16 and
// bfloat16, NHWC: of four consecutive channels of a tap at most two are kept.
//
//   y[n, p, q, k] = act(sum over r, s, c of x[n, p*sh + r*dh - pt, q*sw + s*dw - pl, c]
//                       * W[k, c, r, s] + bias[k] + residual[n, p, q, k])
//
// as an implicit GEMM: D (filters x pixels) = A (filters x taps * C, half of it stored) * B (taps *
// C x pixels); products are exact, sums float32. pattern_conv2d_2_4_pack.cu has packed A into what
// is copied here (layout: pattern_2_4_plan.h).
//
// A block owns a tile of filters and pixels and walks over the steps, 64 channels of one tap, with
// three stages of shared memory filled by cp.async. A lies there as it was packed, lane by lane:
// one 16-byte load per 16 filters and slice of 32 channels, without conflicts. B is the 128 bytes
// of each pixel, its eight pieces permuted by the pixel (piece ^ pixel % 8), so that neither copies
// nor ldmatrix conflict; pixels outside the image and behind the last are zeros and not read. Taps
// are the inner loop: successive steps read the same lines, shifted, and find them in L1. A warp
// owns 64 filters x 64 pixels (32 x 32 in the small tile) in 128 (32) accumulators. Where tiles are
// fewer than SMs, their steps are split into parts, which pattern_conv2d_2_4_sum.cu adds up in
// order: results are the same in every call.
//
// Bounds (derived). What limits it is shared memory, 128 bytes a cycle: for 32 channels a warp
// reads 64 * 36 bytes of A and 64 * 64 of B for its 32 mma.sp. The tile of 256 x 128 reads 51 KB
// and writes 17, 536 cycles for 2.1 MFLOP of the dense layer; that of 128 x 128 takes 300 for half.
//   A100: mma.sp needs 512 cycles, the dense mma.sync 1024: 1.9x at best, of which a kernel that
//   gets to three quarters of its bound, as good dense ones do, keeps 1.4x.
//   H200: 0.9 PFLOP/s on 132 SMs at 1.75 GHz. Against the 0.79 measured of dense wgmma, which reads
//   B once for 64 filters and not once a warp, that is 1.15x at best, more only against what stays
//   below that rate. L2 has to deliver 9.2 + 8.2 / taps KB in that time: at some 25 bytes a cycle
//   and SM it limits 1x1 layers to 0.7 PFLOP/s. wgmma.sp would lift both.
// Packing and its launch come on top in every call, see pattern_conv2d_2_4_pack.cu.
//
// Paper: Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021).
#include "cuda/entry.h"
#include "cuda/mma.cuh"
#include "cuda/pattern_2_4_epilogue.cuh"
#include "cuda/pattern_2_4_plan.h"

namespace sparsecnn::cuda {
namespace two_four {
namespace {

// A pixel of the output as the place of its window in x; 16 bytes, read at once.
struct alignas(16) Pixel {
  int64_t offset;       // bytes to (row, column, channel 0) in x, also where that is outside
  int32_t row, column;  // of its first tap
};

// Which tap of which channels a step is.
struct Step {
  int32_t index, chunk, r, s;

  __device__ __forceinline__ Step(const Plan& plan, const ConvShape& shape, int32_t first)
      : index(first), chunk(first / plan.taps) {
    const int32_t tap = first - chunk * plan.taps, width = static_cast<int32_t>(shape.s);
    r = tap / width;
    s = tap - r * width;
  }

  __device__ __forceinline__ void next(const ConvShape& shape) {
    ++index;
    if (++s < shape.s) return;
    s = 0;
    if (++r < shape.r) return;
    r = 0;
    ++chunk;
  }
};

// Where a thread's pieces of the packed weight begin, in bytes from step to step the same distance.
// Behind the last block of filters that one is copied again: what comes of it is not stored.
template <class Tile>
struct Pieces {
  static constexpr int kAll = Tile::kFilterBlocks * (kBlockBytes / 16);
  static constexpr int kOwn = (kAll + Tile::kThreads - 1) / Tile::kThreads;
  uint32_t offset[kOwn];

  __device__ __forceinline__ void find(const Plan& plan, int64_t filter_block) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int piece = static_cast<int>(threadIdx.x) + i * Tile::kThreads;
      int64_t block = filter_block + piece / (kBlockBytes / 16);
      if (block >= plan.filter_blocks) block = plan.filter_blocks - 1;
      offset[i] = static_cast<uint32_t>(block * plan.steps * kBlockBytes) +
                  static_cast<uint32_t>(piece % (kBlockBytes / 16) * 16);
    }
  }
};

// Issues the copies of one step: the blocks of filters as they are, then 128 bytes of each pixel.
template <class Tile>
__device__ __forceinline__ void copy_step(const PatternConv2dParams& prm,
                                          const unsigned char* packed, const Pieces<Tile>& pieces,
                                          const Pixel* pixels, const Step& step,
                                          unsigned char* stage) {
  const ConvShape& s = prm.shape;
  const int tid = static_cast<int>(threadIdx.x);
  const unsigned char* const from = packed + static_cast<int64_t>(step.index) * kBlockBytes;
#pragma unroll
  for (int i = 0; i < Pieces<Tile>::kOwn; ++i) {
    const int piece = tid + i * Tile::kThreads;
    if (piece < Pieces<Tile>::kAll)
      copy_async<16>(stage + 16 * piece, from + pieces.offset[i], true);
  }
  const int piece = tid % 8, channel = step.chunk * kChunk + piece * 8;
  const int32_t down = step.r * static_cast<int32_t>(s.dil_h);
  const int32_t right = step.s * static_cast<int32_t>(s.dil_w);
  const uint32_t height = channel < s.c ? static_cast<uint32_t>(s.h) : 0;
  const uint32_t width = static_cast<uint32_t>(s.w);
  const int64_t tap = ((down * s.w + right) * s.c + channel) * 2;
  const char* const x = static_cast<const char*>(prm.x) + tap;
  unsigned char* const to =
      stage + Tile::kFilterBlocks * kBlockBytes + tid / 8 * 128 + (piece ^ (tid / 8 % 8)) * 16;
#pragma unroll
  for (int i = 0; i < Tile::kPixels * 8 / Tile::kThreads; ++i) {
    const Pixel pixel = pixels[tid / 8 + i * (Tile::kThreads / 8)];
    const bool inside = static_cast<uint32_t>(pixel.row + down) < height &&
                        static_cast<uint32_t>(pixel.column + right) < width;
    copy_async<16, true>(to + i * (Tile::kThreads / 8) * 128, x + pixel.offset, inside);
  }
}

// One slice of 32 channels: the tiles of 16 filters of the warp times its pixels.
template <typename T, class Tile, int kSlice_>
__device__ __forceinline__ void multiply_slice(const unsigned char* a, const uint32_t* places,
                                               const unsigned char* b,
                                               float (&sum)[Tile::kM][Tile::kN][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  uint32_t part[Tile::kM][4];
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
    const Words words = reinterpret_cast<const Words*>(a)[(m * 2 + kSlice_) * kWarpLanes + lane];
#pragma unroll
    for (int i = 0; i < 4; ++i) part[m][i] = words.v[i];
  }
  // Lane l gives the address of piece l / 8 of pixel l % 8.
  const unsigned char* from = b + lane % 8 * 128 + ((kSlice_ * 4 + lane / 8) ^ (lane % 8)) * 16;
#pragma unroll
  for (int n = 0; n < Tile::kN; ++n) {
    uint32_t image[4];
    ldmatrix_x4(image, from + n * 8 * 128);
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m)
      mma_sparse_16x8x32<T, kSlice_>(sum[m][n], part[m], image, places[m]);
  }
}

// Turns the sums of a warp, 16 pixels at a time, so that a lane stores 8 filters of a pixel: the
// end result, or those of a part to `partial`.
template <typename T, class Tile>
__device__ __forceinline__ void store_tile(const PatternConv2dParams& prm, float* partial,
                                           int64_t pixels, int64_t k0, int64_t pixel0,
                                           const float (&sum)[Tile::kM][Tile::kN][4],
                                           float* turned) {
  // A pitch of 4 modulo 32 banks: the writes of g and t below fall on 32 different ones.
  constexpr int kPitch = Tile::kM * 16 + 4, kVectors = Tile::kM * 2;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, g = lane / 4, t = lane % 4;
  const int k_in_warp = lane % kVectors * 8;
  const int64_t k = k0 + k_in_warp;
  const bool stores = k < prm.shape.k;
  float bias[8] = {};
  if (stores) load_bias<T>(prm, k, bias);
#pragma unroll
  for (int n = 0; n < Tile::kN; n += 2) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        turned[(i / 4 * 8 + 2 * t + i % 2) * kPitch + m * 16 + g + i % 4 / 2 * 8] =
            sum[m][n + i / 4][i % 4];
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < kVectors / 2; ++i) {
      const int row = i * (kWarpLanes / kVectors) + lane / kVectors;
      const int64_t pixel = pixel0 + n * 8 + row;
      if (!stores || pixel >= pixels) continue;
      const int64_t at = pixel * prm.shape.k + k;
      const auto* from = reinterpret_cast<const Floats*>(turned + row * kPitch + k_in_warp);
      const Floats sums[2] = {from[0], from[1]};
      if (partial) {
        Floats* const to = reinterpret_cast<Floats*>(partial + at);
        to[0] = sums[0];
        to[1] = sums[1];
        continue;
      }
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = sums[j / 4].v[j % 4] + bias[j];
      finish<T>(prm, at, v);
    }
  }
}

template <typename T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm)
    pattern_conv2d_2_4_gemm(const PatternConv2dParams prm, const Plan plan,
                            const unsigned char* __restrict__ packed, float* __restrict__ partial,
                            int64_t filter_tiles, int64_t tiles) {
  constexpr int kStages = Tile::kStages;
  DYN_SMEM(unsigned char, shared);
  Pixel* const pixels = reinterpret_cast<Pixel*>(shared + kStages * Tile::kStageBytes);
  const ConvShape& s = prm.shape;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / kWarpLanes;
  const int lane = tid % kWarpLanes;
  const int warp_row = warp / Tile::kWarpColumns, warp_column = warp % Tile::kWarpColumns;
  // The warp's first tile of 16 filters: which block of 64, which of its four.
  const int block = warp_row * Tile::kM / 4, first = warp_row * Tile::kM % 4;
  for (int64_t item = blockIdx.x; item < tiles * plan.parts; item += gridDim.x) {
    // Blocks of the same pixels run together and share them in L2.
    int64_t tile, filter_tile;
    const int part = static_cast<int>(divide(item, tiles, &tile));
    const int64_t pixel0 = divide(tile, filter_tiles, &filter_tile) * Tile::kPixels;
    for (int i = tid; i < Tile::kPixels; i += Tile::kThreads) {
      Pixel pixel{0, INT32_MIN, 0};  // outside at every tap
      if (pixel0 + i < plan.pixels) {
        int64_t p, q;
        const int64_t n = divide(divide(pixel0 + i, s.q, &q), s.p, &p);
        const int64_t row = p * s.stride_h - s.pad_top, column = q * s.stride_w - s.pad_left;
        pixel.offset = ((n * s.h + row) * s.w + column) * s.c * 2;
        pixel.row = static_cast<int32_t>(row);
        pixel.column = static_cast<int32_t>(column);
      }
      pixels[i] = pixel;
    }
    __syncthreads();

    float sum[Tile::kM][Tile::kN][4];
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
      for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] = 0.f;

    Pieces<Tile> pieces;
    pieces.find(plan, filter_tile * Tile::kFilterBlocks);
    Step ahead(plan, s, static_cast<int>(int64_t{part} * plan.steps / plan.parts));
    const int begin = ahead.index;
    const int end = static_cast<int>((int64_t{part} + 1) * plan.steps / plan.parts);
    int write = 0, read = 0;  // stages
    const auto copy_next = [&] {
      if (ahead.index < end) {
        copy_step<Tile>(prm, packed, pieces, pixels, ahead, shared + write * Tile::kStageBytes);
        ahead.next(s);
      }
      copy_async_commit();  // also an empty group: the wait below counts them
      write = write + 1 < kStages ? write + 1 : 0;
    };
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) copy_next();
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      copy_async_wait<kStages - 2>();
      // Behind it the step is there for all, and nobody reads the stage that is written next.
      __syncthreads();
      copy_next();
      const unsigned char* const stage = shared + read * Tile::kStageBytes;
      const unsigned char* const a = stage + block * kBlockBytes;
      const unsigned char* const b =
          stage + Tile::kFilterBlocks * kBlockBytes + warp_column * Tile::kN * 8 * 128;
      const Words all = reinterpret_cast<const Words*>(a + kValueBytes)[lane];
      uint32_t places[Tile::kM];
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m)
        places[m] = Tile::kM == 4 || first == 0 ? all.v[m] : all.v[4 - Tile::kM + m];
      multiply_slice<T, Tile, 0>(a + first * 1024, places, b, sum);
      if (step < plan.first_half_step) multiply_slice<T, Tile, 1>(a + first * 1024, places, b, sum);
      read = read + 1 < kStages ? read + 1 : 0;
    }
    __syncthreads();  // the stages become the memory in which the sums are turned
    store_tile<T, Tile>(prm, partial ? partial + part * plan.pixels * s.k : nullptr, plan.pixels,
                        filter_tile * Tile::kFilters + warp_row * Tile::kM * 16,
                        pixel0 + warp_column * Tile::kN * 8, sum,
                        reinterpret_cast<float*>(shared) + warp * 16 * (Tile::kM * 16 + 4));
    __syncthreads();
  }
}

template <typename T, class Tile>
cudaError_t launch_gemm(const PatternConv2dParams& prm, const Plan& plan,
                        const unsigned char* packed, float* partial, cudaStream_t stream) {
  const auto kernel = pattern_conv2d_2_4_gemm<T, Tile>;
  const cudaError_t error = allow_smem(kernel, Tile::kSmemBytes);
  if (error != cudaSuccess) return error;
  const int64_t filter_tiles = ceil_div(prm.shape.k, Tile::kFilters);
  const int64_t tiles = filter_tiles * ceil_div(plan.pixels, Tile::kPixels);
  CUDA_LAUNCH(kernel, grid_size(tiles * plan.parts), Tile::kThreads, Tile::kSmemBytes, stream, prm,
              plan, packed, partial, filter_tiles, tiles);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_planned(const PatternConv2dParams& prm, const Plan& plan,
                           const unsigned char* packed, float* partial, cudaStream_t stream) {
  switch (plan.tile) {
    case TileKind::kWide:
      return launch_gemm<T, Wide>(prm, plan, packed, partial, stream);
    case TileKind::kMiddle:
      return launch_gemm<T, Middle>(prm, plan, packed, partial, stream);
    default:
      return launch_gemm<T, Small>(prm, plan, packed, partial, stream);
  }
}

}  // namespace
}  // namespace two_four

int64_t pattern_conv2d_2_4_workspace_bytes(const PatternConv2dParams& prm) {
  two_four::Plan plan;
  // Where there is no device, the general kernel reports it.
  if (!two_four::applies(prm) || two_four::make_plan(prm.shape, &plan) != cudaSuccess) return 0;
  return two_four::workspace_bytes(prm.shape, plan);
}

int32_t pattern_conv2d_2_4(const PatternConv2dParams& prm, void* workspace, void* stream) {
  using namespace two_four;
  if (!applies(prm) || !aligned(workspace)) return cudaErrorInvalidValue;
  Plan plan;
  cudaError_t error = make_plan(prm.shape, &plan);
  if (error != cudaSuccess || plan.pixels == 0) return error;
  const auto on = static_cast<cudaStream_t>(stream);
  auto* const packed = static_cast<unsigned char*>(workspace);
  float* const partial =
      plan.parts > 1 ? reinterpret_cast<float*>(packed + packed_bytes(plan)) : nullptr;
  error = pack(prm, plan, packed, on);
  if (error != cudaSuccess) return error;
  error = prm.dtype == DType::kFloat16
              ? launch_planned<__half>(prm, plan, packed, partial, on)
              : launch_planned<__nv_bfloat16>(prm, plan, packed, partial, on);
  if (error != cudaSuccess || !partial) return error;
  return sum_parts(prm, plan, partial, on);
}

}  // namespace sparsecnn::cuda
