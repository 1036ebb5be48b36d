// The dense stages of chain_conv2d.cu: a block's warps multiply pixels in shared memory with
// weights in shared memory and keep the sums in registers.
//
// Inputs are float [pixel][channel], weights [part][tap][channel][filter]. A warp owns 32 pixels
// and `units` units of 8 filters; a lane the pixels lane / 4 + 8 i and the filters 2 (lane % 4) and
// the next of each unit, which is how the tensor cores hand out their sums.
//   float32     by fused multiply-adds, weights in float.
//   half types  on tensor cores, as bfloat16. A float is cut exactly into three bfloat16 of 8 bits
//               each (a bfloat16 is one, a half two) and the products of all parts are summed:
//               intermediates keep the 24 bits that they have on the CPU.
// Channels are padded with zeros on both sides.
#pragma once
#include "cuda/chain_conv2d_plan.h"
#include "cuda/mma.cuh"

namespace sparsecnn::cuda {

template <typename T>
inline constexpr bool kOnTensorCores = sizeof(T) == 2;
// Parts of a value stored as T, and of any float.
inline constexpr int kAllParts = 3;
template <typename T>
inline constexpr int kParts = 1;
template <>
inline constexpr int kParts<__half> = 2;

using Pair = Packed<float, 2>;
using Quad = Packed<float, 4>;
using Bits = Packed<uint32_t, 4>;

// A weight, or a part of it, in shared memory.
template <typename T>
struct WeightOf {
  using type = uint16_t;
};
template <>
struct WeightOf<float> {
  using type = float;
};
template <typename T>
using Weight = typename WeightOf<T>::type;

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

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarpLanes; }

// Where a warp stands in a block's dense stage.
struct Share {
  int first, filter;  // first pixel and filter, within the block's
};
__device__ __forceinline__ Share share_of(const DensePlan& d) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  return {(warp & (d.warps_m - 1)) * kWarpPixels, warp / d.warps_m * d.units * kUnit};
}

// Sums of 32 pixels by kSums units of filters: two tiles of 16 pixels as of mma_16x8x16.
template <typename T, int kSums>
struct DenseTile {
  static constexpr int kPixels = 4;  // of a lane
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
  static __device__ __forceinline__ int pixel(int i) { return lane_id() / 4 + i * 8; }

  // run(filter of the block's slab, its sum and that of the next), for pixel i of the lane.
  template <class Run>
  __device__ __forceinline__ void each(const DensePlan& d, const Share& own, int i, Run run) {
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
      if (j >= d.units) break;
      run(own.filter + j * kUnit + lane_id() % 4 * 2, &sum[i / 2][j][i % 2 * 2]);
    }
  }

  // Adds `channels` (a multiple of kGrain) of one tap. `at`: where the lane's pixels lie in `in`;
  // `weights`: of the warp's first filter; `second`: whether the second 16 pixels are there;
  // `parts`: of the values.
  __device__ __forceinline__ void add(const float* in, const int (&at)[kPixels], bool second,
                                      const DensePlan& d, const Weight<T>* weights, int channels,
                                      int parts) {
    if constexpr (kOnTensorCores<T>)
      add_parts(in, at, second, d, weights, channels, parts);
    else
      add_floats(in, at, d, weights, channels);
  }

  __device__ __forceinline__ void add_floats(const float* in, const int (&at)[kPixels],
                                             const DensePlan& d, const float* weights,
                                             int channels) {
    const float* w = weights + lane_id() % 4 * 2;
#pragma unroll 1
    for (int c = 0; c < channels; c += 2) {
      Pair x[kPixels];
#pragma unroll
      for (int i = 0; i < kPixels; ++i) x[i] = *reinterpret_cast<const Pair*>(in + at[i] + c);
#pragma unroll
      for (int v = 0; v < 2; ++v, w += d.pitch) {
#pragma unroll
        for (int j = 0; j < kSums; ++j) {
          if (j >= d.units) break;
          const Pair b = *reinterpret_cast<const Pair*>(w + j * kUnit);
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            float* to = &sum[i / 2][j][i % 2 * 2];
            to[0] = fmaf(x[i].v[v], b.v[0], to[0]);
            to[1] = fmaf(x[i].v[v], b.v[1], to[1]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void add_parts(const float* in, const int (&at)[kPixels], bool second,
                                            const DensePlan& d, const uint16_t* weights,
                                            int channels, int parts) {
    const int lane = lane_id();
    const uint16_t* w = weights + lane % 16 * d.pitch + lane / 16 * kUnit;
    in += lane % 4 * 2;
#pragma unroll 1
    for (int c = 0; c < channels; c += 16, w += 16 * d.pitch) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // one at a time: their parts take many registers
        if (i == 1 && !second) break;
        uint32_t a[kAllParts][4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          Pair pair = *reinterpret_cast<const Pair*>(in + at[i * 2 + e % 2] + c + e / 2 * 8);
#pragma unroll
          for (int part = 0; part < kAllParts; ++part)
            a[part][e] = take_part(&pair.v[0], &pair.v[1]);
        }
#pragma unroll
        for (int j = 0; j < kSums; j += 2) {
          if (j >= d.units) break;
#pragma unroll
          for (int q = 0; q < kParts<T>; ++q) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, w + q * d.plane + j * kUnit);
            const uint32_t even[2] = {b[0], b[1]}, odd[2] = {b[2], b[3]};
#pragma unroll
            for (int part = 0; part < kAllParts; ++part) {
              if (part >= parts) break;
              mma_16x8x16<__nv_bfloat16>(sum[i][j], a[part], even);
              mma_16x8x16<__nv_bfloat16>(sum[i][j + 1], a[part], odd);
            }
          }
        }
      }
    }
  }
};

