// csr_conv2d: direct convolution with an unstructured sparse filter.
//
//   y[n,k,p,q] = act(bias[k] + residual[n,k,p,q]
//                    + sum over the stored (k,c,r,s) of W * x[n, c, p*stride+r*dil-pad, ...])
//
//
#include "cuda/cluster.cuh"
#include "cuda/csr_conv2d_plan.h"
#include "cuda/entry.h"
#include "cuda/launch.cuh"

namespace sparsecnn::cuda {
namespace {

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

constexpr int32_t kNoColumn = 2147483647;

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

template <typename T, int kVectors, int kLanes, int kRows, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm)
    csr_conv2d_tiled(const CsrConv2dParams prm, const TilePlan t) {
  constexpr int kThreads = kWarps * 32, kTogether = kWarpLanes / kLanes;
  constexpr int kPositions = kVectors * kLanes, kSlots = kStrips * kPositions;
  constexpr int kTileOffset = kHeaderBytes + kThreads * sizeof(Entry);
  static_assert(kRows * kWarps == kBlockFilters);
  DYN_SMEM(char, smem);
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  Header* header = reinterpret_cast<Header*>(smem);
  Entry* entries = reinterpret_cast<Entry*>(smem + kHeaderBytes) + warp * kWarpLanes;
  char* tile = smem + kTileOffset;
  int32_t* table = reinterpret_cast<int32_t*>(tile + t.tile_bytes);
  const T* values = static_cast<const T*>(prm.values);

  // Warps 0 and 1 have the first piece of work to describe meanwhile.
  for (int i = static_cast<int>(threadIdx.x) - kDescribing * kWarpLanes;
       i < t.chunk * t.taps && warp >= kDescribing; i += kThreads - kDescribing * kWarpLanes) {
    const int c = i / t.taps, tap = i - c * t.taps;
    const int r = tap / t.filter_w, shift = (tap - r * t.filter_w) * t.dil_w;
    const int words =
        c * t.channel_pitch + r * t.dil_row + shift % t.phases * t.phase_w + shift / t.phases;
    table[i] = words * static_cast<int>(sizeof(Word<T>));
  }

  // Where the inputs of this lane's outputs start in shared memory: in bytes, like the entries'
  // offsets, so that an address is one addition in the inner loop. The shuffle changes nothing: it
  // hides how the number came about from the compiler, which would compute it anew in that loop.
  int start[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int position = v * kLanes + lane % kLanes, row = position >> t.tile_q_log2;
    const int col = position - (row << t.tile_q_log2);
    const int words = row * t.row_stride * t.pitch + col;
    const int at = kTileOffset + words * static_cast<int>(sizeof(Word<T>));
    start[v] = __shfl_sync(kFullWarp, at, lane);
  }

  const int split = static_cast<int>(blockIdx.x % static_cast<unsigned>(t.splits));
  const auto channel = [&](int32_t c) { return c < t.channels ? c : t.channels; };
  const int32_t channel_begin = channel(split * t.split_channels);
  const int32_t channel_end = channel(channel_begin + t.split_channels);
  for (int64_t work = blockIdx.x / static_cast<unsigned>(t.splits); work < t.work;
       work += gridDim.x / static_cast<unsigned>(t.splits)) {
    if (warp < kDescribing) describe_work(prm.row_ptr, t, work, warp, lane, header);
    __syncthreads();

    // Entry cursor + lane of each row, fetched ahead; kNoColumn past the end of the row.
    int32_t cursor[kRows], end[kRows], column[kRows];
    float value[kRows], sum[kRows][kVectors][kStrips];
    const auto fetch = [&](int32_t at, int32_t stop, int32_t* to_column, float* to_value) {
      *to_column = at < stop ? prm.col_idx[at] : kNoColumn;
      *to_value = at < stop ? to_float(values[at]) : 0.f;
    };
    // Ranks in turns, every other turn backwards: a warp with a long row gets a short one too.
    const auto rank_of = [&](int j) { return j * kWarps + (j % 2 ? kWarps - 1 - warp : warp); };
#pragma unroll
    for (int j = 0; j < kRows; ++j)
      cursor[j] = header->begin[rank_of(j)], end[j] = header->end[rank_of(j)];
    if (split > 0) skip_to_column<kRows>(prm.col_idx, channel_begin * t.taps, lane, cursor, end);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      fetch(cursor[j] + lane, end[j], &column[j], &value[j]);
#pragma unroll
      for (int i = 0; i < kVectors * kStrips; ++i) sum[j][i / kStrips][i % kStrips] = 0.f;
    }

    for (int32_t c0 = channel_begin; c0 < channel_end; c0 += t.chunk) {
      const int channels = channel_end - c0 < t.chunk ? channel_end - c0 : t.chunk;
      const int32_t column0 = c0 * t.taps, column1 = column0 + channels * t.taps;
      // The first chunk is staged without waiting for the first entries to arrive.
      bool stored = c0 == channel_begin;
      if (!stored) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) stored |= column[j] < column1;
      }
      // Also the barrier between the last reads of the tile and its next contents.
      if (!__syncthreads_or(stored)) continue;
      stage_tile(static_cast<const T*>(prm.x) + header->x + c0 * t.x_c,
                 reinterpret_cast<Word<T>*>(tile), header->strip, t, channels);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        int count;
        do {
          // Columns ascend, so the chunk's entries are the first `count` lanes.
          const bool mine = column[j] < column1;
          count = __popc(__ballot_sync(kFullWarp, mine));
          if (mine) entries[lane] = {value[j], table[column[j] - column0]};
          __syncwarp();
          cursor[j] += count;
          fetch(cursor[j] + lane, end[j], &column[j], &value[j]);
#pragma unroll 4
          for (int e = kTogether == 1 ? 0 : lane / kLanes; e < count; e += kTogether) {
            const Entry entry = entries[e];
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
              float in[kStrips];
              unpack(*reinterpret_cast<const Word<T>*>(smem + (start[v] + entry.offset)), in);
#pragma unroll
              for (int i = 0; i < kStrips; ++i)
                sum[j][v][i] = fmaf(entry.value, in[i], sum[j][v][i]);
            }
          }
          __syncwarp();  // all lanes have read before the next batch overwrites
        } while (count == kWarpLanes);
      }
    }

    // The sums leave through the tile, so that they can be written side by side in either layout
    // and added up over the blocks of a cluster.
    __syncthreads();
    float* sums = reinterpret_cast<float*>(tile);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int f = header->filter[rank_of(j)];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < kStrips; ++i) {
          float mine = sum[j][v][i];
          if (kTogether == 2) mine += __shfl_xor_sync(kFullWarp, mine, kLanes);
          if (lane < kLanes) sums[f * (kSlots + 1) + i * kPositions + v * kLanes + lane] = mine;
        }
      }
    }
    if (t.splits > 1)
      cluster_sync();
    else
      __syncthreads();
    const int share = kBlockFilters / t.splits;
