// pattern_conv2d for half types with filter groups of several filters: tensor cores.
//
// The formula and the weight are those of pattern_conv2d.cu. A filter group is a product of a
// (pixels x kept columns) matrix, gathered, with its dense (kept columns x filters) block.
//
// A block owns 16 * kM * kSpan outputs of one image and kTeams teams of kOctets octets: an octet is
// up to 8 filters of one filter group, a column of the 16 x 8 x 16 product. A warp owns 16 * kM of
// the outputs and all octets of its team in registers; kSplit warps share the same outputs and take
// every kSplit-th product, summed at the end. Octets of one filter group are a piece; a team works
// piece by piece, so that groups of any sizes fill its registers.
//
// The input channels are walked in chunks. All threads stage the chunk's input tile with its halo,
// [place][channel], whole sectors whichever columns are kept: 16-byte asynchronous copies where the
// layout allows. For each chunk and piece a team then
//   - scatters the piece's columns of the chunk into an inverse map [tap][channel], a step ahead,
//   - lists them: first the octets of channels of a tap that are all kept (in the weight's order
//     their columns are R * S apart), then the others, dealt to the four lanes that load at once by
//     the channel pair within its octet, which is the bank they read: see list_columns; and
//   - copies the columns' values in the order of the list, kRound at a time and one batch ahead.
// An octet of channels is an operand row of 16 bytes for ldmatrix, straight from the tile; other
// columns are loaded element by element and packed. Neither meets a bank conflict but for columns
// dealt to a foreign lane. Every loaded input serves all filters of the piece, at most 64, and a
// column that is not kept is never read as an operand: infinities stay where they are.
//
// Bound (derived): 64 outputs x 64 filters x 16 columns of a warp are 32 products of 8 * 16 * 16
// multiply-adds, 128 clocks of one of the four tensor cores of an SM at the peak rate. Their
// operands take 16 clocks of shared memory for the values and 16 for the inputs in whole octets or
// 32 one by one: for four warps 128 or 192 clocks, so that shared memory and tensor cores are
// balanced where whole octets are kept and shared memory binds at two thirds of the peak where none
// is. Of L2 a block reads its input once for all its 64 * kTeams filters. Not timed on a GPU yet.
//
// Papers: Mao et al., CVPR workshops 2017; Chen et al., "Efficient tensor core-based GPU kernels
// for structured sparsity under reduced precision", SC 2021 (vectors on tensor cores).
#include "cuda/pattern_conv2d_lists.cuh"

