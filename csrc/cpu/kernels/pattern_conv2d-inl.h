// pattern_conv2d on the CPU: y = act(conv(x, W) + bias + residual), W in groups of filters that
// share their columns.
//
// tiled_conv2d-inl.h says who owns which tile. The program (cpu/pattern_program.h) cuts each filter
// group into register blocks of F = 8, 4, 2 and 1 filters and holds, panel by panel, the columns of
// the groups once and the values of each block, F for a column. The row loop keeps F * ny * nx sums
// in registers; for a column it loads each of ny * nx vectors once and multiplies it by F weights.
// Channels that no filter reads are neither packed nor loaded. Each output is one chain of FMAs in
// ascending column order whatever the cut: results do not depend on the number of threads, nor on
// the pattern a weight is stored in.
//
// The bound. With F >= 2 an FMA needs at most 0.57 loads, so one FMA per cycle whether its operand
// is in L1 or on its way: 115 GFLOP/s on a core of the Zen 4 server this was measured on, where
// csr_conv2d, with a load in each FMA, reaches 92. Whole calls, one thread, AVX-512, best of 25,
// shape-wise zeros (csr_conv2d on the same weight, same run):
//   3x3 64>64 @56     50 %  99 (77) GFLOP/s   70 %  92 (78)   90 %  68 (57)
//   3x3 128>128 @28   50 % 103 (79)           70 % 101 (83)   90 %  88 (65)
//   3x3 256>256 @56   50 % 102 (77)           70 % 101 (77)   90 %  88 (71)
//   3x3 512>512 @7    50 %  70 (43)           70 %  73 (48)   90 %  69 (49)   (23 % padded lanes)
// What is missing at 90 % is packing and storing, which do not shrink with the weight.
// A filter alone (F = 1) is csr_conv2d's loop, and its rate: 0.92-1.0 of it.
//
// Tried and lost, one thread:
//   - leaving the loads to the compiler: it folds each into all F of its FMAs, and the loop waits
//     for L1 as csr_conv2d does; pinned to a register, 64>64 @56 at 50 % went from 1.43 to 1.16 ms.
//   - sums to the output from registers, as csr_conv2d stores them: five instances of every loop,
//     8.3 MB of code and seven minutes of compiling for one instruction set; through L1 it is 0.9.
//   - columns in the order of the format: lone filters jump through them, 1024>256 @14 at 50 %
//     0.89 ms; panel by panel 0.78.
//   - 8 filters x 2 vectors of an image read in place: each column is another page, 256>64 @56 at
//     50 % 0.87 ms; 2 x 14 in 33 channels 0.57.
//   - 4 filters x 7 vectors was not built: 28 sums, 4 weights and an operand are one register too
//     many.
#pragma once
#include "cpu/kernels/pattern_rows-inl.h"
#include "cpu/kernels/tiled_conv2d-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

using cpu::PatternPlan;

template <class V, int MaxVectors, int Registers>
class PatternRows {
  using T = typename V::T;
  const PatternPlan& plan_;
  const PatternKernel<V> of_size_[cpu::kFilterBlockSizes];

  PatternSink<V> sink_of(const ToPartial<V>&) const { return {}; }
  template <class Sink>
  PatternSink<V> sink_of(const Sink& sink) const {
    return find_pattern_sink<V>(sink, plan_.ny, plan_.nx);
  }

 public:
  explicit PatternRows(const PatternPlan& p)
      : plan_(p),
        of_size_{find_pattern_kernel<V, MaxVectors, Registers, 8>(p.ny, p.nx),
                 find_pattern_kernel<V, MaxVectors, Registers, 4>(p.ny, p.nx),
                 find_pattern_kernel<V, MaxVectors, Registers, 2>(p.ny, p.nx),
                 find_pattern_kernel<V, MaxVectors, Registers, 1>(p.ny, p.nx)} {}

  bool new_chunk(int64_t, int64_t, int64_t) { return true; }
  int64_t visits(int64_t chunk, int64_t) const {
    return plan_.chunk_first[chunk + 1] - plan_.chunk_first[chunk];
  }

  template <class Sink>
  void operator()(const RowArgs<V>& args, const ChunkPanel& at, const Sink& sink) const {
    const int64_t first = plan_.values_begin[at.chunk * plan_.channel_blocks + at.panel];
    PatternStream<T> stream{plan_.runs + at.panel * plan_.blocks + plan_.chunk_first[at.chunk],
                            static_cast<const T*>(plan_.values) + first, plan_.offsets, 0,
                            plan_.filter_of ? plan_.filter_of + at.k0 : nullptr};
    const int32_t* const blocks = plan_.chunk_blocks + at.chunk * cpu::kFilterBlockSizes;
    const PatternSink<V> to = sink_of(sink);
    for (int i = 0; i < cpu::kFilterBlockSizes; ++i) {
      if (blocks[i] > 0) of_size_[i](args, stream, blocks[i], to);
    }
  }
};

template <class V, class S, int MaxVectors, int Registers>
void pattern_conv2d_typed(const PatternConv2dParams& params, const PatternPlan& plan, int64_t begin,
                          int64_t end, void* scratch) {
  TiledConv2d<V, S> tiled(params, plan, static_cast<char*>(scratch));
  PatternRows<V, MaxVectors, Registers> rows(plan);
  tiled.run(begin, end, rows);
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
