// What the glue may call of the CUDA side: one launcher per op. No torch, no CUDA header: a stream
// travels as void* and an error as the integer value of cudaError_t (0 = success).
#pragma once
#include <cstdint>

#include "core/params.h"

namespace sparsecnn::cuda {

// All pointers are device pointers; work is enqueued on `stream`, nothing is allocated and the
// host does not wait, so every launcher may be captured into a CUDA graph.
int32_t csr_conv2d(const CsrConv2dParams& params, void* stream);
int32_t csr_conv2d_grad_values(const CsrConv2dGradValuesParams& params, void* stream);
int32_t depthwise_conv2d(const DepthwiseConv2dParams& params, void* stream);
int32_t pattern_conv2d(const PatternConv2dParams& params, void* stream);
// For a weight of the pattern 2:4 on sparse tensor cores. The first says how many bytes of
// workspace (16-byte aligned, of any content) the second wants, or 0 where it does not apply. A
// filter that keeps more than two of four consecutive channels of a tap gets outputs of NaN.
int64_t pattern_conv2d_2_4_workspace_bytes(const PatternConv2dParams& params);
int32_t pattern_conv2d_2_4(const PatternConv2dParams& params, void* workspace, void* stream);
int32_t winograd_conv2d(const WinogradConv2dParams& params, void* stream);
int32_t pointwise_conv2d(const PointwiseConv2dParams& params, void* stream);

// Gives `bytes` of device memory that live until the work on the stream is done, or throws.
using WorkspaceSource = void* (*)(void* context, int64_t bytes);
// `workspace` is called at most once, and only for chains that no tile of fits into shared memory:
// they run as several launches with intermediates in device memory.
int32_t chain_conv2d(const ChainConv2dParams& params, WorkspaceSource workspace, void* context,
                     void* stream);

// Text of an error returned by a launcher.
const char* error_string(int32_t error);

}  // namespace sparsecnn::cuda
