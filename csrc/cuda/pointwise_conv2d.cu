// pointwise_conv2d: a 1x1 convolution without padding, as a product of two dense matrices.
//
//   y[n,k,p,q] = act(bias[k] + residual[n,k,p,q] + sum over c of W[k,c] * x[n,c,p*stride,q*stride])
//
// Data layout: x, residual and y are NCHW or channels last, W is (K, C) with strides of its own.
// The outputs of all images are numbered through, so that maps of 7x7 fill tiles as well.
//
// A block owns a tile of 128 outputs x 64 filters (32 x 32 where the GPU would be idle) and walks
// the channels in steps of 64 bytes, staged in shared memory three steps deep: by asynchronous
// copies of 16, 8 or 4 bytes, as shapes and addresses allow, or by plain loads. In half precision a
// warp owns 32 x 32 (16 x 16) of it, by tensor cores with float sums: outputs are the rows of the
// product in channels last, the filters in NCHW, so that each operand is staged as it lies in
// memory. Float with TF32 allowed goes the same way, rounded between shared memory and the tensor
// cores. In strict float a thread owns 8 x 4 (4 x 2), by fused multiply-adds in order of the
// channels; it reads (8 + 4) * 16 bytes of shared memory for 128 of them, which is the rate an SM
// has (derived). Results leave through shared memory, side by side as in y.
//
// Bound (derived): device memory, x and y once and W once in L2, up to C * K / (C + K) operations
// of each two bytes; below about 128 channels and filters that is far from either peak. A map with
// few outputs and filters and many channels (2048 > 512 @7) gives 32 blocks, each walking all
// channels: they are not split. GPU timings have not been taken.
#include "cuda/entry.h"
#include "cuda/pointwise_conv2d_tile.cuh"

