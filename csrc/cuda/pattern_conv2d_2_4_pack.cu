// The weight of a 2:4 pattern_conv2d as operand A of sparse tensor cores, for
// pattern_conv2d_2_4.cu: from the arrays of the pattern format to the layout of
// pattern_2_4_plan.h, in which quads of four channels keep two values and their places.
//
// A block owns a filter: it spreads the kept weights over shared memory, (taps, channels), then
// every thread closes quads of channels. Where fewer than two are kept, a stored zero fills up, so
// that an infinity or NaN of x can reach an output whose filter does not read it, as in the dense
// convolution. A filter that breaks the pattern, with three nonzeros in a quad, gets NaN there, and
// all of its outputs are NaN with it: NaN times anything is NaN. Nothing else depends on the weight
// being 2:4. A filter of more than some 24000 columns is packed in passes over its channels.
//
// Bound (derived): 6 bytes read for each kept weight, 2.25 written. 3x3 with C = K = 512: 10 MB,
// 2.3 us at 4.3 TB/s, and as much for one more launch.
#include "cuda/pattern_2_4_plan.h"

namespace sparsecnn::cuda::two_four {
namespace {

constexpr int kPackThreads = 128;
constexpr int kPackWarps = kPackThreads / kWarpLanes;

// The stored pair of a quad of channels and its places, two bits each, ascending.
struct Pair {
  uint32_t values, places;
};

// `quad` holds four half floats, the first channel in the lowest bits.
__device__ __forceinline__ Pair close_quad(uint64_t quad) {
  // Places of the kept ones by their set; a lone one is joined by its neighbour. Sets of three and
  // four keep sound places.
  constexpr uint64_t kPlaces = 0x444E4DCE498E4944ull;
  uint32_t set = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) set |= ((quad >> (16 * i) & 0x7fff) ? 1u : 0u) << i;
  const uint32_t places = static_cast<uint32_t>(kPlaces >> (4 * set)) & 15;
  if (__popc(set) > 2) return {0x7fff7fffu, places};  // NaN of either type
  const uint32_t low = static_cast<uint32_t>(quad >> (16 * (places & 3))) & 0xffff;
  const uint32_t high = static_cast<uint32_t>(quad >> (16 * (places >> 2))) & 0xffff;
  return {low | high << 16, places};
}

// Where the weights of packed row `row` are.
struct Row {
  int64_t first;       // value of its first column,
  int64_t stride;      // from one column to the next: the filters of its group
  int32_t begin, end;  // its columns
};

// All threads of the block take part: the values of a group follow those of all groups before it.
__device__ __forceinline__ Row find_row(const PatternConv2dParams& prm, int64_t row,
                                        int64_t* scratch) {
  int64_t before = 0, groups = 0;
  for (int64_t g = threadIdx.x; g < prm.filter_groups; g += kPackThreads) {
    const int32_t end = prm.group_rows[g + 1];
    if (end > row) break;
    before += static_cast<int64_t>(end - prm.group_rows[g]) *
              (prm.group_columns[g + 1] - prm.group_columns[g]);
    ++groups;
  }
  for (int lanes = kWarpLanes / 2; lanes > 0; lanes /= 2) {
    before += __shfl_xor_sync(kFullWarp, before, lanes);
    groups += __shfl_xor_sync(kFullWarp, groups, lanes);
  }
  if (threadIdx.x % kWarpLanes == 0) {
    scratch[threadIdx.x / kWarpLanes] = before;
    scratch[kPackWarps + threadIdx.x / kWarpLanes] = groups;
  }
  __syncthreads();
  before = groups = 0;
  for (int warp = 0; warp < kPackWarps; ++warp) {
    before += scratch[warp];
    groups += scratch[kPackWarps + warp];
  }
  const int32_t top = prm.group_rows[groups];
  return {before + row - top, prm.group_rows[groups + 1] - top, prm.group_columns[groups],
          prm.group_columns[groups + 1]};
}

__global__ void __launch_bounds__(kPackThreads)
    pattern_conv2d_2_4_pack(const PatternConv2dParams prm, const Plan plan,
                            unsigned char* __restrict__ packed) {
  DYN_SMEM(uint16_t, shared);
  int64_t* const scratch = reinterpret_cast<int64_t*>(shared);
  uint16_t* const dense = shared + 2 * kPackWarps * 4;  // (taps, channels of a pass)
  const uint16_t* values = static_cast<const uint16_t*>(prm.values);
  const int tid = static_cast<int>(threadIdx.x);
  const int channels = plan.pass_chunks * kChunk;
  for (int64_t row = blockIdx.x; row < plan.filter_blocks * kBlockFilters; row += gridDim.x) {
    // Rows behind the last filter are packed as empty ones.
    int64_t filter = row;
    Row weights{0, 0, 0, 0};
    if (row < prm.shape.k) {
      weights = find_row(prm, row, scratch);
      filter = prm.filters[row];
    }
    const int64_t block = filter / kBlockFilters;
    const int tile = static_cast<int>(filter) / 16 % 4, upper = static_cast<int>(filter) / 8 % 2;
    const int first_lane = static_cast<int>(filter) % 8 * 4;
    for (int chunk0 = 0; chunk0 < plan.chunks; chunk0 += plan.pass_chunks) {
      const int left = plan.chunks - chunk0;
      const int chunks = left < plan.pass_chunks ? left : plan.pass_chunks;
      for (int i = tid; i < plan.taps * channels / 8; i += kPackThreads)
        reinterpret_cast<Words*>(dense)[i] = Words{};
      __syncthreads();
      for (int32_t i = weights.begin + tid; i < weights.end; i += kPackThreads) {
        const uint32_t column = static_cast<uint32_t>(prm.columns[i]);
        const uint32_t c = column / static_cast<uint32_t>(plan.taps);
        const uint32_t inside = c - static_cast<uint32_t>(chunk0 * kChunk);
        if (inside < static_cast<uint32_t>(chunks * kChunk))
          dense[(column - c * static_cast<uint32_t>(plan.taps)) * channels + inside] =
              values[weights.first + (i - weights.begin) * weights.stride];
      }
      __syncthreads();
      // A thread closes the four quads of 16 channels: half a slice, half a word of places.
      for (int i = tid; i < chunks * plan.taps * 4; i += kPackThreads) {
        const int half = i % 2, slice = i / 2 % 2, step = i / 4;
        const int chunk = step / plan.taps, tap = step - chunk * plan.taps;
        unsigned char* const to =
            packed + (block * plan.steps + chunk0 * plan.taps + step) * kBlockBytes;
        const uint64_t* quads = reinterpret_cast<const uint64_t*>(
            dense + tap * channels + chunk * kChunk + slice * kSlice + half * 16);
        uint32_t* const registers = reinterpret_cast<uint32_t*>(to) +
                                    ((tile * 2 + slice) * kWarpLanes + first_lane) * 4 + upper +
                                    2 * half;
        uint32_t places = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Pair pair = close_quad(quads[j]);
          registers[4 * j] = pair.values;
          places |= pair.places << (4 * j);
        }
        reinterpret_cast<uint16_t*>(
            to + kValueBytes)[((first_lane + 2 * slice + half) * 4 + tile) * 2 + upper] =
            static_cast<uint16_t>(places);
      }
      __syncthreads();
    }
  }
}

}  // namespace

cudaError_t pack(const PatternConv2dParams& prm, const Plan& plan, unsigned char* packed,
                 cudaStream_t stream) {
  const int smem = plan.taps * plan.pass_chunks * kChunk * 2 + 2 * kPackWarps * 8;
  CUDA_LAUNCH(pattern_conv2d_2_4_pack, grid_size(plan.filter_blocks * kBlockFilters), kPackThreads,
              smem, stream, prm, plan, packed);
  return cudaGetLastError();
}

}  // namespace sparsecnn::cuda::two_four
