// What every kernel file needs: two spellings that differ between nvcc and the host emulator of
// tests/cuda_emu, conversions between storage and float, and the fused activation.
//
// With CUDA_EMU defined the kernels are compiled by the host compiler and each CUDA thread runs as
// a fiber, so that their logic can be tested without a GPU. Kernels keep to what both understand:
// shared memory through DYN_SMEM, launches through CUDA_LAUNCH, PTX only in mma.cuh and
// cluster.cuh.
#pragma once
#include <cstdint>

#include "core/params.h"

#ifdef CUDA_EMU
#include "cuda_emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// One array under one type for all kernels of a file, whose templates differ in theirs.
#define DYN_SMEM(T, name)                                          \
  extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared)
// A kernel with template arguments goes in parentheses, so that its commas survive the macro.
#define CUDA_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  kernel<<<grid, block, smem_bytes, stream>>>(__VA_ARGS__)
#endif

namespace sparsecnn::cuda {

inline constexpr int kWarpLanes = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;
// Grids are one-dimensional and every kernel strides over its work, so no limit of the y and z
// axes binds and more than 2^31 work items only make blocks loop. (The emulator's tests lower the
// limit, to see them loop.)
#ifdef CUDA_EMU
inline const int64_t& kMaxGrid = emu::device().max_grid;
#else
inline constexpr int64_t kMaxGrid = 2147483647;
#endif
// A block may use this much shared memory without asking for more.
inline constexpr int64_t kDefaultSmemBytes = 48 * 1024;

__host__ __device__ __forceinline__ constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Storage <-> accumulator. All arithmetic is float, rounding to nearest even.
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Elements of 16 bytes, the most that a thread reads or writes at once.
template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Elements side by side, read or written at once if they are not more than that.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Packed {
  T v[kCount];
};
template <typename T>
using Vector = Packed<T, kVector<T>>;

// Where a row of a sparse weight has no more columns: above all there are.
inline constexpr int32_t kNoColumn = 2147483647;

// Comparisons are written so that NaN passes through, as in the framework (fmaxf would drop it).
__device__ __forceinline__ float relu6(float v) { return v < 0.f ? 0.f : (v > 6.f ? 6.f : v); }

__device__ __forceinline__ float activate(Activation activation, float v) {
  switch (activation) {
    case Activation::kRelu:
      return v < 0.f ? 0.f : v;
    case Activation::kRelu6:
      return relu6(v);
    case Activation::kSilu:
      return v / (1.f + expf(-v));
    case Activation::kHardswish:
      return v * relu6(v + 3.f) / 6.f;
    default:
      return v;
  }
}

// The end of every convolution: bias, residual, activation, rounding.
template <typename T>
__device__ __forceinline__ void store_output(const ConvParams& prm, float sum, int64_t k,
                                             int64_t at) {
  if (prm.bias) sum += to_float(static_cast<const T*>(prm.bias)[k]);
  if (prm.residual) sum += to_float(static_cast<const T*>(prm.residual)[at]);
  static_cast<T*>(prm.y)[at] = from_float<T>(activate(prm.activation, sum));
}

// Quotient of two numbers that are not negative, and the rest. 64 bits are divided by a function
// of some hundred instructions, 32 bits by a dozen.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b, int64_t* rest) {
  if (((a | b) >> 32) == 0) {
    const uint32_t small = static_cast<uint32_t>(a), by = static_cast<uint32_t>(b);
    const uint32_t quotient = small / by;
    *rest = small - quotient * by;
    return quotient;
  }
  const int64_t quotient = a / b;
  *rest = a - quotient * b;
  return quotient;
}

// Element strides of a (N, channels, rows, columns) tensor in one of the two layouts.
struct TensorStrides {
  int64_t n, c, h, w;
};

inline TensorStrides strides_of(Layout layout, int64_t channels, int64_t rows, int64_t columns) {
  if (layout == Layout::kNHWC) return {rows * columns * channels, 1, columns * channels, channels};
  return {channels * rows * columns, rows * columns, columns, 1};
}

// What a launcher asks of the current device.
struct DeviceLimits {
  int sm_count;
  int smem_optin_bytes;  // most shared memory a block may ask for
};

// Two attribute look-ups, no synchronization: legal while a stream is being captured.
inline cudaError_t device_limits(DeviceLimits* limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limits->sm_count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&limits->smem_optin_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                device);
}

// A kernel that takes more shared memory than the default has to ask for it.
template <typename Kernel>
inline cudaError_t allow_smem(Kernel* kernel, int64_t bytes) {
  if (bytes <= kDefaultSmemBytes) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// Whether 16 bytes may be read or written at once there.
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T>
struct Storage {
  using type = T;
};

// run(Storage<T>{}) with the storage type of a dtype; no kernel computes in double.
template <class Run>
inline cudaError_t with_storage(DType dtype, Run run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(Storage<float>{});
    case DType::kFloat16:
      return run(Storage<__half>{});
    case DType::kBFloat16:
      return run(Storage<__nv_bfloat16>{});
    default:
      return cudaErrorInvalidValue;
  }
}

inline unsigned grid_size(int64_t blocks) {
  return static_cast<unsigned>(blocks < kMaxGrid ? blocks : kMaxGrid);
}

}  // namespace sparsecnn::cuda