namespace sparsecnn::cuda {
namespace {

template <int M, int Octets, int Teams, int Span, int Split>
struct MmaShape {
  static constexpr int kM = M, kOctets = Octets, kTeams = Teams, kSpan = Span, kSplit = Split;
  static constexpr int team_threads = 32 * kSpan * kSplit, threads = kTeams * team_threads;
  static constexpr int pixels = 16 * kM * kSpan, slots = kTeams * kOctets, rows = 8 * slots;
  static constexpr int round = kOctets > 2 ? 64 : 128;  // columns whose values lie in one buffer
  static constexpr int value_pitch = 8 * kOctets + 8;   // odd in units of 16 bytes
  static constexpr int value_elements = round * value_pitch;
  // Shared memory: slots, filters of the rows, scan, places of the outputs, cursors, list headers,
  // values; by the plan lists, inverse maps, staged pixels, tiles.
  static constexpr int out_at = slots * static_cast<int>(sizeof(FilterSlot));
  static constexpr int scan_at = out_at + 4 * rows;
  static constexpr int outputs_at = scan_at + 16 * (threads / 32);
  static constexpr int cursor_at = outputs_at + 8 * pixels;
  static constexpr int header_at = cursor_at + 4 * slots;
  static constexpr int values_at = (header_at + 2 * 8 * kTeams + 15) / 16 * 16;
  static constexpr int lists_at = values_at + 2 * 2 * kTeams * value_elements;
  static_assert(kOctets % 2 == 0 && threads % kEight == 0);
};

template <typename T, class Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::kM == 4 ? 2 : 3)
    pattern_conv2d_mma(const PatternConv2dParams prm, const PatternPlan t) {
  constexpr int kM = Shape::kM, kOctets = Shape::kOctets, kThreads = Shape::threads;
  constexpr int kRoundSteps = Shape::round / 16, kAhead = 2;
  DYN_SMEM(char, smem);
  const int lane = threadIdx.x % kWarpLanes, g = lane / 4, quad = lane % 4;
  const int team = threadIdx.x / Shape::team_threads;
  const int team_thread = threadIdx.x % Shape::team_threads, team_warp = team_thread / kWarpLanes;
  const int span = team_warp % Shape::kSpan, split = team_warp / Shape::kSpan;
  FilterSlot* slots = reinterpret_cast<FilterSlot*>(smem);
  int32_t* out = reinterpret_cast<int32_t*>(smem + Shape::out_at);
  int64_t* scan = reinterpret_cast<int64_t*>(smem + Shape::scan_at);
  int64_t* outputs = reinterpret_cast<int64_t*>(smem + Shape::outputs_at);
  int32_t* cursor = reinterpret_cast<int32_t*>(smem + Shape::cursor_at);
  ListHeader* headers = reinterpret_cast<ListHeader*>(smem + Shape::header_at);
  T* value_tiles = reinterpret_cast<T*>(smem + Shape::values_at) + team * Shape::value_elements;
  int32_t* lists = reinterpret_cast<int32_t*>(smem + Shape::lists_at) + team * 2 * t.list;
  int32_t* maps = reinterpret_cast<int32_t*>(smem + t.table_at);
  int32_t* map = maps + team * t.chunk * t.taps;
  StagedPixel* pixels = reinterpret_cast<StagedPixel*>(smem + t.pixels_at);
  const FilterSlot* team_slots = slots + team * kOctets;
  const T* values = static_cast<const T*>(prm.values);
  const int chunks = static_cast<int>(ceil_div(t.channels, t.chunk));
  // In two buffers each: the tile of a chunk, the list of a chunk and piece, the values of a round.
  const auto tile_of = [&](int chunk) {
    return reinterpret_cast<T*>(smem + t.tile_at + (chunk & 1) * t.tile_bytes);
  };
  const auto list_of = [&](int step) { return lists + (step & 1) * Shape::kTeams * 2 * t.list; };
  const auto header_of = [&](int step) { return headers + (step & 1) * Shape::kTeams; };
  const auto values_of = [&](int round) {
    return value_tiles + (round & 1) * Shape::kTeams * Shape::value_elements;
  };

  for (int i = threadIdx.x; i < Shape::kTeams * t.chunk * t.taps; i += kThreads) maps[i] = -1;
  // First input of this lane's operand rows in the tile, bytes: of ldmatrix, and of elements.
  int row_at[kM], element_at[kM][2];
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    const int first = (span * kM + i) * 16;
    row_at[i] = 2 * t.pixel_pitch * place_of(t, first + (lane & 15));
#pragma unroll
    for (int h = 0; h < 2; ++h)
      element_at[i][h] = 2 * t.pixel_pitch * place_of(t, first + g + 8 * h);
  }

