// The launchers behind a C interface for ctypes; exceptions of the emulator become messages.
#include <cmath>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "cuda/entry.h"
#include "cuda/mma.cuh"
#include "cuda_emu.h"
#include "cuda_emu_cluster.h"

namespace {
int64_t workspace_bytes = 0;
std::string message;  // NOLINT: what emu_message() points to must outlive the call

template <class F>
int guarded(F run) {
  message.clear();
  try {
    return run();
  } catch (const std::exception& e) {
    message = e.what();
    return -1;
  }
}

using sparsecnn::cuda::copy_async;
using sparsecnn::cuda::copy_async_commit;
using sparsecnn::cuda::copy_async_wait;

// D (16 x 8) = A (16 x 16) * B (16 x 8) by one warp, with B kept as [column][k] or as [k][column].
template <typename T>
void multiply(const T* a, const T* b, bool b_by_column, bool wait, float* d) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  DYN_SMEM(T, shared);
  T* const a_tile = shared;
  T* const b_tile = shared + 16 * 16;
  copy_async<16>(a_tile + lane * 8, a + lane * 8, true);
  copy_async_commit();
  copy_async<8>(b_tile + lane * 4, b + lane * 4, true);
  copy_async_commit();
  if (wait) {
    copy_async_wait<0>();
  } else {
    copy_async_wait<1>();
  }
  __syncwarp();
  uint32_t a_part[4], b_part[2];
  sparsecnn::cuda::ldmatrix_x4(a_part, a_tile + (lane & 15) * 16 + lane / 16 * 8);
  if (b_by_column) {
    sparsecnn::cuda::ldmatrix_x2(b_part, b_tile + (lane & 7) * 16 + lane / 8 % 2 * 8);
  } else {
    sparsecnn::cuda::ldmatrix_x2_trans(b_part, b_tile + (lane & 15) * 8);
  }
  float sum[4] = {};
  sparsecnn::cuda::mma_16x8x16<T>(sum, a_part, b_part);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// The same of a 2:4 sparse A (16 x 32), stored as 16 x 16, and B [k][column].
template <typename T>
void multiply_sparse(const T* a, const T* b, const uint32_t* metadata, int selector, float* d) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  DYN_SMEM(T, shared);
  T* const b_tile = shared + 16 * 16;
  copy_async<16>(shared + lane * 8, a + lane * 8, true);
  copy_async<16>(b_tile + lane * 8, b + lane * 8, true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  uint32_t a_part[4], b_part[4];
  sparsecnn::cuda::ldmatrix_x4(a_part, shared + (lane & 15) * 16 + lane / 16 * 8);
  sparsecnn::cuda::ldmatrix_x4_trans(b_part, b_tile + lane * 8);
  float sum[4] = {};
  if (selector == 0) {
    sparsecnn::cuda::mma_sparse_16x8x32<T>(sum, a_part, b_part, metadata[lane]);
  } else {
    sparsecnn::cuda::mma_sparse_16x8x32<T, 1>(sum, a_part, b_part, metadata[lane]);
  }
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// D (16 x 8) = A (16 x 8) * B (8 x 8) of float by one warp, with B kept as [column][k] or
// [k][column].
void multiply_tf32(const float* a, const float* b, bool b_by_column, bool rounded, float* d) {
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  DYN_SMEM(float, shared);
  float* const b_tile = shared + 16 * 8;
  copy_async<16>(shared + lane * 4, a + lane * 4, true);
  if (lane < 16) copy_async<16>(b_tile + lane * 4, b + lane * 4, true);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  uint32_t a_part[4], b_part[2];
  sparsecnn::cuda::ldmatrix_x4(a_part, shared + (lane & 15) * 8 + lane / 16 * 4);
  if (b_by_column) {
    sparsecnn::cuda::ldmatrix_x2(b_part, b_tile + (lane & 7) * 8 + lane / 8 % 2 * 4);
  } else {
    for (int i = 0; i < 2; ++i) std::memcpy(&b_part[i], b_tile + (t + 4 * i) * 8 + g, 4);
  }
  if (rounded) {
    for (uint32_t& v : a_part) v = sparsecnn::cuda::to_tf32(__uint_as_float(v));
    for (uint32_t& v : b_part) v = sparsecnn::cuda::to_tf32(__uint_as_float(v));
  }
  float sum[4] = {};
  sparsecnn::cuda::mma_tf32_16x8x8(sum, a_part, b_part);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <class Body>
int one_warp(Body body) {
  return guarded([&] {
    emu::launch("one_warp", 1, 32, 4096, body);
    return 0;
  });
}
}  // namespace

extern "C" {

int emu_multiply(bool bfloat16, const void* a, const void* b, bool b_by_column, bool wait,
                 float* d) {
  return one_warp([&] {
    if (bfloat16) {
      multiply(static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b),
               b_by_column, wait, d);
    } else {
      multiply(static_cast<const __half*>(a), static_cast<const __half*>(b), b_by_column, wait, d);
    }
  });
}

int emu_multiply_sparse(bool bfloat16, const void* a, const void* b, const uint32_t* metadata,
                        int selector, float* d) {
  return one_warp([&] {
    if (bfloat16) {
      multiply_sparse(static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b),
                      metadata, selector, d);
    } else {
      multiply_sparse(static_cast<const __half*>(a), static_cast<const __half*>(b), metadata,
                      selector, d);
    }
  });
}

int emu_multiply_tf32(const float* a, const float* b, bool b_by_column, bool rounded, float* d) {
  return one_warp([&] { multiply_tf32(a, b, b_by_column, rounded, d); });
}

int emu_csr_conv2d(const sparsecnn::CsrConv2dParams* params) {
  return guarded([&] { return sparsecnn::cuda::csr_conv2d(*params, nullptr); });
}

int emu_csr_conv2d_grad_values(const sparsecnn::CsrConv2dGradValuesParams* params) {
  return guarded([&] { return sparsecnn::cuda::csr_conv2d_grad_values(*params, nullptr); });
}

int emu_depthwise_conv2d(const sparsecnn::DepthwiseConv2dParams* params) {
  return guarded([&] { return sparsecnn::cuda::depthwise_conv2d(*params, nullptr); });
}

int emu_pattern_conv2d(const sparsecnn::PatternConv2dParams* params) {
  return guarded([&] { return sparsecnn::cuda::pattern_conv2d(*params, nullptr); });
}

int64_t emu_pattern_conv2d_2_4_workspace_bytes(const sparsecnn::PatternConv2dParams* params) {
  return sparsecnn::cuda::pattern_conv2d_2_4_workspace_bytes(*params);
}

int emu_pattern_conv2d_2_4(const sparsecnn::PatternConv2dParams* params, void* workspace) {
  return guarded([&] { return sparsecnn::cuda::pattern_conv2d_2_4(*params, workspace, nullptr); });
}

int emu_winograd_conv2d(const sparsecnn::WinogradConv2dParams* params) {
  return guarded([&] { return sparsecnn::cuda::winograd_conv2d(*params, nullptr); });
}

int emu_pointwise_conv2d(const sparsecnn::PointwiseConv2dParams* params) {
  return guarded([&] { return sparsecnn::cuda::pointwise_conv2d(*params, nullptr); });
}

size_t emu_sizeof_pointwise_params() { return sizeof(sparsecnn::PointwiseConv2dParams); }

// Bytes of device memory the last chain asked for, and the chain itself.
int64_t emu_workspace_bytes() { return workspace_bytes; }

int emu_chain_conv2d(const sparsecnn::ChainConv2dParams* params) {
  std::vector<float> memory;
  workspace_bytes = 0;
  const auto source = [](void* context, int64_t bytes) -> void* {
    workspace_bytes = bytes;
    auto* floats = static_cast<std::vector<float>*>(context);
    floats->assign(static_cast<size_t>(bytes) / sizeof(float), NAN);
    return floats->data();
  };
  return guarded([&] { return sparsecnn::cuda::chain_conv2d(*params, source, &memory, nullptr); });
}

size_t emu_sizeof_chain_params() { return sizeof(sparsecnn::ChainConv2dParams); }

const char* emu_error_string(int error) { return sparsecnn::cuda::error_string(error); }

const char* emu_message() { return message.c_str(); }

void emu_set_device(int sm_count, int smem_optin_bytes, int64_t max_grid) {
  emu::device().max_grid = max_grid;
  emu::device().sm_count = sm_count;
  emu::device().smem_optin_bytes = smem_optin_bytes;
}

void emu_set_clusters(int has_clusters) { emu::device_has_clusters() = has_clusters != 0; }

int emu_cluster() { return static_cast<int>(emu::device().cluster); }

int64_t emu_launches() { return emu::device().launches; }

const char* emu_kernel() { return emu::device().kernel.c_str(); }

size_t emu_sizeof_params() { return sizeof(sparsecnn::CsrConv2dParams); }

size_t emu_sizeof_depthwise_params() { return sizeof(sparsecnn::DepthwiseConv2dParams); }

size_t emu_sizeof_pattern_params() { return sizeof(sparsecnn::PatternConv2dParams); }
size_t emu_sizeof_winograd_params() { return sizeof(sparsecnn::WinogradConv2dParams); }

// One barrier that half of the block never reaches: the emulator must refuse it.
int emu_divergent_barrier() {
  return guarded([] {
    emu::launch("divergent", 1, 64, 0, [] {
      if (threadIdx.x < 32) __syncthreads();
    });
    return 0;
  });
}

uint16_t emu_half_bits(float v) { return __float2half_rn(v).bits; }
float emu_half_value(uint16_t bits) { return __half2float({bits}); }
uint32_t emu_tf32_bits(float v) { return sparsecnn::cuda::to_tf32(v); }
uint16_t emu_bfloat16_bits(float v) { return __float2bfloat16_rn(v).bits; }

}  // extern "C"
