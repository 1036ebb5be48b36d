// csr_conv2d_grad_values: gradient of csr_conv2d with respect to its stored values, a sampled
// product over the sparsity pattern.
//
//   grad_values[i] = sum over n,p,q of grad_y[n,k,p,q] * x[n, c, p*stride+r*dil-pad, ...]
//                    for the i-th stored position (k,c,r,s)
//
// Data layout: x and grad_y are NCHW or channels last, the pattern is CSR (int32 columns). Storage
// is float, half or bfloat16, sums are float.
//
// Who owns what: a team (a warp, or a block when the batch has many outputs) owns kPositions
// consecutive stored positions, which nearly always share their row and so each grad_y element
// read; its lanes spread over the outputs. Each position is summed by one team only, by lanes in a
// fixed order, then over a fixed tree: no atomics, the same bits on every run on one GPU model.
// The number of stored positions is known on the device only (row_ptr[K]; asking would wait for
// the GPU), so a fixed grid strides over them.
//
// Bound (derived): (1 + 1/kPositions) loads from global memory, mostly L1 hits, per multiply-add;
// neighbouring lanes read neighbouring words in NCHW, words C (or K) elements apart in channels
// last. GPU timings have not been taken.
//
// Papers: sampled dense-dense products as in Gale et al., "Sparse GPU Kernels for Deep Learning",
// SC 2020; the sparse forward is Park et al., ICLR 2017.
#include "cuda/csr_conv2d_plan.h"
#include "cuda/entry.h"
#include "cuda/launch.cuh"

