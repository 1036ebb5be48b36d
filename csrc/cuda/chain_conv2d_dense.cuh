// The dense stages of chain_conv2d.cu: a block's warps multiply pixels in shared memory with
// weights in shared memory and keep the sums in registers.
//
// Inputs are float [pixel][channel]. A warp owns 32 pixels and `units` units of channels.
//   float32     by fused multiply-adds. A unit is 32 channels; a lane owns 8 pixels, each four
//   apart
//               from the next, and 4 neighbouring channels of a unit. Weights are float
//               [tap][channel][filter].
//   half types  on tensor cores, which read bfloat16. A unit is 8 channels. A float is cut exactly
//               into three bfloat16 of 8 bits each (a bfloat16 is one, a half is two), and the
//               products of all parts are summed: intermediates keep the 24 bits they have on the
//               CPU. Weights are pairs of parts [part][tap][channel / 2][filter].
// Channels are padded with zeros on both sides.
#pragma once
#include "cuda/chain_conv2d_plan.h"
#include "cuda/mma.cuh"

namespace sparsecnn::cuda {

template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) Vector {
  T v[kVector<T>];
};

template <typename T>
inline constexpr bool kOnTensorCores = sizeof(T) == 2;
// Parts of a value stored as T.
template <typename T>
inline constexpr int kParts = 3;
template <>
inline constexpr int kParts<__nv_bfloat16> = 1;
template <>
inline constexpr int kParts<__half> = 2;

struct alignas(8) Pair {
  float v[2];
};
struct alignas(16) Quad {
  float v[4];
};
struct alignas(16) Words {
  uint32_t v[4];
};

__device__ __forceinline__ uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  return bits;
}
__device__ __forceinline__ float of_bits(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

// The leading parts of two values as a pair; what is left stays in them. Cutting instead of
// rounding makes every difference exact and keeps finite values finite.
__device__ __forceinline__ uint32_t take_part(float* low, float* high) {
  const uint32_t a = bits_of(*low), b = bits_of(*high) & 0xffff0000u;
  const float part_a = of_bits(a & 0xffff0000u), part_b = of_bits(b);
  *low = *low == part_a ? 0.f : *low - part_a;  // the difference of infinities would be NaN
  *high = *high == part_b ? 0.f : *high - part_b;
  return b | a >> 16;
}

struct Lane {
  int warp, lane;
  __device__ Lane() : warp(threadIdx.x / kWarpLanes), lane(threadIdx.x % kWarpLanes) {}
};

// Sums of 32 pixels by units of channels.
template <typename T, int kSums, bool kMatrix = kOnTensorCores<T>>
struct DenseTile {  // on tensor cores: two tiles of 16 pixels by kSums tiles of 8 channels
  static constexpr int kPixels = 4, kRun = 2;  // pixels of a lane, neighbouring channels of it
  float sum[2][kSums][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < kSums; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.f;
  }

  // Pixel i of the lane, within the warp's.
  static __device__ __forceinline__ int pixel(int i) { return Lane().lane / 4 + i * 8; }

  // Adds `channels` (a multiple of 16) of one tap. `at`: where the lane's pixels lie in `in`;
  // `second`: whether the second 16 of them are there; `exact`: the values have 24 bits.
  __device__ __forceinline__ void add(const float* in, const int (&at)[kPixels], bool second,
                                      const DensePlan& d, const float* weights, int warp_n,
                                      int channels, bool exact) {
    if (exact) {
      add_parts<3>(in, at, second, d, weights, warp_n, channels);
    } else {
      add_parts<kParts<T>>(in, at, second, d, weights, warp_n, channels);
    }
  }

  template <int kA>
  __device__ __forceinline__ void add_parts(const float* in, const int (&at)[kPixels], bool second,
                                            const DensePlan& d, const float* weights, int warp_n,
                                            int channels) {
    const int lane = Lane().lane;
    const uint32_t* w = reinterpret_cast<const uint32_t*>(weights) + lane % 4 * d.pitch +
                        warp_n * d.units * 8 + lane / 4;
    in += lane % 4 * 2;
#pragma unroll 1
    for (int c = 0; c < channels; c += 16, w += 8 * d.pitch) {
      uint32_t a[kA][2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          Pair pair = *reinterpret_cast<const Pair*>(in + at[i * 2 + e % 2] + c + e / 2 * 8);
#pragma unroll
          for (int part = 0; part < kA; ++part) a[part][i][e] = take_part(&pair.v[0], &pair.v[1]);
        }
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
        if (j >= d.units) break;
#pragma unroll
        for (int q = 0; q < kParts<T>; ++q) {
          const uint32_t* from = w + q * d.plane + j * 8;
          const uint32_t b[2] = {from[0], from[4 * d.pitch]};
#pragma unroll
          for (int part = 0; part < kA; ++part) {
            mma_16x8x16<__nv_bfloat16>(sum[0][j], a[part][0], b);
            if (second) mma_16x8x16<__nv_bfloat16>(sum[1][j], a[part][1], b);
          }
        }
      }
    }
  }

  // run(pixel of the lane, channel, its kRun sums), channels within the block's slab.
  template <class Run>
  __device__ __forceinline__ void each(const DensePlan& d, int warp_n, Run run) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int j = 0; j < kSums; ++j)
        if (j < d.units)
          run(i, (warp_n * d.units + j) * 8 + Lane().lane % 4 * 2, &sum[i / 2][j][i % 2 * 2]);
  }
};

