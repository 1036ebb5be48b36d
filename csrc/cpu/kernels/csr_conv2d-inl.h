// csr_conv2d on the CPU: y = act(conv(x, W) + bias + residual), W in CSR over (K, C/G * R * S).
//
// Included by every isa_*.cpp; the plan (cpu/csr_plan.h) says how the call is cut.
//
// Who owns what. An item is (block of output positions) x (group) x (chunk of filters). A block is
// ny * nx output positions of each of L lanes, so ny * nx vectors, held in registers. For one item:
//   for each panel (block of input channels):
//     pack the panel: [channel][packed row][packed column][L lanes], about 24 KB, so L1
//     for each filter k of the chunk:
//       load the partial sums of k (or its bias), walk the nonzeros of k that fall in this panel:
//       broadcast the weight, ny * nx FMAs whose memory operand is an aligned vector of the panel
//   unpack: transpose lanes back to pixels (NCHW) or filters (NHWC), add residual, activate, store.
// Filter k resumes where it stopped in the previous panel (`cursor`), so the CSR arrays are walked
// once per block and need no panel index of their own. Each output is one chain of FMAs in
// ascending column order whatever the cut: results do not depend on the number of threads.
//
// The bound. One FMA with an L1 operand per cycle: 83 GFLOP/s of a 104 GFLOP/s core (Zen 4,
// AVX-512, one 64-byte load a cycle) when every operand is aligned and in L1; 57 when loads split
// cache lines, 48 when they come from L2.
#pragma once
#include <stddef.h>

#include "cpu/csr_plan.h"
#include "cpu/vec.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

using cpu::CsrPlan;

// Distances of the software prefetches, in channels, filters and filters; measured on Zen 4.
constexpr int64_t kPrefetchIn = 4, kPrefetchOut = 2, kPrefetchFilters = 3;
static_assert(kPrefetchFilters <= cpu::kBoundsPad, "the bounds are padded for the look-ahead");

// Bits [lo, hi) of a mask over positions [first, first + L).
template <int L>
SPARSECNN_INLINE uint32_t range_mask(int64_t first, int64_t lo, int64_t hi) {
  int64_t a = lo - first, b = hi - first;
  a = a < 0 ? 0 : (a > L ? L : a);
  b = b < 0 ? 0 : (b > L ? L : b);
  if (b <= a) return 0;
  return ((1u << b) - 1u) & ~((1u << a) - 1u);
}

template <class V>
SPARSECNN_INLINE typename V::reg activate(typename V::reg v, Activation activation) {
  using reg = typename V::reg;
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:  // max(0, v) in this order keeps a NaN
      return V::max(V::zero(), v);
    case Activation::kRelu6:
      return V::min(V::set1(6), V::max(V::zero(), v));
    case Activation::kSilu: {
      const reg e = V::exp(V::mul(v, V::set1(-1)));
      return V::div(v, V::add(V::set1(1), e));
    }
    case Activation::kHardswish: {
      const reg t = V::min(V::set1(6), V::max(V::zero(), V::add(v, V::set1(3))));
      return V::mul(v, V::mul(t, V::set1(typename V::T(1) / 6)));
    }
  }
  return v;
}

// What the row loop needs, gathered so that its signature stays short.
template <class V, class S>
struct RowArgs {
  const typename V::T* panel;
  ptrdiff_t row_pitch;          // elements between packed rows
  const int32_t* tap_offset;    // indexed by the column in W's lowered matrix
  const S* values;
  const int32_t* col_idx;
  const S* bias;                // of the chunk's first filter; null: start from zero
  bool first_panel;
  int64_t filters;
  const int32_t* begin;         // (filters): first entry of each filter in this panel
  const int32_t* end;           // (filters): one past the last
  typename V::T* partial;       // (filters of the chunk, NY, NX, L)
};

