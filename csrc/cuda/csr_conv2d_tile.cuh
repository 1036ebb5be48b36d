// The parts of csr_conv2d's tiled kernel (csr_conv2d.cu): what lies in its shared memory and how a
// block finds its work, orders its filters, finds its first entries and stages its input.
#pragma once
#include "cuda/csr_conv2d_plan.h"
#include "cuda/launch.cuh"

namespace sparsecnn::cuda::csr {

struct alignas(8) Entry {
  float value;
  int32_t offset;  // bytes from an output's first staged word
};

// One staged element of each strip, side by side.
template <typename T>
struct alignas(kStrips * sizeof(T)) Word {
  T of[kStrips];
};

template <typename T>
__device__ __forceinline__ void unpack(Word<T> word, float (&to)[kStrips]) {
#pragma unroll
  for (int i = 0; i < kStrips; ++i) to[i] = to_float(word.of[i]);
}
// One instruction per element; the general way takes two for every other one.
template <>
__device__ __forceinline__ void unpack(Word<__nv_bfloat16> word, float (&to)[kStrips]) {
  const uint2 pairs = reinterpret_cast<const uint2&>(word);
  to[0] = __uint_as_float(pairs.x << 16), to[1] = __uint_as_float(pairs.x & 0xffff0000u);
  to[2] = __uint_as_float(pairs.y << 16), to[3] = __uint_as_float(pairs.y & 0xffff0000u);
}

// Where a strip lies. Rows and columns that count from its staged tile are inside the image if
// they are first <= . < first + count; both counts are 0 for a strip behind the last one.
struct Strip {
  int64_t x, y;  // element offsets of staged word 0 (perhaps outside) and of output 0, channel 0
  int32_t first_row, rows, first_col, cols;
  int32_t p, q;  // outputs of the tile inside the map
};

// What a block works on; in shared memory, since registers are short.
struct alignas(16) Header {
  Strip strip[kStrips];
  int64_t filter0, x;              // the first filter, the first input channel's element offset
  int32_t filters;                 // that exist
  int32_t entries[kBlockFilters];  // by filter
  int32_t filter[kBlockFilters], begin[kBlockFilters], end[kBlockFilters];  // by rank
};
static_assert(sizeof(Header) == kHeaderBytes && kHeaderBytes % 16 == 0);

// The part of `staged` rows (or columns), `step` apart, that lies inside an image of `extent`.
__device__ __forceinline__ void clip(int64_t origin, int64_t step, int64_t extent, int32_t staged,
                                     int32_t* first, int32_t* count) {
  int64_t begin = origin < 0 ? ceil_div(-origin, step) : 0;
  int64_t end = origin < extent ? ceil_div(extent - origin, step) : 0;
  begin = begin < staged ? begin : staged;
  end = end < staged ? end : staged;
  *first = static_cast<int32_t>(begin);
  *count = static_cast<int32_t>(end > begin ? end - begin : 0);
}

__device__ __forceinline__ Strip describe_strip(const TilePlan& t, int64_t tile) {
  Strip s{};
  if (tile >= t.tiles) return s;
  int64_t rest, tile_q;
  const int64_t row = divide(tile, t.tiles_q, &tile_q), n = divide(row, t.tiles_p, &rest);
  const int64_t p0 = rest * t.tile_p, q0 = tile_q << t.tile_q_log2;
  const int64_t row0 = p0 * t.stride_h - t.pad_top, col0 = q0 * t.stride_w - t.pad_left;
  s.x = n * t.x_n + row0 * t.x_h + col0 * t.x_w;
  s.y = n * t.y_n + p0 * t.y_p + q0 * t.y_q;
  clip(row0, t.row_step, t.h, t.staged_h, &s.first_row, &s.rows);
  clip(col0, t.col_step, t.w, t.staged_w, &s.first_col, &s.cols);
  s.p = static_cast<int32_t>(t.p - p0 < t.tile_p ? t.p - p0 : t.tile_p);
  const int64_t tile_width = int64_t{1} << t.tile_q_log2;
  s.q = static_cast<int32_t>(t.q - q0 < tile_width ? t.q - q0 : tile_width);
  return s;
}

// Ranks a block's filters by their stored entries, most first: what one warp does, a filter a lane.
__device__ __forceinline__ void sort_filters(const int32_t* row_ptr, int64_t k, bool exists,
                                             int lane, Header* header) {
  const int32_t begin = exists ? row_ptr[k] : 0, end = exists ? row_ptr[k + 1] : 0;
  const int32_t mine = exists ? end - begin : -1;
  header->entries[lane] = mine;
  __syncwarp();
  int rank = 0;
#pragma unroll 8
  for (int other = 0; other < kBlockFilters; ++other) {
    const int32_t theirs = header->entries[other];
    rank += theirs > mine || (theirs == mine && other < lane);
  }
  header->filter[rank] = lane, header->begin[rank] = begin, header->end[rank] = end;
}

// Moves the beginning of each row to its first entry at or behind a column. The 32 lanes probe at
// once: two rounds for rows of up to 1024 entries. All rows' probes of a round are in flight
// together.
template <int kRows>
__device__ __forceinline__ void skip_to_column(const int32_t* col_idx, int32_t column, int lane,
                                               int32_t (&begin)[kRows],
                                               const int32_t (&end)[kRows]) {
  int32_t left[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) left[j] = end[j] - begin[j];
  for (bool open = true; open;) {
    bool below[kRows];
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int32_t at = lane * (left[j] / kWarpLanes + 1);
      below[j] = at < left[j] && col_idx[begin[j] + at] < column;
    }
    open = false;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int32_t step = left[j] / kWarpLanes + 1;
      const int32_t count = __popc(__ballot_sync(kFullWarp, below[j]));
      // The entry sought lies behind the last probe below and not behind the first one that is not.
      const int32_t skipped = count ? (count - 1) * step + 1 : 0;
      const int32_t stop = count * step < left[j] ? count * step : left[j];
      begin[j] += skipped;
      left[j] = count ? stop - skipped : 0;
      open |= left[j] > 0;
    }
  }
}

