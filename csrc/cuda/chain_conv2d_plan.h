// How chain_conv2d.cu cuts a chain into tiles and steps: plain host arithmetic, no CUDA.
//
// Region i is what a tile needs of the output of stage i - 1; region 0 is its part of x. A tile of
// final outputs is walked back through the stages, so every region is a rectangle of its own size
// and origin. A region may hang over the edge of its map: it is zero there, which is the padding.
//
// The stages are grouped into steps, each [dense] depthwise* [dense]:
//   - a last dense stage (`reduce`) sums in registers over chunks of its input channels;
//   - the depthwise stages run chunk by chunk from shared memory to shared memory;
//   - a first dense stage (`expand`) makes the chunks out of an input that lies whole in shared
//     memory; without it they are read from there, or from x in device memory (`streams`).
// So what is wide (the expanded channels of an inverted residual) exists in chunks only, and what
// lies whole between two steps is narrow (the ranks of a factorization).
#pragma once
#include <cstdint>

#include "core/params.h"

namespace sparsecnn::cuda {

inline constexpr int kChainThreads = 256;
inline constexpr int kChainWarps = 8;
inline constexpr int kWarpPixels = 32;
inline constexpr int kTileFloats = 8;  // in front of all else: which tile it is
inline constexpr int kGrain = 16;      // channels are padded with zeros to a multiple of this
inline constexpr int kUnit = 8;        // channels are shared between warps in units of this
// Words of dense weights in shared memory: at a time, or all if that is not much more.
inline constexpr int64_t kPassWords = 4096, kWholeWords = 6144;

// Bounds that keep positions and offsets inside a tile within 32 bits.
inline constexpr int64_t kMostExtent = 4096, kMostPixels = 16384, kMostPosition = 1 << 28;

struct Region {
  int32_t h, w;
  // Its first position is that of the tile * step + first.
  int32_t step_h, step_w, first_h, first_w;
};

// How a block's warps share one dense stage: along pixels first, the rest along channels. Weights
// are staged pass by pass, alternately in two buffers unless there is a single pass.
struct DensePlan {
  int32_t warps_m;   // warps along the pixels, a power of two
  int32_t units;     // units of channels of a warp
  int32_t slab;      // channels of all warps
  int32_t channels;  // input channels of a pass
  int32_t taps;      // and filter taps, more than one only if the channels are all
  int32_t pitch;     // elements (float or 16 bits) between rows of weights
  int32_t plane;     // elements between the parts of a weight
  int32_t buffer;    // floats of a pass
  int32_t at;        // where the first lies in shared memory
  int32_t floats;    // of all buffers
};

struct ChainStep {
  int32_t first, last;  // stages
  int32_t expand, reduce, streams;
  int32_t chunk;                    // channels
  int32_t source, source_pitch;     // in shared memory, in floats, unless it streams
  int32_t sink, sink_pitch;         // likewise; of the final step: outputs on their way to y
  int32_t pitch;                    // of chunks
  int32_t at[kMaxChainStages + 1];  // where the chunk of a region lies
  int32_t filters;                  // where the depthwise filters of a chunk lie
  DensePlan expand_plan, reduce_plan;
};

struct ChainPlan {
  int32_t stages, steps;
  Region region[kMaxChainStages + 1];
  ChainStep step[kMaxChainStages];
  int32_t sums;              // template argument of the kernel
  int64_t tiles_p, tiles_q;  // tiles of an image
  int64_t slabs, slab;       // shares of the final channels, and their width
  int64_t work, smem_bytes;
  double cost;  // clocks, for comparison only
};

// What the planner has to know of the machine and the type.
struct ChainMachine {
  int64_t sms, smem_bytes;
  bool matrix;               // dense stages run on tensor cores
  int32_t x_terms, w_terms;  // parts into which an input and a weight are split there
};

namespace chain {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t parts(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t to) { return parts(a, to) * to; }
// Floats between pixels or rows: an odd multiple of 8, so that four rows, read 8 words wide, fall
// onto different banks.
inline int64_t pitch_of(int64_t channels) {
  return round_up(channels, 8) / 8 % 2 ? round_up(channels, 8) : round_up(channels, 8) + 8;
}
inline bool is_depthwise(const ConvShape& s) { return s.groups > 1; }

// Whether all sizes of a stage leave room for sums and products of positions.
inline bool is_small(const ConvShape& s) {
  return most(most(s.h, s.w), most(s.p, s.q)) <= kMostPosition &&
         most(most(s.stride_h, s.stride_w), most(s.dil_h, s.dil_w)) <= kMostPosition &&
         most(most(s.pad_top, s.pad_left), most(s.c, s.k)) <= kMostPosition &&
         most(s.r, s.s) <= kMostExtent;
}

// The regions of stages [begin, begin + count) for a tile of the last one; false if one is too
// large to be thought of.
inline bool set_regions(const ChainConv2dParams& p, int begin, int count, int64_t tile_h,
                        int64_t tile_w, ChainPlan* plan) {
  int64_t h = tile_h, w = tile_w, step_h = 1, step_w = 1, first_h = 0, first_w = 0;
  for (int i = count;; --i) {
    if (h > kMostExtent || w > kMostExtent || h * w > kMostPixels) return false;
    if (step_h > kMostPosition || step_w > kMostPosition) return false;
    if (-first_h > kMostPosition || -first_w > kMostPosition) return false;
    plan->region[i] = {static_cast<int32_t>(h),       static_cast<int32_t>(w),
                       static_cast<int32_t>(step_h),  static_cast<int32_t>(step_w),
                       static_cast<int32_t>(first_h), static_cast<int32_t>(first_w)};
    if (i == 0) return true;
    const ConvShape& s = p.stage[begin + i - 1].shape;
    if (!is_small(s)) return false;
    h = (h - 1) * s.stride_h + (s.r - 1) * s.dil_h + 1;
    w = (w - 1) * s.stride_w + (s.s - 1) * s.dil_w + 1;
    first_h = first_h * s.stride_h - s.pad_top, first_w = first_w * s.stride_w - s.pad_left;
    step_h *= s.stride_h, step_w *= s.stride_w;
  }
}

// Groups the stages, from the last one back; `fuse` lets dense stages make chunks.
inline void set_steps(const ChainConv2dParams& p, int begin, int count, bool fuse,
                      ChainPlan* plan) {
  ChainStep found[kMaxChainStages];
  int steps = 0;
  for (int i = count - 1; i >= 0;) {
    ChainStep s{};
    s.last = i;
    s.reduce = !is_depthwise(p.stage[begin + i].shape);
    i -= s.reduce;
    while (i >= 0 && is_depthwise(p.stage[begin + i].shape)) --i;
    s.expand = fuse && i >= 0;
    i -= s.expand;
    s.first = i + 1;
    found[steps++] = s;
  }
  plan->steps = steps;
  for (int i = 0; i < steps; ++i) plan->step[i] = found[steps - 1 - i];
  plan->step[0].streams = !plan->step[0].expand;
}

struct Cost {
  double clocks, waits;  // of throughput, of latency
};

// Arrangement of a dense stage on `pixels` outputs, `n` channels of them and `k` input channels;
// adds what one chunk of it costs.
inline DensePlan plan_dense(const ChainMachine& m, const ConvShape& s, int sums, int64_t pixels,
                            int64_t n, int64_t k, int terms, Cost* cost) {
  DensePlan d{};
  d.warps_m = 1;
  while (d.warps_m < kChainWarps && d.warps_m * kWarpPixels < pixels) d.warps_m *= 2;
  const int64_t warps_n = kChainWarps / d.warps_m;
  d.units = static_cast<int32_t>(least(sums, parts(parts(n, kUnit), warps_n)));
  // Whole grains of channels: those that the stage does not have are written as zeros.
  if (warps_n == 1) d.units += d.units % 2;
  d.slab = static_cast<int32_t>(kUnit * d.units * warps_n);
  // Tensor cores read the weights of two units at once, of which the second may be none.
  d.pitch = static_cast<int32_t>(m.matrix ? pitch_of(d.slab + kUnit) : d.slab);
  const int64_t packed = m.matrix ? 2 : 1, row = d.pitch * m.w_terms;
  const int64_t taps = s.r * s.s, padded = round_up(k, kGrain);
  const bool whole = padded * taps * row <= kWholeWords * packed;
  const int64_t held = whole ? padded * taps : most(kGrain, kPassWords * packed / row);
  d.channels = static_cast<int32_t>(least(padded, held / kGrain * kGrain));
  d.taps = d.channels < padded ? 1 : static_cast<int32_t>(most(1, least(taps, held / padded)));
  d.plane = d.taps * d.channels * d.pitch;
  d.buffer = static_cast<int32_t>(d.plane * m.w_terms / packed);
  const int64_t passes = parts(padded, d.channels) * parts(taps, d.taps);
  d.floats = d.buffer * (passes > 1 ? 2 : 1);
  const double products = static_cast<double>(d.warps_m) * kWarpPixels * d.slab * padded * taps;
  cost->clocks += m.matrix ? products * terms * m.w_terms / 1000 : products / 90;
  cost->clocks += static_cast<double>(padded) * taps * d.slab / 16;
  cost->waits += 500.0 * static_cast<double>(passes);
  return d;
}

// Lays out one step at `base` of shared memory; returns the floats of its own. `n` final channels.
inline int64_t plan_step(const ChainConv2dParams& p, int begin, const ChainMachine& m, int sums,
                         int64_t max_chunk, int64_t n, int64_t base, bool final, ChainStep* step,
                         const ChainPlan& plan, Cost* total) {
  ChainStep& s = *step;
  const ConvShape& last = p.stage[begin + s.last].shape;
  const ConvShape& first = p.stage[begin + s.first].shape;
  const Region& out = plan.region[s.last + 1];
  const int64_t pixels = static_cast<int64_t>(out.h) * out.w;
  // Without a dense stage in the end the chunks are final channels.
  const int64_t channels = s.reduce ? last.c : (final ? n : last.k);
  const bool in_place = s.reduce && !s.streams && s.first == s.last;
  s.chunk = static_cast<int32_t>(round_up(channels, kGrain));
  if (!in_place) s.chunk = static_cast<int32_t>(least(s.chunk, max_chunk));
  s.pitch = static_cast<int32_t>(pitch_of(s.chunk));
  Cost chunk{};
  int64_t at = base, filters = 0;
  for (int i = s.first + s.expand; i <= s.last + 1; ++i) {
    const bool made = i > s.first ? i <= s.last || !s.reduce : s.streams != 0;
    if (!made) continue;
    const Region& r = plan.region[i];
    const int64_t area = static_cast<int64_t>(r.h) * r.w;
    // The last depthwise stage writes where the next step reads.
    if (i == s.last + 1 && !final) break;
    s.at[i] = static_cast<int32_t>(at);
    at += area * s.pitch;
    if (i == 0 && s.streams) chunk.clocks += static_cast<double>(area) * s.chunk / 8;
  }
  for (int i = s.first + s.expand; i <= s.last - s.reduce; ++i) {
    const ConvShape& d = p.stage[begin + i].shape;
    const Region& r = plan.region[i + 1];
    filters += (d.r * d.s + 1) * s.chunk;
    chunk.clocks += static_cast<double>(r.h) * r.w * s.chunk * static_cast<double>(d.r * d.s) / 40;
    chunk.waits += 200;
  }
  s.filters = static_cast<int32_t>(at);
  at += filters;
  int64_t slabs_n = 1, slabs_m = 1;
  if (s.expand) {
    const Region& r = plan.region[s.first + 1];
    const int64_t area = static_cast<int64_t>(r.h) * r.w;
    Cost once{};
    s.expand_plan =
        plan_dense(m, first, sums / 2, area, s.chunk, first.c, s.first == 0 ? m.x_terms : 3, &once);
    const double times = static_cast<double>(parts(area, s.expand_plan.warps_m * kWarpPixels)) *
                         static_cast<double>(parts(s.chunk, s.expand_plan.slab));
    chunk.clocks += once.clocks * times;
    chunk.waits += once.waits * times;
    s.expand_plan.at = static_cast<int32_t>(at);
    at += s.expand_plan.floats;
  }
  if (s.reduce) {
    const int64_t k = final ? n : last.k;
    s.reduce_plan = plan_dense(m, last, sums, pixels, k, s.chunk,
                               s.first == s.last && s.first == 0 ? m.x_terms : 3, &chunk);
    s.reduce_plan.at = static_cast<int32_t>(at);
    at += s.reduce_plan.floats;
    slabs_n = parts(k, s.reduce_plan.slab);
    slabs_m = parts(pixels, s.reduce_plan.warps_m * kWarpPixels);
    total->waits += 500.0 * static_cast<double>(slabs_m * slabs_n);
  }
  const double times = static_cast<double>(parts(channels, s.chunk) * slabs_n * slabs_m);
  total->clocks += chunk.clocks * times;
  total->waits += (chunk.waits + (s.streams ? 900 : 200)) * times;
  if (final && s.reduce) {  // outputs take the place of what made them
    s.sink = static_cast<int32_t>(base);
    s.sink_pitch = static_cast<int32_t>(pitch_of(s.reduce_plan.slab));
    at = most(at, base + least(pixels, s.reduce_plan.warps_m * kWarpPixels) * s.sink_pitch);
  }
  return at - base;
}

// A plan for one tile; false if it does not fit into `smem_bytes`.
inline bool plan_tile(const ChainConv2dParams& p, int begin, int count, const ChainMachine& m,
                      int64_t tile_h, int64_t tile_w, bool fuse, int sums, int64_t max_chunk,
                      bool split, int64_t smem_bytes, ChainPlan* plan) {
  const ConvShape& last = p.stage[begin + count - 1].shape;
  *plan = ChainPlan{};
  plan->stages = count;
  plan->sums = sums;
  if (!set_regions(p, begin, count, tile_h, tile_w, plan)) return false;
  set_steps(p, begin, count, fuse, plan);
  plan->tiles_p = parts(last.p, tile_h);
  plan->tiles_q = parts(last.q, tile_w);
  const int64_t tiles = p.n * plan->tiles_p * plan->tiles_q;
  plan->slab = last.k;
  if (split) plan->slab = least(last.k, most(32, round_up(parts(last.k, parts(m.sms, tiles)), 32)));
  plan->slabs = parts(last.k, plan->slab);
  plan->work = tiles * plan->slabs;

  // Inputs of steps that lie whole: at both ends of shared memory in turn.
  int64_t whole[kMaxChainStages + 1] = {};
  for (int i = 0; i < plan->steps; ++i) {
    ChainStep& s = plan->step[i];
    if (s.streams) continue;
    const Region& r = plan->region[s.first];
    s.source_pitch =
        static_cast<int32_t>(pitch_of(round_up(p.stage[begin + s.first].shape.c, kGrain)));
    whole[i] = static_cast<int64_t>(r.h) * r.w * s.source_pitch;
  }
  int64_t floats = 0;
  Cost cost{3000, static_cast<double>(whole[0]) / 6};
  for (int i = 0; i < plan->steps; ++i) {
    ChainStep& s = plan->step[i];
    const int64_t low = i % 2 ? whole[i + 1] : whole[i];
    const int64_t high = i % 2 ? whole[i] : whole[i + 1];
    const bool final = i == plan->steps - 1;
    floats = most(floats, low + high +
                              plan_step(p, begin, m, sums, max_chunk, plan->slab, low, final, &s,
                                        *plan, &cost));
  }
  plan->smem_bytes = (kTileFloats + floats) * 4;
  if (plan->smem_bytes > smem_bytes) return false;
  for (int i = 0; i < plan->steps; ++i) {
    const int32_t top = static_cast<int32_t>(floats - whole[i]);
    if (!plan->step[i].streams) plan->step[i].source = i % 2 ? top : 0;
    if (i == 0) continue;
    plan->step[i - 1].sink = plan->step[i].source;
    plan->step[i - 1].sink_pitch = plan->step[i].source_pitch;
  }
  const int64_t waves = parts(plan->work, m.sms);
  const bool paired = sums == 4 && waves > 1 && plan->smem_bytes <= (m.smem_bytes - 2048) / 2;
  plan->cost = static_cast<double>(waves) * (cost.clocks + cost.waits / (paired ? 2 : 1));
  return true;
}

// The best plan for stages [begin, begin + count); false if none fits.
inline bool plan_group(const ChainConv2dParams& p, int begin, int count, const ChainMachine& m,
                       ChainPlan* best) {
  const ConvShape& last = p.stage[begin + count - 1].shape;
  bool found = false;
  const auto try_tile = [&](int64_t h, int64_t w) {
    for (int option = 0; option < 8; ++option) {
      const bool fuse = option & 1, split = option & 2, big = option & 4;
      // Two small blocks share an SM, a big one has it for itself. In float32 there are big ones
      // only: the compiler finds no small one in 128 registers.
      if (!big && !m.matrix) continue;
      const int64_t smem_bytes = big ? m.smem_bytes : m.smem_bytes / 2 - 1024;
      ChainPlan plan;
      for (int64_t chunk = 64; chunk >= kGrain; chunk /= 2) {
        if (!plan_tile(p, begin, count, m, h, w, fuse, big ? 8 : 4, chunk, split, smem_bytes,
                       &plan))
          continue;
        if (!found || plan.cost < best->cost) *best = plan;
        found = true;
        break;
      }
    }
  };
  int64_t h_before = 0, w_before = 0;
  for (int64_t area = 256; area > 0; area /= area > 16 ? 2 : 4) {
    // The smallest tiles are for what fits no larger one, or for few pixels.
    if (found && area < 32 && last.p * last.q * p.n >= 64 * m.sms) break;
    for (int64_t longest = 32; longest > 0; longest /= 2) {
      if (longest * longest >= 4 * area && longest > 1) continue;
      if (longest * longest * 4 < area && longest < last.q) break;
      // Tiles as even as they go.
      const int64_t w = parts(last.q, parts(last.q, longest));
      const int64_t h = parts(last.p, parts(last.p, least(last.p, most(1, area / w))));
      if (h == h_before && w == w_before) continue;
      try_tile(h, w);
      h_before = h, w_before = w;
    }
  }
  return found;
}

}  // namespace chain
}  // namespace sparsecnn::cuda
