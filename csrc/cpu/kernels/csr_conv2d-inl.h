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

// How many filters ahead unstreamed weights are prefetched; measured on Zen 4.
constexpr int64_t kPrefetchFilters = 3;
static_assert(kPrefetchFilters <= cpu::kBoundsPad, "the bounds are padded for the look-ahead");

// The nonzeros of one panel in the order of the kernel, filter after filter.
template <class T>
struct Streamed {
  const cpu::CsrEntry<T>* entry;
  const int32_t* counts;  // of each filter

  template <int MaxVectors>
  static constexpr int max_vectors() {
    return MaxVectors;
  }

  // Calls use(value, tap vectors) for every nonzero of the next filter.
  template <class Use>
  SPARSECNN_INLINE void filter(int64_t f, const T* panel, Use&& use) {
    for (const cpu::CsrEntry<T>* const end = entry + counts[f]; entry < end; ++entry) {
      use(entry->value,
          reinterpret_cast<const T*>(reinterpret_cast<const char*>(panel) + entry->offset));
    }
  }
};

// The same from plain CSR.
template <class T, class S>
struct Stored {
  const S* values;
  const int32_t* col_idx;
  const int32_t* tap_offset;  // by column, in elements
  const int32_t* begin;       // (filters): first entry of each filter in this panel
  const int32_t* end;         // (filters): one past the last

  template <int>
  static constexpr int max_vectors() {
    return cpu::kStoredVectors;
  }

  template <class Use>
  SPARSECNN_INLINE void filter(int64_t f, const T* panel, Use&& use) {
    // A filter touches a few lines of weights at an address no hardware prefetcher guesses. `begin`
    // is followed by kBoundsPad entries, so that looking ahead needs no test.
    const int64_t ahead = f + kPrefetchFilters;
    for (int32_t i = begin[ahead]; i < end[ahead]; i += 16) {
      __builtin_prefetch(values + i);
      __builtin_prefetch(col_idx + i);
    }
    for (int32_t i = begin[f]; i < end[f]; ++i) {
      use(static_cast<T>(to_acc(values[i])), panel + tap_offset[col_idx[i]]);
    }
  }
};

// What the row loop needs, gathered so that its signature stays short.
template <class V>
struct RowArgs {
  const typename V::T* panel;
  ptrdiff_t row_pitch;        // elements between packed rows
  const typename V::T* bias;  // (filters of the chunk)
  bool first_panel;           // start from the bias, not from the partial sums
  int64_t filters;            // of the chunk
  typename V::T* partial;     // (filters, NY, NX, L)
  Prefetcher* prefetcher;
};

// Where the sums of a filter go: back to the partial sums ...
template <class V>
struct ToPartial {
  template <int NY, int NX>
  SPARSECNN_INLINE void store(typename V::reg (&acc)[NY][NX], typename V::T* partial, int64_t) {
#pragma GCC unroll 8
    for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
      for (int x = 0; x < NX; ++x) V::store(partial + (y * NX + x) * V::L, acc[y][x]);
    }
  }
};

// ... or, from the last panel of an NCHW layer, finished to the output: lanes that are tiles are
// transposed back to rows of pixels while they are in registers ...
template <class V, class S>
struct ToTiles {
  const Finish<V, S>& finish;
  const int64_t* offset;  // (NY, L): of a lane's row in filter 0
  const uint32_t* mask;   // (NY, L): its pixels
  int64_t plane;          // elements between filters

