// The cost model behind csr_conv2d's choice of lanes, block and channel block.
//
// Cycles per unit are estimates from timings of the kernel's parts on one core of a Zen 4 server
// CPU (AVX-512, 32 KB L1, 1 MB L2), not a fit; the plans they chose were within the noise of the
// best of a sweep on five layers. They only rank alternatives.
#include "cpu/csr_plan.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace sparsecnn::cpu {
namespace {

constexpr double kFmaCycles = 1.15;            // FMA with an operand in L1
constexpr double kL2Penalty = 0.9;             // added for an operand in L2
constexpr double kScalarCycles = 0.7;          // weight, column and offset of one nonzero
constexpr double kChainCycles = 4.0;           // latency of an FMA: a nonzero cannot cost less
constexpr double kVisitCycles = 14.0;          // start and end of a visit
constexpr double kPartialCycles = 3.5;         // load and store of one partial-sum vector in L2
constexpr double kTransposeCycles = 6.0;       // per vector packed through an L x L transpose
constexpr double kScatterCycles = 8.0;         // per vector unpacked through a transpose
constexpr double kCopyCycles = 3.0;            // per vector packed or unpacked as it is
constexpr double kRowCycles = 12.0;            // per row of a copy: a new page and stream
constexpr double kTouchCycles = 1.0;           // per packed vector and block, from L2 to L1
constexpr double kListCycles = 20.0;           // finding the bounds of one visit
constexpr double kPanelLimit = 512 << 10;      // bytes of a panel, half of L2
constexpr int64_t kScratchBudget = 640 << 10;  // bytes of panel, partial sums and bounds
constexpr int64_t kCacheLine = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Input positions along one axis that the taps of n consecutive outputs touch, each once.
//
// Tap t of output i reads position i*stride + t*dil. Positions are ordered by phase (position mod
// stride), then ascending, so that for every tap the n positions of n outputs are neighbours: the
// stride is absorbed here and the kernel always steps by one vector. Gaps of a large dilation are
// left out. Writes positions and, per tap, the index of its first position; both may be null.
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
double evaluate(CsrPlan& plan, const CsrConv2dParams& params, double nnz, const CsrMachine& machine,
                int64_t element_bytes, int32_t threads) {
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

  const int64_t cg = s.channels_per_group(), kg = s.filters_per_group();
  const double nnz_g = nnz / static_cast<double>(s.groups);
  const double items =
      static_cast<double>(plan.image_groups * plan.blocks_y * plan.blocks_x * s.groups);
  // Blocks that do work: a super-block at the border may be cut short.
  const double blocks = static_cast<double>(plan.image_groups * ceil_div(plan.tile_h, plan.ny) *
                                            ceil_div(plan.tile_w, plan.nx) * s.groups);

  const double vecs = static_cast<double>(plan.rows) * plan.cols;
  double pack;  // cycles per channel and item
  if (params.layout == Layout::kNHWC) {
    pack = vecs * kTransposeCycles;
  } else if (plan.interleaved) {
    pack = vecs * kCopyCycles + kRowCycles;
  } else {
    pack = static_cast<double>(plan.rows * ceil_div(plan.span, lanes) * lanes) * kTransposeCycles;
  }
  double unpack;  // cycles per filter and block
  if (params.layout == Layout::kNCHW && !plan.interleaved) {
    unpack = static_cast<double>(plan.ny * ceil_div(plan.nx, lanes) * lanes) * kScatterCycles;
  } else {
    unpack = static_cast<double>(vectors) *
             (plan.interleaved && params.layout == Layout::kNCHW ? kCopyCycles : kScatterCycles);
  }

  double best = -1;
  const double channel_bytes = block_vecs * static_cast<double>(lanes * element_bytes);
  const int64_t in_l1 =
      std::max<int64_t>(1, static_cast<int64_t>(machine.panel_bytes / channel_bytes));
  CsrPlan chosen = plan;
  for (int64_t grow = 1; grow <= 16; grow *= 2) {
    const int64_t want = std::min(cg, in_l1 * grow);
    const int64_t panels = ceil_div(cg, want);
    const int64_t block = ceil_div(cg, panels);
    const double super_bytes = vecs * static_cast<double>(block * lanes * element_bytes);
    if (grow > 1 && super_bytes > kPanelLimit) break;
    // Filters per chunk: the scratch of one thread stays in its share of L2, and all have work.
    const int64_t filter_bytes =
        vectors * plan.super_y * plan.super_x * lanes * element_bytes + 4 * (panels + 1);
    const int64_t budget =
        std::max<int64_t>(kScratchBudget - static_cast<int64_t>(super_bytes), 32 * filter_bytes);
    int64_t chunks = std::max<int64_t>(1, ceil_div(kg * filter_bytes, budget));
    const int64_t max_chunks = std::max<int64_t>(chunks, ceil_div(kg, lanes));
    const auto imbalance = [&](int64_t c) {
      const double n = items * static_cast<double>(c);
      return static_cast<double>(ceil_div(static_cast<int64_t>(n), threads)) * threads / n;
    };
    while (chunks < max_chunks && imbalance(chunks) > 1.12) ++chunks;

    const double panel = static_cast<double>(block) * channel_bytes;
    const double miss = std::max(0.0, 1.0 - static_cast<double>(machine.panel_bytes) * 1.2 / panel);
    const double fma =
        std::max(static_cast<double>(vectors) * (kFmaCycles + kL2Penalty * miss) + kScalarCycles,
                 kChainCycles);
    const double visits = static_cast<double>(kg * panels);
    const double touch = block_vecs * static_cast<double>(cg) * kTouchCycles;  // L2 to L1
    const double cycles =
        items * static_cast<double>(cg) * pack * static_cast<double>(chunks) +
        static_cast<double>(s.groups) * visits * kListCycles +
        blocks *
            (visits * (kVisitCycles +
                       static_cast<double>(vectors) * (panels > 1 ? kPartialCycles : 1.5)) +
             nnz_g * fma + touch * static_cast<double>(chunks) + static_cast<double>(kg) * unpack);
    const double total = cycles * imbalance(chunks);
    if (best < 0 || total < best) {
      best = total;
      chosen.channel_block = block;
      chosen.channel_blocks = panels;
      chosen.filter_chunks = chunks;
    }
    if (want == cg) break;
  }
  plan = chosen;
  return best;
}

struct Key {
  ConvShape shape;
  int64_t nnz;
  int32_t dtype, layout, lanes, max_vectors, threads;
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

CsrPlan search(const CsrConv2dParams& params, int64_t nnz, const CsrMachine& machine,
               int32_t threads) {
  bool pointwise = false;
  CsrPlan base{};
  base.shape = collapse_pointwise(params.shape, params.layout, &pointwise);
  base.lanes = machine.lanes;
  const int64_t element = params.dtype == DType::kFloat64 ? 8 : 4;
  CsrPlan best = base;
  double best_cycles = -1;
  const auto consider = [&](CsrPlan plan) {
    const int64_t tile_h = ceil_div(plan.shape.p, plan.ly),
                  tile_w = ceil_div(plan.shape.q, plan.lx);
    for (int32_t ny = 1; ny <= kMaxNy; ++ny) {
      if (ny > 1 && ny > tile_h) break;
      for (int32_t nx = 1; nx <= kMaxNx; ++nx) {
        if (!csr_block_is_legal(ny, nx, machine.max_vectors)) continue;
        if (nx > 1 && nx > round_up(tile_w, 2)) continue;
        for (const int32_t super : {1, 2, 3, 4, 7, 8}) {
          plan.ny = ny;
          plan.nx = nx;
          plan.super_y = plan.super_x = 1;
          // Rows share their halo; pixels of a pointwise layer share pages and prefetch streams.
          (plan.interleaved ? plan.super_x : plan.super_y) = super;
          if (super > 1 &&
              ceil_div(plan.interleaved ? tile_w : tile_h, plan.interleaved ? nx : ny) < super) {
            break;
          }
          const double c =
              evaluate(plan, params, static_cast<double>(nnz), machine, element, threads);
          if (best_cycles < 0 || c < best_cycles) {
            best_cycles = c;
            best = plan;
          }
        }
      }
    }
  };
  for (int32_t ln = 1; ln <= machine.lanes; ln *= 2) {
    for (int32_t ly = 1; ln * ly <= machine.lanes; ly *= 2) {
      CsrPlan plan = base;
      plan.ln = ln;
      plan.ly = ly;
      plan.lx = machine.lanes / (ln * ly);
      consider(plan);
    }
  }
  if (pointwise) {
    CsrPlan plan = base;
    plan.ln = plan.ly = 1;
    plan.lx = machine.lanes;
    plan.interleaved = true;
    consider(plan);
  }
  best.items =
      best.image_groups * best.blocks_y * best.blocks_x * best.shape.groups * best.filter_chunks;
  return best;
}

// First filter of chunk i of group g, so that chunks hold about equally many nonzeros. One row
// counts as nnz + 8: an empty row still costs its bias and its store.
int64_t chunk_start(const CsrPlan& plan, const int32_t* row_ptr, int64_t g, int64_t i) {
  const int64_t kg = plan.shape.filters_per_group(), k0 = g * kg;
  const auto weight = [&](int64_t k) {
    return static_cast<int64_t>(row_ptr[k0 + k] - row_ptr[k0]) + 8 * k;
  };
  if (i == 0) return k0;
  if (i >= plan.filter_chunks) return k0 + kg;
  const int64_t target = weight(kg) * i / plan.filter_chunks;
  int64_t lo = 0, hi = kg;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (weight(mid) < target) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  return k0 + lo;
}

}  // namespace

CsrPlan csr_plan(const CsrConv2dParams& params, int64_t nnz, const CsrMachine& machine,
                 int32_t threads) {
  static std::mutex mutex;
  static std::unordered_map<Key, CsrPlan, KeyHash> cache;
  Key key;
  std::memset(&key, 0, sizeof key);  // padding takes part in the comparison
  key.shape = params.shape;
  key.nnz = nnz;
  key.dtype = static_cast<int32_t>(params.dtype);
  key.layout = static_cast<int32_t>(params.layout);
  key.lanes = machine.lanes;
  key.max_vectors = machine.max_vectors;
  key.threads = threads;
  CsrPlan plan;
  bool known = false;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const auto it = cache.find(key);
    if (it != cache.end()) {
      plan = it->second;
      known = true;
    }
  }
  if (!known) {
    plan = search(params, nnz, machine, threads);
    std::lock_guard<std::mutex> lock(mutex);
    if (cache.size() >= 1024) cache.clear();  // bounded: a service may see endless input sizes
    cache.emplace(key, plan);
  }