// One pass of weights into shared memory: `taps` taps from tap0 on, `channels` (padded) input
// channels from c0 on and the plan's slab of filters. What the stage does not have is zero. Copies
// may be under way when it returns, in one group.
template <typename T>
__device__ __forceinline__ void stage_dense(const ChainStage& stage, const DensePlan& d, int tap0,
                                            int taps, int c0, int channels, int filter0,
                                            Weight<T>* to) {
  const ConvShape& s = stage.shape;
  const int64_t* const stride = stage.weight_stride;
  const T* base = static_cast<const T*>(stage.weight) + filter0 * stride[0] + c0 * stride[1];
  constexpr int kV = kVector<T>;
  const int filter_w = static_cast<int>(s.s);
  const auto at = [&](int tap, int c) {
    const int r = tap / filter_w;
    return c * stride[1] + r * stride[2] + (tap - r * filter_w) * stride[3];
  };
  const int filters = static_cast<int>(s.k) - filter0, inputs = static_cast<int>(s.c) - c0;
  // Vectors of filters, neither cut by the last filter nor off their alignment.
  const bool whole = stride[0] == 1 && s.k % kV == 0 &&
                     reinterpret_cast<uintptr_t>(base) % 16 == 0 &&
                     (s.c == 1 || stride[1] % kV == 0) && (s.r == 1 || stride[2] % kV == 0) &&
                     (s.s == 1 || stride[3] % kV == 0);
  if (whole) {
    const int vectors = d.slab / kV;
#pragma unroll 1
    for (int i = threadIdx.x; i < taps * channels * vectors; i += kChainThreads) {
      const int line = i / vectors, k = (i - line * vectors) * kV;
      const int tap = line / channels, c = line - tap * channels;
      const bool inside = k < filters && c < inputs;
      const T* from = base + k + at(tap0 + tap, c);
      Weight<T>* target = to + line * d.pitch + k;
      if constexpr (kParts<T> == 2) {
        Vector<T> in{};
        if (inside) in = *reinterpret_cast<const Vector<T>*>(from);
        Bits parts[2];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          float low = to_float(in.v[v * 2]), high = to_float(in.v[v * 2 + 1]);
          parts[0].v[v] = take_part(&low, &high);
          parts[1].v[v] = take_part(&low, &high);
        }
        *reinterpret_cast<Bits*>(target) = parts[0];
        *reinterpret_cast<Bits*>(target + d.plane) = parts[1];
      } else {
        copy_async<16>(target, inside ? from : base, inside);
      }
    }
  } else {
    // Lanes along what lies closest together.
    const int lines = taps * channels;
#pragma unroll 1
    for (int i = threadIdx.x; i < lines * d.slab; i += kChainThreads) {
      const int k = stride[0] == 1 ? i % d.slab : i / lines;
      const int line = stride[0] == 1 ? i / d.slab : i - k * lines;
      const int tap = line / channels, c = line - tap * channels;
      float value = 0.f, none = 0.f;
      if (k < filters && c < inputs) value = to_float(base[k * stride[0] + at(tap0 + tap, c)]);
      Weight<T>* target = to + line * d.pitch + k;
      if constexpr (kOnTensorCores<T>) {
#pragma unroll
        for (int q = 0; q < kParts<T>; ++q)
          target[q * d.plane] = static_cast<uint16_t>(take_part(&value, &none));
      } else {
        *target = value;
      }
    }
  }
  copy_async_commit();
}

