// csr_conv2d: direct convolution with an unstructured sparse filter.
//
//   y[n,k,p,q] = act(bias[k] + residual[n,k,p,q]
//                    + sum over the stored (k,c,r,s) of W * x[n, c, p*stride+r*dil-pad, ...])
//
// Data layout: x, residual and y are NCHW or channels last; the filter is standard CSR over the
// lowered matrix (K, C/G*R*S) with int32 columns ascending within a row. Storage is float, half or
// bfloat16; all sums are float, in ascending column order, one fused multiply-add per entry, so
// both kernels below form the same sums bit by bit, at any tiling.
//
// Tiled kernel. A block owns `warps * rows` filters of one group and a tile of 32 * pixels outputs
// of one image (arithmetic in csr_conv2d_plan.h); it walks the input channels in chunks:
//   - all threads stage the chunk's input tile with its halo in shared memory, as float;
//   - each warp walks the stored entries of its own filters: 32 entries are read coalesced, each
//     lane turns its column into an offset by a table in shared memory (the same for each chunk:
//     columns count from the chunk's first), the warp's entries go through shared memory as
//     {value, offset}, and all lanes apply them to their `pixels` outputs in registers.
// Entries are fetched one batch ahead, so that their latency hides behind staging and arithmetic.
// A chunk in which the block's filters store nothing (pruned input channels) is not staged.
//
// Direct kernel. One warp owns 128 outputs of one filter and reads the input from global memory.
// It takes what the tiled one cannot: a halo beyond shared memory (very large filters, dilations,
// strides) and groups with so few filters (depthwise) that nothing staged would be shared.
//
// Bound (derived): every multiply-add reads one shared-memory word, and an SM delivers 32 of those
// per clock against 128 multiply-adds, so the tiled kernel ends at a quarter of the float peak;
// lanes read neighbouring words, and pitch and phases (see the plan) keep them off each other's
// banks except in tiles four columns wide and some strided ones, which the plan counts double.
// GPU timings have not been taken: block shapes, the 48 KB budget and the two-blocks-per-SM rule
// are reasoned, not measured.
//
// Papers: Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning", ICLR 2017
// (direct sparse convolution, offsets instead of im2col); Chen, "Escoin", arXiv:1802.10280 (on
// GPU).
#include "cuda/csr_conv2d_plan.h"
#include "cuda/entry.h"
#include "cuda/launch.cuh"

