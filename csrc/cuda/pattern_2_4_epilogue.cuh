// The end of the 2:4 convolution, for eight filters of a pixel: 16 bytes of y.
#pragma once
#include "cuda/launch.cuh"

namespace sparsecnn::cuda::two_four {

using Floats = Packed<float, 4>;

// The bias of filters k to k + 7, zeros where there is none; it need not be aligned.
template <typename T>
__device__ __forceinline__ void load_bias(const PatternConv2dParams& prm, int64_t k,
                                          float (&bias)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    bias[i] = prm.bias ? to_float(static_cast<const T*>(prm.bias)[k + i]) : 0.f;
}

// One choice for all values: the code is there several times, and has to stay in the cache.
__device__ __forceinline__ void activate_all(Activation activation, float (&v)[8]) {
  const auto all = [&](Activation known) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = activate(known, v[i]);
  };
  switch (activation) {
    case Activation::kRelu:
      return all(Activation::kRelu);
    case Activation::kRelu6:
      return all(Activation::kRelu6);
    case Activation::kSilu:
      return all(Activation::kSilu);
    case Activation::kHardswish:
      return all(Activation::kHardswish);
    default:
      return;
  }
}

// Adds the residual, activates, rounds and stores eight sums at element `at` of y.
template <typename T>
__device__ __forceinline__ void finish(const PatternConv2dParams& prm, int64_t at, float (&v)[8]) {
  if (prm.residual) {
    const auto residual =
        *reinterpret_cast<const Vector<T>*>(static_cast<const T*>(prm.residual) + at);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] += to_float(residual.v[j]);
  }
  activate_all(prm.activation, v);
  Vector<T> out;
#pragma unroll
  for (int j = 0; j < 8; ++j) out.v[j] = from_float<T>(v[j]);
  *reinterpret_cast<Vector<T>*>(static_cast<T*>(prm.y) + at) = out;
}

}  // namespace sparsecnn::cuda::two_four
