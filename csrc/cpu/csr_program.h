// What a csr_conv2d call needs besides activations: the plan, its tables and, for most layers, the
// weight copied into the order in which the kernel reads it.
//
// CSR keeps a filter together; the kernel walks a panel (a block of input channels) filter by
// filter, so in CSR it would jump to another cache line for every filter of every panel and look up
// each column's place in the panel. The copy, a stream of {value, byte offset}, takes the row loop
// from 62-78 to 80-92 GFLOP/s (Zen 4, 3x3 layers at 80-95 %, best panels). Making it takes 0.3 ms
// for 256>256 at 90 % and 1 ms for 512>512, twice a call on a 7x7 map, so programs are kept.
#pragma once
#include "cpu/csr_plan.h"
#include "cpu/tile_program.h"

namespace sparsecnn::cpu {

struct CsrProgram {
  CsrPlan plan;  // its pointers lead into the vectors below
  TileTables tiles;
  std::vector<int64_t> panel_entries;
  std::vector<CsrEntry<float>> entries_float;
  std::vector<CsrEntry<double>> entries_double;
  std::vector<int32_t> counts;

  int64_t bytes() const;
};

// The program of a call, from the cache or new. Null when col_idx is not ascending within its
// range in every row; a plan that is not streamed leaves that check to the kernel. row_ptr must
// have been checked.
std::shared_ptr<const CsrProgram> csr_program(const CsrConv2dParams& params, int64_t nnz,
                                              const TileMachine& machine, int32_t threads,
                                              HashFunction hash);

}  // namespace sparsecnn::cpu
