// depthwise_conv2d on the CPU: y = act(conv(x, W) + bias + residual), one filter per output
// channel.
#pragma once
#include "cpu/kernels/depthwise_nchw-inl.h"
#include "cpu/kernels/depthwise_nhwc-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

template <class V, class S, int MaxTile>
void depthwise_conv2d_typed(const DepthwiseConv2dParams& params, const cpu::DepthwisePlan& plan,
                            int64_t begin, int64_t end, void* scratch) {
  char* const own = static_cast<char*>(scratch);
  if (params.layout == Layout::kNHWC) {
    DepthwiseNhwc<V, S, MaxTile>(params, plan, own).run(begin, end);
  } else {
    DepthwiseNchw<V, S, MaxTile>(params, plan, own).run(begin, end);
  }
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
