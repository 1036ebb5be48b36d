#include "cpu/pointwise_plan.h"

#include <algorithm>

namespace sparsecnn::cpu {
namespace {

// Cycles for a pixel's channel to be transposed, beside one FMA of a vector a cycle: 64 shuffles,
// 16 loads and 16 stores for 256 elements.
constexpr double kTransposeCost = 0.6;
// Rows of planes this long or fewer channels than that are read where they lie: they stay within
// the ways of a first-level cache however far apart they are.
constexpr int64_t kChannelsInPlace = 48;
// Filters this many bytes apart fold onto one cache set.
constexpr int64_t kFilterFoldBytes = 4096;

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

ChainConv2dParams as_chain(const PointwiseConv2dParams& p) {
  ChainConv2dParams c{};
  c.stages = 1;
  ChainStage& stage = c.stage[0];
  stage.shape = p.shape;
  stage.activation = p.activation;
  stage.weight = p.weight;
  stage.weight_stride[0] = p.weight_stride[0];
  stage.weight_stride[1] = p.weight_stride[1];
  stage.weight_stride[2] = stage.weight_stride[3] = p.shape.c * p.shape.k;
  stage.bias = p.bias;
  c.n = p.shape.n;
  c.dtype = p.dtype;
  c.layout = p.layout;
  c.x = p.x;
  c.residual = p.residual;
  c.y = p.y;
  return c;
}

// Lanes that are pixels are wasted at the end of a plane, lanes that are channels at the end of the
// channels, and the latter cost the transposes of all that is read and written.
bool planes_are_cheaper(const ConvShape& s, int64_t pixels, int64_t lanes) {
  const double by_pixels = static_cast<double>(round_up(pixels, lanes)) / lanes * s.c * (s.k + 2.0);
  const double by_channels =
      static_cast<double>(pixels) *
      (static_cast<double>(s.c) * round_up(s.k, lanes) / lanes + kTransposeCost * (s.c + s.k));
  return by_pixels < by_channels;
}

}  // namespace

PointwisePlan plan_pointwise(const PointwiseConv2dParams& p, const ChainMachine& m,
                             int64_t threads) {
  PointwisePlan plan{};
  const ConvShape& s = p.shape;
  plan.pixels = s.h * s.w;
  plan.planes = p.layout == Layout::kNCHW && s.stride_h == 1 && s.stride_w == 1 &&
                p.dtype != DType::kBFloat16 &&
                p.weight_stride[0] * m.element_bytes % kFilterFoldBytes != 0 &&
                planes_are_cheaper(s, plan.pixels, m.lanes);
  if (!plan.planes) {
    plan.chain_params = as_chain(p);
    plan.chain = plan_chain(plan.chain_params, m, threads);
    plan.items = plan.chain.items;
    plan.thread_bytes = plan.chain.thread_bytes;
    return plan;
  }
  const int64_t width = m.lanes * m.tile_vectors;
  plan.slabs = (plan.pixels + width - 1) / width;
  plan.items = s.n * plan.slabs;
  plan.in_place = s.c <= kChannelsInPlace;
  plan.bias_offset = round_up(s.c * width * m.element_bytes, 64);
  plan.thread_bytes = round_up(plan.bias_offset + s.k * m.element_bytes, 4096) + 64;
  return plan;
}

}  // namespace sparsecnn::cpu