// All filters of the chunk over one panel, for one block of output positions.
template <class V, class S, int NY, int NX>
void csr_rows(const RowArgs<V, S>& args) {
  using reg = typename V::reg;
  using T = typename V::T;
  const RowArgs<V, S> a = args;
  T* partial = a.partial;
  for (int64_t f = 0; f < a.filters; ++f, partial += NY * NX * V::L) {
    // A filter touches a few lines of weights at an address no hardware prefetcher guesses. `begin`
    // is followed by kBoundsPad entries, so that looking ahead needs no test.
    const int64_t ahead = f + kPrefetchFilters;
    for (int32_t i = a.begin[ahead]; i < a.end[ahead]; i += 16) {
      __builtin_prefetch(a.values + i);
      __builtin_prefetch(a.col_idx + i);
    }
    reg acc[NY][NX];
    if (a.first_panel) {
      const reg b = a.bias ? V::set1(to_acc(a.bias[f])) : V::zero();
#pragma GCC unroll 8
      for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) acc[y][x] = b;
      }
    } else {
#pragma GCC unroll 8
      for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) acc[y][x] = V::load(partial + (y * NX + x) * V::L);
      }
    }
    const int32_t end = a.end[f];
    for (int32_t i = a.begin[f]; i < end; ++i) {
      const T* p = a.panel + a.tap_offset[a.col_idx[i]];
      const reg w = V::set1(to_acc(a.values[i]));
#pragma GCC unroll 8
      for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) {
          acc[y][x] = V::fmadd(w, V::load(p + y * a.row_pitch + x * V::L), acc[y][x]);
        }
      }
    }
#pragma GCC unroll 8
    for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
      for (int x = 0; x < NX; ++x) V::store(partial + (y * NX + x) * V::L, acc[y][x]);
    }
  }
}

template <class V, class S>
using RowKernel = void (*)(const RowArgs<V, S>&);

template <class V, class S, int MaxVectors, int NY, int NX>
constexpr RowKernel<V, S> row_kernel() {
  if constexpr (cpu::csr_block_is_legal(NY, NX, MaxVectors)) {
    return &csr_rows<V, S, NY, NX>;
  } else {
    return nullptr;
  }
}

template <class V, class S, int MaxVectors>
RowKernel<V, S> find_row_kernel(int32_t ny, int32_t nx) {
#define SPARSECNN_ROW(NY)                                                                         \
  {                                                                                               \
    nullptr, row_kernel<V, S, MaxVectors, NY, 1>(), row_kernel<V, S, MaxVectors, NY, 2>(),        \
        row_kernel<V, S, MaxVectors, NY, 3>(), row_kernel<V, S, MaxVectors, NY, 4>(),             \
        row_kernel<V, S, MaxVectors, NY, 5>(), row_kernel<V, S, MaxVectors, NY, 6>(),             \
        row_kernel<V, S, MaxVectors, NY, 7>(), row_kernel<V, S, MaxVectors, NY, 8>(), nullptr,    \
        row_kernel<V, S, MaxVectors, NY, 10>(), nullptr, row_kernel<V, S, MaxVectors, NY, 12>(),  \
        nullptr, row_kernel<V, S, MaxVectors, NY, 14>()                                           \
  }
  static constexpr RowKernel<V, S> table[cpu::kMaxNy + 1][cpu::kMaxNx + 1] = {
      {}, SPARSECNN_ROW(1), SPARSECNN_ROW(2), SPARSECNN_ROW(3), SPARSECNN_ROW(4),
      {}, {},               SPARSECNN_ROW(7)};
#undef SPARSECNN_ROW
  return table[ny][nx];
}

template <class V, class S>
class CsrConv2d {
  using T = typename V::T;
  using reg = typename V::reg;
  static constexpr int L = V::L;

  // One lane of the current block.
  struct Lane {
    int64_t image, tile_y, tile_x;
    bool active;           // its image and tile exist
    int64_t in_row, in_col;  // input position of packed row 0, column 0; may lie in the padding
  };

  const CsrConv2dParams& params_;
  const CsrPlan& plan_;
  const ConvShape& s_;
  T* const panel_;
  T* const partial_;
  int32_t* const bounds_;  // (panels + 1, filters)
  Lane lane_[L];
  int64_t y0_ = 0, x0_ = 0;  // first output position of the block inside a tile