namespace sparsecnn::cuda {
namespace {

using namespace pointwise;  // NOLINT: its parts

struct TileShape {
  int pixels, filters, warps;
};
constexpr TileShape kLarge{128, 64, 8}, kSmall{32, 32, 4};

struct Plan {
  int64_t pixels, pixel_tiles, work;
  int64_t area;          // P * Q
  TensorStrides x;       // strides between outputs: those of x times the convolution's
  int x_width, w_width;  // elements side by side that may be copied at once
};

// Where an output's first input channel lies in x; `pixel` counts through all images.
__device__ __forceinline__ int64_t input_at(const ConvShape& s, const Plan& plan, int64_t pixel) {
  int64_t rest, q;
  const int64_t n = divide(pixel, plan.area, &rest), p = divide(rest, s.q, &q);
  return n * plan.x.n + p * plan.x.h + q * plan.x.w;
}

template <typename T, bool kTensor, bool kNhwc, bool kInnermost, int kPixels, int kFilters,
          int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 2)
    pointwise_conv2d_tiled(const PointwiseConv2dParams prm, const Plan plan) {
  using Tile = Tiles<T, kNhwc, kInnermost, kPixels, kFilters>;
  constexpr int kThreads = kWarps * 32, kV = kVector<T>, kDepth = Tile::kDepth;
  constexpr int kXParts = kPixels * kDepth / kV / kThreads;
  constexpr int kWParts = kFilters * kDepth / kV / kThreads;
  static_assert(kXParts * kThreads * kV == kPixels * kDepth);
  static_assert(kWParts * kThreads * kV == kFilters * kDepth);
  DYN_SMEM(T, stages);
  float* const out = reinterpret_cast<float*>(stages);
  const ConvShape& s = prm.shape;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarpLanes, warp = tid / kWarpLanes;
  const T* const weight = static_cast<const T*>(prm.weight);

  for (int64_t item = blockIdx.x; item < plan.work; item += gridDim.x) {
    // Filter tiles run slowest: blocks in flight together share the weight, and W fits the L2.
    int64_t pixel_tile;
    const int64_t k0 = divide(item, plan.pixel_tiles, &pixel_tile) * kFilters;
    const int64_t pixel0 = pixel_tile * kPixels;

    // The vectors of x that this thread copies in every step: the same outputs each time. Where a
    // vector of outputs may not be copied at once (kNhwc is false), it copies single elements.
    const bool by_element = !kNhwc && plan.x_width == 1;
    const T* x_from[kXParts];
    bool x_inside[kXParts];
#pragma unroll
    for (int i = 0; i < kXParts; ++i) {
      const int part = tid + i * kThreads;
      const int of = kNhwc ? part / (kDepth / kV) : part % (kPixels / kV) * kV;
      const int64_t pixel = pixel0 + (by_element ? tid % kPixels : of);
      x_inside[i] = pixel < plan.pixels;
      x_from[i] = static_cast<const T*>(prm.x) + (x_inside[i] ? input_at(s, plan, pixel) : 0);
    }
    const auto stage = [&](int64_t c0, int slot) {
      T* const x_tile = stages + slot * Tile::kStage;
      T* const w_tile = x_tile + Tile::kX;
      if (by_element) {
        static_assert(kThreads % kPixels == 0);
#pragma unroll 4
        for (int c = tid / kPixels; c < kDepth; c += kThreads / kPixels) {
          const bool inside = x_inside[0] && c0 + c < s.c;
          x_tile[c * Tile::kXPitch + tid % kPixels] =
              inside ? x_from[0][(c0 + c) * plan.x.c] : from_float<T>(0.f);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kXParts; ++i) {
          const int part = tid + i * kThreads;
          if (kNhwc) {
            const int pixel = part / (kDepth / kV), c = part % (kDepth / kV) * kV;
            stage_vector(x_tile + pixel * Tile::kXPitch + c, x_from[i] + c0 + c, plan.x_width, 1,
                         x_inside[i] ? s.c - c0 - c : 0);
          } else {
            const int c = part / (kPixels / kV), pixel = part % (kPixels / kV) * kV;
            stage_vector(x_tile + c * Tile::kXPitch + pixel, x_from[i] + (c0 + c) * plan.x.c,
                         plan.x_width, 1, c0 + c < s.c ? plan.pixels - pixel0 - pixel : 0);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kWParts; ++i) {
        const int part = tid + i * kThreads;
        constexpr int kRow = kInnermost ? kFilters / kV : kDepth / kV;  // vectors
        const int row = part / kRow, column = part % kRow * kV;
        const int64_t k = k0 + (kInnermost ? column : row), c = c0 + (kInnermost ? row : column);
        const int64_t count = kInnermost ? (c < s.c ? s.k - k : 0) : (k < s.k ? s.c - c : 0);
        stage_vector(w_tile + row * Tile::kWPitch + column,
                     weight + k * prm.weight_stride[0] + c * prm.weight_stride[1], plan.w_width,
                     prm.weight_stride[kInnermost ? 0 : 1], count);
      }
    };

    const int64_t steps = ceil_div(s.c, kDepth);
    const auto walk = [&](auto multiply) {
#pragma unroll
      for (int i = 0; i < kStages - 1; ++i) {
        if (i < steps) stage(int64_t{i} * kDepth, i);
        copy_async_commit();
      }
      int slot = 0;
      for (int64_t step = 0; step < steps; ++step) {
        copy_async_wait<kStages - 2>();
        __syncthreads();  // all copies of this step are there, and the step before is used up
        const int next = slot == 0 ? kStages - 1 : slot - 1;
        if (step + kStages - 1 < steps) stage((step + kStages - 1) * kDepth, next);
        copy_async_commit();
        multiply(stages + slot * Tile::kStage, stages + slot * Tile::kStage + Tile::kX);
        slot = slot == kStages - 1 ? 0 : slot + 1;
      }
      __syncthreads();  // the results go where the tiles were
    };

    if constexpr (!kTensor) {
      constexpr int kAcross = 16, kDown = kThreads / kAcross;
      constexpr int kOwnFilters = kFilters / kAcross, kOwnPixels = kPixels / kDown;
      const int across = tid % kAcross, down = tid / kAcross;
      // Own filters side by side where they are so in shared memory, else kAcross apart.
      const int filter0 = kInnermost ? across * kOwnFilters : across;
      constexpr int kFilterStep = kInnermost ? 1 : kAcross;
      float sum[kOwnPixels][kOwnFilters] = {};
      walk([&](const float* x_tile, const float* w_tile) {
#pragma unroll
        for (int c = 0; c < kDepth; c += 4) {
          float w[4][kOwnFilters];  // [c][filter]
          if constexpr (kInnermost) {
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              const auto row = *reinterpret_cast<const Packed<float, kOwnFilters>*>(
                  w_tile + (c + v) * Tile::kWPitch + filter0);
#pragma unroll
              for (int j = 0; j < kOwnFilters; ++j) w[v][j] = row.v[j];
            }
          } else {
#pragma unroll
            for (int j = 0; j < kOwnFilters; ++j) {
              const auto row = *reinterpret_cast<const Packed<float, 4>*>(
                  w_tile + (filter0 + j * kFilterStep) * Tile::kWPitch + c);
#pragma unroll
              for (int v = 0; v < 4; ++v) w[v][j] = row.v[v];
            }
          }
          // Four outputs a time: their vectors along c, or for each c a vector of the outputs.
#pragma unroll
          for (int i = 0; i < kOwnPixels; i += 4) {
            float x[4][4];  // [c][pixel]
#pragma unroll
            for (int v = 0; v < 4; ++v) {
              const int at = kNhwc ? (down + (i + v) * kDown) * Tile::kXPitch + c
                                   : (c + v) * Tile::kXPitch + down * 4 + i * kDown;
              const auto in = *reinterpret_cast<const Packed<float, 4>*>(x_tile + at);
#pragma unroll
              for (int u = 0; u < 4; ++u) (kNhwc ? x[u][v] : x[v][u]) = in.v[u];
            }
#pragma unroll
            for (int j = 0; j < kOwnFilters; ++j)
#pragma unroll
              for (int v = 0; v < 4; ++v) {
                float& to = sum[i + v][j];
#pragma unroll
                for (int u = 0; u < 4; ++u) to = fmaf(w[u][j], x[u][v], to);
              }
          }
        }
      });
#pragma unroll
      for (int i = 0; i < kOwnPixels; ++i)
#pragma unroll
        for (int j = 0; j < kOwnFilters; ++j) {
          const int pixel = kNhwc ? down + i * kDown : down * 4 + i / 4 * 4 * kDown + i % 4;
          out[pixel * Tile::kOutPitch + filter0 + j * kFilterStep] = sum[i][j];
        }
    } else {
      constexpr int kEdge = kPixels == kLarge.pixels ? 32 : 16;  // of a warp's part
      constexpr int kRows = kEdge / 16, kColumns = kEdge / 8;
      static_assert(kPixels / kEdge * (kFilters / kEdge) == kWarps);
      const int pixel_of = warp % (kPixels / kEdge) * kEdge;
      const int filter_of = warp / (kPixels / kEdge) * kEdge;
      float sum[kRows][kColumns][4] = {};
      walk([&](const T* x_tile, const T* w_tile) {

#pragma unroll
        for (int c = 0; c < kDepth; c += kStep<T>) {
          uint32_t a[kRows][4];
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            if constexpr (kNhwc) {
              load_a<T, false>(a[i], x_tile, Tile::kXPitch, pixel_of + i * 16, c, lane);
            } else {
              load_a<T, kInnermost>(a[i], w_tile, Tile::kWPitch, filter_of + i * 16, c, lane);
            }
          }
#pragma unroll
          for (int j = 0; j < kColumns; j += 2) {
            uint32_t b[4];
            if constexpr (kNhwc) {
              load_b<T, kInnermost>(b, w_tile, Tile::kWPitch, filter_of + j * 8, c, lane);
            } else {
              load_b<T, true>(b, x_tile, Tile::kXPitch, pixel_of + j * 8, c, lane);
            }
            const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              multiply_add<T>(sum[i][j], a[i], left);
              multiply_add<T>(sum[i][j + 1], a[i], right);
            }
          }
        }
      });
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = i * 16 + lane / 4 + e / 2 * 8, column = j * 8 + lane % 4 * 2 + e % 2;
            const int pixel = pixel_of + (kNhwc ? row : column);
            out[pixel * Tile::kOutPitch + filter_of + (kNhwc ? column : row)] = sum[i][j][e];
          }
    }
    __syncthreads();
#pragma unroll 2
    for (int o = tid; o < kPixels * kFilters; o += kThreads) {
      const int of = kNhwc ? o / kFilters : o % kPixels;
      const int filter = kNhwc ? o % kFilters : o / kPixels;
      const int64_t pixel = pixel0 + of, k = k0 + filter;
      if (pixel >= plan.pixels || k >= s.k) continue;
      int64_t rest = 0, at = pixel * s.k + k;
      if (!kNhwc) {
        const int64_t n = divide(pixel, plan.area, &rest);
        at = (n * s.k + k) * plan.area + rest;
      }
      store_output<T>(prm, out[of * Tile::kOutPitch + filter], k, at);
    }
    __syncthreads();  // all results are read before the next item is staged
  }
}

