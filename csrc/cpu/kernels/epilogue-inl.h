// How the CPU kernels finish a vector of outputs: residual, activation, conversion, store.
#pragma once
#include "core/activation.h"
#include "cpu/vec.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// Bits [lo, hi) of a mask over positions [first, first + L).
template <int L>
SPARSECNN_INLINE uint32_t range_mask(int64_t first, int64_t lo, int64_t hi) {
  int64_t a = lo - first, b = hi - first;
  a = a < 0 ? 0 : (a > L ? L : a);
  b = b < 0 ? 0 : (b > L ? L : b);
  if (b <= a) return 0;
  return ((1u << b) - 1u) & ~((1u << a) - 1u);
}

template <class V>
SPARSECNN_INLINE typename V::reg activate(typename V::reg v, Activation activation) {
  using reg = typename V::reg;
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:  // max(0, v) in this order keeps a NaN
      return V::max(V::zero(), v);
    case Activation::kRelu6:
      return V::min(V::set1(6), V::max(V::zero(), v));
    case Activation::kSilu: {
      const reg e = V::exp(V::mul(v, V::set1(-1)));
      return V::div(v, V::add(V::set1(1), e));
    }
    case Activation::kHardswish: {
      const reg t = V::min(V::set1(6), V::max(V::zero(), V::add(v, V::set1(3))));
      return V::mul(v, V::mul(t, V::set1(typename V::T(1) / 6)));
    }
  }
  return v;
}

// An activation known at compile time.
template <Activation A>
struct ActivationConstant {
  static constexpr Activation value = A;
};

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

template <int L>
constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << L) - 1);

// A vector of storage at any address of which only the lanes of `mask` exist; whole vectors of the
// type of accumulation take the plain instruction.
template <class V, class S>
SPARSECNN_INLINE typename V::reg load_some(const S* p, uint32_t mask) {
  if constexpr (kSame<S, typename V::T>) {
    if (mask == kAllLanes<V::L>) return V::load_any(p);
  }
  return V::load_mask(p, mask);
}
template <class V, class S>
SPARSECNN_INLINE void store_some(S* p, typename V::reg v, uint32_t mask) {
  if constexpr (kSame<S, typename V::T>) {
    if (mask == kAllLanes<V::L>) return V::store_any(p, v);
  }
  V::store_mask(p, v, mask);
}

// Residual, activation and store of one vector of neighbouring output elements.
template <class V, class S>
struct Finish {
  S* y;
  const S* residual;  // like y, or null
  Activation activation;

  SPARSECNN_INLINE void operator()(typename V::reg v, int64_t offset, uint32_t mask) const {
    if (residual) v = V::add(v, V::load_mask(residual + offset, mask));
    V::store_mask(y + offset, activate<V>(v, activation), mask);
  }
  // Two rows of at most L/2 elements.
  SPARSECNN_INLINE void pair(typename V::reg v, int64_t lo, uint32_t mask_lo, int64_t hi,
                             uint32_t mask_hi) const {
    if (residual) {
      v = V::add(v, V::load_pair(residual + lo, mask_lo, residual + hi, mask_hi));
    }
    V::store_pair(y + lo, mask_lo, y + hi, mask_hi, activate<V>(v, activation));
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