namespace sparsecnn::cuda {
namespace {

constexpr int kWarps = 8, kPositions = 4;
// From this many outputs on (N * P * Q) a whole block shares the sum of a position: 16 per lane.
constexpr int64_t kBlockTeamOutputs = 4096;
constexpr int kBlocksPerSm = 8;

// Row of stored position i: the largest k with row_ptr[k] <= i (empty rows are stepped over).
__device__ __forceinline__ int64_t row_of(const int32_t* row_ptr, int64_t rows, int64_t i) {
  int64_t low = 0, high = rows;  // row_ptr[low] <= i < row_ptr[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (row_ptr[middle] <= i)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// kTeam warps sum together; lanes_log2: lanes side by side along Q, the others on further rows.
template <typename T, int kTeam>
__global__ void __launch_bounds__(kWarps * 32)
    csr_conv2d_grad_values_kernel(const CsrConv2dGradValuesParams prm, const TensorStrides xs,
                                  const TensorStrides gs, int lanes_log2) {
  DYN_SMEM(float, partial);  // [warp][position]
  const ConvShape& s = prm.shape;
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int member = warp % kTeam;  // of the team
  const T* x = static_cast<const T*>(prm.x);
  const T* grad_y = static_cast<const T*>(prm.grad_y);
  const int64_t stored = prm.row_ptr[s.k];
  const int32_t taps = static_cast<int32_t>(s.r * s.s), filter_w = static_cast<int32_t>(s.s);

  // Output rows (n, p) of this lane: row0, row0 + step, ...; the step is kept as whole images and
  // rows, so that no division is left in the loop.
  const int rows_at_once = kWarpLanes >> lanes_log2;
  const int64_t row0 = static_cast<int64_t>(member) * rows_at_once + (lane >> lanes_log2);
  const int64_t step = static_cast<int64_t>(kTeam) * rows_at_once;
  const int64_t q0 = lane & ((1 << lanes_log2) - 1), q_step = int64_t{1} << lanes_log2;
  const int64_t first_n = s.p ? row0 / s.p : s.n, first_p = s.p ? row0 % s.p : 0;
  const int64_t step_n = s.p ? step / s.p : 1, step_p = s.p ? step % s.p : 0;

  constexpr int kTeams = kWarps / kTeam;
  for (int64_t team = static_cast<int64_t>(blockIdx.x) * kTeams + warp / kTeam;
       team * kPositions < stored; team += static_cast<int64_t>(gridDim.x) * kTeams) {
    const int64_t last =
        team * kPositions + kPositions < stored ? team * kPositions + kPositions : stored;
    for (int64_t i = team * kPositions; i < last;) {  // once per row that the positions touch
      const int64_t k = row_of(prm.row_ptr, s.k, i);
      const int64_t row_end = prm.row_ptr[k + 1];
      const int count = static_cast<int>((row_end < last ? row_end : last) - i);
      const int64_t channel0 = k / (s.k / s.groups) * (s.c / s.groups);
      int64_t down[kPositions], right[kPositions], plane[kPositions];
      float sum[kPositions];
#pragma unroll
      for (int e = 0; e < kPositions; ++e) {
        // Missing positions repeat the last one; their sums are not stored.
        const int32_t column = prm.col_idx[i + (e < count ? e : count - 1)];
        const int32_t c = column / taps, tap = column - c * taps, r = tap / filter_w;
        down[e] = r * s.dil_h - s.pad_top;
        right[e] = (tap - r * filter_w) * s.dil_w - s.pad_left;
        plane[e] = (channel0 + c) * xs.c;
        sum[e] = 0.f;
      }
      int64_t n = first_n, p = first_p;
      while (n < s.n) {
        const T* gradient = grad_y + n * gs.n + k * gs.c + p * gs.h;
        for (int64_t q = q0; q < s.q; q += q_step) {
          const float g = to_float(gradient[q * gs.w]);
#pragma unroll
          for (int e = 0; e < kPositions; ++e) {
            const int64_t h = p * s.stride_h + down[e], w = q * s.stride_w + right[e];
            const bool inside = h >= 0 && h < s.h && w >= 0 && w < s.w;
            const float in = inside ? to_float(x[n * xs.n + plane[e] + h * xs.h + w * xs.w]) : 0.f;
            sum[e] = fmaf(g, in, sum[e]);
          }
        }
        n += step_n, p += step_p;
        if (p >= s.p) p -= s.p, ++n;
      }
#pragma unroll
      for (int e = 0; e < kPositions; ++e) {
        for (int other = 16; other > 0; other /= 2)
          sum[e] += __shfl_xor_sync(kFullWarp, sum[e], other);
        if (kTeam > 1 && lane == 0) partial[warp * kPositions + e] = sum[e];
      }
      T* out = static_cast<T*>(prm.grad_values) + i;
      if (kTeam == 1) {
#pragma unroll
        for (int e = 0; e < kPositions; ++e)
          if (lane == 0 && e < count) out[e] = from_float<T>(sum[e]);
      } else {
        __syncthreads();
        if (threadIdx.x < static_cast<unsigned>(count)) {
          float total = 0.f;
          for (int m = 0; m < kTeam; ++m) total += partial[m * kPositions + threadIdx.x];
          out[threadIdx.x] = from_float<T>(total);
        }
        __syncthreads();  // before the next sums overwrite
      }
      i += count;
    }
  }
}

template <typename T, int kTeam>
cudaError_t launch_team(const CsrConv2dGradValuesParams& params, int sm_count,
                        cudaStream_t stream) {
  const ConvShape& s = params.shape;
  const int64_t most = ceil_div(s.k * s.columns(), int64_t{kPositions} * (kWarps / kTeam));
  const int64_t resident = static_cast<int64_t>(sm_count) * kBlocksPerSm;
  CUDA_LAUNCH((csr_conv2d_grad_values_kernel<T, kTeam>),
              grid_size(most < resident ? most : resident), kWarps * 32,
              kWarps * kPositions * sizeof(float), stream, params,
              strides_of(params.layout, s.c, s.h, s.w), strides_of(params.layout, s.k, s.p, s.q),
              ceil_log2(s.q, 5));
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const CsrConv2dGradValuesParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  DeviceLimits limits{};
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  if (s.n * s.p * s.q >= kBlockTeamOutputs)
    return launch_team<T, kWarps>(params, limits.sm_count, stream);
  return launch_team<T, 1>(params, limits.sm_count, stream);
}

}  // namespace

int32_t csr_conv2d_grad_values(const CsrConv2dGradValuesParams& params, void* stream) {
  const ConvShape& s = params.shape;
  if (s.k * s.columns() == 0) return cudaSuccess;  // nothing can be stored
  if (s.groups < 1 || s.k >= INT32_MAX || s.columns() >= INT32_MAX) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  return with_storage(params.dtype, [&](auto storage) {
    return launch<typename decltype(storage)::type>(params, on);
  });
}

}  // namespace sparsecnn::cuda
