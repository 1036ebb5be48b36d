// depthwise_conv2d on the CPU: y = act(conv(x, W) + bias + residual), one R x S filter per output
// channel, K = m * C of them, output channel k reading input channel k / m (Howard et al.,
// "MobileNets", 2017).
//
// Data. x and y as they come; the filters of a chunk are repacked per call, NHWC (vector of
// channels)(bias, taps)[L], NCHW one plane's taps.
//
// Who owns what. NHWC (depthwise_nhwc-inl.h): lanes are output channels. An item is an output row
// of a chunk of channels; it is cut into tiles of up to 14 output columns of L channels, whose sums
// stay in registers while a filter row slides over the input row: an input vector is loaded once
// per filter row and feeds all outputs whose window covers it. Channels run inside columns, rows
// inside those, so that the next row finds its input in L1. NCHW (depthwise_nchw-inl.h): lanes are
// output columns. An item is a band of rows of one plane, cut into tiles of up to 14 rows of L
// columns; for one filter column, an input row is loaded once (at its shift, unaligned, masked at
// the border) and feeds all R output rows. Stride 2 thins two vectors out into the even and the odd
// columns, which serve two taps. Where at most half a vector of columns is left, a vector holds two
// half rows, one tile apart. Planes of at most 8 columns (depthwise_small-inl.h) are transposed to
// (pixel, channel) in L1 and go through the NHWC kernels. bfloat16 NCHW converts the rows of a tile
// first. Filters of 3, 5, 7 have tiles of their own at strides 1 and 2; all others a load per FMA.
// Sums run over (r, s) in NHWC and over (s, r) in NCHW, whatever the cut: the number of threads
// does not change a bit.
//
// The bound. FMAs: 3x3 does 9 per vector of outputs, one per cycle, and moves 128 bytes for them; a
// core of the Zen 4 server this was measured on does 115 GFLOP/s and copies 90 GB/s within L3. So
// 3x3 at stride 1 is bound by FMAs (96 @56: 47 us, the copy 27) while data come from caches, stride
// 2 by memory (144 @56: FMAs 18, copy 25 us); 5x5 and 7x7 by FMAs. The kernels alone, one thread,
// us (share of the FMA bound), NHWC / NCHW: 3x3 96 @56 56 (84 %) / 66 (71 %), 576 @14 20 (89) / 29
// (60), 32 @112 75 (83) / 79 (79), 960 @7 9 (82) / 23 (32), stride 2 144 @56 40 / 53 (63 % and 47 %
// of the copy), 5x5 240 @28 81 (101, border taps are skipped) / 101 (81), 672 @14 54 (106) / 74
// (77), 7x7 96 @56 255 (100) / 275 (93).
//
// Tried and lost, same machine, one thread:
//   - the load of an input vector folded into each FMA (what the compiler does when left alone): 96
//     @56 NHWC 94 us, kept in a register 57; the test for the border said to be likely is half of
//     that, since else the arithmetic is moved out of line and spills.
//   - masks computed per tap: 96 @56 NCHW 105 us, from a table 83; divisions per plane and validity
//     of rows bit by bit: 83, without 66.
//   - one call per vector of channels: 16 @28 NHWC 3.7 us, the loop inside 2.6.
//   - every end of a tile inlined (activation, residual): three times the code, and 96 @56 NCHW 83
//     us against 76.
//   - NHWC rows outside columns: 96 @56 63 us against 57; there tiles of 4, 7, 8, 14 columns: 74,
//     66, 65, 63.
//   - prefetching the next row's input column by column from memory: no gain; in the order of
//     memory batch 16 of 96 @56 4.5 to 3.3 ms, 5x5 240 @28 2.4 to 1.8; the lines of the output too:
//     no gain, and in L3 (batch 2 of 96 @56) 118 to 138 us. The next plane in NCHW: 2.87 against
//     2.85 ms.
//   - 960 @7 in NCHW in place: pairs of rows 73 us, single rows 48, transposed 23.
#pragma once
#include "cpu/kernels/depthwise_nchw-inl.h"
#include "cpu/kernels/depthwise_nhwc-inl.h"
#include "cpu/kernels/depthwise_small-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

template <class V, class S, int MaxTile>
void depthwise_conv2d_typed(const DepthwiseConv2dParams& params, const cpu::DepthwisePlan& plan,
                            int64_t begin, int64_t end, void* scratch) {
  char* const own = static_cast<char*>(scratch);
  if (params.layout == Layout::kNHWC) {
    DepthwiseNhwc<V, S, MaxTile>(params, plan, own).run(begin, end);
    return;
  }
  if constexpr (sizeof(S) == sizeof(typename V::T)) {
    if (plan.transposed) return DepthwiseSmall<V, S, MaxTile>(params, plan, own).run(begin, end);
  }
  DepthwiseNchw<V, S, MaxTile>(params, plan, own).run(begin, end);
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
