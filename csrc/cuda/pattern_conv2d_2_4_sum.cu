// Sums what the parts of a split 2:4 convolution (pattern_conv2d_2_4.cu) have found, (parts, N * P
// * Q, K) floats, in the order of the parts, and ends the convolution: bias, residual, activation.
// A thread owns eight filters of a pixel. Bound: parts * 4 + 2 bytes an output, out of L2.
#include "cuda/pattern_2_4_epilogue.cuh"
#include "cuda/pattern_2_4_plan.h"

namespace sparsecnn::cuda::two_four {
namespace {

constexpr int kThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    pattern_conv2d_2_4_sum(const PatternConv2dParams prm, const float* __restrict__ partial,
                           int32_t parts, int64_t vectors) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < vectors;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    int64_t first;
    divide(i, prm.shape.k / 8, &first);
    float v[8];
    load_bias<T>(prm, first * 8, v);
    for (int32_t part = 0; part < parts; ++part) {
      const auto* from = reinterpret_cast<const Floats*>(partial + (part * vectors + i) * 8);
      const Floats found[2] = {from[0], from[1]};
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] += found[j / 4].v[j % 4];
    }
    finish<T>(prm, i * 8, v);
  }
}

template <typename T>
cudaError_t launch_sum(const PatternConv2dParams& prm, const float* partial, int32_t parts,
                       int64_t vectors, cudaStream_t stream) {
  CUDA_LAUNCH((pattern_conv2d_2_4_sum<T>), grid_size(ceil_div(vectors, kThreads)), kThreads, 0,
              stream, prm, partial, parts, vectors);
  return cudaGetLastError();
}

}  // namespace

cudaError_t sum_parts(const PatternConv2dParams& prm, const Plan& plan, const float* partial,
                      cudaStream_t stream) {
  const int64_t vectors = plan.pixels * (prm.shape.k / 8);
  return prm.dtype == DType::kFloat16
             ? launch_sum<__half>(prm, partial, plan.parts, vectors, stream)
             : launch_sum<__nv_bfloat16>(prm, partial, plan.parts, vectors, stream);
}

}  // namespace sparsecnn::cuda::two_four