template <typename T, int kSums>
struct DenseTile<T, kSums, false> {  // 8 pixels by kSums channels a lane
  static constexpr int kPixels = 8, kRun = 4;
  float sum[kPixels][kSums];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int j = 0; j < kSums; ++j) sum[i][j] = 0.f;
  }

  static __device__ __forceinline__ int pixel(int i) { return Lane().lane / 8 + i * 4; }

  __device__ __forceinline__ void add(const float* in, const int (&at)[kPixels], bool,
                                      const DensePlan& d, const float* weights, int warp_n,
                                      int channels, bool) {
    const float* w = weights + warp_n * d.units * 32 + Lane().lane % 8 * 4;
    for (int c = 0; c < channels; c += 2) {
      Pair a[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) a[i] = *reinterpret_cast<const Pair*>(in + at[i] + c);
#pragma unroll
      for (int step = 0; step < 2; ++step, w += d.pitch) {
#pragma unroll
        for (int j = 0; j < kSums / 4; ++j) {
          if (j >= d.units) break;
          const Quad b = *reinterpret_cast<const Quad*>(w + j * 32);
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
              sum[i][j * 4 + e] = fmaf(a[i].v[step], b.v[e], sum[i][j * 4 + e]);
          }
        }
      }
    }
  }

  template <class Run>
  __device__ __forceinline__ void each(const DensePlan& d, int warp_n, Run run) {
#pragma unroll
    for (int i = 0; i < kPixels; ++i)
#pragma unroll
      for (int j = 0; j < kSums / 4; ++j)
        if (j < d.units) run(i, (warp_n * d.units + j) * 32 + Lane().lane % 8 * 4, &sum[i][j * 4]);
  }
};

