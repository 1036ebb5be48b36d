// winograd_conv2d with a sparse weight: CSR over the rows (block of 8 filters, tap, filter).
//
//   y = act(A^T [ sum over the stored (k,tap,c) of U . (B^T d[c] B)[tap] ] A + bias + residual)
//
// Formula, tiles and layouts: winograd_conv2d.cu, winograd_tiles.cuh. Arithmetic is float.
//
// A block owns kRows * kWarps filters of one group and 32 * kPer tiles. It walks the channels in
// chunks, whose transformed tiles lie in shared memory; a warp owns kRows filters that are
// neighbours in a block of the format, its lanes kPer tiles each. Tap by tap it takes the chunk's
// entries of its rows: 32 / kRows lanes fetch the entries of a row (coalesced, a tap ahead), leave
// them in shared memory as {value, offset}, and all lanes apply them to their tiles.
//
// The sums of a tap would take 16 (36) registers of a filter and tile. But the inverse transform is
// linear: its first pass takes what a chunk gave for tap (i, j) to the M sums z[.][j] at once, M
// multiply-adds a row of a chunk, and 8 (24) registers remain.
//
//   m = 2: 4 filters x 2 tiles a lane, 16 warps, 64 sums
//   m = 4: 2 filters x 1 tile a lane, 16 warps, 48 sums
//   few tiles: a filter and a tile a lane, 8 warps, two blocks to an SM
//
// Wide blocks have an SM for themselves: what a row of a chunk costs beside its entries (to fetch
// them, to find where they end, the first pass of the inverse transform: some 25 instructions) is
// shared by the more of them the longer the chunk, 32 channels in 160 to 190 KB.
//
// Bound (derived): with many entries shared memory. A stored value costs a warp one broadcast and
// kPer words a lane, of which an SM delivers 32 a clock: 2 / 3 (m = 2) and 1 / 2 multiply-adds of a
// lane a clock, a sixth and an eighth of the float peak. With few entries the instructions: of 32
// channels and 64 (32) tiles a row takes 25 + 4 (3) a stored value, where the dense kernel takes 70
// (38): at 90 % zeros 1.9 and 1.1 times fewer, at 95 % 2.2 and 1.3. GPU timings have not been
// taken.
//
// Papers: Liu et al., "Efficient Sparse-Winograd Convolutional Neural Networks", ICLR 2018; Park et
// al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning", ICLR 2017.
#include "cuda/winograd_tiles.cuh"

namespace sparsecnn::cuda {
namespace {

struct alignas(8) Entry {
  float value;
  int32_t offset;  // bytes from tile 0 of the chunk's first channel
};

// What is left of a row.
struct alignas(8) Span {
  int32_t at, end;
};

// Column i of A^T: the powers of its point. By arithmetic, since a table in local or constant
// memory would cost more.
template <int M>
__device__ __forceinline__ void output_column(int i, float (&at)[M]) {
  const float near = M == 2 ? 1.f : kWinogradNear, far = kWinogradFar;
  const float size = i == 1 || i == 2 ? near : (M == 4 && (i == 3 || i == 4) ? far : 0.f);
  const float point = i % 2 ? size : -size;
  at[0] = i < M + 1 ? 1.f : 0.f;
  at[1] = point;
  if constexpr (M == 4) at[2] = point * point, at[3] = point * point * point;
  // Infinity: the highest power alone, which the input transform of m = 2 takes negative.
  if (i == M + 1) at[M - 1] = M == 2 ? -1.f : 1.f;
}

template <int M, int kRows, int kPer, int kWarps>
struct SparseBlock {
  static constexpr int kA = M + 2, kTaps = kA * kA;
  static constexpr int kFilters = kRows * kWarps, kTiles = kWarpLanes * kPer;
  static constexpr int kThreads = kWarps * kWarpLanes, kSpan = kWarpLanes / kRows;
  static constexpr int kPlaceBytes = kTiles * static_cast<int>(sizeof(TilePlace));
  static constexpr int kEntryBytes = kThreads * static_cast<int>(sizeof(Entry));
  static constexpr int kSpanBytes = kFilters * kTaps * static_cast<int>(sizeof(Span));
  static constexpr int kFixedBytes = kPlaceBytes + kEntryBytes + kSpanBytes;
  static constexpr int kChannelBytes = kTaps * kTilePitch<kTiles> * 4;
  // Channels last: a row of the outputs of all filters, [column][filter][tile].
  static constexpr int kOutPitch = kTiles + 1;
  static constexpr int kOutBytes = M * kFilters * kOutPitch * 4;
  static_assert(kWinogradBlock % kRows == 0 && kFilters % kWinogradBlock == 0);

