// The cost model behind the choice of lanes, block, channel block and filters of a block.
//
// Cycles per unit are estimates from timings of the kernel's parts on one core of a Zen 4 server
// CPU (AVX-512, 32 KB L1, 1 MB L2), not a fit; the plans they chose were within the noise of the
// best of a sweep on five layers. They only rank alternatives.
#include "cpu/tile_plan.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "cpu/csr_plan.h"

namespace sparsecnn::cpu {
namespace {

// The row loop, from 60 timings of blocks of 4 to 28 vectors at 5 to 20 % density.
constexpr double kFmaCycles = 1.07;     // FMA with an operand in L1
constexpr double kReuseCycles = 1.0;    // FMA with an operand that several filters share
constexpr double kEntryCycles = 1.3;    // value and offset of one nonzero
constexpr double kChainCycles = 4.0;    // latency of an FMA: a nonzero cannot cost less
constexpr double kVisitCycles = 7.0;    // start and end of a filter's visit to a panel
constexpr double kPartialCycles = 1.3;  // load and store of one vector of partial sums
constexpr double kWideCycles = 0.08;    // added to it per vector of a block beyond 14
constexpr double kL2Penalty = 0.6;      // added to an FMA whose operand comes from L2
constexpr double kL1Bytes = 36 << 10;   // panel from which on operands do
constexpr int64_t kTlbPages = 64, kPageBytes = 4096;
constexpr double kTlbCycles = 7.0;     // from the second-level TLB
constexpr double kStoredCycles = 5.0;  // added per nonzero of a weight not streamed
constexpr double kListCycles = 20.0;   // and per visit, to find its bounds
// The two sides of a panel.
constexpr double kTransposeCycles = 8.0;       // per vector packed through an L x L transpose
constexpr double kScatterCycles = 8.0;         // per vector unpacked through a transpose
constexpr double kCopyCycles = 3.5;            // per vector packed or unpacked as it is
constexpr double kRowCycles = 4.0;             // per row of a copy: a new page and stream
constexpr double kTouchCycles = 1.0;           // per packed vector and block, from L2 to L1
constexpr int64_t kScratchBudget = 640 << 10;  // bytes of panel and partial sums
constexpr int64_t kLeastFilters = 16;          // of a chunk
// Scratch may take what is left of 1.2 times input and output after the output itself.
constexpr double kScratchShare = 1.2;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Vectors that go through transposes for rows of n pixels: the last may be half as many.
int64_t transposed(int64_t n, int64_t lanes) {
  const int64_t rest = n % lanes;
  return n - rest + (rest == 0 ? 0 : rest <= lanes / 2 ? lanes / 2 : lanes);
}

ConvShape collapse_pointwise(const ConvShape& s, Layout layout, bool* pointwise) {
  *pointwise = s.r == 1 && s.s == 1 && s.stride_h == 1 && s.stride_w == 1 && s.pad_top == 0 &&
               s.pad_left == 0 && s.p == s.h && s.q == s.w;
  if (!*pointwise) return s;
  ConvShape c = s;
  c.w = c.q = s.h * s.w;
  c.h = c.p = 1;
  if (layout == Layout::kNHWC) {
    c.w = c.q = s.n * s.h * s.w;
    c.n = 1;
  }
  return c;
}

// Everything that depends on lanes, block and super-block; returns the estimated cycles of the
// call.
double evaluate(TilePlan& plan, const ConvParams& params, const TileWork& work,
                const TileMachine& machine, int64_t element_bytes, int32_t threads) {
  const ConvShape& s = plan.shape;
  const int64_t lanes = plan.lanes, vectors = int64_t{plan.ny} * plan.nx;
  plan.tile_h = ceil_div(s.p, plan.ly);
  plan.tile_w = ceil_div(s.q, plan.lx);
  plan.image_groups = ceil_div(s.n, plan.ln);
  plan.blocks_y = ceil_div(plan.tile_h, int64_t{plan.ny} * plan.super_y);
  plan.blocks_x = ceil_div(plan.tile_w, int64_t{plan.nx} * plan.super_x);
  const int32_t out_rows = plan.ny * plan.super_y, out_cols = plan.nx * plan.super_x;
  plan.rows = pack_axis(s.r, s.dil_h, s.stride_h, out_rows, nullptr, nullptr);
  plan.cols = pack_axis(s.s, s.dil_w, s.stride_w, out_cols, nullptr, nullptr);
  plan.span = static_cast<int32_t>((s.s - 1) * s.dil_w + (out_cols - 1) * s.stride_w + 1);
  const double block_vecs =  // packed vectors that one block touches
      static_cast<double>(pack_axis(s.r, s.dil_h, s.stride_h, plan.ny, nullptr, nullptr)) *
      pack_axis(s.s, s.dil_w, s.stride_w, plan.nx, nullptr, nullptr);

  // An image without channels has one panel, of nothing.
  const int64_t cg = std::max<int64_t>(1, plan.channels), kg = s.filters_per_group();
  const double per_group = 1.0 / static_cast<double>(s.groups);
  const double items =
      static_cast<double>(plan.image_groups * plan.blocks_y * plan.blocks_x * s.groups);
  // Blocks that do work: a super-block at the border may be cut short.
  const double blocks = static_cast<double>(plan.image_groups * ceil_div(plan.tile_h, plan.ny) *
                                            ceil_div(plan.tile_w, plan.nx) * s.groups);

  const double vecs = static_cast<double>(plan.rows) * plan.cols;
  double pack;  // cycles per channel and item
  if (plan.in_place) {
    pack = 0;  // what it costs to bring the image to L1 is in kTouchCycles
  } else if (params.layout == Layout::kNHWC) {
    pack = vecs * kTransposeCycles;
  } else if (plan.interleaved) {
    pack = vecs * kCopyCycles + kRowCycles;
  } else {
    pack = static_cast<double>(plan.rows * transposed(plan.span, lanes)) * kTransposeCycles;
  }
  double unpack;  // cycles per filter and block
  if (params.layout == Layout::kNHWC) {
    unpack = static_cast<double>(vectors) * kScatterCycles;
  } else if (plan.interleaved) {
    unpack = static_cast<double>(vectors);  // stored from the row loop
  } else {
    unpack = static_cast<double>(plan.ny * transposed(plan.nx, lanes)) * kScatterCycles;
  }

  double best = -1;
  // Planes of an image read in place may compete for the same sets of L1: with a pitch of, say, 16
  // lines a channel takes as much of the cache as 16 lines.
  double lines = 0;
  if (plan.in_place) {
    const int64_t pitch = std::max<int64_t>(1, s.w * element_bytes / kCacheLine);
    lines = static_cast<double>(std::gcd(pitch, kL1Sets) * kCacheLine);
  }
  const double channel_bytes =
      std::max(block_vecs * static_cast<double>(lanes * element_bytes), lines);
  const int64_t in_l1 =
      std::max<int64_t>(1, static_cast<int64_t>(machine.panel_bytes / channel_bytes));
  TilePlan chosen = plan;
  const auto try_channels = [&](int64_t want) {
    const int64_t panels = ceil_div(cg, want);
    const int64_t block = ceil_div(cg, panels);
    const int64_t super_bytes = panel_bytes(plan, block, element_bytes);
    // Filters per chunk: the scratch of one thread stays in its budget, and all have work.
    const int64_t filter_size = filter_bytes(plan, panels, element_bytes);
    const int64_t left = plan.scratch_budget - super_bytes;
    const bool fits = left >= std::min(kg, kLeastFilters) * filter_size;
    if (!fits && (block > 1 || out_rows > plan.ny || out_cols > plan.nx)) return;
    int64_t chunks = std::clamp<int64_t>(ceil_div(kg * filter_size, std::max<int64_t>(left, 1)), 1,
                                         std::max<int64_t>(kg, 1));
    const int64_t max_chunks = std::max<int64_t>(chunks, ceil_div(kg, lanes));
    const auto imbalance = [&](int64_t c) {
      const double n = items * static_cast<double>(c);
      return static_cast<double>(ceil_div(static_cast<int64_t>(n), threads)) * threads / n;
    };
    while (chunks < max_chunks && imbalance(chunks) > 1.12) ++chunks;

    const double panel = static_cast<double>(block) * channel_bytes;
    const double miss = std::max(0.0, 1.0 - kL1Bytes / panel);
    const double filters = work.columns > 0 ? work.stored / work.columns : 1;  // of a column
    const double fma = filters > 1 ? kReuseCycles : kFmaCycles;
    // Channels of an image read in place lie a page or more apart: past the first-level TLB, each
    // column pays for its translation.
    const bool scattered = plan.in_place && block > kTlbPages && s.w * element_bytes >= kPageBytes;
    const double entry =
        std::max(static_cast<double>(vectors) * (filters * fma + kL2Penalty * miss) + kEntryCycles,
                 kChainCycles) +
        (plan.streamed ? 0 : kStoredCycles) + (scattered ? kTlbCycles : 0);
    const double sums = static_cast<double>(kg * panels);
    const double visits = work.blocks * per_group * static_cast<double>(panels);
    const double partial =
        kPartialCycles + kWideCycles * static_cast<double>(std::max<int64_t>(0, vectors - 14));
    // NCHW layers store the last panel's sums from the row loop.
    const double summed = params.layout == Layout::kNHWC ? sums : sums - static_cast<double>(kg);
    const double touch = block_vecs * static_cast<double>(cg) * kTouchCycles;  // L2 to L1
    const double cycles =
        items * static_cast<double>(cg) * pack * static_cast<double>(chunks) +
        (plan.streamed ? 0 : static_cast<double>(s.groups) * visits * kListCycles) +
        blocks * (visits * kVisitCycles + summed * static_cast<double>(vectors) * partial +
                  work.columns * per_group * entry + touch * static_cast<double>(chunks) +
                  static_cast<double>(kg) * unpack);
    const double total = cycles * imbalance(chunks);
    if (best < 0 || total < best) {
      best = total;
      chosen.channel_block = block;
      chosen.channel_blocks = panels;
      chosen.filter_chunks = chunks;
    }
  };
  for (const double grow : {0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 16.0}) {
    const auto want = static_cast<int64_t>(static_cast<double>(in_l1) * grow);
    try_channels(std::clamp<int64_t>(want, 1, cg));
    if (want >= cg) break;
  }
  plan = chosen;
  return best;
}

struct Key {
  ConvShape shape;
  TileWork work[kMaxFilterBlock];
  int64_t channels;
  int32_t dtype, layout, lanes, max_vectors, registers, threads, aligned, streamed;
  bool operator==(const Key& o) const { return std::memcmp(this, &o, sizeof(Key)) == 0; }
};
struct KeyHash {
  size_t operator()(const Key& k) const {
    uint64_t h = 1469598103934665603ull;  // FNV-1a over the words
    unsigned char bytes[sizeof(Key)];
    std::memcpy(bytes, &k, sizeof(Key));
    for (unsigned char b : bytes) h = (h ^ b) * 1099511628211ull;
    return static_cast<size_t>(h);
  }
};

TilePlan search(const ConvParams& params, const TileWork* options, int32_t count, int64_t channels,
                bool streamed, const TileMachine& machine, int32_t threads) {
  bool pointwise = false;
  TilePlan base{};
  base.shape = collapse_pointwise(params.shape, params.layout, &pointwise);
  base.lanes = machine.lanes;
  base.channels = channels;
  const int64_t element = params.dtype == DType::kFloat64 ? 8 : 4;
  const ConvShape& s = params.shape;
  base.streamed = streamed;
  const int64_t stored = params.dtype == DType::kBFloat16 ? 2 : element;
  const double in = static_cast<double>(s.n * s.c * s.h * s.w * stored);
  const double out = static_cast<double>(s.n * s.k * s.p * s.q * stored);
  base.scratch_budget = std::clamp<int64_t>(
      static_cast<int64_t>((kScratchShare * (in + out) - out) / threads), 32 << 10, kScratchBudget);
  TilePlan best = base;
  double best_cycles = -1;
  const auto consider_option = [&](TilePlan plan, const TileWork& work) {
    plan.filter_block = work.filter_block;
    const int64_t tile_h = ceil_div(plan.shape.p, plan.ly),
                  tile_w = ceil_div(plan.shape.q, plan.lx);
    for (int32_t ny = 1; ny <= kMaxNy; ++ny) {
      if (ny > 1 && ny > tile_h) break;
      for (int32_t nx = 1; nx <= kMaxNx; ++nx) {
        const int32_t most =
            plan.streamed || work.filter_block > 1
                ? max_block_vectors(work.filter_block, machine.max_vectors, machine.registers)
                : kStoredVectors;
        if (!block_is_legal(ny, nx, most)) continue;
        if (nx > 1 && nx > round_up(tile_w, 2)) continue;
        for (const int32_t super : {1, 2, 3, 4, 7, 8}) {
          plan.ny = ny;
          plan.nx = nx;
          plan.super_y = plan.super_x = 1;
          // Rows share their halo; pixels of a pointwise layer share pages and prefetch streams.
          (plan.interleaved ? plan.super_x : plan.super_y) = super;
          if (plan.in_place && (super > 1 || tile_w % nx != 0)) break;
          if (super > 1 &&
              ceil_div(plan.interleaved ? tile_w : tile_h, plan.interleaved ? nx : ny) < super) {
            break;
          }
          const double c = evaluate(plan, params, work, machine, element, threads);
          if (c >= 0 && (best_cycles < 0 || c < best_cycles)) {
            best_cycles = c;
            best = plan;
          }
        }
      }
    }
  };
  const auto consider = [&](const TilePlan& plan) {
    for (int32_t i = 0; i < count; ++i) consider_option(plan, options[i]);
  };
  for (int32_t ln = 1; ln <= machine.lanes; ln *= 2) {
    for (int32_t ly = 1; ln * ly <= machine.lanes; ly *= 2) {
      TilePlan plan = base;
      plan.ln = ln;
      plan.ly = ly;
      plan.lx = machine.lanes / (ln * ly);
      consider(plan);
    }
  }
  if (pointwise) {
    TilePlan plan = base;
    plan.ln = plan.ly = 1;
    plan.lx = machine.lanes;
    plan.interleaved = true;
    consider(plan);
    // A stream's offsets are 32-bit bytes, which a panel of a huge image in place could exceed.
    const int64_t group_bytes = plan.shape.channels_per_group() * plan.shape.w * element;
    plan.in_place = params.layout == Layout::kNCHW && params.dtype != DType::kBFloat16 &&
                    plan.shape.w % machine.lanes == 0 && is_aligned(params) &&
                    group_bytes <= INT32_MAX;
    if (plan.in_place) consider(plan);
  }
  return best;
}

}  // namespace

int64_t panel_bytes(const TilePlan& plan, int64_t channels, int64_t element_bytes) {
  if (plan.in_place) return 0;
  const int64_t vector_bytes = plan.lanes * element_bytes;
  int64_t pitch = int64_t{plan.rows} * plan.cols;
  if (plan.super_y * plan.super_x > 1) {
    pitch += (kPitchPads - 1) * std::max<int64_t>(1, kCacheLine / vector_bytes);
  }
  return channels * pitch * vector_bytes;
}

int64_t filter_bytes(const TilePlan& plan, int64_t panels, int64_t element_bytes) {
  const int64_t vectors = int64_t{plan.ny} * plan.nx * plan.super_y * plan.super_x;
  return (vectors * plan.lanes + 1) * element_bytes + (plan.streamed ? 0 : 4 * (panels + 1));
}

// Tap t of output i reads position i*stride + t*dil. Positions are ordered by phase (position mod
// stride), then ascending, so that for every tap the n positions of n outputs are neighbours: the
// stride is absorbed here and the kernel always steps by one vector. Gaps of a large dilation are
// left out.
int32_t pack_axis(int64_t taps, int64_t dil, int64_t stride, int64_t n, int32_t* source,
                  int32_t* tap_index) {
  int32_t count = 0;
  for (int64_t first = 0; first < taps; ++first) {
    const int64_t phase = first * dil % stride;
    bool seen = false;
    for (int64_t t = 0; t < first && !seen; ++t) seen = t * dil % stride == phase;
    if (seen) continue;
    int64_t segment_start = 0, segment_base = 0, end = -1;
    for (int64_t t = first; t < taps; ++t) {
      if (t * dil % stride != phase) continue;
      const int64_t start = t * dil / stride;
      if (start > end) {
        segment_start = start;
        segment_base = count;
        end = start;
      }
      if (tap_index) tap_index[t] = static_cast<int32_t>(segment_base + start - segment_start);
      for (; end < start + n; ++end, ++count) {
        if (source) source[count] = static_cast<int32_t>(end * stride + phase);
      }
    }
  }
  return count;
}

TilePlan tile_plan(const ConvParams& params, const TileWork* options, int32_t count,
                   int64_t channels, bool streamed, const TileMachine& machine, int32_t threads) {
  static std::mutex mutex;
  static std::unordered_map<Key, TilePlan, KeyHash> cache;
  Key key;
  std::memset(&key, 0, sizeof key);  // padding takes part in the comparison
  key.shape = params.shape;
  for (int32_t i = 0; i < count; ++i) {
    key.work[i].filter_block = options[i].filter_block;
    key.work[i].blocks = options[i].blocks;
    key.work[i].columns = options[i].columns;
    key.work[i].stored = options[i].stored;
  }
  key.channels = channels;
  key.dtype = static_cast<int32_t>(params.dtype);
  key.layout = static_cast<int32_t>(params.layout);
  key.lanes = machine.lanes;
  key.max_vectors = machine.max_vectors;
  key.registers = machine.registers;
  key.threads = threads;
  key.aligned = is_aligned(params);
  key.streamed = streamed;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto it = cache.find(key);
    if (it != cache.end()) return it->second;
  }
  const TilePlan plan = search(params, options, count, channels, streamed, machine, threads);
  std::lock_guard<std::mutex> lock(mutex);
  if (cache.size() >= 1024) cache.clear();  // bounded: a service may see endless input sizes
  cache.emplace(key, plan);
  return plan;
}

}  // namespace sparsecnn::cpu