  template <int NY, int NX>
  SPARSECNN_INLINE void store(typename V::reg (&acc)[NY][NX], typename V::T*, int64_t f) {
    constexpr int L = V::L, H = L / 2;
    S* const y0 = finish.y + f * plane;
#pragma GCC unroll 8
    for (int y = 0; y < NY; ++y) {
      const int64_t* const to = offset + y * L;
      const uint32_t* const m = mask + y * L;
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) __builtin_prefetch(y0 + to[l] + kPrefetchOut * plane, 1);
      if constexpr (NX <= H) {
        typename V::reg r[H];
#pragma GCC unroll 8
        for (int j = 0; j < H; ++j) r[j] = j < NX ? acc[y][j < NX ? j : 0] : V::zero();
        V::transpose_pairs(r);
#pragma GCC unroll 8
        for (int l = 0; l < H; ++l) {
          if (m[l] | m[l + H]) {
            finish.pair(r[l], to[l] + f * plane, m[l], to[l + H] + f * plane, m[l + H]);
          }
        }
      } else {
#pragma GCC unroll 16
        for (int x0 = 0; x0 < NX; x0 += L) {
          typename V::reg r[L];
#pragma GCC unroll 16
          for (int j = 0; j < L; ++j) {
            r[j] = x0 + j < NX ? acc[y][x0 + j < NX ? x0 + j : 0] : V::zero();
          }
          V::transpose(r);
#pragma GCC unroll 16
          for (int l = 0; l < L; ++l) {
            const uint32_t now = m[l] >> x0 & ((1u << L) - 1u);
            if (now) finish(r[l], to[l] + f * plane + x0, now);
          }
        }
      }
    }
  }
};

// ... and lanes that are pixels are stored as they are.
template <class V, class S>
struct ToPixels {
  const Finish<V, S>& finish;
  int64_t offset, pitch;  // of the block's first pixel in filter 0; elements between filters
  int64_t pixels;         // left in the row of pixels

  template <int NY, int NX>
  SPARSECNN_INLINE void store(typename V::reg (&acc)[NY][NX], typename V::T*, int64_t f) {
    static_assert(NY == 1, "a row of pixels");
#pragma GCC unroll 16
    for (int x = 0; x < NX; ++x) {
      const uint32_t mask = range_mask<V::L>(x * V::L, 0, pixels);
      if (mask) finish(acc[0][x], offset + f * pitch + x * V::L, mask);
    }
  }
};

// All filters of the chunk over one panel, for one block of output positions.
template <class V, class Weights, class Sink, int NY, int NX>
void csr_rows(const RowArgs<V>& args, Weights weights, Sink sink) {
  using reg = typename V::reg;
  using T = typename V::T;
  const RowArgs<V> a = args;
  T* partial = a.partial;
  for (int64_t f = 0; f < a.filters; ++f, partial += NY * NX * V::L) {
    a.prefetcher->visit();
    reg acc[NY][NX];
    if (a.first_panel) {
      const reg b = V::set1(a.bias[f]);
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
    weights.filter(f, a.panel, [&](T value, const T* tap) __attribute__((always_inline)) {
      const reg w = V::set1(value);
#pragma GCC unroll 8
      for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) {
          acc[y][x] = V::fmadd(w, V::load(tap + y * a.row_pitch + x * V::L), acc[y][x]);
        }
      }
    });
    sink.template store<NY, NX>(acc, partial, f);
  }
}

template <class V, class Weights, class Sink>
using RowKernel = void (*)(const RowArgs<V>&, Weights, Sink);

template <class V, class Weights, class Sink, int MaxVectors, int NY, int NX>
constexpr RowKernel<V, Weights, Sink> row_kernel() {
  if constexpr (cpu::csr_block_is_legal(NY, NX, Weights::template max_vectors<MaxVectors>())) {
    return &csr_rows<V, Weights, Sink, NY, NX>;
  } else {
    return nullptr;
  }
}

#define SPARSECNN_CELL(NY, NX) row_kernel<V, Weights, Sink, MaxVectors, NY, NX>()
#define SPARSECNN_ROW(NY)                                                                       \
  {                                                                                             \
    nullptr, SPARSECNN_CELL(NY, 1), SPARSECNN_CELL(NY, 2), SPARSECNN_CELL(NY, 3),               \
        SPARSECNN_CELL(NY, 4), SPARSECNN_CELL(NY, 5), SPARSECNN_CELL(NY, 6),                    \
        SPARSECNN_CELL(NY, 7), SPARSECNN_CELL(NY, 8), nullptr, SPARSECNN_CELL(NY, 10), nullptr, \
        SPARSECNN_CELL(NY, 12), nullptr, SPARSECNN_CELL(NY, 14)                                 \
  }