  const int64_t element = params.dtype == DType::kFloat64 ? 8 : 4;
  const ConvShape& s = plan.shape;
  plan.max_chunk_filters = 0;
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t i = 0; i < plan.filter_chunks; ++i) {
      plan.max_chunk_filters =
          std::max(plan.max_chunk_filters, chunk_start(plan, params.row_ptr, g, i + 1) -
                                               chunk_start(plan, params.row_ptr, g, i));
    }
  }
  const int64_t filter_bytes =
      int64_t{plan.ny} * plan.nx * plan.super_y * plan.super_x * plan.lanes * element;
  plan.panel_offset = 0;
  plan.partial_offset =
      round_up(plan.channel_block * plan.rows * plan.cols * plan.lanes * element, kCacheLine);
  plan.bounds_offset =
      plan.partial_offset + round_up(plan.max_chunk_filters * filter_bytes, kCacheLine);
  plan.thread_bytes =
      plan.bounds_offset +
      round_up(4 * ((plan.channel_blocks + 1) * plan.max_chunk_filters + kBoundsPad), kCacheLine);
  plan.shared_bytes =
      round_up(4 * (plan.channel_block * s.r * s.s + plan.rows + plan.cols + plan.span), 8) +
      8 * (s.groups * plan.filter_chunks + 1);
  plan.shared_bytes = round_up(plan.shared_bytes, kCacheLine);
  return plan;
}