  for (int64_t work = blockIdx.x; work < t.work; work += gridDim.x) {
    const PatternItem item = pattern_item(t, work, Shape::pixels);
    const int64_t row_begin = item.group * t.filters;
    find_slots<kThreads, Shape::slots, kEight>(prm, row_begin, row_begin + t.filters,
                                               item.slab * Shape::slots, slots, out, scan);
    if (slots[0].rows == 0) continue;  // fewer octets than the host had to expect
    locate_pixels<kThreads, Shape::pixels>(t, item, pixels, outputs);
    for (int i = threadIdx.x; i < Shape::slots; i += kThreads) cursor[i] = slots[i].column;
    int pieces = 1;  // most of a team
    for (int i = 0, own = 0; i < Shape::slots; ++i) {
      const bool next = i % kOctets == 0 || slots[i].group != slots[i - 1].group;
      own = i % kOctets == 0 ? 1 : own + (next && slots[i].rows > 0);
      pieces = own > pieces ? own : pieces;
    }

    float sum[kM][kOctets][4];
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int o = 0; o < kOctets; ++o)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][o][e] = 0.f;

    const T* image = static_cast<const T*>(prm.x) + item.n * t.x_n;
    image += item.group * t.channels * t.x_c;
    const auto stage = [&](int chunk) {
      const int c0 = chunk * t.chunk, left = t.channels - c0;
      stage_octets<T, kThreads>(image + c0 * t.x_c, pixels, tile_of(chunk), t,
                                left < t.chunk ? left : t.chunk);
    };
    // The first columns of each thread are on their way while the warp multiplies.
    int32_t ahead[kAhead];
    const auto fetch_columns = [&](int step) {
      const Piece piece = piece_of<kOctets>(team_slots, step % pieces);
      const int32_t first = cursor[team * kOctets + piece.begin] + team_thread;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int32_t i = first + j * Shape::team_threads;
        ahead[j] = i < team_slots[piece.begin].column_end ? prm.columns[i] : 0;
      }
    };
    const auto scatter_columns = [&](int step) {
      const Piece piece = piece_of<kOctets>(team_slots, step % pieces);
      if (piece.end == 0) return;
      const FilterSlot& slot = team_slots[piece.begin];
      const int32_t column0 = step / pieces * t.chunk * t.taps;
      int32_t i = cursor[team * kOctets + piece.begin] + team_thread;
      const auto scatter = [&](int32_t column) {  // false behind the chunk's last
        const int32_t c = (column - column0) / t.taps;
        if (c >= t.chunk) return false;
        map[(column - column0 - c * t.taps) * t.chunk + c] = i - slot.column;
        i += Shape::team_threads;
        return true;
      };
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (i >= slot.column_end || !scatter(ahead[j])) return;
      while (i < slot.column_end && scatter(prm.columns[i])) {
      }
    };
    const auto list_step = [&](int step) {  // ends synchronized
      if (team_warp == 0) {
        const Piece piece = piece_of<kOctets>(team_slots, step % pieces);
        ListHeader* header = header_of(step) + team;
        int32_t* source = list_of(step);
        const int found =
            piece.end == 0 ? 0 : list_columns(t, map, source, source + t.list, header);
        if (piece.end == 0) *header = {0, 0};
        if (lane == 0) cursor[team * kOctets + piece.begin] += found;
      }
      __syncthreads();
    };
    // Values of the columns of one round of a list, an octet of filters at a time.
    const auto stage_values = [&](int step, int round, int buffer) {
      const Piece piece = piece_of<kOctets>(team_slots, step % pieces);
      const int octets = piece.end - piece.begin;
      const int columns = (header_of(step) + team)->steps * 16 - round * Shape::round;
      const int count = octets * (columns < Shape::round ? columns : Shape::round);
      const int32_t* source = list_of(step) + round * Shape::round;
      for (int i = team_thread; i < count; i += Shape::team_threads) {
        const int k = i / octets, o = piece.begin + i - k * octets;
        const FilterSlot& slot = team_slots[o];
        const int32_t column = source[k];
        T* to = values_of(buffer) + k * Shape::value_pitch + o * kEight;
        const T* from = values + slot.values + static_cast<int64_t>(column) * slot.group_rows;
        if (t.value_vectors && slot.group_rows % kEight == 0 && slot.values % kEight == 0) {
          copy_async<16>(to, column < 0 ? values : from, column >= 0);
          continue;
        }
        Vector<T> all;
#pragma unroll
        for (int v = 0; v < kEight; ++v)
          all.v[v] = column >= 0 && v < slot.rows ? from[v] : from_float<T>(0.f);
        *reinterpret_cast<Vector<T>*>(to) = all;
      }
    };
    const auto multiply = [&](int step, int round, int buffer) {
      const Piece piece = piece_of<kOctets>(team_slots, step % pieces);
      const ListHeader header = header_of(step)[team];
      const int32_t* offset = list_of(step) + t.list;
      const char* tile = reinterpret_cast<const char*>(tile_of(step / pieces));
      const T* operand = values_of(buffer) + (lane & 15) * Shape::value_pitch + lane / 16 * kEight;
      const int first = round * kRoundSteps;
      const int last = header.steps < first + kRoundSteps ? header.steps : first + kRoundSteps;
#pragma unroll 1
      for (int s = first + split; s < last; s += Shape::kSplit) {
        uint32_t a[kM][4];
        if (2 * s < header.full) {
          const char* from = tile + offset[16 * s + lane / 16 * kEight];
#pragma unroll
          for (int i = 0; i < kM; ++i) {
            ldmatrix_x4(a[i], from + row_at[i]);
            if (2 * s + 1 == header.full) a[i][2] = a[i][3] = 0;  // the second octet is none
          }
        } else {
          Entries4 at = *reinterpret_cast<const Entries4*>(offset + 16 * s + 4 * quad);
          uint32_t mask[2] = {~0u, ~0u};
          bool gap = false;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (at.v[j] >= 0) continue;
            gap = true;
            at.v[j] = 0, mask[j / 2] &= j % 2 == 0 ? 0xffff0000u : 0xffffu;
          }
#pragma unroll
          for (int i = 0; i < kM; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {  // rows g and g+8 of columns 2 quad, then of 8 behind
              const char* from = tile + element_at[i][e % 2];
              const uint32_t low = *reinterpret_cast<const uint16_t*>(from + at.v[e / 2 * 2]);
              const uint32_t high = *reinterpret_cast<const uint16_t*>(from + at.v[e / 2 * 2 + 1]);
              a[i][e] = low | high << 16;
            }
          if (__ballot_sync(kFullWarp, gap)) {
#pragma unroll
            for (int i = 0; i < kM; ++i)
#pragma unroll
              for (int e = 0; e < 4; ++e) a[i][e] &= mask[e / 2];
          }
        }
        const T* own = operand + (s - first) * 16 * Shape::value_pitch;
#pragma unroll
        for (int o = 0; o < kOctets; o += 2) {
          if (o + 1 < piece.begin || o >= piece.end) continue;
          uint32_t b[4];
          ldmatrix_x4_trans(b, own + o * kEight);
          const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
          for (int i = 0; i < kM; ++i) {
            if (o >= piece.begin) mma_16x8x16<T>(sum[i][o], a[i], left);
            if (o + 1 < piece.end) mma_16x8x16<T>(sum[i][o + 1], a[i], right);
          }
        }
      }
    };

    __syncthreads();  // pixels and cursors are there
    const int all_steps = chunks * pieces;
    stage(0);
    fetch_columns(0);
    scatter_columns(0);
    __syncthreads();  // the map is full
    list_step(0);
    stage_values(0, 0, 0);
    copy_async_commit();
    if (all_steps > 1) {
      fetch_columns(1);
      scatter_columns(1);
    }
    int buffer = 0;
    for (int step = 0; step < all_steps; ++step) {
      int rounds = 1;
      for (int i = 0; i < Shape::kTeams; ++i) {
        const int own = (header_of(step)[i].steps + kRoundSteps - 1) / kRoundSteps;
        rounds = own > rounds ? own : rounds;
      }
      for (int round = 0; round < rounds; ++round, ++buffer) {
        const bool ends = round + 1 == rounds;
        copy_async_wait<0>();
        __syncthreads();  // what this round reads is there, what it overwrites has been read
        if (round == 0 && step % pieces == 0 && step / pieces + 1 < chunks)
          stage(step / pieces + 1);
        if (!ends) {
          stage_values(step, round + 1, buffer + 1);
        } else if (step + 1 < all_steps) {
          list_step(step + 1);
          stage_values(step + 1, 0, buffer + 1);
        }
        copy_async_commit();
        // The map is free again once its columns are listed, until the next step's last round.
        const bool next = ends && step + 2 < all_steps;
        if (next) fetch_columns(step + 2);
        multiply(step, round, buffer);
        if (next) scatter_columns(step + 2);
      }
    }

    // Outputs leave through the tiles, 16 pixels a warp at a time; there the warps of a split add
    // up.
    float* sums = reinterpret_cast<float*>(smem + t.tile_at);
    const int pitch = 16 * Shape::kSpan + (t.channels_last ? 1 : 4);  // either spreads the banks
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      for (int part = 0; part < Shape::kSplit; ++part) {
        __syncthreads();
        if (split != part) continue;
#pragma unroll
        for (int o = 0; o < kOctets; ++o)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = (team * kOctets + o) * kEight + 2 * quad + e % 2;
            float* to = sums + row * pitch + span * 16 + g + e / 2 * 8;
            *to = part == 0 ? sum[i][o][e] : *to + sum[i][o][e];
          }
      }
      __syncthreads();
      store_sums<T, kThreads, Shape::rows, 16 * Shape::kSpan>(
          prm, t, sums, pitch, out,
          [&](int pixel) { return outputs[(pixel / 16 * kM + i) * 16 + pixel % 16]; });
    }
  }
}

