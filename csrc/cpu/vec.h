// The vector types the CPU kernels are written in, one set per instruction set.
//
// Included once by each isa_*.cpp, which defines SPARSECNN_ISA (the namespace everything lands in)
// and compiles with the flags of that instruction set. Nothing here may be reachable from another
// unit: a weak symbol compiled with AVX-512 that the linker hands to the scalar unit is an illegal
// instruction on older machines, so every function is in the ISA's namespace, and no standard
// header with inline functions is included.
//
// A vector type V has: V::T (accumulation type), V::L (lanes), V::reg, and
//   zero, set1, load, store (aligned, panel memory), fmadd, add, mul, div, max, min, exp,
//   load_mask<S> / store_mask<S> (storage type S in memory, only lanes whose mask bit is set are
//   touched), transpose(reg (&)[L]).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(SPARSECNN_ISA_AVX2) || defined(SPARSECNN_ISA_AVX512)
#include <immintrin.h>
#endif

#define SPARSECNN_INLINE inline __attribute__((always_inline))

namespace sparsecnn {
namespace SPARSECNN_ISA {

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

// Bit i is set when p[i] >= bound, for the first n <= kScan integers.
#if defined(SPARSECNN_ISA_AVX512)
constexpr int kScan = 16;
SPARSECNN_INLINE uint32_t at_least(const int32_t* p, int n, int32_t bound) {
  const __mmask16 m = static_cast<__mmask16>((1u << n) - 1u);
  return _mm512_mask_cmpge_epi32_mask(m, _mm512_maskz_loadu_epi32(m, p), _mm512_set1_epi32(bound));
}
#elif defined(SPARSECNN_ISA_AVX2)
constexpr int kScan = 8;
SPARSECNN_INLINE uint32_t at_least(const int32_t* p, int n, int32_t bound) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i m = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
  const __m256i less = _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), _mm256_maskload_epi32(p, m));
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_andnot_si256(less, m))));
}
#else
constexpr int kScan = 8;
SPARSECNN_INLINE uint32_t at_least(const int32_t* p, int n, int32_t bound) {
  uint32_t mask = 0;
  for (int i = 0; i < n; ++i) mask |= static_cast<uint32_t>(p[i] >= bound) << i;
  return mask;
}
#endif

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

// exp(x) by range reduction x = n ln2 + r, |r| <= ln2/2, and a degree-6 polynomial (relative error
// below 2 ulp on the range that matters to a sigmoid; the ends saturate at about 1e-38 and 1e38).
template <class V>
SPARSECNN_INLINE typename V::reg exp_poly(typename V::reg x) {
  x = V::min(V::set1(88.3762626647949f), V::max(V::set1(-87.3365478515625f), x));
  const typename V::reg n = V::round(V::mul(x, V::set1(1.44269504088896341f)));
  x = V::fmadd(n, V::set1(-0.693359375f), x);
  x = V::fmadd(n, V::set1(2.12194440e-4f), x);
  typename V::reg p = V::set1(1.9875691500e-4f);
  p = V::fmadd(p, x, V::set1(1.3981999507e-3f));
  p = V::fmadd(p, x, V::set1(8.3334519073e-3f));
  p = V::fmadd(p, x, V::set1(4.1665795894e-2f));
  p = V::fmadd(p, x, V::set1(1.6666665459e-1f));
  p = V::fmadd(p, x, V::set1(5.0000001201e-1f));
  p = V::fmadd(p, V::mul(x, x), V::add(x, V::set1(1.0f)));
  return V::scale_pow2(p, n);
}

// ---- portable: short arrays that the compiler maps to the baseline's registers -----------------
template <class Acc, int Lanes>
struct VecPortable {
  using T = Acc;
  static constexpr int L = Lanes;
  typedef Acc reg __attribute__((vector_size(sizeof(Acc) * Lanes)));

  static SPARSECNN_INLINE reg set1(T v) {
    reg r;
    for (int i = 0; i < L; ++i) r[i] = v;
    return r;
  }
  static SPARSECNN_INLINE reg zero() { return set1(T(0)); }
  static SPARSECNN_INLINE reg load(const T* p) { return *reinterpret_cast<const reg*>(p); }
  static SPARSECNN_INLINE void store(T* p, reg v) { *reinterpret_cast<reg*>(p) = v; }
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
  static SPARSECNN_INLINE void transpose(reg (&r)[L]) {
    for (int i = 0; i < L; ++i) {
      for (int j = i + 1; j < L; ++j) {
        const T t = r[i][j];
        r[i][j] = r[j][i];
        r[j][i] = t;
      }
    }
  }
};

#if defined(SPARSECNN_ISA_AVX512)
struct VecFloat {
  using T = float;
  static constexpr int L = 16;
  using reg = __m512;

