// The current CUDA stream and device guard, for the glue of ops with a CUDA kernel.
//
// The stream is looked up at run time: a direct call to the stream accessor would leave an
// undefined symbol that keeps the library from loading beside a CPU build of torch.
#pragma once
#ifdef SPARSECNN_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/entry.h"
#include "ops/check.h"

namespace sparsecnn::ops {

class CudaGuard {
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;

 public:
  explicit CudaGuard(const Tensor& x) : guard_(x.get_device_index()) {
    using Getter = int32_t (*)(int32_t, void**);
    static const Getter getter = [] {
      void* lib = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      return lib ? reinterpret_cast<Getter>(dlsym(lib, "aoti_torch_get_current_cuda_stream"))
                 : nullptr;
    }();
    STD_TORCH_CHECK(getter != nullptr && getter(x.get_device_index(), &stream_) == 0,
                    "sparsecnn: expected a CUDA build of torch");
  }
  void* stream() const { return stream_; }
  void check(int32_t error, const char* op) const {
    STD_TORCH_CHECK(error == 0, op, ": CUDA launch failed: ", cuda::error_string(error));
  }
};

// The CUDA kernels compute in float32.
inline void check_cuda_dtype(const char* op, DType dtype) {
  STD_TORCH_CHECK(dtype != DType::kFloat64, op,
                  ": expected float32, float16 or bfloat16 on CUDA, got float64");
}

}  // namespace sparsecnn::ops
#endif
