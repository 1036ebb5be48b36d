// What a pattern_conv2d call needs besides activations: the plan, its tables and the weight copied
// into the order in which the kernel reads it, chunk by chunk, panel by panel.
//
// The copy costs about as much as reading the weight twice and is kept between calls like that of
// csr_conv2d (cpu/tile_program.h).
#pragma once
#include "cpu/pattern_plan.h"
#include "cpu/tile_program.h"

namespace sparsecnn::cpu {

struct PatternProgram {
  PatternPlan plan;  // its pointers lead into the vectors below
  TileTables tiles;
  std::vector<int32_t> channel, filter_of, by_filter, chunk_blocks, offsets;
  std::vector<int64_t> chunk_first, values_begin;
  std::vector<PatternRun> runs;
  std::vector<float> values_float;
  std::vector<double> values_double;

  int64_t bytes() const;
};

// The program of a call, from the cache or new. `count` values. Null when the arrays are corrupt:
// pointers that fall or do not end with their arrays, a filter group across convolution groups,
// filters that are no permutation of their group, columns that do not ascend within their range.
std::shared_ptr<const PatternProgram> pattern_program(const PatternConv2dParams& params,
                                                      int64_t count, int64_t column_count,
                                                      const TileMachine& machine, int32_t threads,
                                                      HashFunction hash);

}  // namespace sparsecnn::cpu
