// Activations that a kernel may fuse into its epilogue. The numbers are part of the op's
// parameter block; the Python side spells them with the strings below.
#pragma once
#include <cstdint>

namespace sparsecnn {

enum class Activation : int32_t { kNone = 0, kRelu = 1, kRelu6 = 2, kSilu = 3, kHardswish = 4 };

// Legal spellings, in the order of the enumerators.
inline constexpr const char* kActivationNames[] = {"none", "relu", "relu6", "silu", "hardswish"};
inline constexpr int32_t kActivationCount = 5;

}  // namespace sparsecnn
