#include "cpu/chain_plan.h"

#include <algorithm>

namespace sparsecnn::cpu {
namespace {

// Half of a 1 MB second-level cache: the other half is for weights on their way through.
constexpr int64_t kRingBytes = 512 << 10;
// Rows of a matrix at a multiple of this many bytes fall onto few of the 64 sets of a first-level
// cache, whose 8 ways they overflow. Measured on Zen 4: a 1024>256 pointwise layer on 14x14 went
// from 69 to 92 GFLOP/s when its weights (pitch 1024 B) no longer did.
constexpr int64_t kWeightFoldBytes = 1024;
constexpr int64_t kPixelFoldBytes = 2048;
constexpr int64_t kColumnFoldBytes = 256;  // a depthwise stage walks down columns of pixels

int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

int64_t storage_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

bool accumulates_as_stored(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64;
}

bool is_pointwise(const ConvShape& s) { return s.r == 1 && s.s == 1; }

// Rows that `out_rows` neighbouring output rows read.
int64_t input_rows(const ConvShape& s, int64_t out_rows) {
  return std::min(s.h, (out_rows - 1) * s.stride_h + (s.r - 1) * s.dil_h + 1);
}

// A first stage that is pointwise and skips pixels sees an image without them; one that skips none
// in NHWC, alone in its chain, sees a single image of all rows.
void view_input(const ChainConv2dParams& p, ChainPlan& plan) {
  plan.n = p.n;
  for (int32_t i = 0; i < p.stages; ++i) plan.shape[i] = p.stage[i].shape;
  ConvShape& s = plan.shape[0];
  const bool nhwc = p.layout == Layout::kNHWC;
  plan.x_image = s.c * s.h * s.w;
  plan.x_pixel = nhwc ? s.c : 1;
  plan.x_channel = nhwc ? 1 : s.h * s.w;
  plan.x_row = s.w * plan.x_pixel;
  const ConvShape& last = p.stage[p.stages - 1].shape;
  plan.y_image = last.k * last.p * last.q;
  const bool unpadded = s.pad_top == 0 && s.pad_left == 0 && is_pointwise(s) &&
                        (s.p - 1) * s.stride_h < s.h && (s.q - 1) * s.stride_w < s.w;
  if (!unpadded) return;
  plan.x_pixel *= s.stride_w;
  plan.x_row *= s.stride_h;
  s.h = s.p;
  s.w = s.q;
  const bool whole =
      s.stride_h == 1 && s.stride_w == 1 && p.stage[0].shape.h == s.h && p.stage[0].shape.w == s.w;
  s.stride_h = s.stride_w = 1;
  if (whole && nhwc && p.stages == 1) {
    s.h = s.p = plan.n * s.p;
    plan.n = 1;
  }
}

void lay_out_input(const ChainConv2dParams& p, const ChainMachine& m, ChainPlan& plan, int32_t i) {
  const ConvShape& s = plan.shape[i];
  ChainBuffer& b = plan.input[i];
  b.pad_left = std::max<int64_t>(0, s.pad_left);
  const int64_t reach = (s.q - 1) * s.stride_w + (s.s - 1) * s.dil_w + 1 - s.pad_left;
  b.pixels = b.pad_left + std::max(s.w, reach);
  const bool depthwise = s.groups > 1;
  b.rows = 1;
  b.pixel = round_up(s.c, m.lanes);
  const int64_t fold = depthwise ? kColumnFoldBytes : kPixelFoldBytes;
  if (b.pixel * m.element_bytes % fold == 0) b.pixel += 64 / m.element_bytes;
  if (i == 0 && p.layout == Layout::kNHWC && accumulates_as_stored(p.dtype) && b.pixels == s.w &&
      plan.x_pixel * m.element_bytes % (2 * kPixelFoldBytes) != 0 &&
      (!depthwise || s.c % m.lanes == 0)) {
    b.rows = 0;
    b.pixel = plan.x_pixel;
    b.row = plan.x_row;
    return;
  }
  b.row = b.pixels * b.pixel;
}

// Bytes of all rings when bands have `band` rows; sets the heights of the rings.
int64_t ring_bytes(const ChainConv2dParams& p, const ChainMachine& m, ChainPlan& plan,
                   int64_t band) {
  int64_t bytes = 0;
  const int64_t rows = plan.shape[p.stages - 1].p;
  int64_t out_rows = std::min(band, rows);
  for (int32_t i = p.stages - 1; i >= 0; --i) {
    const ConvShape& s = plan.shape[i];
    const int64_t in_rows = input_rows(s, out_rows);
    ChainBuffer& b = plan.input[i];
    if (b.rows != 0) b.rows = in_rows;
    bytes +=
        b.rows != 0 ? in_rows * b.row * m.element_bytes : in_rows * s.w * s.c * m.element_bytes;
    out_rows = in_rows;
  }
  return bytes;
}

void choose_band(const ChainConv2dParams& p, const ChainMachine& m, ChainPlan& plan,
                 int64_t share_rows) {
  int64_t lo = 1, hi = share_rows;  // ring_bytes grows with the band
  while (lo < hi) {
    const int64_t middle = (lo + hi + 1) / 2;
    if (ring_bytes(p, m, plan, middle) <= kRingBytes) {
      lo = middle;
    } else {
      hi = middle - 1;
    }
  }
  const int64_t bands = (share_rows + lo - 1) / lo;
  plan.band = (share_rows + bands - 1) / bands;
  ring_bytes(p, m, plan, plan.band);
}

void choose_shares(const ChainConv2dParams& p, const ChainMachine& m, ChainPlan& plan,
                   int64_t threads) {
  const ConvShape& last = plan.shape[p.stages - 1];
  plan.row_parts = plan.slab_parts = 1;
  if (threads == 1 || (plan.n % threads == 0 || plan.n >= 4 * threads)) return;
  const int64_t slabs = (last.k + m.lanes * m.tile_vectors - 1) / (m.lanes * m.tile_vectors);
  // A weight larger than what it is multiplied with is read once if threads share its columns.
  if (p.stages == 1 && last.groups == 1 && slabs >= 4 * threads && last.k > last.p * last.q) {
    plan.slab_parts = threads;
  } else {
    plan.row_parts = std::min(threads, last.p);
  }
}

bool weight_is_direct(const ChainStage& stage, DType dtype, int32_t lanes) {
  const ConvShape& s = stage.shape;
  const int64_t* const t = stage.weight_stride;  // K, C, R, S
  return accumulates_as_stored(dtype) && s.k % lanes == 0 && t[0] == 1 &&
         (s.c == 1 || t[1] == s.k) && (s.s == 1 || t[3] == s.c * s.k) &&
         (s.r == 1 || t[2] == s.s * s.c * s.k) &&
         (s.k * storage_bytes(dtype) % kWeightFoldBytes != 0 || s.c * s.r * s.s == 1);
}

}  // namespace

ChainPlan plan_chain(const ChainConv2dParams& p, const ChainMachine& m, int64_t threads) {
  ChainPlan plan{};
  view_input(p, plan);
  for (int32_t i = 0; i < p.stages; ++i) {
    lay_out_input(p, m, plan, i);
    plan.direct[i] = plan.shape[i].groups == 1 && weight_is_direct(p.stage[i], p.dtype, m.lanes);
  }
  choose_shares(p, m, plan, threads);
  const ConvShape& last = plan.shape[p.stages - 1];
  choose_band(p, m, plan, (last.p + plan.row_parts - 1) / plan.row_parts);
  plan.items = plan.n * plan.row_parts * plan.slab_parts;

  int64_t at = 0;
  for (int32_t i = 0; i < p.stages; ++i) {
    ChainBuffer& b = plan.input[i];
    b.offset = at;
    at = round_up(at + b.rows * b.row * m.element_bytes, 64);
  }
  int64_t rows = 0, addresses = 0;  // of the longest packed weight, of the longest table
  int64_t out_rows = std::min(plan.band, last.p);
  for (int32_t i = p.stages - 1; i >= 0; --i) {
    const ConvShape& s = plan.shape[i];
    rows = std::max(rows, (s.groups > 1 ? 1 : s.c) * s.r * s.s);
    addresses = std::max(addresses, out_rows * s.r);
    out_rows = input_rows(s, out_rows);
  }
  plan.table_offset = at;
  at = round_up(at + addresses * static_cast<int64_t>(sizeof(const char*)), 64);
  plan.slab_offset = at;
  at = round_up(at + rows * m.tile_vectors * m.lanes * m.element_bytes, 64);
  plan.out_offset = at;
  if (p.layout == Layout::kNCHW) {
    plan.out_pixel = round_up(last.k, m.lanes);
    if (plan.out_pixel * m.element_bytes % kPixelFoldBytes == 0) {
      plan.out_pixel += 64 / m.element_bytes;
    }
    at += plan.band * last.q * plan.out_pixel * m.element_bytes;
  }
  plan.thread_bytes = round_up(at, 4096) + 64;  // ends of scratches do not share a set either
  return plan;
}

}  // namespace sparsecnn::cpu
