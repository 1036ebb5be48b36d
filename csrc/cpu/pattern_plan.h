// What pattern_conv2d's kernel needs to know beside the tiles: where the kept blocks are.
#pragma once
#include "cpu/tile_plan.h"

namespace sparsecnn::cpu {

// Sizes of register blocks, largest first: a filter group of 13 is 8 + 4 + 1 of them.
inline constexpr int32_t kFilterBlocks[] = {8, 4, 2, 1};
inline constexpr int32_t kFilterBlockSizes = 4;

// What one register block keeps of a panel: its values come one after the other in the stream, its
// columns are those of its filter group, which the group's other blocks share.
struct PatternRun {
  int32_t first;  // in `offsets`
  int32_t count;
};

struct PatternPlan : TilePlan {
  const int32_t* chunk_blocks;  // (chunks, kFilterBlockSizes): register blocks of each size
  const int64_t* chunk_first;   // (chunks): place of a chunk's first run in one panel's
  const PatternRun* runs;       // (panels, register blocks)
  int64_t blocks;               // register blocks of all chunks
  const int64_t* values_begin;  // (chunks, panels): first value
  const void* values;           // float or double; per run: (count, filters of the block)
  const int32_t* offsets;       // bytes from the start of the panel to a tap's first vector
};

}  // namespace sparsecnn::cpu
