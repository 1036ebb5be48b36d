// The launchers behind a C interface for ctypes; exceptions of the emulator become messages.
#include <exception>
#include <string>

#include "cuda/entry.h"
#include "cuda_emu.h"

namespace {
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
}  // namespace

extern "C" {

int emu_csr_conv2d(const sparsecnn::CsrConv2dParams* params) {
  return guarded([&] { return sparsecnn::cuda::csr_conv2d(*params, nullptr); });
}

int emu_csr_conv2d_grad_values(const sparsecnn::CsrConv2dGradValuesParams* params) {
  return guarded([&] { return sparsecnn::cuda::csr_conv2d_grad_values(*params, nullptr); });
}

int emu_depthwise_conv2d(const sparsecnn::DepthwiseConv2dParams* params) {
  return guarded([&] { return sparsecnn::cuda::depthwise_conv2d(*params, nullptr); });
}

const char* emu_error_string(int error) { return sparsecnn::cuda::error_string(error); }

const char* emu_message() { return message.c_str(); }

void emu_set_device(int sm_count, int smem_optin_bytes) {
  emu::device().sm_count = sm_count;
  emu::device().smem_optin_bytes = smem_optin_bytes;
}

int64_t emu_launches() { return emu::device().launches; }

const char* emu_kernel() { return emu::device().kernel.c_str(); }

size_t emu_sizeof_params() { return sizeof(sparsecnn::CsrConv2dParams); }

size_t emu_sizeof_depthwise_params() { return sizeof(sparsecnn::DepthwiseConv2dParams); }

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
uint16_t emu_bfloat16_bits(float v) { return __float2bfloat16_rn(v).bits; }

}  // extern "C"
