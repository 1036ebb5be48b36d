// pattern_conv2d: convolution with a weight in filter groups that share their columns.
//
//   y[n,k,p,q] = act(bias[k] + residual[n,k,p,q]
//                    + sum over the columns (c,r,s) of k's group of W * x[n, c,
//                    p*stride+r*dil-pad])
//
// Data layout: x, residual and y are NCHW or channels last; the weight is that of core/params.h, a
// dense block of columns x filters for each filter group. Storage is float, half or bfloat16; sums
// are float, in ascending column order, one fused multiply-add per value: the two kernels of this
// file form the same sums bit by bit, at any tiling and any cut into filter groups.
//
// Tiled kernel. A block owns a tile of 32 * kPixels outputs of one image and kWarps * kSlots slots
// of up to kRows filters of one filter group (pattern_conv2d_plan.h). It walks the input channels
// in chunks, one ahead in shared memory by asynchronous copies where storage is float:
//   - all threads stage the input tile of the chunk with its halo, as float, lanes along the pixels
//     or, channels last, along the channels: whole sectors, whichever columns are kept;
//   - each warp walks the columns of its slots: 32 columns and kRows values of each are fetched
//     coalesced, one batch ahead, turned into offsets in the tile by a table, and pass through
//     shared memory; a lane multiplies the inputs of its kPixels outputs by the kRows values.
// A loaded input serves kRows filters, a value kPixels * 32 outputs. Filter groups of one filter
// have kRows = 1 and four slots a warp; of several filters 4 or, where the map is large, 8.
//
// Direct kernel. One warp owns 128 outputs of one filter and reads the input from global memory:
// for halos beyond shared memory and for convolution groups of few filters (depthwise).
//
// Half types with filter groups of several filters go to the tensor cores,
// pattern_conv2d_mma.cu.
//
// Bound (derived): a column takes 1 + kPixels + kRows/4 words of shared memory a lane for
// kPixels * kRows multiply-adds; an SM delivers 32 words per clock against 128 multiply-adds. 8 x 8
// needs 11 of 16 clocks and ends at the float peak, 4 x 4 at two thirds, single filters (4 x 1) at
// a sixth. GPU timings have not been taken: block shapes and their choice are reasoned.
//
// Papers: Mao et al., "Exploring the Granularity of Sparsity in Convolutional Neural Networks",
// CVPR workshops 2017 (vectors); Park et al., "Faster CNNs with Direct Sparse Convolutions and
// Guided Pruning", ICLR 2017 (offsets instead of a lowered input).
#include "cuda/direct_filter.cuh"
#include "cuda/entry.h"
#include "cuda/mma.cuh"
#include "cuda/pattern_conv2d_blocks.cuh"