 public:
  CsrConv2d(const CsrConv2dParams& params, const CsrPlan& plan, char* scratch)
      : params_(params),
        plan_(plan),
        s_(plan.shape),
        panel_(reinterpret_cast<T*>(scratch + plan.panel_offset)),
        partial_(reinterpret_cast<T*>(scratch + plan.partial_offset)),
        bounds_(reinterpret_cast<int32_t*>(scratch + plan.bounds_offset)) {}

  void run(int64_t begin, int64_t end, RowKernel<V, S> rows) {
    int64_t bounded = -1;  // the chunk whose bounds are known
    int64_t packed = -1;  // the (block, group) whose only panel is packed, when there is one panel
    for (int64_t item = begin; item < end; ++item) {
      int64_t rest = item;
      const int64_t chunk = rest % plan_.filter_chunks;
      rest /= plan_.filter_chunks;
      const int64_t block_and_group = rest;
      const int64_t group = rest % s_.groups;
      rest /= s_.groups;
      const int64_t bx = rest % plan_.blocks_x;
      rest /= plan_.blocks_x;
      place_lanes(rest / plan_.blocks_y, rest % plan_.blocks_y, bx);
      const int64_t y0 = y0_, x0 = x0_;

      const int64_t chunk_index = group * plan_.filter_chunks + chunk;
      const int64_t k0 = plan_.chunk_begin[chunk_index];
      const int64_t filters = plan_.chunk_begin[chunk_index + 1] - k0;
      if (filters == 0) continue;
      if (bounded != chunk_index) find_bounds(k0, filters);
      bounded = chunk_index;
      const int64_t cg = s_.channels_per_group();
      const ptrdiff_t filter = static_cast<ptrdiff_t>(plan_.ny) * plan_.nx * L;
      for (int64_t b = 0; b < plan_.channel_blocks; ++b) {
        const int64_t c0 = b * plan_.channel_block;
        const int64_t c1 = c0 + plan_.channel_block < cg ? c0 + plan_.channel_block : cg;
        if (plan_.channel_blocks > 1 || packed != block_and_group) {
          pack(group * cg + c0, c1 - c0);
          packed = block_and_group;
        }
        RowArgs<V, S> args;
        args.row_pitch = static_cast<ptrdiff_t>(plan_.cols) * L;
        args.tap_offset = plan_.tap_offset - c0 * s_.r * s_.s;
        args.values = static_cast<const S*>(params_.values);
        args.col_idx = params_.col_idx;
        args.bias = params_.bias ? static_cast<const S*>(params_.bias) + k0 : nullptr;
        args.first_panel = b == 0;
        args.filters = filters;
        args.begin = bounds_ + b * filters;
        args.end = args.begin + filters;
        for (int64_t i = 0; i < plan_.super_y * plan_.super_x; ++i) {
          const int64_t y = i / plan_.super_x * plan_.ny, x = i % plan_.super_x * plan_.nx;
          if (y0 + y >= plan_.tile_h || x0 + x >= plan_.tile_w) continue;
          args.panel = panel_ + (y * plan_.cols + x) * L;
          args.partial = partial_ + i * filters * filter;
          rows(args);
        }
      }
      for (int64_t i = 0; i < plan_.super_y * plan_.super_x; ++i) {
        y0_ = y0 + i / plan_.super_x * plan_.ny;
        x0_ = x0 + i % plan_.super_x * plan_.nx;
        if (y0_ >= plan_.tile_h || x0_ >= plan_.tile_w) continue;
        const T* const sums = partial_ + i * filters * filter;
        for (int64_t k = 0; k < filters; k += L) {
          const int64_t n = filters - k < L ? filters - k : L;
          if (params_.layout == Layout::kNHWC) {
            unpack_nhwc(sums + k * filter, k0 + k, n);
          } else if (plan_.interleaved) {
            unpack_pixels(sums + k * filter, k0 + k, n);
          } else {
            unpack_nchw(sums + k * filter, k0 + k, n);
          }
        }
      }
    }
  }

