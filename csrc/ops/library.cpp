// Facts about the library itself: the instruction set in force and what was compiled in.
#include "cpu/kernel_table.h"
#include "ops/check.h"

namespace sparsecnn::ops {
namespace {

std::string isa() { return cpu::kernels().isa; }
bool set_isa(Name name) { return cpu::set_isa(name.text.c_str()); }
bool isa_is_supported(Name name) { return cpu::isa_is_supported(name.text.c_str()); }
bool has_cuda() {
#ifdef SPARSECNN_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(sparsecnn, m) {
  m.def("_isa() -> str");
  m.def("_set_isa(str name) -> bool");
  m.def("_isa_is_supported(str name) -> bool");
  m.def("_has_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(sparsecnn, CompositeExplicitAutograd, m) {
  m.impl("_isa", TORCH_BOX(&isa));
  m.impl("_set_isa", TORCH_BOX(&set_isa));
  m.impl("_isa_is_supported", TORCH_BOX(&isa_is_supported));
  m.impl("_has_cuda", TORCH_BOX(&has_cuda));
}

}  // namespace sparsecnn::ops
