#include "cpu/tile_program.h"

#include <algorithm>

namespace sparsecnn::cpu {
namespace {

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// The smallest channel pitch, in vectors, whose lines spread a block's share of a panel most evenly
// over the sets of the L1 cache. A block touches a window of the packed rows of its super-block;
// with a pitch of, say, 64 lines the windows of all channels would compete for the same sets.
int64_t spread_pitch(const TilePlan& plan, int64_t element_bytes) {
  const ConvShape& s = plan.shape;
  const int64_t vector_bytes = plan.lanes * element_bytes;
  const int64_t dense = int64_t{plan.rows} * plan.cols;
  if (plan.in_place) return s.w / plan.lanes;
  if (plan.super_y * plan.super_x == 1) return dense;
  const int64_t rows = pack_axis(s.r, s.dil_h, s.stride_h, plan.ny, nullptr, nullptr);
  const int64_t cols = pack_axis(s.s, s.dil_w, s.stride_w, plan.nx, nullptr, nullptr);
  const int64_t channels = std::min<int64_t>(plan.channel_block, 64);
  const int64_t step = std::max<int64_t>(1, kCacheLine / vector_bytes);
  int64_t best = dense, best_load = INT64_MAX;
  for (int64_t pad = 0; pad < kPitchPads; ++pad) {
    const int64_t pitch = dense + pad * step;
    int64_t load[kL1Sets] = {};
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t y = 0; y < rows; ++y) {
        const int64_t first = (c * pitch + y * plan.cols) * vector_bytes / kCacheLine;
        const int64_t last = ((c * pitch + y * plan.cols + cols) * vector_bytes - 1) / kCacheLine;
        for (int64_t line = first; line <= last; ++line) ++load[line % kL1Sets];
      }
    }
    const int64_t most = *std::max_element(load, load + kL1Sets);
    if (most < best_load) {
      best_load = most;
      best = pitch;
    }
  }
  return best;
}

}  // namespace

void lay_out_panel(TilePlan& plan, TileTables& owner, int64_t element_bytes) {
  const ConvShape& s = plan.shape;
  plan.channel_pitch = spread_pitch(plan, element_bytes);
  const int64_t taps = plan.channel_block * s.r * s.s;
  owner.tables.assign(static_cast<size_t>(taps + plan.rows + plan.cols + plan.span), -1);
  plan.tap_offset = owner.tables.data();
  plan.row_source = plan.tap_offset + taps;
  plan.col_source = plan.row_source + plan.rows;
  plan.col_slot = plan.col_source + plan.cols;
  std::vector<int32_t> tap_row(static_cast<size_t>(s.r)), tap_col(static_cast<size_t>(s.s));
  pack_axis(s.r, s.dil_h, s.stride_h, plan.ny * plan.super_y, plan.row_source, tap_row.data());
  pack_axis(s.s, s.dil_w, s.stride_w, plan.nx * plan.super_x, plan.col_source, tap_col.data());
  int32_t* tap = plan.tap_offset;
  for (int64_t c = 0; c < plan.channel_block; ++c) {
    for (int64_t r = 0; r < s.r; ++r) {
      for (int64_t q = 0; q < s.s; ++q) {
        *tap++ = static_cast<int32_t>(
            (c * plan.channel_pitch + int64_t{tap_row[r]} * plan.cols + tap_col[q]) * plan.lanes);
      }
    }
  }
  for (int32_t j = 0; j < plan.cols; ++j) plan.col_slot[plan.col_source[j]] = j;
}

int64_t chunk_room(const TilePlan& plan, int64_t element_bytes) {
  const int64_t panel = panel_bytes(plan, plan.channel_block, element_bytes);
  const int64_t filter = filter_bytes(plan, plan.channel_blocks, element_bytes);
  return std::max<int64_t>((plan.scratch_budget - panel) / filter, 1);
}

void lay_out_chunks(TilePlan& plan, const TileTables& owner, int64_t element_bytes) {
  plan.max_chunk_filters = 0;
  for (size_t i = 1; i < owner.chunk_begin.size(); ++i) {
    plan.max_chunk_filters =
        std::max(plan.max_chunk_filters, owner.chunk_begin[i] - owner.chunk_begin[i - 1]);
  }
  plan.chunk_begin = owner.chunk_begin.data();
  plan.items =
      plan.image_groups * plan.blocks_y * plan.blocks_x * plan.shape.groups * plan.filter_chunks;
  const int64_t sums =
      int64_t{plan.ny} * plan.nx * plan.super_y * plan.super_x * plan.lanes * element_bytes;
  const int64_t panel = plan.channel_block * plan.channel_pitch * plan.lanes * element_bytes;
  plan.panel_offset = 0;
  plan.partial_offset = plan.in_place ? 0 : round_up(panel, kCacheLine);
  plan.bias_offset = plan.partial_offset + round_up(plan.max_chunk_filters * sums, kCacheLine);
  plan.thread_bytes =
      plan.bias_offset + round_up(plan.max_chunk_filters * element_bytes, kCacheLine);
}

ProgramKey program_key(const ConvParams& params, const TileMachine& machine, int32_t threads) {
  ProgramKey key;
  std::memset(&key, 0, sizeof key);  // padding takes part in the comparison
  key.shape = params.shape;
  key.dtype = static_cast<int32_t>(params.dtype);
  key.layout = static_cast<int32_t>(params.layout);
  key.lanes = machine.lanes;
  key.max_vectors = machine.max_vectors;
  key.threads = threads;
  key.aligned = is_aligned(params);
  return key;
}

}  // namespace sparsecnn::cpu
