// Storage types, their conversions, and the vector type that any compiler maps to the registers
// of its baseline. Included by vec.h only, whose header states the rules and the interface.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define SPARSECNN_INLINE inline __attribute__((always_inline))

namespace sparsecnn {
namespace SPARSECNN_ISA {

// Keeps a vector in a register: compilers fold a load into each of its uses, which is no gain where
// L1 loads are what a loop waits for.
template <class Reg>
SPARSECNN_INLINE void pin(Reg& r) {
#if defined(__x86_64__)
  asm("" : "+v"(r));
#else
  static_cast<void>(r);
#endif
}

// bfloat16 as stored; arithmetic is float32.
struct bf16 {
  uint16_t bits;
};

SPARSECNN_INLINE float to_acc(float v) { return v; }
SPARSECNN_INLINE double to_acc(double v) { return v; }
SPARSECNN_INLINE float to_acc(bf16 v) {
  const uint32_t u = static_cast<uint32_t>(v.bits) << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

template <class S>
struct Convert;
template <>
struct Convert<float> {
  static SPARSECNN_INLINE float from(float v) { return v; }
};
template <>
struct Convert<double> {
  static SPARSECNN_INLINE double from(double v) { return v; }
};
template <>
struct Convert<bf16> {  // round to nearest even; a NaN stays a (quiet) NaN
  static SPARSECNN_INLINE bf16 from(float v) {
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40u)};
    return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
  }
};

// ---- portable: short arrays that the compiler maps to the baseline's registers -----------------
template <class Acc, int Lanes>
struct VecPortable {
  using T = Acc;
  static constexpr int L = Lanes;
  static constexpr bool kHalves = false;
  typedef Acc reg __attribute__((vector_size(sizeof(Acc) * Lanes)));

  static SPARSECNN_INLINE reg set1(T v) {
    reg r;
    for (int i = 0; i < L; ++i) r[i] = v;
    return r;
  }
  static SPARSECNN_INLINE reg zero() { return set1(T(0)); }
  static SPARSECNN_INLINE reg load(const T* p) { return *reinterpret_cast<const reg*>(p); }
  static SPARSECNN_INLINE void store(T* p, reg v) { *reinterpret_cast<reg*>(p) = v; }
  static SPARSECNN_INLINE reg load_any(const T* p) {
    reg r;
    memcpy(&r, p, sizeof r);
    return r;
  }
  static SPARSECNN_INLINE void store_any(T* p, reg v) { memcpy(p, &v, sizeof v); }
  static SPARSECNN_INLINE reg fmadd(reg a, reg b, reg c) { return a * b + c; }
  static SPARSECNN_INLINE reg add(reg a, reg b) { return a + b; }
  static SPARSECNN_INLINE reg mul(reg a, reg b) { return a * b; }
  static SPARSECNN_INLINE reg div(reg a, reg b) { return a / b; }
  // The second operand wins when either is a NaN, as the x86 instructions have it.
  static SPARSECNN_INLINE reg max(reg a, reg b) { return a > b ? a : b; }
  static SPARSECNN_INLINE reg min(reg a, reg b) { return a < b ? a : b; }
  static SPARSECNN_INLINE reg exp(reg x) {
    reg r;
    for (int i = 0; i < L; ++i) r[i] = static_cast<T>(::exp(static_cast<double>(x[i])));
    return r;
  }
  template <class S>
  static SPARSECNN_INLINE reg load_mask(const S* p, uint32_t mask) {
    reg r = zero();
    for (int i = 0; i < L; ++i) {
      if (mask >> i & 1u) r[i] = to_acc(p[i]);
    }
    return r;
  }
  template <class S>
  static SPARSECNN_INLINE void store_mask(S* p, reg v, uint32_t mask) {
    for (int i = 0; i < L; ++i) {
      if (mask >> i & 1u) p[i] = Convert<S>::from(v[i]);
    }
  }
  template <class S>
  static SPARSECNN_INLINE reg load_pair(const S* lo, uint32_t mask_lo, const S* hi,
                                        uint32_t mask_hi) {
    reg r = zero();
    for (int i = 0; i < L / 2; ++i) {
      if (mask_lo >> i & 1u) r[i] = to_acc(lo[i]);
      if (mask_hi >> i & 1u) r[L / 2 + i] = to_acc(hi[i]);
    }
    return r;
  }
  template <class S>
  static SPARSECNN_INLINE void store_pair(S* lo, uint32_t mask_lo, S* hi, uint32_t mask_hi, reg v) {
    for (int i = 0; i < L / 2; ++i) {
      if (mask_lo >> i & 1u) lo[i] = Convert<S>::from(v[i]);
      if (mask_hi >> i & 1u) hi[i] = Convert<S>::from(v[L / 2 + i]);
    }
  }
  static SPARSECNN_INLINE reg even(reg a, reg b) { return alternate(a, b, 0); }
  static SPARSECNN_INLINE reg odd(reg a, reg b) { return alternate(a, b, 1); }
  static SPARSECNN_INLINE reg zip_low(reg a, reg b) { return zip(a, b, 0); }
  static SPARSECNN_INLINE reg zip_high(reg a, reg b) { return zip(a, b, L / 2); }
  static SPARSECNN_INLINE reg permute(reg a, const int32_t* index) {
    reg r;
    for (int i = 0; i < L; ++i) r[i] = a[index[i]];
    return r;
  }
  static SPARSECNN_INLINE void transpose(reg (&r)[L]) { transpose_square<L>(r, 0); }
  static SPARSECNN_INLINE void transpose_pairs(reg (&r)[L / 2]) {
    transpose_square<L / 2>(r, 0);
    transpose_square<L / 2>(r, L / 2);
  }

 private:
  static SPARSECNN_INLINE reg alternate(reg a, reg b, int first) {
    reg r;
    for (int i = 0; i < L / 2; ++i) {
      r[i] = a[2 * i + first];
      r[L / 2 + i] = b[2 * i + first];
    }
    return r;
  }
  static SPARSECNN_INLINE reg zip(reg a, reg b, int first) {
    reg r;
    for (int i = 0; i < L / 2; ++i) {
      r[2 * i] = a[first + i];
      r[2 * i + 1] = b[first + i];
    }
    return r;
  }
  // Lanes [lane, lane + N) of N registers.
  template <int N>
  static SPARSECNN_INLINE void transpose_square(reg (&r)[N], int lane) {
    for (int i = 0; i < N; ++i) {
      for (int j = i + 1; j < N; ++j) {
        const T t = r[i][lane + j];
        r[i][lane + j] = r[j][lane + i];
        r[j][lane + i] = t;
      }
    }
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