  static constexpr int64_t bytes(int chunk_log2) {
    const int64_t input = int64_t{kChannelBytes} << chunk_log2;
    return kFixedBytes + (input > kOutBytes ? input : kOutBytes);
  }
};

template <typename T, int M, int kRows, int kPer, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpLanes, kWarps > 8 ? 1 : 2)
    winograd_conv2d_sparse(const WinogradConv2dParams prm, const WinogradPlan plan) {
  using B = SparseBlock<M, kRows, kPer, kWarps>;
  constexpr int kA = B::kA;
  constexpr unsigned kRowLanes = B::kSpan == 32 ? kFullWarp : (1u << (B::kSpan & 31)) - 1;
  DYN_SMEM(float, smem);
  TilePlace* places = reinterpret_cast<TilePlace*>(smem);
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  const int row = lane / B::kSpan, sub = lane % B::kSpan;  // what the lane fetches
  Entry* entries = reinterpret_cast<Entry*>(smem + B::kPlaceBytes / 4) + warp * kWarpLanes;
  Span* spans = reinterpret_cast<Span*>(smem + (B::kPlaceBytes + B::kEntryBytes) / 4);
  Span* own_spans = spans + warp * kRows + row;  // [tap][filter]
  float* input = smem + B::kFixedBytes / 4;
  const T* values = static_cast<const T*>(prm.values);
  const int tap_pitch = kTilePitch<B::kTiles> << plan.chunk_log2;

  for (int64_t work = blockIdx.x; work < plan.work; work += gridDim.x) {
    const WinogradItem item = winograd_item(plan, prm.shape.groups, work, B::kTiles);
    const T* x = static_cast<const T*>(prm.x) + item.group * plan.channels * plan.x.c;
    const int slab0 = item.slab * (B::kFilters / kWinogradBlock);
    const int block0 = item.group * plan.blocks + slab0, blocks = plan.blocks - slab0;
    __syncthreads();  // the item before is done with shared memory
    place_tiles<M, B::kTiles>(prm.shape, plan, item.tile, places);
    for (int i = threadIdx.x; i < B::kFilters * B::kTaps; i += B::kThreads) {
      const int f = i % B::kFilters, block = f / kWinogradBlock;
      const int at = ((block0 + block) * B::kTaps + i / B::kFilters) * kWinogradBlock;
      const int32_t* ends = prm.row_ptr + at + f % kWinogradBlock;
      spans[i] = block < blocks ? Span{ends[0], ends[1]} : Span{0, 0};
    }
    __syncthreads();

    float z[kRows][M][kA][kPer];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int a = 0; a < M * kA * kPer; ++a) z[r][a / (kA * kPer)][a / kPer % kA][a % kPer] = 0.f;

    Span span = own_spans[0];
    int32_t column;
    float value;
    const auto fetch = [&] {
      const int32_t at = span.at + sub;
      column = at < span.end ? prm.col_idx[at] : kNoColumn;
      value = at < span.end ? to_float(values[at]) : 0.f;
    };
    fetch();
    for (int c0 = 0; c0 < plan.channels; c0 += 1 << plan.chunk_log2) {
      stage_tiles<T, M, B::kTiles, B::kThreads>(x, plan, places, c0, plan.chunk_log2, input);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kA; ++j) {
#pragma unroll 1
        for (int i = 0; i < kA; ++i) {
          const int tap = i * kA + j;
          float m[kRows][kPer];
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int p = 0; p < kPer; ++p) m[r][p] = 0.f;
          const char* from = reinterpret_cast<const char*>(input + tap * tap_pitch + lane * kPer);
          bool more;
          do {
            // Columns ascend, so the chunk's entries of a row are its first lanes. As unsigned,
            // what is no column of the chunk is large.
            const uint32_t c = static_cast<uint32_t>(column - c0);
            const bool mine = c < 1u << plan.chunk_log2;
            const unsigned stored = __ballot_sync(kFullWarp, mine);
            if (mine) entries[lane] = {value, static_cast<int32_t>(c) * kTilePitch<B::kTiles> * 4};
            __syncwarp();
            span.at += __popc(stored >> (row * B::kSpan) & kRowLanes);
            more = false;
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              more |= (stored >> (r * B::kSpan) & kRowLanes) == kRowLanes;
            if (!more) {
              // The next row is fetched while this one is multiplied.
              if (sub == 0) own_spans[tap * B::kFilters] = span;
              const int next = i + 1 < kA ? tap + kA : (j + 1) % kA;
              __syncwarp();
              span = own_spans[next * B::kFilters];
            }
            fetch();
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              const int count = __popc(stored >> (r * B::kSpan) & kRowLanes);
#pragma unroll 4
              for (int e = 0; e < count; ++e) {
                const Entry entry = entries[r * B::kSpan + e];
                const auto v = *reinterpret_cast<const Packed<float, kPer>*>(from + entry.offset);
#pragma unroll
                for (int p = 0; p < kPer; ++p) m[r][p] = fmaf(entry.value, v.v[p], m[r][p]);
              }
            }
            __syncwarp();  // all lanes have read before the next entries overwrite
          } while (more);
          float at[M];
          output_column<M>(i, at);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int a = 0; a < M; ++a)
#pragma unroll
              for (int p = 0; p < kPer; ++p) z[r][a][j][p] = fmaf(at[a], m[r][p], z[r][a][j][p]);
        }
      }
      __syncthreads();  // before the next chunk, or the outputs, overwrite this one
    }