// Weights of `taps` taps from the first, `channels` input channels (padded; those from `inside` on
// are zeros) and the plan's slab of filters (likewise) into shared memory.
template <typename T>
__device__ __forceinline__ void stage_dense(const ChainStage& stage, const DensePlan& d, int tap0,
                                            int taps, int c0, int channels, int filter0,
                                            float* to) {
  const ConvShape& s = stage.shape;
  const T* base = static_cast<const T*>(stage.weight);
  const int64_t stride_k = stage.weight_stride[0], stride_c = stage.weight_stride[1];
  constexpr int kV = kVector<T>, kRows = kOnTensorCores<T> ? 2 : 1;
  const int rows = channels / kRows;
  const auto at = [&](int tap, int c) {
    const int r = tap / static_cast<int>(s.s);
    return (c0 + c) * stride_c + r * stage.weight_stride[2] +
           (tap - r * static_cast<int>(s.s)) * stage.weight_stride[3];
  };
  const int64_t filters = s.k - filter0;
  // Whole vectors of filters, neither cut by the last filter nor off their alignment.
  const bool whole = stride_k == 1 && s.k % kV == 0 && filter0 % kV == 0 &&
                     reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
                     (s.c == 1 || stride_c % kV == 0) &&
                     (s.r == 1 || stage.weight_stride[2] % kV == 0) &&
                     (s.s == 1 || stage.weight_stride[3] % kV == 0);
  if (whole) {
    const int vectors = d.slab / kV;
    for (int i = threadIdx.x; i < taps * rows * vectors; i += kChainThreads) {
      const int line = i / vectors, k = (i - line * vectors) * kV;
      const int tap = line / rows, c = (line - tap * rows) * kRows;
      const T* from = base + filter0 + k + at(tap0 + tap, c);
      float* target = to + line * d.pitch + k;
      if constexpr (kOnTensorCores<T>) {
        Vector<T> even{}, odd{};
        if (k < filters && c0 + c < s.c) even = *reinterpret_cast<const Vector<T>*>(from);
        if (k < filters && c0 + c + 1 < s.c)
          odd = *reinterpret_cast<const Vector<T>*>(from + stride_c);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          Words words[kParts<T>];
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            float low = to_float(even.v[half * 4 + v]), high = to_float(odd.v[half * 4 + v]);
#pragma unroll
            for (int q = 0; q < kParts<T>; ++q) words[q].v[v] = take_part(&low, &high);
          }
#pragma unroll
          for (int q = 0; q < kParts<T>; ++q)
            *reinterpret_cast<Words*>(target + q * d.plane + half * 4) = words[q];
        }
      } else {
        copy_async<16>(target, from, k < filters && c0 + c < s.c);
      }
    }
    if constexpr (!kOnTensorCores<T>) {
      copy_async_commit();
      copy_async_wait<0>();
    }
    return;
  }
  // Lanes along what lies closest together.
  const bool along_filters = stride_k == 1;
  for (int i = threadIdx.x; i < taps * rows * d.slab; i += kChainThreads) {
    int line, k;
    if (along_filters) {
      line = i / d.slab, k = i - line * d.slab;
    } else {
      k = i / (taps * rows), line = i - k * (taps * rows);
    }
    const int tap = line / rows, c = (line - tap * rows) * kRows;
    const T* from = base + (filter0 + k) * stride_k + at(tap0 + tap, c);
    float low = k < filters && c0 + c < s.c ? to_float(from[0]) : 0.f;
    float* target = to + line * d.pitch + k;
    if constexpr (kOnTensorCores<T>) {
      float high = k < filters && c0 + c + 1 < s.c ? to_float(from[stride_c]) : 0.f;
#pragma unroll
      for (int q = 0; q < kParts<T>; ++q)
        reinterpret_cast<uint32_t*>(target)[q * d.plane] = take_part(&low, &high);
    } else {
      *target = low;
    }
  }
}

// Adds to `tile` the products of `channels` (padded) input channels from c0 on, whose values lie
// from `in` on, `in_pitch` apart; `in_w` pixels to a row. `m0`: first pixel of the block. The
// block's barriers are the caller's and this function's: it starts with one.
template <typename T, int kSums>
__device__ __forceinline__ void add_dense(DenseTile<T, kSums>& tile, const ChainStage& stage,
                                          const DensePlan& d, const Region& out, int m0,
                                          const float* in, int in_pitch, int in_w, int c0,
                                          int channels, int filter0, bool exact, float* weights) {
  const ConvShape& s = stage.shape;
  const int warp = Lane().warp, warp_m = warp & (d.warps_m - 1), warp_n = warp / d.warps_m;
  const int area = out.h * out.w, first = m0 + warp_m * kWarpPixels;
  int at[DenseTile<T, kSums>::kPixels];
#pragma unroll
  for (int i = 0; i < DenseTile<T, kSums>::kPixels; ++i) {
    const int pixel = first + tile.pixel(i), row = pixel / out.w, col = pixel - row * out.w;
    at[i] = pixel < area
                ? (row * static_cast<int>(s.stride_h) * in_w + col * static_cast<int>(s.stride_w)) *
                      in_pitch
                : 0;
  }
  const int filter_w = static_cast<int>(s.s), all = static_cast<int>(s.r) * filter_w;
  for (int c = 0; c < channels; c += d.channels) {
    const int some = channels - c < d.channels ? channels - c : d.channels;
    for (int tap0 = 0; tap0 < all; tap0 += d.taps) {
      const int taps = all - tap0 < d.taps ? all - tap0 : d.taps;
      __syncthreads();  // all have used the weights before; chunks made by others are there
      stage_dense<T>(stage, d, tap0, taps, c0 + c, some, filter0, weights);
      __syncthreads();
      if (first >= area) continue;
      for (int tap = 0; tap < taps; ++tap) {
        const int r = (tap0 + tap) / filter_w, t = tap0 + tap - r * filter_w;
        const int shift =
            (r * static_cast<int>(s.dil_h) * in_w + t * static_cast<int>(s.dil_w)) * in_pitch;
        tile.add(in + shift + c, at, first + 16 < area, d,
                 weights + tap * (some / (kOnTensorCores<T> ? 2 : 1)) * d.pitch, warp_n, some,
                 exact);
      }
    }
  }
}

}  // namespace sparsecnn::cuda
