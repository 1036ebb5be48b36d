// csr_conv2d on the CPU: y = act(conv(x, W) + bias + residual), W in CSR over (K, C/G * R * S).
//
// tiled_conv2d-inl.h says who owns which tile. The program (cpu/csr_program.h) holds the weight in
// the order of its loop: for each filter of the chunk, walk the nonzeros that fall in the panel,
// broadcast the weight, ny * nx FMAs whose memory operand is an aligned vector of the panel. Each
// output is one chain of FMAs in ascending column order whatever the cut: results do not depend on
// the number of threads.
//
// The bound. One FMA with an L1 operand per cycle; a core of the Zen 4 server this was measured on
// does 115 GFLOP/s with operands in registers. The row loop alone, from L1, one thread: 89 GFLOP/s
// on 3x3 64>64 @56 at 90 %, 87 on 128>128 @28, 85 on 512>512 @7 (23 % of whose lanes are padding);
// 92, 91 and 84 at 80 %; 81, 81 and 80 at 95 %. What is left of a call at 90 %, 64>64 @56: packing
// 41 us, storing about 30, Python and dispatcher 20, of 360.
//
// Tried and lost, one thread, 90 % (figures of one run each, interleaved):
//   - walking plain CSR, prefetching three filters ahead, a table from column to address: 71
//     GFLOP/s where the stream does 82-89 (64>64 @56), 72 against 85 (512>512 @7).
//   - packing every block by itself: packing a 3x3 block of rows three times over; sharing it
//     between blocks took 128>128 @28 from 0.47 to 0.42 ms.
//   - packing pointwise layers: 256>64 @56 0.28 ms, in place 0.20; a third of it was the copy.
//   - storing all partial sums and transposing them afterwards: 64>64 @56 0.379 ms, from registers
//     0.357; 512>512 @7 0.470 against 0.444.
//   - prefetching the next block's input when it is in L2 anyway: slower by what it executes; from
//     1 MB on it wins (batch 16: stride 2 128>128 @56 8.85 to 7.85 ms, 64>64 @56 7.2 to 6.7).
//   - prefetching a whole block of an image read in place instead of panel by panel: 256>64 @56
//     0.24 against 0.20 ms.
//   - filters sorted by their number of nonzeros in the panel, so that loop exits are predicted:
//     geometric mean over seven layers 4.83x dense sorted, 5.03x as they are.
//   - 2, 3, 4 filters side by side (more independent chains): 0.96, 1.02, 1.03 of the time over
//     eight cases; the loop waits for L1, not for the FMA latency.
//   - 28 accumulators instead of 14 for 64>64 @56: 76-78 GFLOP/s against 89; twice the partial sums
//     stream through L1 and evict the panel.
// Shifted loads from unpacked rows were not built: the aligned panel also absorbs stride, padding,
// dilation and tails.
#pragma once
#include "cpu/kernels/csr_rows-inl.h"
#include "cpu/kernels/tiled_conv2d-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

using cpu::CsrPlan;

// The row loop over one kind of weights, one instance per sink, chosen once per call.
template <class V, class S, class Weights, int MaxVectors>
class RowLoops {
  RowKernel<V, Weights, ToPartial<V>> rows_;
  RowKernel<V, Weights, ToTiles<V, S>> tile_rows_;
  RowKernel<V, Weights, ToPixels<V, S>> pixel_rows_;

 protected:
  explicit RowLoops(const CsrPlan& plan)
      : rows_(find_row_kernel<V, Weights, ToPartial<V>, MaxVectors>(plan.ny, plan.nx)),
        tile_rows_(find_row_kernel<V, Weights, ToTiles<V, S>, MaxVectors>(plan.ny, plan.nx)),
        pixel_rows_(find_pixel_kernel<V, Weights, ToPixels<V, S>, MaxVectors>(plan.nx)) {}

  void call(const RowArgs<V>& a, const Weights& w, ToPartial<V> to) const { rows_(a, w, to); }
  void call(const RowArgs<V>& a, const Weights& w, ToTiles<V, S> to) const { tile_rows_(a, w, to); }
  void call(const RowArgs<V>& a, const Weights& w, ToPixels<V, S> to) const {
    pixel_rows_(a, w, to);
  }
};

