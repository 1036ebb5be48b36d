// pattern_conv2d on the CPU: y = act(conv(x, W) + bias + residual), W in groups of filters that
// share their columns.
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
