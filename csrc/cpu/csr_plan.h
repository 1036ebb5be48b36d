// What csr_conv2d's kernel needs to know beside the tiles: where the nonzeros are.
#pragma once
#include "cpu/tile_plan.h"

namespace sparsecnn::cpu {

// Entries past the end of the bounds table that the kernel may read.
inline constexpr int64_t kBoundsPad = 4;

struct CsrPlan : TilePlan {
  const void* entries;  // CsrEntry<float or double>, if streamed: chunk by chunk, panel by panel
  const int64_t* panel_entries;  // (chunks, panels): first entry of a chunk's part of a panel
  const int32_t* counts;         // (chunks, panels, filters of the chunk): entries of each filter
  int64_t bounds_offset;         // of a table in the thread's scratch, if not streamed
};

// One nonzero in the order of the kernel: its value in the type of accumulation and the distance
// in bytes of its tap's first vector from the start of the panel.
template <class T>
struct CsrEntry {
  T value;
  int32_t offset;
};

// A weight is read as it is stored where the output has no more than so many vectors.
inline constexpr int32_t kStoredVectors = 2;

}  // namespace sparsecnn::cpu