template <class V, class Weights, class Sink, int MaxVectors>
RowKernel<V, Weights, Sink> find_row_kernel(int32_t ny, int32_t nx) {
  static constexpr RowKernel<V, Weights, Sink> table[cpu::kMaxNy + 1][cpu::kMaxNx + 1] = {
      {}, SPARSECNN_ROW(1), SPARSECNN_ROW(2), SPARSECNN_ROW(3), SPARSECNN_ROW(4), {},
      {}, SPARSECNN_ROW(7)};
  return table[ny][nx];
}

template <class V, class Weights, class Sink, int MaxVectors>
RowKernel<V, Weights, Sink> find_pixel_kernel(int32_t nx) {
  static constexpr RowKernel<V, Weights, Sink> table[cpu::kMaxNx + 1] = SPARSECNN_ROW(1);
  return table[nx];
}

#undef SPARSECNN_ROW
#undef SPARSECNN_CELL

template <class V, class S>
class CsrConv2d : private CsrTiles<V, S> {
  using Base = CsrTiles<V, S>;
  using T = typename V::T;
  using Base::finish_;
  using Base::in_place;
  using Base::L;
  using Base::list_rows;
  using Base::place_block;
  using Base::prefetch_in_place;
  using Base::prefetch_rows;
  using Base::worth_prefetching;
  using Base::lane_;
  using Base::pack;
  using Base::panel_;
  using Base::params_;
  using Base::place_rows;
  using Base::plan_;
  using Base::s_;
  using Base::unpack;
  using Base::x0_;
  using Base::y0_;

  T* const partial_;
  T* const bias_;          // of the chunk, zeros where there is none
  int32_t* const bounds_;  // (panels + 1, filters), for weights that are not streamed

 public:
  CsrConv2d(const CsrConv2dParams& params, const CsrPlan& plan, char* scratch)
      : Base(params, plan, scratch),
        partial_(reinterpret_cast<T*>(scratch + plan.partial_offset)),
        bias_(reinterpret_cast<T*>(scratch + plan.bias_offset)),
        bounds_(reinterpret_cast<int32_t*>(scratch + plan.bounds_offset)) {}

  // False, with part of the output unwritten, when col_idx is not ascending within its range.
  template <int MaxVectors>
  bool run(int64_t begin, int64_t end) {
    if (plan_.streamed) {
      const auto* const entries = static_cast<const cpu::CsrEntry<T>*>(plan_.entries);
      return run<MaxVectors, Streamed<T>>(
          begin, end, [](int64_t, int64_t) { return true; },
          [&](int64_t chunk, int64_t k0, int64_t panel, int64_t filters) -> Streamed<T> {
            return {entries + plan_.panel_entries[chunk * plan_.channel_blocks + panel],
                    plan_.counts + k0 * plan_.channel_blocks + panel * filters};
          });
    }
    return run<MaxVectors, Stored<T, S>>(
        begin, end, [&](int64_t k0, int64_t filters) { return find_bounds(k0, filters); },
        [&](int64_t, int64_t, int64_t panel, int64_t filters) -> Stored<T, S> {
          const int32_t* const first = bounds_ + panel * filters;
          return {static_cast<const S*>(params_.values), params_.col_idx,
                  plan_.tap_offset - panel * plan_.channel_block * s_.r * s_.s, first,
                  first + filters};
        });
  }