template <class V, class S, int MaxVectors>
class StreamedRows : RowLoops<V, S, Streamed<typename V::T>, MaxVectors> {
  using T = typename V::T;
  const CsrPlan& plan_;

 public:
  explicit StreamedRows(const CsrPlan& plan)
      : RowLoops<V, S, Streamed<T>, MaxVectors>(plan), plan_(plan) {}

  bool new_chunk(int64_t, int64_t, int64_t) { return true; }
  int64_t visits(int64_t, int64_t filters) const { return filters; }

  template <class Sink>
  void operator()(const RowArgs<V>& args, const ChunkPanel& at, const Sink& sink) const {
    const auto* const entries = static_cast<const cpu::CsrEntry<T>*>(plan_.entries);
    const int64_t panels = plan_.channel_blocks;
    this->call(args,
               Streamed<T>{entries + plan_.panel_entries[at.chunk * panels + at.panel],
                           plan_.counts + at.k0 * panels + at.panel * args.filters},
               sink);
  }
};

template <class V, class S, int MaxVectors>
class StoredRows : RowLoops<V, S, Stored<typename V::T, S>, MaxVectors> {
  using T = typename V::T;
  const CsrConv2dParams& params_;
  const CsrPlan& plan_;
  int32_t* const bounds_;  // (panels + 1, filters)

 public:
  StoredRows(const CsrConv2dParams& params, const CsrPlan& plan, char* scratch)
      : RowLoops<V, S, Stored<T, S>, MaxVectors>(plan),
        params_(params),
        plan_(plan),
        bounds_(reinterpret_cast<int32_t*>(scratch + plan.bounds_offset)) {}

  bool new_chunk(int64_t, int64_t k0, int64_t filters) { return find_bounds(k0, filters); }
  int64_t visits(int64_t, int64_t filters) const { return filters; }

  template <class Sink>
  void operator()(const RowArgs<V>& args, const ChunkPanel& at, const Sink& sink) const {
    const int32_t* const first = bounds_ + at.panel * args.filters;
    const int64_t before = at.panel * plan_.channel_block * plan_.shape.r * plan_.shape.s;
    this->call(args,
               Stored<T, S>{static_cast<const S*>(params_.values), params_.col_idx,
                            plan_.tap_offset - before, first, first + args.filters},
               sink);
  }

 private:
  // Where each filter's nonzeros lie in each panel: row b of bounds_ holds the first entry of every
  // filter at or beyond panel b, so that rows b and b + 1 enclose what panel b multiplies.
  //
  // A column is used as an address, so this also checks that each row ascends within the range.
  bool find_bounds(int64_t k0, int64_t filters) {
    const int32_t* const col = params_.col_idx;
    const uint32_t last = static_cast<uint32_t>(plan_.shape.columns()) - 1;
    const int64_t panel_columns = plan_.channel_block * plan_.shape.r * plan_.shape.s;
    const int64_t panels = plan_.channel_blocks;
    for (int64_t f = 0; f < filters; ++f) {
      const int32_t row_begin = params_.row_ptr[k0 + f], row_end = params_.row_ptr[k0 + f + 1];
      // The top bit is set once an entry leaves [0, columns). Unsigned, because any number may
      // stand there; within the range no difference overflows.
      uint32_t bad = 0;
      for (int32_t i = row_begin; i < row_end; ++i) {
        const uint32_t column = static_cast<uint32_t>(col[i]);
        bad |= column | (last - column);
      }
      if (bad >> 31) return false;
      int32_t falling = 0;
      for (int32_t i = row_begin; i + 1 < row_end; ++i) falling |= col[i + 1] - col[i] - 1;
      if (falling < 0) return false;
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

// False, with part of the output unwritten, when col_idx is not ascending within its range.
template <class V, class S, int MaxVectors>
bool csr_conv2d_typed(const CsrConv2dParams& params, const CsrPlan& plan, int64_t begin,
                      int64_t end, void* scratch) {
  char* const base = static_cast<char*>(scratch);
  TiledConv2d<V, S> tiled(params, plan, base);
  if (plan.streamed) {
    StreamedRows<V, S, MaxVectors> rows(plan);
    return tiled.run(begin, end, rows);
  }
  StoredRows<V, S, MaxVectors> rows(params, plan, base);
  return tiled.run(begin, end, rows);
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
