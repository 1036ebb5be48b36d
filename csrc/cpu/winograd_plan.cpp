#include "cpu/winograd_plan.h"

#include <algorithm>

namespace sparsecnn::cpu {
namespace {

constexpr int64_t kLine = 64;
// Transformed input of a run: beyond this the runs get shorter. Above L2, on purpose: each tap's
// part is read once per 32 filters, which the third level serves at the rate of the products.
constexpr int64_t kInputBytes = 5 << 18;
// One tap's part of it, which the sparse products walk at random.
constexpr int64_t kSparseTapBytes = 24 << 10;
// Filters that meet one tap's part before the next tap.
constexpr int64_t kFilters = 32;
// Cycles per vector and tap to gather and transform the input, measured (Zen 4).
constexpr double kTransformCost = 10;

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunks of filters: each transforms the input once more, so they are for idle threads only.
int64_t choose_chunks(const WinogradPlan& plan, int64_t groups, double products, int64_t threads) {
  int64_t best = 1;
  double best_time = 0;
  for (int64_t chunks = 1; chunks <= std::min(plan.blocks, 2 * threads); ++chunks) {
    const int64_t rounds = ceil_div(groups * plan.runs * chunks, threads);
    const double time = static_cast<double>(rounds) * (kTransformCost + products / chunks);
    if (chunks == 1 || time < 0.97 * best_time) best = chunks, best_time = time;
  }
  return best;
}

}  // namespace

WinogradPlan winograd_plan(const WinogradConv2dParams& params, int64_t stored,
                           const WinogradMachine& machine, int64_t threads) {
  WinogradPlan plan{};
  const ConvShape& s = params.shape;
  const bool sparse = params.row_ptr != nullptr;
  const int64_t taps = winograd_taps(params.tile), channels = s.channels_per_group();
  plan.lanes = machine.lanes;
  plan.tiles_y = ceil_div(s.p, params.tile);
  plan.tiles_x = ceil_div(s.q, params.tile);
  plan.tiles = s.n * plan.tiles_y * plan.tiles_x;
  plan.vectors = ceil_div(plan.tiles, machine.lanes);
  plan.blocks = winograd_blocks(s.filters_per_group());

  const int64_t vector_bytes = machine.lanes * machine.element_bytes;
  const int64_t tap_bytes = std::max<int64_t>(1, channels * vector_bytes);
  int64_t n = sparse ? machine.sparse_vectors : machine.dense_vectors;
  if (sparse) n = std::min(n, kSparseTapBytes / tap_bytes);
  n = std::min(n, kInputBytes / (taps * tap_bytes));
  n = std::clamp<int64_t>(n, 1, plan.vectors);
  // As many for each thread, where there are few; sums do not depend on how long a run is.
  plan.runs = ceil_div(plan.vectors, n);
  if (s.groups * plan.runs < 8 * threads) {
    plan.runs = std::min(plan.vectors, ceil_div(plan.runs, threads) * threads);
  }
  plan.max_vectors = static_cast<int32_t>(ceil_div(plan.vectors, plan.runs));

  // Stored values a channel and tap: what a vector of transformed input is multiplied with.
  const double used = static_cast<double>(stored) /
                      static_cast<double>(std::max<int64_t>(1, taps * channels * s.groups));
  plan.chunks = threads == 1 ? 1 : choose_chunks(plan, s.groups, used, threads);
  plan.items = s.groups * plan.chunks * plan.runs;

  plan.filters = std::min(kFilters, ceil_div(plan.blocks, plan.chunks) * kWinogradBlock);
  const int64_t line = kLine / machine.element_bytes, width = plan.max_vectors * machine.lanes;
  plan.input_pitch = channels * width + line;
  plan.product_pitch = plan.filters * width + line;
  plan.product_offset = round_up(taps * plan.input_pitch * machine.element_bytes, kLine);
  plan.tile_offset =
      plan.product_offset + round_up(taps * plan.product_pitch * machine.element_bytes, kLine);
  plan.tile_pitch = width + machine.lanes;
  const int64_t planes = params.layout == Layout::kNHWC ? machine.lanes : kWinogradPlanes;
  plan.thread_bytes =
      round_up(plan.tile_offset + planes * taps * plan.tile_pitch * machine.element_bytes, 4096);
  return plan;
}

}  // namespace sparsecnn::cpu
