// Checks and small conversions shared by the ops' glue. Everything here runs before any work; the
// Python layer raises the same conditions as ValueError / TypeError with the value in the message,
// so what is left for this file is what keeps a direct torch.ops call from touching foreign memory.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "core/params.h"

namespace sparsecnn::ops {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A string argument of an op. torch 2.13's own conversion to std::string leaks one string a call.
struct Name {
  std::string text;
};

inline DType dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, op,
                      ": expected x float32, float16, bfloat16 or float64, got scalar type ",
                      static_cast<int>(t.scalar_type()));
  }
  return DType::kFloat32;
}

inline Activation activation_of(const std::string& name, const char* op) {
  for (int32_t i = 0; i < kActivationCount; ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  }
  STD_TORCH_CHECK(false, op, ": expected activation none, relu, relu6, silu or hardswish, got '",
                  name, "'");
  return Activation::kNone;
}

// Whether strides are those of a dense tensor whose dimensions nest in `order` (outermost first);
// a dimension of size 1 may have any stride.
inline bool is_dense_in_order(const Tensor& t, const int (&order)[4]) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (int i = 3; i >= 0; --i) {
    const int64_t size = sizes[order[i]];
    if (size == 0) return order[1] == 1;
    if (size != 1 && strides[order[i]] != expected) return false;
    expected *= size;
  }
  return true;
}

inline constexpr int kOrderNchw[4] = {0, 1, 2, 3}, kOrderNhwc[4] = {0, 2, 3, 1};

// The layout an op works in: NCHW when x is contiguous, NHWC when only channels_last, and NCHW
// after a copy otherwise.
inline Layout layout_of(const Tensor& x) {
  if (is_dense_in_order(x, kOrderNchw)) return Layout::kNCHW;
  return is_dense_in_order(x, kOrderNhwc) ? Layout::kNHWC : Layout::kNCHW;
}

inline Tensor to_layout(const Tensor& t, Layout layout) {
  const bool nhwc = layout == Layout::kNHWC;
  if (is_dense_in_order(t, nhwc ? kOrderNhwc : kOrderNchw)) return t;
  return torch::stable::contiguous(t, nhwc ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Without the way through the dispatcher where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor empty_like_layout(const Tensor& x, const std::vector<int64_t>& size, Layout layout) {
  return torch::stable::empty(
      size, x.scalar_type(), torch::headeronly::Layout::Strided, x.device(), false,
      layout == Layout::kNHWC ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline void check_same(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), op, ": expected ", name,
                  " of the dtype of x (scalar type ", static_cast<int>(x.scalar_type()),
                  "), got scalar type ", static_cast<int>(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == x.device(), op, ": expected ", name, " on the device of x");
}

// An index array of a packed weight, contiguous.
inline Tensor index_array(const Tensor& t, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.scalar_type() == ScalarType::Int, op, ": expected ", name,
                  " a 1-d int32 tensor");
  STD_TORCH_CHECK(t.device() == x.device(), op, ": expected ", name, " on the device of x");
  return as_contiguous(t);
}

inline const int32_t* indices_of(const Tensor& t) {
  return static_cast<const int32_t*>(t.const_data_ptr());
}

}  // namespace sparsecnn::ops

namespace torch::stable::detail {

template <>
struct ToImpl<sparsecnn::ops::Name> {
  static sparsecnn::ops::Name call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* text = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    sparsecnn::ops::Name name{std::string(text, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};

}  // namespace torch::stable::detail
