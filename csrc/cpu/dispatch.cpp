// Choice of the instruction set, once per process.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/kernel_table.h"

namespace sparsecnn {

// What the kernel units define for one instruction set, and its table. An op adds a line to each.
#define SPARSECNN_UNITS(isa)                            \
  namespace isa {                                       \
  extern const cpu::CsrKernels csr_kernels;             \
  extern const cpu::ChainKernels chain_kernels;         \
  extern const cpu::DepthwiseKernels depthwise_kernels; \
  extern const cpu::PatternKernels pattern_kernels;     \
  extern const cpu::PointwiseKernels pointwise_kernels; \
  extern const cpu::WinogradKernels winograd_kernels;   \
  }
#define SPARSECNN_TABLE(isa, name) \
  {name,                           \
   isa::csr_kernels,               \
   isa::chain_kernels,             \
   isa::depthwise_kernels,         \
   isa::pattern_kernels,           \
   isa::pointwise_kernels,         \
   isa::winograd_kernels}

SPARSECNN_UNITS(isa_scalar)
#if defined(__x86_64__)
SPARSECNN_UNITS(isa_avx2)
SPARSECNN_UNITS(isa_avx512)
#endif

namespace cpu {
namespace {

const KernelTable kScalarKernels = SPARSECNN_TABLE(isa_scalar, "scalar");
#if defined(__x86_64__)
const KernelTable kAvx2Kernels = SPARSECNN_TABLE(isa_avx2, "avx2");
const KernelTable kAvx512Kernels = SPARSECNN_TABLE(isa_avx512, "avx512");
#endif

struct Candidate {
  const KernelTable* table;
  bool supported;
};

// Best first. __builtin_cpu_supports also asks whether the operating system saves the registers.
const Candidate* candidates(int* count) {
#if defined(__x86_64__)
  static const Candidate list[] = {
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&kScalarKernels, true},
  };
#else
  static const Candidate list[] = {{&kScalarKernels, true}};
#endif
  *count = sizeof(list) / sizeof(list[0]);
  return list;
}

const KernelTable* find(const char* name) {
  int n;
  const Candidate* c = candidates(&n);
  for (int i = 0; i < n; ++i) {
    if (c[i].supported && (name == nullptr || std::strcmp(c[i].table->isa, name) == 0)) {
      return c[i].table;
    }
  }
  return nullptr;
}

const KernelTable* initial() {
  const char* name = std::getenv("SPARSECNN_ISA");
  if (name == nullptr || *name == '\0') return find(nullptr);
  if (const KernelTable* t = find(name)) return t;
  std::fprintf(stderr,
               "sparsecnn: SPARSECNN_ISA=%s is unknown or not supported here; "
               "legal: scalar, avx2, avx512; using %s\n",
               name, find(nullptr)->isa);
  return find(nullptr);
}

std::atomic<const KernelTable*>& current() {
  static std::atomic<const KernelTable*> table{initial()};
  return table;
}

}  // namespace

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed); }

bool isa_is_supported(const char* name) { return name != nullptr && find(name) != nullptr; }

bool set_isa(const char* name) {
  const KernelTable* t = name == nullptr ? nullptr : find(name);
  if (t == nullptr) return false;
  current().store(t, std::memory_order_relaxed);
  return true;
}

}  // namespace cpu
}  // namespace sparsecnn