template <typename T, bool kTensor, bool kNhwc, bool kInnermost, int kPixels, int kFilters,
          int kWarps>
cudaError_t launch_tiled(const PointwiseConv2dParams& params, Plan plan, cudaStream_t stream) {
  plan.pixel_tiles = ceil_div(plan.pixels, kPixels);
  plan.work = plan.pixel_tiles * ceil_div(params.shape.k, kFilters);
  CUDA_LAUNCH((pointwise_conv2d_tiled<T, kTensor, kNhwc, kInnermost, kPixels, kFilters, kWarps>),
              grid_size(plan.work), kWarps * 32,
              (Tiles<T, kNhwc, kInnermost, kPixels, kFilters>::kBytes), stream, params, plan);
  return cudaGetLastError();
}

template <typename T, bool kTensor, bool kNhwc, bool kInnermost>
cudaError_t launch_layout(const PointwiseConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  DeviceLimits limits{};
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  Plan plan{};
  plan.area = s.p * s.q;
  plan.pixels = s.n * plan.area;
  plan.x = strides_of(params.layout, s.c, s.h, s.w);
  // Outputs side by side are inputs side by side, from one image row to the next, at stride 1.
  // A vector of them may not reach into another image.
  const bool dense =
      s.stride_h == 1 && s.stride_w == 1 && (s.n == 1 || plan.area % kVector<T> == 0);
  plan.x_width = kNhwc || dense ? copy_width<T>(params.x, kNhwc ? s.c : plan.area, plan.x.n) : 1;
  plan.x.h *= s.stride_h;
  plan.x.w *= s.stride_w;
  const int64_t* const strides = params.weight_stride;
  plan.w_width = strides[kInnermost ? 0 : 1] == 1
                     ? copy_width<T>(params.weight, kInnermost ? s.k : s.c, strides[kInnermost])
                     : 1;
  constexpr TileShape L = kLarge, S = kSmall;
  const int64_t large = ceil_div(plan.pixels, L.pixels) * ceil_div(s.k, L.filters);
  return large >= limits.sm_count && s.k > S.filters
             ? launch_tiled<T, kTensor, kNhwc, kInnermost, L.pixels, L.filters, L.warps>(
                   params, plan, stream)
             : launch_tiled<T, kTensor, kNhwc, kInnermost, S.pixels, S.filters, S.warps>(
                   params, plan, stream);
}

template <typename T, bool kTensor>
cudaError_t launch(const PointwiseConv2dParams& params, cudaStream_t stream) {
  const bool innermost = params.weight_stride[0] == 1 && params.weight_stride[1] != 1;
  if (params.layout == Layout::kNHWC)
    return innermost ? launch_layout<T, kTensor, true, true>(params, stream)
                     : launch_layout<T, kTensor, true, false>(params, stream);
  return innermost ? launch_layout<T, kTensor, false, true>(params, stream)
                   : launch_layout<T, kTensor, false, false>(params, stream);
}

}  // namespace

int32_t pointwise_conv2d(const PointwiseConv2dParams& params, void* stream) {
  const ConvShape& s = params.shape;
  if (s.n * s.k * s.p * s.q == 0) return cudaSuccess;
  if (s.groups != 1 || s.r != 1 || s.s != 1 || s.pad_top != 0 || s.pad_left != 0)
    return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  return with_storage(params.dtype, [&](auto storage) {
    using T = typename decltype(storage)::type;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (!params.allow_tf32) return launch<T, false>(params, on);
    }
    return launch<T, true>(params, on);
  });
}

}  // namespace sparsecnn::cuda