// Plans and launches one block shape, if it fits into `budget` bytes of shared memory and makes at
// least `enough` blocks; says whether it did.
template <typename T, int kM, int kOctets, int kTeams, int kSpan, int kSplit>
bool launch_mma(const PatternConv2dParams& params, int64_t budget, int64_t enough,
                cudaStream_t stream, cudaError_t* error) {
  using Shape = MmaShape<kM, kOctets, kTeams, kSpan, kSplit>;
  constexpr PatternBlock kBlock{Shape::pixels, Shape::slots, kEight, kEight};
  constexpr int64_t kColumns = 512;  // of a chunk: more would only lengthen the lists
  const auto fit = [&](PatternPlan* t) {
    for (int32_t chunk = 128; chunk >= kEight; chunk /= 2) {
      const int64_t columns = int64_t{chunk} * t->taps;
      if (chunk > kEight && (columns > kColumns || chunk >= 2 * t->channels)) continue;
      if (columns > budget) continue;
      t->chunk = chunk;
      // An odd multiple of 16 bytes: operand rows side by side lie in different banks.
      t->pixel_pitch = chunk == kEight ? kEight : chunk + kEight;
      t->list = static_cast<int32_t>((columns + 15) / 16 * 16 + 32);
      t->table_at = Shape::lists_at + 2 * kTeams * 2 * 4 * t->list;
      t->pixels_at = static_cast<int32_t>(t->table_at + 4 * kTeams * columns);
      t->tile_at = t->pixels_at + 16 * t->area;
      const int64_t tile = 2 * int64_t{t->places} * t->pixel_pitch;
      const int64_t sums = int64_t{4} * Shape::rows * (16 * kSpan + 4);  // the outputs' way out
      const int64_t bytes = t->tile_at + (2 * tile < sums ? sums : 2 * tile);
      if (bytes > budget) continue;
      t->tile_bytes = static_cast<int32_t>(tile), t->smem_bytes = static_cast<int32_t>(bytes);
      return true;
    }
    return false;
  };
  PatternPlan plan;
  if (!plan_pattern(params, kBlock, &plan, fit) || plan.work < enough) return false;
  *error = allow_smem(pattern_conv2d_mma<T, Shape>, plan.smem_bytes);
  if (*error != cudaSuccess) return true;
  plan.input_vectors = plan.channels_last && plan.channels % kEight == 0 && aligned(params.x);
  plan.value_vectors = aligned(params.values);
  CUDA_LAUNCH((pattern_conv2d_mma<T, Shape>), grid_size(plan.work), Shape::threads, plan.smem_bytes,
              stream, params, plan);
  *error = cudaGetLastError();
  return true;
}