 private:
  // Where each filter's nonzeros lie in each panel: row b of bounds_ holds the first entry of every
  // filter at or beyond panel b, so that rows b and b + 1 enclose what panel b multiplies.
  void find_bounds(int64_t k0, int64_t filters) {
    const int32_t* const col = params_.col_idx;
    const int64_t panel_columns = plan_.channel_block * s_.r * s_.s;
    const int64_t panels = plan_.channel_blocks;
    for (int64_t f = 0; f < filters; ++f) {
      const int32_t row_begin = params_.row_ptr[k0 + f], row_end = params_.row_ptr[k0 + f + 1];
      int32_t* out = bounds_ + f;
      *out = row_begin;
      int64_t left = panels - 1;
      int64_t bound = panel_columns;
      for (int32_t i = row_begin; i < row_end && left > 0; i += kScan) {
        const int n = row_end - i < kScan ? row_end - i : kScan;
        uint32_t beyond = at_least(col + i, n, static_cast<int32_t>(bound));
        while (beyond != 0 && left > 0) {
          const int32_t position = i + __builtin_ctz(beyond);
          do {
            *(out += filters) = position;
            bound += panel_columns;
            --left;
          } while (left > 0 && col[position] >= bound);
          beyond = at_least(col + i, n, static_cast<int32_t>(bound));
        }
      }
      for (; left >= 0; --left) *(out += filters) = row_end;
    }
    // The last rows look ahead past the end: empty ranges.
    for (int64_t i = 0; i < cpu::kBoundsPad; ++i) bounds_[(panels + 1) * filters + i] = 0;
  }

  // Output column of a lane's position x, and the step between positions.
  int64_t out_col(const Lane& l, int64_t x) const {
    return plan_.interleaved ? (x0_ + x) * L + l.tile_x : l.tile_x * plan_.tile_w + x0_ + x;
  }
  int64_t out_row(const Lane& l, int64_t y) const { return l.tile_y * plan_.tile_h + y0_ + y; }

  void place_lanes(int64_t image_group, int64_t block_y, int64_t block_x) {
    y0_ = block_y * plan_.super_y * plan_.ny;
    x0_ = block_x * plan_.super_x * plan_.nx;
    for (int64_t l = 0; l < L; ++l) {
      Lane& lane = lane_[l];
      lane.tile_x = l % plan_.lx;
      lane.tile_y = l / plan_.lx % plan_.ly;
      lane.image = image_group * plan_.ln + l / (plan_.lx * plan_.ly);
      lane.in_row = out_row(lane, 0) * s_.stride_h - s_.pad_top;
      lane.in_col = out_col(lane, 0) * s_.stride_w - s_.pad_left;
      lane.active = lane.image < s_.n && out_row(lane, 0) < s_.p && out_col(lane, 0) < s_.q;
    }
  }

  void pack(int64_t c0, int64_t channels) {
    if (params_.layout == Layout::kNHWC) {
      pack_nhwc(c0, channels);
    } else if (plan_.interleaved) {
      pack_pixels(c0, channels);
    } else {
      pack_nchw(c0, channels);
    }
  }

