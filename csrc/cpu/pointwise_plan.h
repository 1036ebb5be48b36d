// How a pointwise_conv2d call runs: as a chain of one stage, whose lanes are output channels, or
// plane by plane (NCHW), whose lanes are neighbouring pixels.
#pragma once
#include <cstdint>

#include "cpu/chain_plan.h"

namespace sparsecnn::cpu {

struct PointwisePlan {
  bool planes;          // else the chain below
  int64_t pixels;       // of a plane
  int64_t slabs;        // blocks of pixels of an image; an item is one of them
  int64_t items;        // n * slabs
  bool in_place;        // full slabs are read where they lie
  int64_t bias_offset;  // bytes into the thread's scratch, which starts with a packed slab
  int64_t thread_bytes;
  ChainConv2dParams chain_params;
  ChainPlan chain;
};

PointwisePlan plan_pointwise(const PointwiseConv2dParams& params, const ChainMachine& machine,
                             int64_t threads);

}  // namespace sparsecnn::cpu
