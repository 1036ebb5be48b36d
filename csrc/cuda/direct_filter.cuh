// A sparse filter applied straight from global memory: what the direct kernels of csr_conv2d and
// pattern_conv2d share. A warp owns kDirectPixels * 32 outputs of one filter and image.
#pragma once
#include "cuda/launch.cuh"

namespace sparsecnn::cuda {

inline constexpr int kDirectPixels = 4, kDirectWarps = 8;

// Warps' worth of outputs of a filter and image.
__host__ __device__ __forceinline__ int64_t direct_spans(const ConvShape& s) {
  return ceil_div(s.p * s.q, kDirectPixels * kWarpLanes);
}

// Output span `span` of filter k and image n. Of the filter's columns begin to end - 1, ascending,
// read(at, &column, &value) gets one.
template <typename T, class Read>
__device__ __forceinline__ void direct_filter(const ConvParams& prm, const TensorStrides& xs,
                                              const TensorStrides& ys, int64_t n, int64_t k,
                                              int64_t span, int32_t begin, int32_t end, Read read) {
  const ConvShape& s = prm.shape;
  const int lane = threadIdx.x % kWarpLanes;
  const int32_t taps = static_cast<int32_t>(s.r * s.s), filter_w = static_cast<int32_t>(s.s);
  const int64_t channel0 = k / (s.k / s.groups) * (s.c / s.groups);
  const T* image = static_cast<const T*>(prm.x) + n * xs.n + channel0 * xs.c;
  int64_t row[kDirectPixels], col[kDirectPixels];  // input position under the filter's origin
  float sum[kDirectPixels];
#pragma unroll
  for (int i = 0; i < kDirectPixels; ++i) {
    int64_t q;
    const int64_t p = divide((span * kDirectPixels + i) * kWarpLanes + lane, s.q, &q);
    row[i] = p * s.stride_h - s.pad_top, col[i] = q * s.stride_w - s.pad_left;
    sum[i] = 0.f;
  }
  for (int32_t first = begin; first < end; first += kWarpLanes) {
    // Each lane decodes one column, then all lanes apply all of them.
    int32_t column = 0;
    float value = 0.f;
    if (first + lane < end) read(first + lane, &column, &value);
    const int32_t c = column / taps, tap = column - c * taps, r = tap / filter_w;
    const int64_t down = r * s.dil_h, right = (tap - r * filter_w) * s.dil_w, plane = c * xs.c;
    const int count = end - first < kWarpLanes ? end - first : kWarpLanes;
    for (int e = 0; e < count; ++e) {
      const float v = __shfl_sync(kFullWarp, value, e);
      const int64_t dy = __shfl_sync(kFullWarp, down, e);
      const int64_t dx = __shfl_sync(kFullWarp, right, e);
      const T* from = image + __shfl_sync(kFullWarp, plane, e);
#pragma unroll
      for (int i = 0; i < kDirectPixels; ++i) {
        const int64_t h = row[i] + dy, w = col[i] + dx;
        const bool inside = h >= 0 && h < s.h && w >= 0 && w < s.w;
        sum[i] = fmaf(v, inside ? to_float(from[h * xs.h + w * xs.w]) : 0.f, sum[i]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kDirectPixels; ++i) {
    int64_t q;
    const int64_t at = (span * kDirectPixels + i) * kWarpLanes + lane, p = divide(at, s.q, &q);
    if (at < s.p * s.q) store_output<T>(prm, sum[i], k, n * ys.n + k * ys.c + p * ys.h + q * ys.w);
  }
}

}  // namespace sparsecnn::cuda