void csr_plan_tables(CsrPlan& plan, const CsrConv2dParams& params, void* shared) {
  const ConvShape& s = plan.shape;
  int32_t* p = static_cast<int32_t*>(shared);
  plan.tap_offset = p;
  plan.row_source = plan.tap_offset + plan.channel_block * s.r * s.s;
  plan.col_source = plan.row_source + plan.rows;
  plan.col_slot = plan.col_source + plan.cols;
  char* end = reinterpret_cast<char*>(plan.col_slot + plan.span);
  const int64_t used = round_up(end - static_cast<char*>(shared), 8);
  plan.chunk_begin = reinterpret_cast<int64_t*>(static_cast<char*>(shared) + used);

  std::vector<int32_t> tap_row(static_cast<size_t>(s.r)), tap_col(static_cast<size_t>(s.s));
  pack_axis(s.r, s.dil_h, s.stride_h, plan.ny * plan.super_y, plan.row_source, tap_row.data());
  pack_axis(s.s, s.dil_w, s.stride_w, plan.nx * plan.super_x, plan.col_source, tap_col.data());
  int32_t* tap = plan.tap_offset;
  for (int64_t c = 0; c < plan.channel_block; ++c) {
    for (int64_t r = 0; r < s.r; ++r) {
      for (int64_t q = 0; q < s.s; ++q) {
        *tap++ = static_cast<int32_t>(((c * plan.rows + tap_row[r]) * plan.cols + tap_col[q]) *
                                      plan.lanes);
      }
    }
  }
  std::fill(plan.col_slot, plan.col_slot + plan.span, -1);
  for (int32_t j = 0; j < plan.cols; ++j) plan.col_slot[plan.col_source[j]] = j;

  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t i = 0; i < plan.filter_chunks; ++i) {
      plan.chunk_begin[g * plan.filter_chunks + i] = chunk_start(plan, params.row_ptr, g, i);
    }
  }
  plan.chunk_begin[s.groups * plan.filter_chunks] = s.k;
}

}  // namespace sparsecnn::cpu
