// csr_conv2d on the CPU: y = act(conv(x, W) + bias + residual), W in CSR over (K, C/G * R * S).
//
// Included by every isa_*.cpp; the plan (cpu/csr_plan.h) says how the call is cut.
//
// Who owns what. An item is (super-block of output positions) x (group) x (chunk of filters). A
// block is ny * nx output positions of each of L lanes, so ny * nx vectors, held in registers; the
// blocks of a super-block share one packing. For one item:
//   for each panel (block of input channels):
//     pack it: [channel][packed row][packed column][L lanes]; what one block touches is about 24 KB
//     for each block of the super-block, for each filter k of the chunk:
//       load the partial sums of k (or its bias), walk the nonzeros of k that fall in this panel:
//       broadcast the weight, ny * nx FMAs whose memory operand is an aligned vector of the panel
//   unpack: transpose lanes back to pixels (NCHW) or filters (NHWC), add residual, activate, store.
// The bounds of each filter in each panel are found once per chunk, so the op reads plain CSR. Each
// output is one chain of FMAs in ascending column order whatever the cut: results do not depend on
// the number of threads.
//
// The bound. One FMA with an L1 operand per cycle: 83 GFLOP/s of a 104 GFLOP/s core (Zen 4,
// AVX-512, one 64-byte load a cycle) when every operand is aligned and in L1; 57 when loads split
// cache lines, 48 when they come from L2. Measured inside the row loop at 90 %: 71 GFLOP/s on 3x3
// 128>128 @28, 62 on 256>256 @14, 32-43 on 7x7 maps and 1x1 @14, where an input vector is used by
// too few filters to be worth bringing to L1 (1x1 1024>256 @14: 26 of 256).
//
// Tried and lost, one thread, 90 % (figures of one run each, interleaved):
//   - packing every block by itself: packing a 3x3 block of rows three times over; sharing it
//     between blocks took 128>128 @28 from 0.47 to 0.42 ms and 256>64 1x1 @56 from 0.49 to 0.40.
//   - filters sorted by their number of nonzeros in the panel, so that loop exits are predicted:
//     geometric mean over seven layers 4.83x dense sorted, 5.03x as they are.
//   - 2, 3, 4 filters side by side (more independent chains): 0.96, 1.02, 1.03 of the time over
//     eight cases; the loop waits for L1, not for the FMA latency.
//   - prefetching the partial sums of the next filter: within the noise (0.476 against 0.479 ms on
//     128>128 @28 at 90 %, 0.885 against 0.858 at 80 %).
//   - 28 accumulators (2 x 14) for 64>64 @56: 39 GFLOP/s in the loop against 57 with 14; twice the
//     partial sums stream through L1 and evict the panel.
// Shifted loads from unpacked rows were not built: the aligned panel also absorbs stride, padding,
// dilation and tails.
#pragma once
#include <stddef.h>

#include "cpu/kernels/csr_tiles-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// How many filters ahead the weights are prefetched; measured on Zen 4.
constexpr int64_t kPrefetchFilters = 3;
static_assert(kPrefetchFilters <= cpu::kBoundsPad, "the bounds are padded for the look-ahead");

