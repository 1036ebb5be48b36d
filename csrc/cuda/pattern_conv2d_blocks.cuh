// What the blocks of pattern_conv2d*.cu work out on the device: which filters they own and where
// the pixels of their input tile lie.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/pattern_conv2d_plan.h"

namespace sparsecnn::cuda {

// Half types only. Launches the kernel of pattern_conv2d_mma.cu, or says that its input tile does
// not fit into shared memory.
bool pattern_conv2d_on_tensor_cores(const PatternConv2dParams& params, const DeviceLimits& limits,
                                    cudaStream_t stream, cudaError_t* error);

// Up to kRows packed rows of one filter group.
struct alignas(16) FilterSlot {
  int64_t values;              // index of the value of its first row and the group's first column
  int32_t group, group_rows;   // values from one column to the next: the filters of the group
  int32_t column, column_end;  // of the group
  int32_t row, rows;           // packed rows; none in slots behind the last
};

// A pixel of the staged tile: element offset of its first channel in the image, -1 in the padding,
// and its place.
struct alignas(16) StagedPixel {
  int64_t at;
  int32_t place;
};

// One block's worth of work. Slabs run fastest: blocks in flight together share their input in L2.
struct PatternItem {
  int64_t n, group, p0, q0, slab;
};

__device__ __forceinline__ PatternItem pattern_item(const PatternPlan& t, int64_t work,
                                                    int tile_pixels) {
  PatternItem item;
  int64_t rest = divide(work, t.slabs, &item.slab);
  rest = divide(rest, t.tiles_q, &item.q0);
  rest = divide(rest, t.tiles_p, &item.p0);
  item.n = divide(rest, t.groups, &item.group);
  item.q0 <<= t.tile_q_log2;
  item.p0 *= tile_pixels >> t.tile_q_log2;
  return item;
}

// Fills `slots` with slots first, first + 1, ... of the filter groups that own packed rows
// row_begin to row_end, and `out` with the filter of each of their rows, -1 where there is none. A
// value's index is a sum over all filter groups before it, so that every thread adds up some groups
// and a scan adds up the threads, in 2 numbers a warp of `scratch`. The block ends up synchronized.
template <int kThreads, int kSlots, int kRows>
__device__ __forceinline__ void find_slots(const PatternConv2dParams& prm, int64_t row_begin,
                                           int64_t row_end, int64_t first, FilterSlot* slots,
                                           int32_t* out, int64_t* scratch) {
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  __syncthreads();  // all have used the slots of the item before
  for (int i = threadIdx.x; i < kSlots; i += kThreads) slots[i] = FilterSlot{};
  if (prm.filter_groups == prm.shape.k) {  // a filter each
    __syncthreads();
    for (int i = threadIdx.x; i < kSlots; i += kThreads) {
      const int64_t row = row_begin + first + i;
      if (row >= row_end) break;
      const int32_t column = prm.group_columns[row], end = prm.group_columns[row + 1];
      const auto at = static_cast<int32_t>(row);
      slots[i] = {column, at, 1, column, end, at, 1};
    }
  } else {
    const int64_t share = ceil_div(prm.filter_groups, kThreads), g0 = threadIdx.x * share;
    const int64_t g1 = g0 + share < prm.filter_groups ? g0 + share : prm.filter_groups;
    int64_t slot = 0, value = 0;
    for (int64_t g = g0; g < g1; ++g) {
      const int32_t row = prm.group_rows[g], rows = prm.group_rows[g + 1] - row;
      if (row >= row_begin && row < row_end) slot += (rows + kRows - 1) / kRows;
      value += static_cast<int64_t>(rows) * (prm.group_columns[g + 1] - prm.group_columns[g]);
    }
    const int64_t own_slots = slot, own_values = value;
    for (int d = 1; d < kWarpLanes; d *= 2) {
      const int64_t before_slots = __shfl_sync(kFullWarp, slot, lane - d);
      const int64_t before_values = __shfl_sync(kFullWarp, value, lane - d);
      if (lane >= d) slot += before_slots, value += before_values;
    }
    if (lane == kWarpLanes - 1) scratch[2 * warp] = slot, scratch[2 * warp + 1] = value;
    __syncthreads();
    slot -= own_slots + first, value -= own_values;
    for (int w = 0; w < warp; ++w) slot += scratch[2 * w], value += scratch[2 * w + 1];
    for (int64_t g = g0; g < g1; ++g) {
      const int32_t row = prm.group_rows[g], rows = prm.group_rows[g + 1] - row;
      const int32_t column = prm.group_columns[g], end = prm.group_columns[g + 1];
      if (row >= row_begin && row < row_end) {
        for (int32_t r = 0; r < rows; r += kRows, ++slot) {
          if (slot < 0 || slot >= kSlots) continue;
          const int32_t left = rows - r < kRows ? rows - r : kRows;
          slots[slot] = {value + r, static_cast<int32_t>(g), rows, column, end, row + r, left};
        }
      }
      value += static_cast<int64_t>(rows) * (end - column);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSlots * kRows; i += kThreads) {
    const FilterSlot& of = slots[i / kRows];
    out[i] = i % kRows < of.rows ? prm.filters[of.row + i % kRows] : -1;
  }
  __syncthreads();
}

// Fills the tables of an item's staged pixels and of where its outputs go, but for their channel:
// -1 outside of the image. Visible to others after the next barrier.
template <int kThreads, int kPixels>
__device__ __forceinline__ void locate_pixels(const PatternPlan& t, const PatternItem& item,
                                              StagedPixel* pixels, int64_t* outputs) {
  for (int o = threadIdx.x; o < kPixels; o += kThreads) {
    const int64_t p = item.p0 + (o >> t.tile_q_log2);
    const int64_t q = item.q0 + (o & ((1 << t.tile_q_log2) - 1));
    outputs[o] = p < t.p && q < t.q ? item.n * t.y_n + p * t.y_p + q * t.y_q : -1;
  }
  const int64_t row0 = item.p0 * t.stride_h - t.pad_top, col0 = item.q0 * t.stride_w - t.pad_left;
  for (int i = threadIdx.x; i < t.area; i += kThreads) {
    const int row = i / t.staged_w, col = i - row * t.staged_w;
    const int64_t h = row0 + static_cast<int64_t>(row) * t.row_step;
    const int64_t w = col0 + static_cast<int64_t>(col) * t.col_step;
    const bool inside = h >= 0 && h < t.h && w >= 0 && w < t.w;
    const int phase = t.phases == 1 ? 0 : col % t.phases;
    pixels[i] = {inside ? h * t.x_h + w * t.x_w : -1,
                 row * t.pitch + phase * t.phase_w + (t.phases == 1 ? col : col / t.phases)};
  }
}

// Place of the first input of output `o` of the tile, and the places from there to that of a tap.
__device__ __forceinline__ int place_of(const PatternPlan& t, int o) {
  const int row = o >> t.tile_q_log2, col = o & ((1 << t.tile_q_log2) - 1);
  return row * t.row_stride * t.pitch + col;
}
__device__ __forceinline__ int tap_places(const PatternPlan& t, int tap) {
  const int r = tap / t.filter_w, shift = (tap - r * t.filter_w) * t.dil_w;
  return r * t.dil_row + shift % t.phases * t.phase_w + shift / t.phases;
}

// Writes sums of [row][pixel], `pitch` floats apart, to y: neighbouring threads write neighbouring
// elements, and each keeps its row (channels last) or its pixel. place(pixel) is where a pixel
// goes.
template <typename T, int kThreads, int kRows, int kPixels, class Place>
__device__ __forceinline__ void store_sums(const PatternConv2dParams& prm, const PatternPlan& t,
                                           const float* sums, int pitch, const int32_t* out,
                                           Place place) {
  static_assert(kThreads % kRows == 0 && kThreads % kPixels == 0);
  if (t.channels_last) {
    const int row = threadIdx.x % kRows, k = out[row];
    if (k < 0) return;
#pragma unroll 2
    for (int pixel = threadIdx.x / kRows; pixel < kPixels; pixel += kThreads / kRows) {
      const int64_t at = place(pixel);
      if (at >= 0) store_output<T>(prm, sums[row * pitch + pixel], k, at + k);
    }
    return;
  }
  const int pixel = threadIdx.x % kPixels;
  const int64_t at = place(pixel);
  if (at < 0) return;
#pragma unroll 2
  for (int row = threadIdx.x / kPixels; row < kRows; row += kThreads / kPixels) {
    const int k = out[row];
    if (k >= 0) store_output<T>(prm, sums[row * pitch + pixel], k, at + k * t.y_k);
  }
}

}  // namespace sparsecnn::cuda