namespace sparsecnn::cuda {
namespace {

struct alignas(8) Entry {
  float value;
  int32_t offset;  // bytes from a pixel's first staged input
};

constexpr int32_t kNoColumn = 2147483647;

// Copies one chunk of channels into the tile, zeros where the filter hangs over the edge. `x` is
// the chunk's first channel, (row0, col0) the input position of staged element (0, 0).
template <typename T>
__device__ __forceinline__ void stage_tile(const T* __restrict__ x, float* tile, const TilePlan& t,
                                           int channels, int64_t row0, int64_t col0) {
  const int lanes = 1 << t.stage_lanes_log2;
  const int lane = threadIdx.x & (lanes - 1);
  const int first = threadIdx.x >> t.stage_lanes_log2;
  const int step = blockDim.x >> t.stage_lanes_log2;
  if (t.channels_last) {  // lanes along the channels
    const int area = t.staged_h * t.staged_w;
    for (int i = first; i < area; i += step) {
      const int row = i / t.staged_w, col = i - row * t.staged_w;
      const int64_t in_row = row0 + static_cast<int64_t>(row) * t.row_step;
      const int64_t in_col = col0 + static_cast<int64_t>(col) * t.col_step;
      const bool inside = in_row >= 0 && in_row < t.h && in_col >= 0 && in_col < t.w;
      const int64_t at = in_row * t.x_h + in_col * t.x_w;
      const int slot = row * t.pitch + col % t.phases * t.phase_w + col / t.phases;
#pragma unroll 2
      for (int c = lane; c < channels; c += lanes)
        tile[c * t.channel_pitch + slot] = inside ? to_float(x[at + c]) : 0.f;
    }
    return;
  }
  for (int i = first; i < channels * t.staged_h; i += step) {  // lanes along the columns
    const int c = i / t.staged_h, row = i - c * t.staged_h;
    const int64_t in_row = row0 + static_cast<int64_t>(row) * t.row_step;
    const bool row_inside = in_row >= 0 && in_row < t.h;
    const int64_t at = c * t.x_c + in_row * t.x_h;
    float* line = tile + c * t.channel_pitch + row * t.pitch;
#pragma unroll 2
    for (int col = lane; col < t.staged_w; col += lanes) {
      const int64_t in_col = col0 + static_cast<int64_t>(col) * t.col_step;
      const bool inside = row_inside && in_col >= 0 && in_col < t.w;
      const int slot = t.phases == 1 ? col : col % t.phases * t.phase_w + col / t.phases;
      line[slot] = inside ? to_float(x[at + in_col * t.x_w]) : 0.f;
    }
  }
}

// Blocks on an SM hide each other's staging. As many are asked for as the compiler can give without
// spilling: 128, 80 and 64 registers for 8 x 4, 4 x 2 and 2 x 1 sums per lane.
constexpr int blocks_per_sm(int sums) { return sums > 8 ? 2 : (sums > 2 ? 3 : 4); }

template <typename T, int kPixels, int kRows, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, blocks_per_sm(kPixels* kRows))
    csr_conv2d_tiled(const CsrConv2dParams prm, const TilePlan t) {
  constexpr int kFilters = kRows * kWarps;
  DYN_SMEM(float, smem);
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  Entry* entries = reinterpret_cast<Entry*>(smem) + warp * kWarpLanes;
  float* tile = smem + kWarps * kWarpLanes * (sizeof(Entry) / sizeof(float));
  int32_t* table = reinterpret_cast<int32_t*>(tile + t.tile_floats);
  const T* values = static_cast<const T*>(prm.values);

  for (int i = threadIdx.x; i < t.chunk * t.taps; i += kWarps * 32) {
    const int c = i / t.taps, tap = i - c * t.taps;
    const int r = tap / t.filter_w, shift = (tap - r * t.filter_w) * t.dil_w;
    const int floats =
        c * t.channel_pitch + r * t.dil_row + shift % t.phases * t.phase_w + shift / t.phases;
    table[i] = floats * static_cast<int>(sizeof(float));
  }

  // Outputs of this lane inside the tile, and where their inputs start in the staged tile: in
  // bytes, like the entries' offsets, so that an address is one addition in the inner loop.
  const int lane_col = lane & ((1 << t.lanes_q_log2) - 1);
  const int lane_row = (lane >> t.lanes_q_log2) * (kPixels / t.segments);
  int start[kPixels];
#pragma unroll
  for (int i = 0; i < kPixels; ++i)
    start[i] =
        static_cast<int>(sizeof(float)) *
        ((lane_row + i / t.segments) * t.row_stride * t.pitch + i % t.segments * 32 + lane_col);

  for (int64_t work = blockIdx.x; work < t.work; work += gridDim.x) {
    // Filter blocks run fastest: blocks in flight together share their input in L2.
    int64_t rest = work;
    const int64_t filter0 = rest % t.filter_blocks * kFilters;
    rest /= t.filter_blocks;
    const int64_t q0 = rest % t.tiles_q * t.tile_q;
    rest /= t.tiles_q;
    const int64_t p0 = rest % t.tiles_p * t.tile_p;
    rest /= t.tiles_p;
    const int64_t group = rest % t.groups, n = rest / t.groups;

    // Entry cursor + lane of each row, fetched ahead; kNoColumn past the end of the row.
    int32_t cursor[kRows], end[kRows], column[kRows];
    float value[kRows], sum[kRows][kPixels];
    const auto fetch = [&](int32_t at, int32_t stop, int32_t* to_column, float* to_value) {
      *to_column = at < stop ? prm.col_idx[at] : kNoColumn;
      *to_value = at < stop ? to_float(values[at]) : 0.f;
    };
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      const int64_t filter = filter0 + j * kWarps + warp, k = group * t.filters + filter;
      cursor[j] = filter < t.filters ? prm.row_ptr[k] : 0;
      end[j] = filter < t.filters ? prm.row_ptr[k + 1] : 0;
      fetch(cursor[j] + lane, end[j], &column[j], &value[j]);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) sum[j][i] = 0.f;
    }

