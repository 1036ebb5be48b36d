// The row loop of pattern_conv2d: the register blocks of one size over one panel, for one block of
// output positions. Included by pattern_conv2d-inl.h, whose header explains it.
#pragma once
#include "cpu/kernels/sinks-inl.h"
#include "cpu/pattern_plan.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// What is left of a panel's weights; the loop over the larger blocks leaves it at the smaller ones.
template <class T>
struct PatternStream {
  const cpu::PatternRun* run;
  const T* values;
  const int32_t* offsets;
  int64_t first;             // place of the next filter in the chunk
  const int32_t* filter_of;  // of the chunk, or null
};

// Where the sums of a filter go after the last panel, if they leave from the row loop. Going
// through memory that is in L1 anyway keeps transposes and stores out of the instances of the row
// loop: a fifth of the code, for 1.5 cycles a vector.
template <class V>
struct PatternSink {
  void (*store)(const void* sink, const typename V::T* sums, int32_t ny, int64_t filter);
  const void* sink;
  int32_t ny;
};

template <class V, class Sink, int NX>
void store_filter(const void* sink, const typename V::T* sums, int32_t ny, int64_t filter) {
  for (int32_t y = 0; y < ny; ++y, sums += NX * V::L) {
    typename V::reg acc[1][NX];
#pragma GCC unroll 16
    for (int x = 0; x < NX; ++x) acc[0][x] = V::load(sums + x * V::L);
    static_cast<const Sink*>(sink)->row(y).template store<1, NX>(acc, nullptr, filter);
  }
}

// `blocks` register blocks of F filters.
template <class V, int F, int NY, int NX>
void pattern_rows(const RowArgs<V>& args, PatternStream<typename V::T>& stream, int64_t blocks,
                  const PatternSink<V>& sink) {
  using reg = typename V::reg;
  using T = typename V::T;
  constexpr int kVectors = NY * NX;
  const RowArgs<V> a = args;
  const T* values = stream.values;
  const cpu::PatternRun* run = stream.run;
  const int32_t* const offsets = stream.offsets;
  int64_t place = stream.first;
  T* partial = a.partial + place * kVectors * V::L;
  for (const cpu::PatternRun* const end = run + blocks; run < end; ++run) {
    a.prefetcher->visit();
    reg acc[F][NY][NX];
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
      const reg b = V::set1(a.bias[place + f]);
#pragma GCC unroll 8
      for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) {
          acc[f][y][x] = a.first_panel ? b : V::load(partial + (f * kVectors + y * NX + x) * V::L);
        }
      }
    }
    const int32_t* column = offsets + run->first;
    for (const int32_t* const last = column + run->count; column < last; ++column, values += F) {
      const T* const tap =
          reinterpret_cast<const T*>(reinterpret_cast<const char*>(a.panel) + *column);
      if constexpr (F <= kVectors) {  // the weights stay, the operands pass
        reg w[F];
#pragma GCC unroll 8
        for (int f = 0; f < F; ++f) w[f] = V::set1(values[f]);
#pragma GCC unroll 8
        for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
          for (int x = 0; x < NX; ++x) {
            reg operand = V::load(tap + y * a.row_pitch + x * V::L);
            if (F > 1) pin(operand);
#pragma GCC unroll 8
            for (int f = 0; f < F; ++f) acc[f][y][x] = V::fmadd(w[f], operand, acc[f][y][x]);
          }
        }
      } else {
        reg operand[NY][NX];
#pragma GCC unroll 8
        for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
          for (int x = 0; x < NX; ++x) {
            operand[y][x] = V::load(tap + y * a.row_pitch + x * V::L);
            pin(operand[y][x]);
          }
        }
#pragma GCC unroll 8
        for (int f = 0; f < F; ++f) {
          const reg w = V::set1(values[f]);
#pragma GCC unroll 8
          for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
            for (int x = 0; x < NX; ++x) {
              acc[f][y][x] = V::fmadd(w, operand[y][x], acc[f][y][x]);
            }
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int f = 0; f < F; ++f) {
#pragma GCC unroll 8
      for (int y = 0; y < NY; ++y) {
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) {
          V::store(partial + (f * kVectors + y * NX + x) * V::L, acc[f][y][x]);
        }
      }
    }
    for (int f = 0; sink.store && f < F; ++f) {
      const int64_t filter = stream.filter_of ? stream.filter_of[place + f] : place + f;
      sink.store(sink.sink, partial + f * kVectors * V::L, sink.ny, filter);
    }
    place += F;
    partial += F * kVectors * V::L;
  }
  stream.run = run;
  stream.values = values;
  stream.first = place;
}

template <class V>
using PatternKernel = void (*)(const RowArgs<V>&, PatternStream<typename V::T>&, int64_t,
                               const PatternSink<V>&);

template <class V, int MaxVectors, int Registers, int F, int NY, int NX>
constexpr PatternKernel<V> pattern_kernel() {
  if constexpr (cpu::block_is_legal(NY, NX, cpu::max_block_vectors(F, MaxVectors, Registers))) {
    return &pattern_rows<V, F, NY, NX>;
  } else {
    return nullptr;
  }
}

#define SPARSECNN_CELL(NY, NX) pattern_kernel<V, MaxVectors, Registers, F, NY, NX>()
template <class V, int MaxVectors, int Registers, int F>
PatternKernel<V> find_pattern_kernel(int32_t ny, int32_t nx) {
  static constexpr PatternKernel<V> table[cpu::kMaxNy + 1][cpu::kMaxNx + 1] =
      SPARSECNN_ROWS_OF(SPARSECNN_CELL);
  return table[ny][nx];
}
#undef SPARSECNN_CELL

#define SPARSECNN_CELL(NY, NX) &store_filter<V, Sink, NX>
template <class V, class Sink>
PatternSink<V> find_pattern_sink(const Sink& sink, int32_t ny, int32_t nx) {
  using Store = void (*)(const void*, const typename V::T*, int32_t, int64_t);
  static constexpr Store table[cpu::kMaxNx + 1] = SPARSECNN_ROW_OF(SPARSECNN_CELL, 1);
  return {table[nx], &sink, ny};
}
#undef SPARSECNN_CELL

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
