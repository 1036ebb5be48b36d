// What a csr_conv2d call needs besides activations: the plan, its tables and, for most layers, the
// weight copied into the order in which the kernel reads it.
//
// CSR keeps a filter together; the kernel walks a panel (a block of input channels) filter by
// filter, so in CSR it would jump to another cache line for every filter of every panel and look up
// each column's place in the panel. The copy, a stream of {value, byte offset}, takes the row loop
// from 62-78 to 80-92 GFLOP/s (Zen 4, 3x3 layers at 80-95 %, best panels). Making it takes 0.3 ms
// for 256>256 at 90 % and 1 ms for 512>512, twice a call on a 7x7 map, so programs are kept.
//
// Kept how: by the addresses of the weight's arrays, and checked by a hash of their contents on
// every call (kernels/hash-inl.h), because a weight may change in place in ways no counter sees. A
// program that does not match any more is not used; had the hash missed a change, numbers would be
// wrong, but nothing read outside the panel. Programs are kept from the second call with the same
// contents on, so that training steps and the temporaries of gradients leave nothing behind, and
// the least recently used go first.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/params.h"
#include "cpu/csr_plan.h"

namespace sparsecnn::cpu {

struct CsrProgram {
  CsrPlan plan;  // its pointers lead into the vectors below
  std::vector<int32_t> tables;
  std::vector<int64_t> chunk_begin, panel_entries;
  std::vector<CsrEntry<float>> entries_float;
  std::vector<CsrEntry<double>> entries_double;
  std::vector<int32_t> counts;

  int64_t bytes() const;
};

// The program of a call, from the cache or new. Null when col_idx is not ascending within its
// range in every row; a plan that is not streamed leaves that check to the kernel. row_ptr must
// have been checked.
std::shared_ptr<const CsrProgram> csr_program(const CsrConv2dParams& params, int64_t nnz,
                                              const CsrMachine& machine, int32_t threads,
                                              HashFunction hash);

}  // namespace sparsecnn::cpu