namespace sparsecnn::cuda {
namespace {

// Copies one chunk of channels into a tile of [channel][place], zeros in the padding. `x` is the
// chunk's first channel of the image.
template <typename T, int kThreads>
__device__ __forceinline__ void stage_chunk(const T* __restrict__ x, const StagedPixel* pixels,
                                            float* tile, const PatternPlan& t, int channels) {
  const auto stage = [&](const StagedPixel& pixel, int c) {
    float* to = tile + c * t.channel_pitch + pixel.place;
    const T* from = x + (pixel.at < 0 ? 0 : pixel.at + c * t.x_c);
    if constexpr (sizeof(T) == sizeof(float))
      copy_async<4>(to, from, pixel.at >= 0);
    else
      *to = pixel.at >= 0 ? to_float(*from) : 0.f;
  };
  if (t.channels_last) {  // lanes along the channels, as many as there are, then along the pixels
    int lanes = kWarpLanes;
    while (lanes >= 2 * channels) lanes /= 2;
    for (int i = threadIdx.x / lanes; i < t.area; i += kThreads / lanes) {
      const StagedPixel pixel = pixels[i];
      for (int c = threadIdx.x % lanes; c < channels; c += lanes) stage(pixel, c);
    }
    return;
  }
  for (int i = threadIdx.x; i < t.area; i += kThreads) {
    const StagedPixel pixel = pixels[i];
#pragma unroll 4
    for (int c = 0; c < channels; ++c) stage(pixel, c);
  }
}

// Shared memory: slots, filters of the rows, scan, places of the outputs, the warps' batches of
// columns; by the plan the offsets of columns, staged pixels and two tiles.
template <int kPixels, int kRows, int kSlots, int kWarps>
struct TiledShape {
  static constexpr int slots = kSlots * kWarps, rows = slots * kRows, threads = 32 * kWarps;
  static constexpr int pixels = 32 * kPixels;
  static constexpr int out_at = slots * static_cast<int>(sizeof(FilterSlot));
  static constexpr int scan_at = out_at + (4 * rows + 15) / 16 * 16;
  static constexpr int outputs_at = scan_at + 16 * kWarps;
  static constexpr int batch_at = outputs_at + 8 * pixels;
  static constexpr int batch_floats = 32 * kRows + 32;
  static constexpr int table_at = batch_at + 4 * kWarps * batch_floats;
};

// Registers for as many blocks as the sums allow: 128 of a thread for 8 x 8, 80 for 4 and 16, 64
// for a single one.
constexpr int blocks_per_sm(int sums, int threads) {
  return (sums > 16 ? 512 : (sums > 1 ? 768 : 1024)) / threads;
}

template <typename T, int kPixels, int kRows, int kSlots, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, blocks_per_sm(kPixels * kRows * kSlots, kWarps * 32))
    pattern_conv2d_tiled(const PatternConv2dParams prm, const PatternPlan t) {
  using Shape = TiledShape<kPixels, kRows, kSlots, kWarps>;
  constexpr int kThreads = Shape::threads, kColumns = 32 / kRows;  // columns of 32 values
  DYN_SMEM(char, smem);
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  FilterSlot* slots = reinterpret_cast<FilterSlot*>(smem);
  int32_t* out = reinterpret_cast<int32_t*>(smem + Shape::out_at);
  int64_t* scan = reinterpret_cast<int64_t*>(smem + Shape::scan_at);
  int64_t* outputs = reinterpret_cast<int64_t*>(smem + Shape::outputs_at);
  float* batch = reinterpret_cast<float*>(smem + Shape::batch_at) + warp * Shape::batch_floats;
  int32_t* offsets = reinterpret_cast<int32_t*>(batch + 32 * kRows);
  int32_t* table = reinterpret_cast<int32_t*>(smem + t.table_at);
  StagedPixel* pixels = reinterpret_cast<StagedPixel*>(smem + t.pixels_at);
  float* tiles = reinterpret_cast<float*>(smem + t.tile_at);
  const T* values = static_cast<const T*>(prm.values);

  // Offsets of a chunk's columns in bytes, the same for each chunk.
  for (int i = threadIdx.x; i < t.chunk * t.taps; i += kThreads) {
    const int c = i / t.taps;
    table[i] =
        static_cast<int>(sizeof(float)) * (c * t.channel_pitch + tap_places(t, i - c * t.taps));
  }
  // First input of this lane's first output in the tile, and from there to that of its next: equal
  // steps, as a tile is at most 32 outputs wide or one row.
  const int start = static_cast<int>(sizeof(float)) * place_of(t, lane);
  const int stride = static_cast<int>(sizeof(float)) * place_of(t, 32 + lane) - start;

  for (int64_t work = blockIdx.x; work < t.work; work += gridDim.x) {
    const PatternItem item = pattern_item(t, work, kPixels * 32);
    const int64_t row_begin = item.group * t.filters;
    find_slots<kThreads, Shape::slots, kRows>(prm, row_begin, row_begin + t.filters,
                                              item.slab * Shape::slots, slots, out, scan);
    if (slots[0].rows == 0) continue;  // fewer slots than the host had to expect
    locate_pixels<kThreads, Shape::pixels>(t, item, pixels, outputs);

    // Of each slot the next column of this lane, and of 32 / kRows columns each the value of row
    // lane % kRows; kNoColumn behind the last.
    int32_t cursor[kSlots]{}, column[kSlots];
    float value[kSlots][kRows], sum[kSlots][kRows][kPixels];
    const auto fetch = [&](int j) {
      const FilterSlot& slot = slots[warp * kSlots + j];
      const int32_t at = cursor[j] + lane;
      column[j] = at < slot.column_end ? prm.columns[at] : kNoColumn;
      const int32_t first = cursor[j] + lane / kRows;
      const T* from = values + slot.values + lane % kRows +
                      static_cast<int64_t>(first - slot.column) * slot.group_rows;
#pragma unroll
      for (int v = 0; v < kRows; ++v) {
        const bool stored = first + v * kColumns < slot.column_end && lane % kRows < slot.rows;
        value[j][v] = stored ? to_float(*from) : 0.f;
        from += kColumns * slot.group_rows;
      }
    };
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      cursor[j] = slots[warp * kSlots + j].column;
      fetch(j);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < kPixels; ++i) sum[j][r][i] = 0.f;
    }