// Copies one chunk of channels of all strips into the tile, zeros where the filter hangs over an
// edge. A thread finds the four addresses of a position once and then follows the channels.
template <typename T>
__device__ __forceinline__ void stage_tile(const T* __restrict__ x, Word<T>* tile,
                                           const Strip* strips, const TilePlan& t, int channels) {
  const int fast = t.channels_last ? t.stage_channels : t.stage_positions;
  const int outer = threadIdx.x / fast, inner = threadIdx.x - outer * fast;
  const int position0 = t.channels_last ? outer : inner;
  const int channel0 = t.channels_last ? inner : outer;
  if (channel0 >= t.stage_channels) return;  // threads beyond the last whole group
  const int area = t.staged_h * t.staged_w, to_step = t.stage_channels * t.channel_pitch;
  const int64_t step = t.stage_channels * t.x_c;
  for (int i = position0; i < area; i += t.stage_positions) {
    const int row = i / t.staged_w, col = i - row * t.staged_w;
    const int64_t at = row * t.staged_row + col * t.staged_col;
    const T* from[kStrips];
    bool inside[kStrips];
#pragma unroll
    for (int v = 0; v < kStrips; ++v) {
      const Strip& s = strips[v];
      inside[v] = static_cast<unsigned>(row - s.first_row) < static_cast<unsigned>(s.rows) &&
                  static_cast<unsigned>(col - s.first_col) < static_cast<unsigned>(s.cols);
      from[v] = x + (inside[v] ? s.x + at : 0) + channel0 * t.x_c;
    }
    Word<T>* to = tile + row * t.pitch +
                  (t.phases == 1 ? col : col % t.phases * t.phase_w + col / t.phases) +
                  channel0 * t.channel_pitch;
    for (int c = channel0; c < channels; c += 2 * t.stage_channels) {
      // Eight loads in flight; the last channel of an odd number is loaded twice.
      const bool second = c + t.stage_channels < channels;
      const int64_t next = second ? step : 0;
      Word<T> word[2];
#pragma unroll
      for (int v = 0; v < kStrips; ++v) {
        word[0].of[v] = inside[v] ? from[v][0] : from_float<T>(0.f);
        word[1].of[v] = inside[v] ? from[v][next] : from_float<T>(0.f);
        from[v] += 2 * step;
      }
      to[0] = word[0];
      if (second) to[to_step] = word[1];
      to += 2 * to_step;
    }
  }
}

// What two warps do for the others: one places the strips, one sorts the filters.
constexpr int kDescribing = 2;
__device__ __forceinline__ void describe_work(const int32_t* row_ptr, const TilePlan& t,
                                              int64_t work, int warp, int lane, Header* header) {
  // Filter blocks run fastest: blocks in flight together share their input in L2.
  int64_t filter_block, group;
  const int64_t tile0 = divide(divide(work, t.filter_blocks, &filter_block), t.groups, &group);
  if (warp == 0) {
    if (lane < kStrips) header->strip[lane] = describe_strip(t, tile0 * kStrips + lane);
    return;
  }
  const int64_t skipped = filter_block * kBlockFilters, filter0 = group * t.filters + skipped;
  const int64_t left = t.filters - skipped;
  if (lane == 0) {
    header->filter0 = filter0, header->x = group * t.channels * t.x_c;
    header->filters = static_cast<int32_t>(left < kBlockFilters ? left : kBlockFilters);
  }
  sort_filters(row_ptr, filter0 + lane, lane < left, lane, header);
}

}  // namespace sparsecnn::cuda::csr
