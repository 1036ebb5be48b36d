// The host emulator's versions of what cluster.cuh offers.
#pragma once
#include "cuda_emu.h"

namespace emu {

// Whether the pretended device has clusters: tests set it.
inline bool& device_has_clusters() {
  static bool answer = true;
  return answer;
}

inline __attribute__((noinline)) void cluster_barrier() { wait(State::kClusterBarrier); }

}  // namespace emu

namespace sparsecnn::cuda {

inline void cluster_sync() { emu::cluster_barrier(); }

inline float read_peer(const float* own, int rank) {
  const std::ptrdiff_t at = own - emu::shared_memory();
  return emu::sim().smem[rank * emu::sim().block_floats + static_cast<size_t>(at)];
}

template <class Kernel>
cudaError_t has_clusters(Kernel*, bool* answer) {
  *answer = emu::device_has_clusters();
  return cudaSuccess;
}

}  // namespace sparsecnn::cuda

#define CLUSTER_LAUNCH(kernel, grid, cluster, block, smem_bytes, stream, ...) \
  ((void)(stream),                                                            \
   emu::launch(#kernel, grid, block, smem_bytes, [&] { kernel(__VA_ARGS__); }, cluster))
