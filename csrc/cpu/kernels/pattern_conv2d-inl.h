// pattern_conv2d on the CPU: y = act(conv(x, W) + bias + residual), W in groups of filters that
// share their columns.
#pragma once
#include "cpu/kernels/pattern_rows-inl.h"
#include "cpu/kernels/tiled_conv2d-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

using cpu::PatternPlan;

// The row loops for one sink, by size of register block.
template <class V, class Sink, int MaxVectors, int Registers>
class PatternLoops {
  PatternKernel<V, Sink> of_size_[cpu::kFilterBlockSizes];

 public:
  explicit PatternLoops(const PatternPlan& p)
      : of_size_{find_pattern_kernel<V, Sink, MaxVectors, Registers, 8>(p.ny, p.nx),
                 find_pattern_kernel<V, Sink, MaxVectors, Registers, 4>(p.ny, p.nx),
                 find_pattern_kernel<V, Sink, MaxVectors, Registers, 2>(p.ny, p.nx),
                 find_pattern_kernel<V, Sink, MaxVectors, Registers, 1>(p.ny, p.nx)} {}

  void operator()(const RowArgs<V>& args, PatternStream<typename V::T> stream,
                  const int32_t* blocks, const Sink& sink) const {
    for (int i = 0; i < cpu::kFilterBlockSizes; ++i) {
      if (blocks[i] > 0) of_size_[i](args, stream, blocks[i], sink);
    }
  }
};

template <class V, class S, int MaxVectors, int Registers>
class PatternRows {
  using T = typename V::T;
  const PatternPlan& plan_;
  const PatternLoops<V, ToPartial<V>, MaxVectors, Registers> rows_;
  const PatternLoops<V, ToTiles<V, S>, MaxVectors, Registers> tile_rows_;
  const PatternLoops<V, ToPixels<V, S>, MaxVectors, Registers> pixel_rows_;

  const auto& loops(const ToPartial<V>&) const { return rows_; }
  const auto& loops(const ToTiles<V, S>&) const { return tile_rows_; }
  const auto& loops(const ToPixels<V, S>&) const { return pixel_rows_; }

 public:
  explicit PatternRows(const PatternPlan& plan)
      : plan_(plan), rows_(plan), tile_rows_(plan), pixel_rows_(plan) {}

  bool new_chunk(int64_t, int64_t, int64_t) { return true; }
  int64_t visits(int64_t chunk, int64_t) const {
    return plan_.chunk_first[chunk + 1] - plan_.chunk_first[chunk];
  }

  template <class Sink>
  void operator()(const RowArgs<V>& args, const ChunkPanel& at, const Sink& sink) const {
    const int64_t first = plan_.values_begin[at.chunk * plan_.channel_blocks + at.panel];
    loops(sink)(args,
                {plan_.runs + at.panel * plan_.blocks + plan_.chunk_first[at.chunk],
                 static_cast<const T*>(plan_.values) + first, plan_.offsets, 0,
                 plan_.filter_of ? plan_.filter_of + at.k0 : nullptr},
                plan_.chunk_blocks + at.chunk * cpu::kFilterBlockSizes, sink);
  }
};

template <class V, class S, int MaxVectors, int Registers>
void pattern_conv2d_typed(const PatternConv2dParams& params, const PatternPlan& plan, int64_t begin,
                          int64_t end, void* scratch) {
  TiledConv2d<V, S> tiled(params, plan, static_cast<char*>(scratch));
  PatternRows<V, S, MaxVectors, Registers> rows(plan);
  tiled.run(begin, end, rows);
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