#pragma unroll
    for (int a = 0; a < M; ++a) {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int p = 0; p < kPer; ++p) {
          const int f = warp * kRows + r, tile = lane * kPer + p;
          const int filter = item.slab * B::kFilters + f;
          float m[kA], y[M];
#pragma unroll
          for (int j = 0; j < kA; ++j) m[j] = z[r][a][j][p];
          winograd_output<M>(m, y);
          if (plan.nhwc) {
#pragma unroll
            for (int b = 0; b < M; ++b) input[(b * B::kFilters + f) * B::kOutPitch + tile] = y[b];
          } else if (filter < plan.filters) {
            const int k = item.group * plan.filters + filter;
            store_row<T, M>(prm, plan, places[tile], k, a, bias_of<T>(prm, k), y);
          }
        }
      if (!plan.nhwc) continue;
      // Through shared memory, so that neighbouring lanes write neighbouring filters.
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < B::kFilters * B::kTiles; i += B::kThreads) {
        const int f = i % B::kFilters, tile = i / B::kFilters;
        const int filter = item.slab * B::kFilters + f;
        if (filter >= plan.filters) continue;
        const int k = item.group * plan.filters + filter;
        float y[M];
#pragma unroll
        for (int b = 0; b < M; ++b) y[b] = input[(b * B::kFilters + f) * B::kOutPitch + tile];
        store_row<T, M>(prm, plan, places[tile], k, a, bias_of<T>(prm, k), y);
      }
      __syncthreads();
    }
  }
}

template <typename T, int M, int kRows, int kPer, int kWarps>
cudaError_t launch_sparse(const WinogradConv2dParams& params, const DeviceLimits& limits,
                          cudaStream_t stream) {
  using B = SparseBlock<M, kRows, kPer, kWarps>;
  // Two blocks to an SM of 228 KB, where registers allow two.
  const int64_t most = kWarps > 8 ? 227 * 1024 : 113 * 1024;
  const int64_t limit = limits.smem_optin_bytes < most ? limits.smem_optin_bytes : most;
  WinogradPlan plan = winograd_plan<T>(params, B::kFilters, B::kTiles);
  while (plan.chunk_log2 < 5 && plan.channels > 1 << plan.chunk_log2 &&
         B::bytes(plan.chunk_log2 + 1) <= limit)
    ++plan.chunk_log2;
  const int64_t bytes = B::bytes(plan.chunk_log2);
  const cudaError_t error = allow_smem(winograd_conv2d_sparse<T, M, kRows, kPer, kWarps>, bytes);
  if (error != cudaSuccess) return error;
  CUDA_LAUNCH((winograd_conv2d_sparse<T, M, kRows, kPer, kWarps>), grid_size(plan.work),
              B::kThreads, static_cast<size_t>(bytes), stream, params, plan);
  return cudaGetLastError();
}

// The choice of winograd_conv2d.cu's launch_width.
template <typename T>
cudaError_t launch(const WinogradConv2dParams& params, cudaStream_t stream) {
  DeviceLimits limits{};
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  const int tiles = params.tile == 2 ? 64 : 32, filters = params.tile == 2 ? 64 : 32;
  const bool wide = params.shape.filters_per_group() > 8 &&
                    winograd_plan<T>(params, filters, tiles).work >= limits.sm_count;
  if (params.tile == 2) {
    return wide ? launch_sparse<T, 2, 4, 2, 16>(params, limits, stream)
                : launch_sparse<T, 2, 1, 1, 8>(params, limits, stream);
  }
  return wide ? launch_sparse<T, 4, 2, 1, 16>(params, limits, stream)
              : launch_sparse<T, 4, 1, 1, 8>(params, limits, stream);
}

}  // namespace

cudaError_t winograd_sparse(const WinogradConv2dParams& params, cudaStream_t stream) {
  return with_storage(params.dtype, [&](auto storage) {
    return launch<typename decltype(storage)::type>(params, stream);
  });
}

}  // namespace sparsecnn::cuda