// What the row loop needs, gathered so that its signature stays short.
template <class V, class S>
struct RowArgs {
  const typename V::T* panel;
  ptrdiff_t row_pitch;        // elements between packed rows
  const int32_t* tap_offset;  // indexed by the column in W's lowered matrix
  const S* values;
  const int32_t* col_idx;
  const S* bias;  // of the chunk's first filter; null: start from zero
  bool first_panel;
  int64_t filters;
  const int32_t* begin;    // (filters): first entry of each filter in this panel
  const int32_t* end;      // (filters): one past the last
  typename V::T* partial;  // (filters of the chunk, NY, NX, L)
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
#define SPARSECNN_ROW(NY)                                                                        \
  {                                                                                              \
    nullptr, row_kernel<V, S, MaxVectors, NY, 1>(), row_kernel<V, S, MaxVectors, NY, 2>(),       \
        row_kernel<V, S, MaxVectors, NY, 3>(), row_kernel<V, S, MaxVectors, NY, 4>(),            \
        row_kernel<V, S, MaxVectors, NY, 5>(), row_kernel<V, S, MaxVectors, NY, 6>(),            \
        row_kernel<V, S, MaxVectors, NY, 7>(), row_kernel<V, S, MaxVectors, NY, 8>(), nullptr,   \
        row_kernel<V, S, MaxVectors, NY, 10>(), nullptr, row_kernel<V, S, MaxVectors, NY, 12>(), \
        nullptr, row_kernel<V, S, MaxVectors, NY, 14>()                                          \
  }
  static constexpr RowKernel<V, S> table[cpu::kMaxNy + 1][cpu::kMaxNx + 1] = {
      {}, SPARSECNN_ROW(1), SPARSECNN_ROW(2), SPARSECNN_ROW(3), SPARSECNN_ROW(4), {},
      {}, SPARSECNN_ROW(7)};
#undef SPARSECNN_ROW
  return table[ny][nx];
}

template <class V, class S>
class CsrConv2d : private CsrTiles<V, S> {
  using Base = CsrTiles<V, S>;
  using T = typename V::T;
  using Base::L;
  using Base::pack;
  using Base::panel_;
  using Base::params_;
  using Base::place_lanes;
  using Base::plan_;
  using Base::s_;
  using Base::unpack;
  using Base::x0_;
  using Base::y0_;

  T* const partial_;
  int32_t* const bounds_;  // (panels + 1, filters)

 public:
  CsrConv2d(const CsrConv2dParams& params, const CsrPlan& plan, char* scratch)
      : Base(params, plan, scratch),
        partial_(reinterpret_cast<T*>(scratch + plan.partial_offset)),
        bounds_(reinterpret_cast<int32_t*>(scratch + plan.bounds_offset)) {}

  // False, with part of the output unwritten, when col_idx is not ascending within its range.
  bool run(int64_t begin, int64_t end, RowKernel<V, S> rows) {
    int64_t bounded = -1;  // the chunk whose bounds are known
    int64_t packed = -1;   // the (block, group) whose only panel is packed, when there is one panel
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
      if (bounded != chunk_index && !find_bounds(k0, filters)) return false;
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
          unpack(sums + k * filter, k0 + k, n);
        }
      }
    }
    return true;
  }

 private:
  // Where each filter's nonzeros lie in each panel: row b of bounds_ holds the first entry of every
  // filter at or beyond panel b, so that rows b and b + 1 enclose what panel b multiplies.
  //
  // A column is used as an address, so this also checks that each row ascends within the range.
  bool find_bounds(int64_t k0, int64_t filters) {
    const int32_t* const col = params_.col_idx;
    const int32_t columns = static_cast<int32_t>(s_.columns());
    const int64_t panel_columns = plan_.channel_block * s_.r * s_.s;
    const int64_t panels = plan_.channel_blocks;
    for (int64_t f = 0; f < filters; ++f) {
      const int32_t row_begin = params_.row_ptr[k0 + f], row_end = params_.row_ptr[k0 + f + 1];
      // Negative once an entry leaves [0, columns); within it no difference overflows.
      int32_t bad = 0;
      for (int32_t i = row_begin; i < row_end; ++i) bad |= col[i] | (columns - 1 - col[i]);
      if (bad < 0) return false;
      for (int32_t i = row_begin; i + 1 < row_end; ++i) bad |= col[i + 1] - col[i] - 1;
      if (bad < 0) return false;
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
    return true;
  }
};

template <class V, class S, int MaxVectors>
bool csr_conv2d_typed(const CsrConv2dParams& params, const CsrPlan& plan, int64_t begin,
                      int64_t end, void* scratch) {
  return CsrConv2d<V, S>(params, plan, static_cast<char*>(scratch))
      .run(begin, end, find_row_kernel<V, S, MaxVectors>(plan.ny, plan.nx));
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