    const T* image = static_cast<const T*>(prm.x) + n * t.x_n + group * t.channels * t.x_c;
    for (int32_t c0 = 0; c0 < t.channels; c0 += t.chunk) {
      const int channels = t.channels - c0 < t.chunk ? t.channels - c0 : t.chunk;
      const int32_t column0 = c0 * t.taps, column1 = column0 + channels * t.taps;
      bool stored = false;
#pragma unroll
      for (int j = 0; j < kRows; ++j) stored |= column[j] < column1;
      // Also the barrier between the last reads of the tile and its next contents.
      if (!__syncthreads_or(stored)) continue;
      stage_tile(image + c0 * t.x_c, tile, t, channels, p0 * t.stride_h - t.pad_top,
                 q0 * t.stride_w - t.pad_left);
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
          for (int e = 0; e < count; ++e) {
            const Entry entry = entries[e];
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
              const char* from = reinterpret_cast<const char*>(tile) + (start[i] + entry.offset);
              sum[j][i] = fmaf(entry.value, *reinterpret_cast<const float*>(from), sum[j][i]);
            }
          }
          __syncwarp();  // all lanes have read before the next batch overwrites
        } while (count == kWarpLanes);
      }
    }

    // Outputs leave through the tile, 32 pixels of all filters at a time (33 words per filter: no
    // bank conflict either way). Channels last needs that to write filters side by side; for NCHW
    // it costs little and keeps the addresses of a lane's outputs out of the registers.
    for (int i = 0; i < kPixels; ++i) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        float mine = 0.f;
#pragma unroll
        for (int pixel = 0; pixel < kPixels; ++pixel) mine = pixel == i ? sum[j][pixel] : mine;
        tile[(j * kWarps + warp) * 33 + lane] = mine;
      }
      __syncthreads();
#pragma unroll 1
      for (int o = threadIdx.x; o < kFilters * 32; o += kWarps * 32) {
        const int f = t.channels_last ? o % kFilters : o / 32;
        const int of = t.channels_last ? o / kFilters : o % 32;  // the lane that holds the pixel
        const int64_t p = p0 + (of >> t.lanes_q_log2) * (kPixels / t.segments) + i / t.segments;
        const int64_t q = q0 + i % t.segments * 32 + (of & ((1 << t.lanes_q_log2) - 1));
        const int64_t filter = filter0 + f, k = group * t.filters + filter;
        if (p < t.p && q < t.q && filter < t.filters)
          store_output<T>(prm, tile[f * 33 + of], k, n * t.y_n + k * t.y_k + p * t.y_p + q * t.y_q);
      }
    }
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

template <typename T, int kPixels, int kRows, int kWarps>
cudaError_t launch_tiled(const CsrConv2dParams& params, const TilePlan& plan, cudaStream_t stream) {
  if (plan.smem_bytes > kDefaultSmemBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(csr_conv2d_tiled<T, kPixels, kRows, kWarps>,
                             cudaFuncAttributeMaxDynamicSharedMemorySize, plan.smem_bytes);
    if (error != cudaSuccess) return error;
  }
  CUDA_LAUNCH((csr_conv2d_tiled<T, kPixels, kRows, kWarps>), grid_size(plan.work), kWarps * 32,
              plan.smem_bytes, stream, params, plan);
  return cudaGetLastError();
}

// Block shapes, most reuse of a staged tile first: 32 filters x 256 pixels, 16 x 128, and 8 x 64
// for maps too small to occupy the GPU otherwise (a 7x7 map is a single tile at any shape).
constexpr BlockShape kLarge{8, 4, 8}, kMedium{4, 2, 8}, kSmall{2, 1, 8};
constexpr int64_t kFewFilters = 8;  // per group: below, a staged tile has too few readers

template <typename T>
cudaError_t launch(const CsrConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  DeviceLimits limits{};
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  if (s.filters_per_group() < kFewFilters || s.columns() == 0)
    return launch_direct<T>(params, stream);
  // The default budget keeps two to four blocks on an SM; more only where one channel needs it.
  for (const int64_t budget : {kDefaultSmemBytes, static_cast<int64_t>(limits.smem_optin_bytes)}) {
    const int64_t enough = 2 * static_cast<int64_t>(limits.sm_count);
    TilePlan plan;
    if (s.filters_per_group() > kMedium.filters() && plan_tiles(params, kLarge, budget, &plan) &&
        plan.work >= enough)
      return launch_tiled<T, kLarge.pixels, kLarge.rows, kLarge.warps>(params, plan, stream);
    if (s.filters_per_group() > kSmall.filters() && plan_tiles(params, kMedium, budget, &plan) &&
        plan.work >= enough)
      return launch_tiled<T, kMedium.pixels, kMedium.rows, kMedium.warps>(params, plan, stream);
    if (plan_tiles(params, kSmall, budget, &plan))
      return launch_tiled<T, kSmall.pixels, kSmall.rows, kSmall.warps>(params, plan, stream);
  }
  return launch_direct<T>(params, stream);
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
