// Thread-block clusters (sm_90 and later): neighbouring blocks that run at the same time and read
// each other's shared memory. The host emulator has its own versions (cuda_emu_cluster.h).
//
// Code compiled for older GPUs contains no cluster instructions; it is not launched in clusters.
#pragma once
#include "cuda/launch.cuh"

#ifdef CUDA_EMU
#include "cuda_emu_cluster.h"
#else

namespace sparsecnn::cuda {

// A barrier of all threads of a cluster; what they wrote before it, all of them see behind it.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}

// The float where block `rank` of the cluster has in its shared memory what `own` is in this one's.
__device__ __forceinline__ float read_peer(const float* own, int rank) {
#if __CUDA_ARCH__ >= 900
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  uint32_t there;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
  return value;
#else
  return rank == 0 ? *own : 0.f;
#endif
}

// Whether the current device runs a version of the kernel that knows clusters: a newer GPU may run
// one translated from the code of an older one. A look-up, no synchronization.
template <class Kernel>
cudaError_t has_clusters(Kernel* kernel, bool* answer) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  *answer = error == cudaSuccess && attributes.ptxVersion >= 90;
  return error;
}

template <class... Parameters>
cudaError_t launch_in_clusters(void (*kernel)(Parameters...), unsigned grid, unsigned cluster,
                               unsigned block, size_t smem_bytes, cudaStream_t stream,
                               const Parameters&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace sparsecnn::cuda

// `cluster` divides `grid`; the blocks of a cluster have neighbouring numbers.
#define CLUSTER_LAUNCH(kernel, grid, cluster, block, smem_bytes, stream, ...) \
  sparsecnn::cuda::launch_in_clusters(kernel, grid, cluster, block, smem_bytes, stream, __VA_ARGS__)
#endif