 private:
  // new_chunk(k0, filters) -> bool is told when the chunk changes; weights(chunk, k0, panel,
  // filters) are its nonzeros in a panel.
  template <int MaxVectors, class Weights, class NewChunk, class GetWeights>
  bool run(int64_t begin, int64_t end, NewChunk&& new_chunk, GetWeights&& weights) {
    const bool nhwc = params_.layout == Layout::kNHWC;
    const auto rows = find_row_kernel<V, Weights, ToPartial<V>, MaxVectors>(plan_.ny, plan_.nx);
    const auto tile_rows =
        find_row_kernel<V, Weights, ToTiles<V, S>, MaxVectors>(plan_.ny, plan_.nx);
    const auto pixel_rows = find_pixel_kernel<V, Weights, ToPixels<V, S>, MaxVectors>(plan_.nx);
    int64_t row_offset[cpu::kMaxNy * L];
    uint32_t row_mask[cpu::kMaxNy * L];
    int64_t current = -1;  // chunk whose bias is loaded
    int64_t packed = -1;   // the (block, group) whose only panel is packed, when there is one panel
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item % plan_.filter_chunks;
      const int64_t block_and_group = item / plan_.filter_chunks;
      const int64_t group = block_and_group % s_.groups;
      const int64_t following = block_and_group + 1;
      const bool prefetch = following * plan_.filter_chunks < end && worth_prefetching();
      if (prefetch) {
        place_block(following / s_.groups);
        list_rows(following % s_.groups * s_.channels_per_group());
      }
      place_block(block_and_group / s_.groups);
      const int64_t y0 = y0_, x0 = x0_;

      const int64_t chunk_index = group * plan_.filter_chunks + chunk;
      const int64_t k0 = plan_.chunk_begin[chunk_index];
      const int64_t filters = plan_.chunk_begin[chunk_index + 1] - k0;
      if (filters == 0) continue;
      if (current != chunk_index) {
        if (!new_chunk(k0, filters)) return false;
        const S* const bias = static_cast<const S*>(params_.bias);
        for (int64_t f = 0; f < filters; ++f) bias_[f] = bias ? T(to_acc(bias[k0 + f])) : T(0);
        current = chunk_index;
      }
      const int64_t cg = s_.channels_per_group();
      const ptrdiff_t filter = static_cast<ptrdiff_t>(plan_.ny) * plan_.nx * L;
      Prefetcher prefetcher = prefetch ? prefetch_rows(filters) : Prefetcher{};
      RowArgs<V> args{};
      args.prefetcher = &prefetcher;
      args.row_pitch = static_cast<ptrdiff_t>(plan_.cols) * L;
      args.bias = bias_;
      args.filters = filters;
      for (int64_t b = 0; b < plan_.channel_blocks; ++b) {
        const int64_t c0 = b * plan_.channel_block;
        const int64_t c1 = c0 + plan_.channel_block < cg ? c0 + plan_.channel_block : cg;
        const T* panel = panel_;
        if (plan_.in_place) {
          panel = in_place(group * cg + c0, x0);
          prefetcher = prefetch_in_place(b, group * cg, x0, filters);
        } else if (plan_.channel_blocks > 1 || packed != block_and_group) {
          pack(group * cg + c0, c1 - c0);
          packed = block_and_group;
        }
        args.first_panel = b == 0;
        for (int64_t i = 0; i < plan_.super_y * plan_.super_x; ++i) {
          const int64_t y = i / plan_.super_x * plan_.ny, x = i % plan_.super_x * plan_.nx;
          if (y0 + y >= plan_.tile_h || x0 + x >= plan_.tile_w) continue;
          args.panel = panel + (y * plan_.cols + x) * L;
          args.partial = partial_ + i * filters * filter;
          const Weights nonzeros = weights(chunk_index, k0, b, filters);
          if (nhwc || b < plan_.channel_blocks - 1) {
            rows(args, nonzeros, {});
          } else if (plan_.interleaved) {
            const int64_t p0 = (x0 + x) * L;
            const int64_t row = lane_[0].image * s_.k + k0;
            pixel_rows(args, nonzeros, {finish_, row * s_.q + p0, s_.q, s_.q - p0});
          } else {
            y0_ = y0 + y;
            x0_ = x0 + x;
            place_rows(k0, row_offset, row_mask);
            tile_rows(args, nonzeros, {finish_, row_offset, row_mask, s_.p * s_.q});
          }
        }
      }
      for (int64_t i = 0; nhwc && i < plan_.super_y * plan_.super_x; ++i) {
        y0_ = y0 + i / plan_.super_x * plan_.ny;
        x0_ = x0 + i % plan_.super_x * plan_.nx;
        if (y0_ >= plan_.tile_h || x0_ >= plan_.tile_w) continue;
        unpack(partial_ + i * filters * filter, k0, filters);
      }
    }
    return true;
  }

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
      .template run<MaxVectors>(begin, end);
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