    const T* image = static_cast<const T*>(prm.x) + item.n * t.x_n;
    image += item.group * t.channels * t.x_c;
    const auto stage = [&](int32_t c0) {
      const int channels = t.channels - c0 < t.chunk ? t.channels - c0 : t.chunk;
      stage_chunk<T, kThreads>(image + c0 * t.x_c, pixels,
                               tiles + (c0 / t.chunk % 2) * (t.tile_bytes / 4), t, channels);
      copy_async_commit();
    };
    __syncthreads();  // the pixels are located
    stage(0);
    for (int32_t c0 = 0; c0 < t.channels; c0 += t.chunk) {
      copy_async_wait<0>();
      __syncthreads();  // this chunk is there, and all have used the one before
      if (t.chunk < t.channels - c0) stage(c0 + t.chunk);
      const char* tile =
          reinterpret_cast<const char*>(tiles + (c0 / t.chunk % 2) * (t.tile_bytes / 4));
      const int32_t column0 = c0 * t.taps;
      const int32_t column1 = (t.channels - c0 < t.chunk ? t.channels : c0 + t.chunk) * t.taps;
#pragma unroll
      for (int j = 0; j < kSlots; ++j) {
        int count;
        do {
          // Columns ascend, so the chunk's are the first `count` lanes'.
          const bool mine = column[j] < column1;
          count = __popc(__ballot_sync(kFullWarp, mine));
          if (mine) offsets[lane] = table[column[j] - column0];
#pragma unroll
          for (int v = 0; v < kRows; ++v) batch[v * 32 + lane] = value[j][v];
          __syncwarp();
          cursor[j] += count;
          if (count > 0) fetch(j);
#pragma unroll(kPixels* kRows > 32 ? 2 : 4)
          for (int e = 0; e < count; ++e) {
            const char* from = tile + offsets[e] + start;
            float w[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) w[r] = batch[e * kRows + r];
#pragma unroll
            for (int i = 0; i < kPixels; ++i) {
              const float in = *reinterpret_cast<const float*>(from + i * stride);
#pragma unroll
              for (int r = 0; r < kRows; ++r) sum[j][r][i] = fmaf(w[r], in, sum[j][r][i]);
            }
          }
          __syncwarp();  // all lanes have read before the next batch overwrites
        } while (count == kWarpLanes);
      }
    }

    // Outputs leave through the tile, 32 pixels of all rows at a time (33 words a row: no bank
    // conflict either way).
    for (int i = 0; i < kPixels; ++i) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kSlots; ++j)
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float mine = 0.f;
#pragma unroll
          for (int pixel = 0; pixel < kPixels; ++pixel) mine = pixel == i ? sum[j][r][pixel] : mine;
          tiles[((warp * kSlots + j) * kRows + r) * 33 + lane] = mine;
        }
      __syncthreads();
      store_sums<T, kThreads, Shape::rows, 32>(prm, t, tiles, 33, out,
                                               [&](int pixel) { return outputs[i * 32 + pixel]; });
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kDirectWarps * 32)
    pattern_conv2d_direct(const PatternConv2dParams prm, const TensorStrides xs,
                          const TensorStrides ys, int64_t work) {
  DYN_SMEM(char, smem);
  using Shape = TiledShape<1, 1, 1, kDirectWarps>;
  FilterSlot* slots = reinterpret_cast<FilterSlot*>(smem);
  int32_t* out = reinterpret_cast<int32_t*>(smem + Shape::out_at);
  int64_t* scan = reinterpret_cast<int64_t*>(smem + Shape::scan_at);
  const ConvShape& s = prm.shape;
  const int warp = threadIdx.x / kWarpLanes;
  const int64_t spans = direct_spans(s);
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    int64_t span, slab;
    const int64_t n = divide(divide(item, spans, &span), ceil_div(s.k, kDirectWarps), &slab);
    find_slots<Shape::threads, kDirectWarps, 1>(prm, 0, s.k, slab * kDirectWarps, slots, out, scan);
    const FilterSlot& slot = slots[warp];
    if (slot.rows == 0) continue;
    const T* values = static_cast<const T*>(prm.values) + slot.values;
    const auto read = [&](int32_t at, int32_t* column, float* value) {
      *column = prm.columns[at];
      *value = to_float(values[static_cast<int64_t>(at - slot.column) * slot.group_rows]);
    };
    direct_filter<T>(prm, xs, ys, n, out[warp], span, slot.column, slot.column_end, read);
  }
}

template <typename T>
cudaError_t launch_direct(const PatternConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  const int64_t work = s.n * direct_spans(s) * ceil_div(s.k, kDirectWarps);
  CUDA_LAUNCH((pattern_conv2d_direct<T>), grid_size(work), kDirectWarps * 32,
              (TiledShape<1, 1, 1, kDirectWarps>::outputs_at), stream, params,
              strides_of(params.layout, s.c, s.h, s.w), strides_of(params.layout, s.k, s.p, s.q),
              work);
  return cudaGetLastError();
}