  // NCHW, lanes = tiles: rows of L lanes, L columns each, transposed to columns of L lanes.
  void pack_nchw(int64_t c0, int64_t channels) {
    const S* const x = static_cast<const S*>(params_.x);
    const int64_t plane = s_.h * s_.w;
    for (int64_t j0 = 0; j0 < plan_.span; j0 += L) {
      uint32_t mask[L];
      int64_t offset[L];
      for (int l = 0; l < L; ++l) {
        const Lane& lane = lane_[l];
        const int64_t hi = s_.w - lane.in_col < plan_.span ? s_.w - lane.in_col : plan_.span;
        mask[l] = lane.active ? range_mask<L>(j0, -lane.in_col, hi) : 0;
        offset[l] = (lane.image * s_.c + c0) * plane + lane.in_row * s_.w + lane.in_col + j0;
      }
      const int64_t columns = plan_.span - j0 < L ? plan_.span - j0 : L;
      const int32_t* slot = plan_.col_slot + j0;
      for (int64_t i = 0; i < plan_.rows; ++i) {
        const int64_t row = plan_.row_source[i];
        uint32_t row_mask[L];
        uint32_t any = 0;
        for (int l = 0; l < L; ++l) {
          const int64_t h = lane_[l].in_row + row;
          row_mask[l] = h >= 0 && h < s_.h ? mask[l] : 0;
          any |= row_mask[l];
        }
        T* out = panel_ + i * plan_.cols * L;
        const S* in = x + row * s_.w;
        for (int64_t c = 0; c < channels; ++c, out += plan_.rows * plan_.cols * L, in += plane) {
          reg r[L];
          if (any) {
#pragma GCC unroll 16
            for (int l = 0; l < L; ++l) __builtin_prefetch(in + offset[l] + kPrefetchIn * plane);
#pragma GCC unroll 16
            for (int l = 0; l < L; ++l) r[l] = V::load_mask(in + offset[l], row_mask[l]);
            V::transpose(r);
          } else {
#pragma GCC unroll 16
            for (int l = 0; l < L; ++l) r[l] = V::zero();
          }
          if (columns == L && slot[0] >= 0 && slot[L - 1] == slot[0] + L - 1) {
#pragma GCC unroll 16
            for (int j = 0; j < L; ++j) V::store(out + (slot[0] + j) * L, r[j]);
          } else {
#pragma GCC unroll 16
            for (int j = 0; j < L; ++j) {
              if (j < columns && slot[j] >= 0) V::store(out + slot[j] * L, r[j]);
            }
          }
        }
      }
    }
  }

  // NCHW, lanes = neighbouring pixels: a plain copy.
  void pack_pixels(int64_t c0, int64_t channels) {
    const S* in = static_cast<const S*>(params_.x) + (lane_[0].image * s_.c + c0) * s_.w;
    T* out = panel_;
    const int64_t p0 = x0_ * L;
    for (int64_t c = 0; c < channels; ++c, in += s_.w) {
      for (int64_t j = 0; j < plan_.cols; ++j, out += L) {
        const int64_t p = p0 + j * L;
        __builtin_prefetch(in + p + kPrefetchIn * s_.w);
        V::store(out, V::load_mask(in + p, range_mask<L>(p, 0, s_.w)));
      }
    }
  }