#pragma unroll 1
    for (int o = threadIdx.x; o < share * kSlots; o += kThreads) {
      const int f = split * share + (t.channels_last ? o % share : o / kSlots);
      const int slot = t.channels_last ? o / share : o % kSlots;
      const int position = slot % kPositions, row = position >> t.tile_q_log2;
      const int col = position - (row << t.tile_q_log2);
      const Strip& s = header->strip[slot / kPositions];
      if (row >= s.p || col >= s.q || f >= header->filters) continue;
      const float* at = sums + f * (kSlots + 1) + slot;
      float total = *at;
      if (t.splits > 1) {
        float part[kMostSplits];  // all in flight at once, then added in the order of the channels
#pragma unroll
        for (int from = 0; from < kMostSplits; ++from)
          if (from < t.splits) part[from] = read_peer(at, from);
        total = part[0];
#pragma unroll
        for (int from = 1; from < kMostSplits; ++from)
          if (from < t.splits) total += part[from];
      }
      const int64_t k = header->filter0 + f;
      store_output<T>(prm, total, k, s.y + k * t.y_k + row * t.y_p + col * t.y_q);
    }
    // The others have read this block's sums, and all threads their strips.
    if (t.splits > 1)
      cluster_sync();
    else
      __syncthreads();
  }
}

constexpr int kDirectPixels = 4, kDirectWarps = 8;