// Plans and launches one block shape, if it fits into `budget` bytes of shared memory and makes at
// least `enough` blocks; says whether it did.
template <typename T, int kPixels, int kRows, int kSlots, int kWarps>
bool launch_tiled(const PatternConv2dParams& params, int64_t budget, int64_t enough,
                  cudaStream_t stream, cudaError_t* error) {
  using Shape = TiledShape<kPixels, kRows, kSlots, kWarps>;
  constexpr PatternBlock kBlock{kPixels * 32, Shape::slots, kRows, 32};
  const auto fit = [&](PatternPlan* t) {
    // Odd, so that lanes along the channels (channels last) meet no bank conflict either.
    t->channel_pitch = t->places | 1;
    if (t->tile_q_log2 > 5 && 1 << t->tile_q_log2 != kBlock.pixels) return false;
    const int64_t fixed = Shape::table_at + 16 + int64_t{16} * t->area;
    const int64_t channel = 2 * 4 * t->channel_pitch + 4 * int64_t{t->taps};
    if (fixed + channel > budget) return false;
    int64_t most = (budget - fixed) / channel;
    if (most > t->channels) most = t->channels;
    t->chunk = static_cast<int32_t>(ceil_div(t->channels, ceil_div(t->channels, most)));
    const int64_t table = (4 * int64_t{t->chunk} * t->taps + 15) / 16 * 16;
    int64_t tiles = 2 * 4 * int64_t{t->chunk} * t->channel_pitch;
    if (tiles < Shape::rows * 33 * 4) tiles = Shape::rows * 33 * 4;  // the outputs' way out
    t->table_at = Shape::table_at;
    t->pixels_at = static_cast<int32_t>(t->table_at + table);
    t->tile_at = t->pixels_at + 16 * t->area;
    t->tile_bytes = 4 * t->chunk * t->channel_pitch;
    t->smem_bytes = static_cast<int32_t>(t->tile_at + tiles);
    return t->smem_bytes <= budget;
  };
  PatternPlan plan;
  if (!plan_pattern(params, kBlock, &plan, fit) || plan.work < enough) return false;
  *error = allow_smem(pattern_conv2d_tiled<T, kPixels, kRows, kSlots, kWarps>, plan.smem_bytes);
  if (*error != cudaSuccess) return true;
  CUDA_LAUNCH((pattern_conv2d_tiled<T, kPixels, kRows, kSlots, kWarps>), grid_size(plan.work),
              kWarps * 32, plan.smem_bytes, stream, params, plan);
  *error = cudaGetLastError();
  return true;
}

constexpr int64_t kFewFilters = 4;  // per convolution group: a staged tile has too few readers

template <typename T>
cudaError_t launch(const PatternConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  DeviceLimits limits{};
  cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  if (s.filters_per_group() < kFewFilters || s.columns() == 0)
    return launch_direct<T>(params, stream);
  // From 6 filters on that share a column the tensor cores win, of whose 8 the others idle.
  if (sizeof(T) == 2 && s.k >= 6 * params.filter_groups &&
      pattern_conv2d_on_tensor_cores(params, limits, stream, &error))
    return error;
  // A larger block needs less shared memory bandwidth (see above); it has to fill the GPU, or as
  // much of it as that makes up for.
  const int64_t all = limits.sm_count, half = ceil_div(all, 2);
  const bool shared = s.k >= 2 * params.filter_groups;  // columns, by two filters on average
  // The default budget keeps two to four blocks on an SM; more only where one channel needs it.
  for (const int64_t budget : {kDefaultSmemBytes, static_cast<int64_t>(limits.smem_optin_bytes)}) {
    if (!shared) {
      if (launch_tiled<T, 4, 1, 4, 8>(params, budget, half, stream, &error)) return error;
      if (launch_tiled<T, 1, 1, 1, 8>(params, budget, 0, stream, &error)) return error;
      continue;
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      if (s.k >= 6 * params.filter_groups &&
          launch_tiled<T, 8, 8, 1, 8>(params, budget, all, stream, &error))
        return error;
    }
    if (launch_tiled<T, 4, 4, 1, 8>(params, budget, half, stream, &error)) return error;
    if (launch_tiled<T, 1, 4, 1, 4>(params, budget, 0, stream, &error)) return error;
  }
  return launch_direct<T>(params, stream);
}

}  // namespace

int32_t pattern_conv2d(const PatternConv2dParams& params, void* stream) {
  const ConvShape& s = params.shape;
  if (s.n * s.k * s.p * s.q == 0) return cudaSuccess;
  if (s.groups < 1 || params.filter_groups < 1 || params.filter_groups > s.k ||
      s.k > kNoColumn - 1 || s.columns() > kNoColumn - 1)
    return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  return with_storage(params.dtype, [&](auto storage) {
    return launch<typename decltype(storage)::type>(params, on);
  });
}

}  // namespace sparsecnn::cuda
