// Text of the integers that launchers return.
#include "cuda/entry.h"
#include "cuda/launch.cuh"

namespace sparsecnn::cuda {

const char* error_string(int32_t error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace sparsecnn::cuda