  static SPARSECNN_INLINE reg set1(float v) { return _mm512_set1_ps(v); }
  static SPARSECNN_INLINE reg zero() { return _mm512_setzero_ps(); }
  static SPARSECNN_INLINE reg load(const float* p) { return _mm512_load_ps(p); }
  static SPARSECNN_INLINE void store(float* p, reg v) { _mm512_store_ps(p, v); }
  static SPARSECNN_INLINE reg fmadd(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static SPARSECNN_INLINE reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static SPARSECNN_INLINE reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static SPARSECNN_INLINE reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
  static SPARSECNN_INLINE reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
  static SPARSECNN_INLINE reg min(reg a, reg b) { return _mm512_min_ps(a, b); }
  static SPARSECNN_INLINE reg round(reg a) { return _mm512_roundscale_ps(a, 8); }
  static SPARSECNN_INLINE reg scale_pow2(reg a, reg n) { return _mm512_scalef_ps(a, n); }
  static SPARSECNN_INLINE reg exp(reg x) { return exp_poly<VecFloat>(x); }
  static SPARSECNN_INLINE reg load_mask(const float* p, uint32_t mask) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  }
  static SPARSECNN_INLINE reg load_mask(const bf16* p, uint32_t mask) {
    const __m256i h = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static SPARSECNN_INLINE void store_mask(float* p, reg v, uint32_t mask) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), v);
  }
  static SPARSECNN_INLINE void store_mask(bf16* p, reg v, uint32_t mask) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask),
                             _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
  }
  // 16x16: 4x4 blocks inside the 128-bit lanes first, then the lanes themselves.
  static SPARSECNN_INLINE void transpose(reg (&r)[16]) {
    reg t[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      const reg a = _mm512_unpacklo_ps(r[i], r[i + 1]), b = _mm512_unpackhi_ps(r[i], r[i + 1]);
      const reg c = _mm512_unpacklo_ps(r[i + 2], r[i + 3]);
      const reg d = _mm512_unpackhi_ps(r[i + 2], r[i + 3]);
      t[i] = _mm512_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
      t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const reg a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88);
      const reg b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
      const reg c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
      const reg d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
      r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
      r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
      r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }
};

#elif defined(SPARSECNN_ISA_AVX2)
struct VecFloat {
  using T = float;
  static constexpr int L = 8;
  using reg = __m256;

  static SPARSECNN_INLINE reg set1(float v) { return _mm256_set1_ps(v); }
  static SPARSECNN_INLINE reg zero() { return _mm256_setzero_ps(); }
  static SPARSECNN_INLINE reg load(const float* p) { return _mm256_load_ps(p); }
  static SPARSECNN_INLINE void store(float* p, reg v) { _mm256_store_ps(p, v); }
  static SPARSECNN_INLINE reg fmadd(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static SPARSECNN_INLINE reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static SPARSECNN_INLINE reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static SPARSECNN_INLINE reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
  static SPARSECNN_INLINE reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
  static SPARSECNN_INLINE reg min(reg a, reg b) { return _mm256_min_ps(a, b); }
  static SPARSECNN_INLINE reg round(reg a) { return _mm256_round_ps(a, 8); }
  static SPARSECNN_INLINE reg scale_pow2(reg a, reg n) {
    // n is in [-126, 127]: the biased exponent neither underflows nor overflows.
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(e, 23)));
  }
  static SPARSECNN_INLINE reg exp(reg x) { return exp_poly<VecFloat>(x); }
  static SPARSECNN_INLINE __m256i lane_mask(uint32_t mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit),
                              bit);
  }
  static SPARSECNN_INLINE reg load_mask(const float* p, uint32_t mask) {
    return mask == 0xffu ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, lane_mask(mask));
  }
  static SPARSECNN_INLINE reg load_mask(const bf16* p, uint32_t mask) {
    __m128i h;
    if (mask == 0xffu) {
      h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    } else {
      alignas(16) uint16_t part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
      for (int i = 0; i < 8; ++i) {
        if (mask >> i & 1u) part[i] = p[i].bits;
      }
      h = _mm_load_si128(reinterpret_cast<const __m128i*>(part));
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static SPARSECNN_INLINE void store_mask(float* p, reg v, uint32_t mask) {
    if (mask == 0xffu) {
      _mm256_storeu_ps(p, v);
    } else {
      _mm256_maskstore_ps(p, lane_mask(mask), v);
    }
  }
  static SPARSECNN_INLINE void store_mask(bf16* p, reg v, uint32_t mask) {
    alignas(32) float f[8];
    _mm256_store_ps(f, v);
    for (int i = 0; i < 8; ++i) {
      if (mask >> i & 1u) p[i] = Convert<bf16>::from(f[i]);
    }
  }
  static SPARSECNN_INLINE void transpose(reg (&r)[8]) {
    reg t[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      const reg a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
      const reg c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]);
      const reg d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
      t[i] = _mm256_shuffle_ps(a, c, 0x44);
      t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
      t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
      t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
    }
  }
};

#else
using VecFloat = VecPortable<float, 4>;
#endif

using VecDouble = VecPortable<double, 2>;

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
