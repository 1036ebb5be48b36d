#include "cpu/depthwise_plan.h"

#include <algorithm>

namespace sparsecnn::cpu {
namespace {

// Input rows and weights of a chunk, to be found in L1 again by the next output row.
constexpr int64_t kChunkBytes = 24 << 10;
// Work is cut so fine that each thread gets at least so many items.
constexpr int64_t kItemsPerThread = 8;
// Input and output from which on they come from memory, measured on Zen 4 with 32 MB of L3.
constexpr int64_t kPrefetchBytes = 8 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The tile that computes `n` outputs of one axis in the fewest loads: each tile of t outputs reads
// t * stride + filter - stride rows or columns and does t times the arithmetic of one output.
int32_t choose_tile(int64_t n, int64_t filter, int64_t stride, int32_t max_tile) {
  int32_t best = 1;
  int64_t least = INT64_MAX;
  for (const int32_t tile : kDepthwiseTiles) {
    if (tile > max_tile || (tile > n && tile > 1)) continue;
    const int64_t loads = tile * stride + filter - stride;
    const int64_t cost = ceil_div(n, tile) * (tile * filter + loads + 2);
    if (cost < least) least = cost, best = tile;
  }
  return best;
}

void plan_nhwc(const DepthwiseConv2dParams& params, const DepthwiseMachine& machine,
               int64_t threads, DepthwisePlan& plan) {
  const ConvShape& s = params.shape;
  plan.tile = choose_tile(s.q, s.s, s.stride_w, machine.max_tile);
  const int64_t columns = (plan.tile - 1) * s.stride_w + (s.s - 1) * s.dil_w + 1;
  const int64_t accumulator = params.dtype == DType::kFloat64 ? 8 : 4;
  const int64_t taps = s.r * s.s + 1;
  const int64_t channel = s.r * columns * bytes_of(params.dtype) + taps * accumulator;
  const int64_t vectors = ceil_div(s.k, machine.lanes);
  const int64_t fits = std::max<int64_t>(1, kChunkBytes / (channel * machine.lanes));
  int64_t chunks = ceil_div(vectors, fits);
  const int64_t wanted = kItemsPerThread * threads;
  if (threads > 1 && s.n * s.p * chunks < wanted) chunks = ceil_div(wanted, s.n * s.p);
  if (plan.prefetch) chunks = 1;  // whole pixels, in the order of memory
  plan.chunk_vectors = ceil_div(vectors, std::min(chunks, vectors));
  plan.chunks = ceil_div(vectors, plan.chunk_vectors);
  plan.items = s.n * plan.chunks * s.p;
  plan.thread_bytes = plan.chunk_vectors * taps * machine.lanes * accumulator;
}

// Planes of so few outputs are transposed; 3x3 960 @7: 48 us in place, transposed 23 (AVX-512).
constexpr int64_t kSmallOutputs = 64, kSmallColumns = 8, kSmallInputs = 256;

// Whatever the number of threads: the order of summation is another one than that of plan_nchw.
bool plan_small(const DepthwiseConv2dParams& params, const DepthwiseMachine& machine,
                DepthwisePlan& plan) {
  const ConvShape& s = params.shape;
  const int64_t blocks = s.n * ceil_div(s.k, machine.lanes);
  if (s.k != s.c || params.dtype != DType::kFloat32 || s.q > kSmallColumns ||
      s.p * s.q > kSmallOutputs || s.h * s.w > kSmallInputs) {
    return false;
  }
  plan.transposed = true;
  plan.tile = choose_tile(s.q, s.s, s.stride_w, machine.max_tile);
  plan.items = blocks;
  plan.rows_offset = (s.r * s.s + 1) * machine.lanes * 4;
  plan.rows_2_offset = plan.rows_offset + s.h * s.w * machine.lanes * 4;
  plan.thread_bytes = plan.rows_2_offset + s.p * s.q * machine.lanes * 4;
  return true;
}

void plan_nchw(const DepthwiseConv2dParams& params, const DepthwiseMachine& machine,
               int64_t threads, DepthwisePlan& plan) {
  const ConvShape& s = params.shape;
  const int64_t planes = s.n * s.k;
  plan.bands = 1;
  if (threads > 1 && planes < kItemsPerThread * threads) {
    plan.bands = std::min(s.p, ceil_div(kItemsPerThread * threads, planes));
  }
  const int64_t rows = s.p / plan.bands;  // of the smallest band
  plan.full_tile = choose_tile(rows, s.r, s.stride_h, machine.max_tile);
  plan.pair_tile = choose_tile(ceil_div(rows, 2), s.r, s.stride_h, machine.max_tile);
  plan.items = planes * plan.bands;
  plan.weight_offset = 0;
  const int64_t accumulator = params.dtype == DType::kFloat64 ? 8 : 4;
  plan.mask_offset = ceil_div(s.r * s.s * accumulator, 64) * 64;
  const int64_t masks = ceil_div(s.q, machine.lanes) * s.s * 2;
  plan.rows_offset = plan.mask_offset + ceil_div(masks * 4, 64) * 64;
  plan.thread_bytes = plan.rows_offset;
  if (params.dtype == DType::kBFloat16) {  // input rows of a block of output rows, as float32
    const int64_t tile = std::max<int64_t>(plan.full_tile, 2 * plan.pair_tile);
    const int64_t rows = std::min(s.h, (tile - 1) * s.stride_h + (s.r - 1) * s.dil_h + 1);
    plan.thread_bytes += rows * s.w * accumulator;
  }
}

}  // namespace

DepthwisePlan depthwise_plan(const DepthwiseConv2dParams& params, const DepthwiseMachine& machine,
                             int64_t threads) {
  DepthwisePlan plan{};
  const ConvShape& s = params.shape;
  const int64_t elements = s.n * (s.c * s.h * s.w + s.k * s.p * s.q);
  plan.prefetch = elements * bytes_of(params.dtype) >= kPrefetchBytes;
  if (params.layout == Layout::kNHWC) {
    plan_nhwc(params, machine, threads, plan);
  } else if (!plan_small(params, machine, plan)) {
    plan_nchw(params, machine, threads, plan);
  }
  plan.thread_bytes = ceil_div(plan.thread_bytes, 64) * 64;
  return plan;
}

}  // namespace sparsecnn::cpu