// Weights of pass `pass` of add_dense: for channels [c0, c0 + channels), padded.
template <typename T>
__device__ __forceinline__ void stage_pass(const ChainStage& stage, const DensePlan& d, int pass,
                                           int c0, int channels, int filter0, float* smem) {
  const int all = static_cast<int>(stage.shape.r * stage.shape.s);
  const int tap_passes = (all + d.taps - 1) / d.taps;
  const int c = pass / tap_passes * d.channels, tap0 = pass % tap_passes * d.taps;
  stage_dense<T>(stage, d, tap0, all - tap0 < d.taps ? all - tap0 : d.taps, c0 + c,
                 channels - c < d.channels ? channels - c : d.channels, filter0,
                 reinterpret_cast<Weight<T>*>(smem + d.at + pass % 2 * d.buffer));
}

// Adds to `tile` the products of `channels` (padded) input channels from c0 on, whose values lie
// from `in` on, `in_pitch` apart, `in_w` pixels to a row; `m0`: first pixel of the block. A barrier
// separates what the block did before from the products. `prefetched`: the first pass of weights
// was staged, and one group of copies behind it is not waited for.
template <typename T, int kSums>
__device__ __forceinline__ void add_dense(DenseTile<T, kSums>& tile, const ChainStage& stage,
                                          const DensePlan& d, const Region& out, int m0,
                                          const float* in, int in_pitch, int in_w, int c0,
                                          int channels, int filter0, int parts, bool prefetched,
                                          float* smem) {
  const ConvShape& s = stage.shape;
  const Share own = share_of(d);
  const int area = out.h * out.w, first = m0 + own.first;
  int at[DenseTile<T, kSums>::kPixels];
#pragma unroll
  for (int i = 0; i < DenseTile<T, kSums>::kPixels; ++i) {
    const int pixel = first + tile.pixel(i), row = pixel / out.w, col = pixel - row * out.w;
    const int from = row * static_cast<int>(s.stride_h) * in_w + col * static_cast<int>(s.stride_w);
    at[i] = pixel < area ? from * in_pitch : 0;
  }
  const int filter_w = static_cast<int>(s.s), all = static_cast<int>(s.r) * filter_w;
  const int tap_passes = (all + d.taps - 1) / d.taps;
  const int passes = (channels + d.channels - 1) / d.channels * tap_passes;
#pragma unroll 1
  for (int pass = prefetched ? 0 : -1; pass < passes; ++pass) {
    if (pass == 0 && prefetched)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    __syncthreads();  // weights and inputs are there, all have used the other buffer
    if (pass + 1 < passes) stage_pass<T>(stage, d, pass + 1, c0, channels, filter0, smem);
    if (pass < 0 || first >= area) continue;
    const int c = pass / tap_passes * d.channels, tap0 = pass % tap_passes * d.taps;
    const int some = channels - c < d.channels ? channels - c : d.channels;
    const int tap_end = all - tap0 < d.taps ? all : tap0 + d.taps;
    const auto* weights =
        reinterpret_cast<const Weight<T>*>(smem + d.at + pass % 2 * d.buffer) + own.filter;
#pragma unroll 1
    for (int tap = tap0; tap < tap_end; ++tap, weights += some * d.pitch) {
      const int r = tap / filter_w, t = tap - r * filter_w;
      const int shift = r * static_cast<int>(s.dil_h) * in_w + t * static_cast<int>(s.dil_w);
      tile.add(in + c + shift * in_pitch, at, first + 16 < area, d, weights, some, parts);
    }
  }
}

}  // namespace sparsecnn::cuda
