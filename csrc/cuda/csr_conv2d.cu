// csr_conv2d: direct convolution with an unstructured sparse filter.
//
//   y[n,k,p,q] = act(bias[k] + residual[n,k,p,q]
//                    + sum over the stored (k,c,r,s) of W * x[n, c, p*stride+r*dil-pad, ...])
//
// Data layout: x, residual and y are NCHW or channels last; the filter is standard CSR over the
// lowered matrix (K, C/G*R*S) with int32 columns ascending within a row. Storage is float, half or
// bfloat16; all sums are float, one fused multiply-add per entry.
//
// Tiled kernel. A block owns 32 filters of one group and four tiles of outputs, the strips, from
// anywhere in the batch (arithmetic in csr_conv2d_plan.h, parts in csr_conv2d_tile.cuh); it walks
// the input channels in chunks:
//   - all threads stage the chunk's input tiles with their halos in shared memory, in the storage
//     type, the strips side by side: a word of 16 bytes (8 in half precision) has the same place of
//     all four, so that a filter tap shifts every access by whole words, always aligned;
//   - each warp walks the stored entries of its own filters: 32 entries are read coalesced, each
//     lane turns its column into an offset by a table in shared memory (the same for each chunk:
//     columns count from the chunk's first), the warp's entries go through shared memory as
//     {value, offset}, and all lanes apply them to their outputs in registers.
// Entries are fetched one batch ahead, so that their latency hides behind staging and arithmetic.
// A chunk in which the block's filters store nothing (pruned input channels) is not staged.
//
// Small maps. Where the strips hold 64 outputs, half a warp applies an entry to all of them: the
// two halves take every other entry of a filter and are added up at the end. Where the blocks would
// not fill the GPU, clusters of up to eight (sm_90) split the input channels: a block finds its
// first entry of each row by search and stages only its own channels; the partial sums meet
// through the cluster's shared memory, added in the order of the channels. No atomics, no memory
// beyond the block's, nothing to reset: any number of streams and graphs may run it.
//
// Order of the sums: ascending columns, and whole warps, unsplit, form the same sums bit by bit as
// the direct kernel, at any tiling. Half warps and clusters group the same products otherwise.
// Always: the same shape on the same GPU gives the same bits.
//
// Balance. A warp meets the others at each chunk, so the fullest one sets the time. A block ranks
// its filters by their stored entries and deals them out there and back; with row lengths that
// scatter by 30 % (simulated, log-normal) the fullest warp has 1.06 of the average instead of 1.23
// with four rows a warp, 1.17 instead of 1.43 with two.
//
// Direct kernel. One warp owns 128 outputs of one filter and reads the input from global memory.
// It takes what the tiled one cannot: a halo beyond shared memory (very large filters, dilations,
// strides) and groups with so few filters (depthwise) that nothing staged would be shared.
//
// Bound (derived): a multiply-add reads one element from shared memory, which delivers 128 bytes
// per clock to an SM, against 128 multiply-adds: a quarter of the peak in float. Counted in the
// machine code for sm_90a, 32 multiply-adds of a warp (four entries, 256 outputs) take 56
// instructions in float and 88 in half precision, with 8 accesses to words and 2 to entries; one
// load per multiply-add, as in an earlier version, took 108. An SM issues four instructions per
// clock, so a multiply-add costs 0.44 of a clock against 1.06 of shared memory in float, and 0.69
// against 0.56 in half precision, where the unpacking binds. (A read of the same 16 bytes by all
// lanes is counted as one access; should it be four, add 0.19.) Words of neighbouring lanes lie
// side by side, and pitch and phases (see the plan) keep lanes off each other's banks except in
// some strided tiles, which the plan counts double.
//
// Not done: one load for two filters with the same column. Columns coincide with the density as
// probability, so that at 90 % sparsity two filters' union saves 5 % of the loads (density / 2) and
// costs a test or a wasted multiply-add on the other 95 %.
//
// GPU timings have not been taken: shapes, budgets and the estimate in the plan are reasoned.
//
// Papers: Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning", ICLR 2017
// (direct sparse convolution, offsets instead of im2col); Chen, "Escoin", arXiv:1802.10280 (on
// GPU).
#include "cuda/cluster.cuh"
#include "cuda/csr_conv2d_plan.h"
#include "cuda/csr_conv2d_tile.cuh"
#include "cuda/direct_filter.cuh"
#include "cuda/entry.h"
#include "cuda/launch.cuh"

namespace sparsecnn::cuda {
namespace {

using namespace csr;  // NOLINT: its parts

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

template <typename T>
__global__ void __launch_bounds__(kDirectWarps * 32)
    csr_conv2d_direct(const CsrConv2dParams prm, const TensorStrides xs, const TensorStrides ys,
                      int64_t work) {
  const ConvShape& s = prm.shape;
  const int64_t spans = direct_spans(s);
  const auto read = [&](int32_t at, int32_t* column, float* value) {
    *column = prm.col_idx[at];
    *value = to_float(static_cast<const T*>(prm.values)[at]);
  };
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kDirectWarps + threadIdx.x / kWarpLanes;
       item < work; item += static_cast<int64_t>(gridDim.x) * kDirectWarps) {
    int64_t span, k;
    const int64_t n = divide(divide(item, spans, &span), s.k, &k);
    direct_filter<T>(prm, xs, ys, n, k, span, prm.row_ptr[k], prm.row_ptr[k + 1], read);
  }
}

template <typename T>
cudaError_t launch_direct(const CsrConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  const int64_t work = s.n * s.k * direct_spans(s);
  CUDA_LAUNCH((csr_conv2d_direct<T>), grid_size(ceil_div(work, kDirectWarps)), kDirectWarps * 32, 0,
              stream, params, strides_of(params.layout, s.c, s.h, s.w),
              strides_of(params.layout, s.k, s.p, s.q), work);
  return cudaGetLastError();
}

template <typename T, int kVectors, int kLanes, int kRows, int kWarps>
cudaError_t launch_tiled(const CsrConv2dParams& params, const TilePlan& plan, cudaStream_t stream) {
  const auto kernel = csr_conv2d_tiled<T, kVectors, kLanes, kRows, kWarps>;
  const cudaError_t error = allow_smem(kernel, plan.smem_bytes);
  if (error != cudaSuccess) return error;
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
  TilePlan plan;
  int shape = 0;
  const auto choose = [&](int64_t most_splits) {
    return plan_tiles(params, sizeof(T), limits.sm_count, limits.smem_optin_bytes, most_splits,
                      &shape, &plan);
  };
  if (!choose(kMostSplits)) return launch_direct<T>(params, stream);
  if (plan.splits > 1) {  // asked for only here: the answer takes a microsecond
    bool clusters = false;
    constexpr BlockShape any = kSmall;
    error =
        has_clusters(csr_conv2d_tiled<T, any.vectors, any.lanes, any.rows, any.warps>, &clusters);
    if (error != cudaSuccess) return error;
    if (!clusters) choose(1);
  }
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