template <typename T>
bool launch(const PatternConv2dParams& params, const DeviceLimits& limits, cudaStream_t stream,
            cudaError_t* error) {
  // A larger block reads 1.5 and 3 times less shared memory; it has to fill as much of the GPU.
  const int64_t all = limits.sm_count, some = ceil_div(all, 3);
  // Half of what a block may have, so that an SM has room for two; more only where it must be.
  const int64_t optin = limits.smem_optin_bytes, half = optin / 2 - 1024;
  for (const int64_t budget : {half > kDefaultSmemBytes ? half : kDefaultSmemBytes, optin}) {
    // Outputs x filters of a block: 128 x 128, 256 x 64, 64 x 64, 16 x 16.
    if (params.shape.k / params.shape.groups > 64 &&
        launch_mma<T, 4, 8, 2, 2, 1>(params, budget, all, stream, error))
      return true;
    if (launch_mma<T, 4, 8, 1, 4, 1>(params, budget, all, stream, error)) return true;
    if (launch_mma<T, 2, 8, 1, 2, 2>(params, budget, some, stream, error)) return true;
    if (launch_mma<T, 1, 2, 1, 1, 4>(params, budget, 0, stream, error)) return true;
  }
  return false;
}

}  // namespace

bool pattern_conv2d_on_tensor_cores(const PatternConv2dParams& params, const DeviceLimits& limits,
                                    cudaStream_t stream, cudaError_t* error) {
  if (params.dtype == DType::kFloat16) return launch<__half>(params, limits, stream, error);
  return launch<__nv_bfloat16>(params, limits, stream, error);
}

}  // namespace sparsecnn::cuda