  // NHWC: L lanes, L channels each, transposed to channels of L lanes.
  void pack_nhwc(int64_t c0, int64_t channels) {
    const S* const x = static_cast<const S*>(params_.x);
    const int64_t step = plan_.interleaved ? L : 1;
    for (int64_t j = 0; j < plan_.cols; ++j) {
      const int64_t col = plan_.col_source[j] * step;
      for (int64_t i = 0; i < plan_.rows; ++i) {
        const int64_t row = plan_.row_source[i];
        bool valid[L];
        int64_t offset[L];
        for (int l = 0; l < L; ++l) {
          const Lane& lane = lane_[l];
          const int64_t h = lane.in_row + row, w = lane.in_col + col;
          valid[l] = lane.active && h >= 0 && h < s_.h && w >= 0 && w < s_.w;
          offset[l] = ((lane.image * s_.h + h) * s_.w + w) * s_.c + c0;
        }
        T* out = panel_ + (i * plan_.cols + j) * L;
        const ptrdiff_t channel = static_cast<ptrdiff_t>(plan_.rows) * plan_.cols * L;
        for (int64_t c = 0; c < channels; c += L) {
          const uint32_t mask = range_mask<L>(c, 0, channels);
          reg r[L];
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) r[l] = V::load_mask(x + offset[l] + c, valid[l] ? mask : 0);
          V::transpose(r);
          const int64_t n = channels - c < L ? channels - c : L;
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) {
            if (l < n) V::store(out + (c + l) * channel, r[l]);
          }
        }
      }
    }
  }

  // Residual, activation and store of one vector of neighbouring output elements.
  SPARSECNN_INLINE void finish(reg v, int64_t offset, uint32_t mask) const {
    if (params_.residual) {
      v = V::add(v, V::load_mask(static_cast<const S*>(params_.residual) + offset, mask));
    }
    v = activate<V>(v, params_.activation);
    V::store_mask(static_cast<S*>(params_.y) + offset, v, mask);
  }

  void unpack_nchw(const T* sums, int64_t k0, int64_t filters) {
    for (int64_t xb = 0; xb < plan_.nx; xb += L) {
      const int64_t width = plan_.nx - xb < L ? plan_.nx - xb : L;
      for (int64_t y = 0; y < plan_.ny && y0_ + y < plan_.tile_h; ++y) {
        uint32_t mask[L];
        int64_t offset[L];
        for (int l = 0; l < L; ++l) {
          const Lane& lane = lane_[l];
          const int64_t p = out_row(lane, y), q = out_col(lane, xb);
          int64_t n = plan_.tile_w - x0_ - xb;
          n = n < width ? n : width;
          n = n < s_.q - q ? n : s_.q - q;
          mask[l] = lane.active && p < s_.p ? range_mask<L>(0, 0, n) : 0;
          offset[l] = ((lane.image * s_.k + k0) * s_.p + p) * s_.q + q;
        }
        for (int64_t f = 0; f < filters; ++f) {
          const T* in = sums + ((f * plan_.ny + y) * plan_.nx + xb) * L;
          reg r[L];
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) {
            __builtin_prefetch(static_cast<S*>(params_.y) + offset[l] + (f + kPrefetchOut) * s_.p * s_.q, 1);
          }
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) r[j] = j < width ? V::load(in + j * L) : V::zero();
          V::transpose(r);
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) {
            if (mask[l]) finish(r[l], offset[l] + f * s_.p * s_.q, mask[l]);
          }
        }
      }
    }
  }

  void unpack_pixels(const T* sums, int64_t k0, int64_t filters) {
    const int64_t p0 = x0_ * L;
    int64_t offset = (lane_[0].image * s_.k + k0) * s_.q + p0;
    for (int64_t f = 0; f < filters; ++f, offset += s_.q) {
      for (int64_t x = 0; x < plan_.nx; ++x, sums += L) {
        __builtin_prefetch(static_cast<S*>(params_.y) + offset + x * L + kPrefetchOut * s_.q, 1);
        const uint32_t mask = range_mask<L>(p0 + x * L, 0, s_.q);
        if (mask) finish(V::load(sums), offset + x * L, mask);
      }
    }
  }

  void unpack_nhwc(const T* sums, int64_t k0, int64_t filters) {
    const uint32_t mask = range_mask<L>(0, 0, filters);
    const ptrdiff_t filter = static_cast<ptrdiff_t>(plan_.ny) * plan_.nx * L;
    for (int64_t y = 0; y < plan_.ny && y0_ + y < plan_.tile_h; ++y) {
      for (int64_t x = 0; x < plan_.nx && x0_ + x < plan_.tile_w; ++x) {
        const T* in = sums + (y * plan_.nx + x) * L;
        reg r[L];
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) r[j] = j < filters ? V::load(in + j * filter) : V::zero();
        V::transpose(r);
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) {
          const Lane& lane = lane_[l];
          const int64_t p = out_row(lane, y), q = out_col(lane, x);
          if (lane.active && p < s_.p && q < s_.q) {
            finish(r[l], ((lane.image * s_.p + p) * s_.q + q) * s_.k + k0, mask);
          }
        }
      }
    }
  }
};

template <class V, class S, int MaxVectors>
void csr_conv2d_typed(const CsrConv2dParams& params, const CsrPlan& plan, int64_t begin,
                      int64_t end, void* scratch) {
  CsrConv2d<V, S>(params, plan, static_cast<char*>(scratch))
      .run(begin, end, find_row_kernel<V, S, MaxVectors>(plan.ny, plan.nx));
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