template <typename T>
__global__ void __launch_bounds__(kDirectWarps * 32)
    csr_conv2d_direct(const CsrConv2dParams prm, const TensorStrides xs, const TensorStrides ys,
                      int64_t work) {
  const ConvShape& s = prm.shape;
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int64_t area = s.p * s.q, spans = ceil_div(area, kDirectPixels * kWarpLanes);
  const int32_t taps = static_cast<int32_t>(s.r * s.s), filter_w = static_cast<int32_t>(s.s);
  const T* values = static_cast<const T*>(prm.values);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kDirectWarps + warp; item < work;
       item += static_cast<int64_t>(gridDim.x) * kDirectWarps) {
    const int64_t span = item % spans, k = item / spans % s.k, n = item / spans / s.k;
    const int64_t channel0 = k / (s.k / s.groups) * (s.c / s.groups);
    const T* image = static_cast<const T*>(prm.x) + n * xs.n + channel0 * xs.c;
    int64_t row[kDirectPixels], col[kDirectPixels];  // input position under the filter's origin
    float sum[kDirectPixels];
#pragma unroll
    for (int i = 0; i < kDirectPixels; ++i) {
      const int64_t at = (span * kDirectPixels + i) * kWarpLanes + lane;
      row[i] = at / s.q * s.stride_h - s.pad_top;
      col[i] = at % s.q * s.stride_w - s.pad_left;
      sum[i] = 0.f;
    }
    const int32_t end = prm.row_ptr[k + 1];
    for (int32_t first = prm.row_ptr[k]; first < end; first += kWarpLanes) {
      // Each lane decodes one entry, then all lanes apply all of them.
      const int32_t at = first + lane;
      const int32_t column = at < end ? prm.col_idx[at] : 0;
      const float value = at < end ? to_float(values[at]) : 0.f;
      const int32_t c = column / taps, tap = column - c * taps, r = tap / filter_w;
      const int64_t down = r * s.dil_h, right = (tap - r * filter_w) * s.dil_w;
      const int64_t plane = c * xs.c;
      const int count = end - first < kWarpLanes ? end - first : kWarpLanes;
      for (int e = 0; e < count; ++e) {
        const float v = __shfl_sync(kFullWarp, value, e);
        const int64_t dy = __shfl_sync(kFullWarp, down, e);
        const int64_t dx = __shfl_sync(kFullWarp, right, e);
        const int64_t base = __shfl_sync(kFullWarp, plane, e);
#pragma unroll
        for (int i = 0; i < kDirectPixels; ++i) {
          const int64_t h = row[i] + dy, w = col[i] + dx;
          const bool inside = h >= 0 && h < s.h && w >= 0 && w < s.w;
          const float in = inside ? to_float(image[base + h * xs.h + w * xs.w]) : 0.f;
          sum[i] = fmaf(v, in, sum[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDirectPixels; ++i) {
      const int64_t at = (span * kDirectPixels + i) * kWarpLanes + lane;
      if (at < area)
        store_output<T>(prm, sum[i], k, n * ys.n + k * ys.c + at / s.q * ys.h + at % s.q * ys.w);
    }
  }
}

template <typename T>
cudaError_t launch_direct(const CsrConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  const int64_t work = s.n * s.k * ceil_div(s.p * s.q, kDirectPixels * kWarpLanes);
  CUDA_LAUNCH((csr_conv2d_direct<T>), grid_size(ceil_div(work, kDirectWarps)), kDirectWarps * 32, 0,
              stream, params, strides_of(params.layout, s.c, s.h, s.w),
              strides_of(params.layout, s.k, s.p, s.q), work);
  return cudaGetLastError();
}

template <typename T, int kVectors, int kLanes, int kRows, int kWarps>
cudaError_t launch_tiled(const CsrConv2dParams& params, const TilePlan& plan, cudaStream_t stream) {
  const auto kernel = csr_conv2d_tiled<T, kVectors, kLanes, kRows, kWarps>;
  if (plan.smem_bytes > kDefaultSmemBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem_bytes);
    if (error != cudaSuccess) return error;
  }
  const int64_t most = kMaxGrid / plan.splits;
  const unsigned grid = static_cast<unsigned>((plan.work < most ? plan.work : most) * plan.splits);
  if (plan.splits == 1)
    CUDA_LAUNCH(kernel, grid, kWarps * 32, plan.smem_bytes, stream, params, plan);
  else
    CLUSTER_LAUNCH(kernel, grid, plan.splits, kWarps * 32, plan.smem_bytes, stream, params, plan);
  return cudaGetLastError();
}

constexpr int64_t kFewFilters = 8;  // per group: below, a staged tile has too few readers

template <typename T, int kShape>
cudaError_t launch_shape(const CsrConv2dParams& params, const TilePlan& plan, cudaStream_t stream) {
  constexpr BlockShape s = kShapes[kShape];
  return launch_tiled<T, s.vectors, s.lanes, s.rows, s.warps>(params, plan, stream);
}

template <typename T>
cudaError_t launch(const CsrConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  DeviceLimits limits{};
  cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  if (s.filters_per_group() < kFewFilters || s.columns() == 0)
    return launch_direct<T>(params, stream);
  bool clusters = false;
  constexpr BlockShape small = kSmall;
  error = has_clusters(csr_conv2d_tiled<T, small.vectors, small.lanes, small.rows, small.warps>,
                       &clusters);
  if (error != cudaSuccess) return error;
  TilePlan plan;
  int shape = 0;
  if (!plan_tiles(params, sizeof(T), limits.sm_count, limits.smem_optin_bytes,
                  clusters ? kMostSplits : 1, &shape, &plan))
    return launch_direct<T>(params, stream);
  switch (shape) {
    case 0:
      return launch_shape<T, 0>(params, plan, stream);
    case 1:
      return launch_shape<T, 1>(params, plan, stream);
    default:
      return launch_shape<T, 2>(params, plan, stream);
  }
}

}  // namespace

int32_t csr_conv2d(const CsrConv2dParams& params, void* stream) {
  const ConvShape& s = params.shape;
  if (s.n * s.k * s.p * s.q == 0) return cudaSuccess;
  if (s.groups < 1 || s.k > kNoColumn - 1 || s.columns() > kNoColumn - 1)
    return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  return with_storage(params.dtype, [&](auto storage) {
    return launch<typename decltype(storage)::type>(params, on);
  });
}

}  // namespace sparsecnn::cuda
