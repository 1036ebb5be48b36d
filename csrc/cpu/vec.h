// The vector types the CPU kernels are written in, one set per instruction set.
//
// Included by the kernel units, each compiled once per instruction set (cpu/isa.h),
// with everything in the namespace SPARSECNN_ISA. Nothing here may be reachable from another
// unit: a weak symbol compiled with AVX-512 that the linker hands to the scalar unit is an illegal
// instruction on older machines, so every function is in the ISA's namespace, and no standard
// header with inline functions is included.
//
// A vector type V has: V::T (accumulation type), V::L (lanes), V::reg, and
//   zero, set1, load, store (aligned, panel memory), load_any, store_any (any address), fmadd,
//   add, mul, div, max, min, exp,
//   load_mask<S> / store_mask<S> (storage type S in memory, only lanes whose mask bit is set are
//   touched), transpose(reg (&)[L]); and the same for narrow rows, two to a register:
//   load_pair<S> / store_pair<S> (the lower L/2 lanes at one address, the upper at another, masks
//   of L/2 bits) and transpose_pairs(reg (&)[L/2]), which transposes both L/2 x L/2 halves;
//   even(a, b) / odd(a, b): lanes 0, 2, 4, .. (1, 3, 5, ..) of a, then those of b;
//   zip_low(a, b) / zip_high(a, b): the lower (upper) halves of a and b, lane by lane in turn;
//   permute(a, int32 index[L]): lane i is lane index[i] of a.
// Where kHalves, half registers are a type of their own, at twice the rate: half, load_half,
// fmadd_half, lower (of a reg), widen (to a reg, zeros above).
#pragma once
#include "cpu/vec_portable.h"

#if defined(SPARSECNN_ISA_AVX2) || defined(SPARSECNN_ISA_AVX512)
#include <immintrin.h>
#endif

namespace sparsecnn {
namespace SPARSECNN_ISA {

// Keeps a value that several operations use in a register. The compiler folds a load into each of
// its uses, which costs a load for every one of them.
template <class Reg>
SPARSECNN_INLINE void keep(Reg& r) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(r));
#elif defined(__x86_64__)
  __asm__("" : "+x"(r));
#else
  (void)r;
#endif
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

#if defined(SPARSECNN_ISA_AVX512)
struct VecFloat {
  using T = float;
  static constexpr int L = 16;
  using reg = __m512;

  static SPARSECNN_INLINE reg set1(float v) { return _mm512_set1_ps(v); }
  static SPARSECNN_INLINE reg zero() { return _mm512_setzero_ps(); }
  static SPARSECNN_INLINE reg load(const float* p) { return _mm512_load_ps(p); }
  static SPARSECNN_INLINE void store(float* p, reg v) { _mm512_store_ps(p, v); }
  static SPARSECNN_INLINE reg load_any(const float* p) { return _mm512_loadu_ps(p); }
  static SPARSECNN_INLINE void store_any(float* p, reg v) { _mm512_storeu_ps(p, v); }
  static constexpr bool kHalves = true;
  using half = __m256;
  static SPARSECNN_INLINE half load_half(const float* p) { return _mm256_loadu_ps(p); }
  static SPARSECNN_INLINE half fmadd_half(half a, half b, half c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static SPARSECNN_INLINE half lower(reg v) { return _mm512_castps512_ps256(v); }
  static SPARSECNN_INLINE reg widen(half v) { return _mm512_zextps256_ps512(v); }
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
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), round_bf16(v));
  }
  static SPARSECNN_INLINE __m256i round_bf16(reg v) {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
  }
  static SPARSECNN_INLINE reg load_pair(const float* lo, uint32_t mask_lo, const float* hi,
                                        uint32_t mask_hi) {
    const __m256 a = _mm256_maskz_loadu_ps(static_cast<__mmask8>(mask_lo), lo);
    const __m256 b = _mm256_maskz_loadu_ps(static_cast<__mmask8>(mask_hi), hi);
    return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
  }
  static SPARSECNN_INLINE reg load_pair(const bf16* lo, uint32_t mask_lo, const bf16* hi,
                                        uint32_t mask_hi) {
    const __m128i a = _mm_maskz_loadu_epi16(static_cast<__mmask8>(mask_lo), lo);
    const __m128i b = _mm_maskz_loadu_epi16(static_cast<__mmask8>(mask_hi), hi);
    const __m256i h = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static SPARSECNN_INLINE void store_pair(float* lo, uint32_t mask_lo, float* hi, uint32_t mask_hi,
                                          reg v) {
    _mm256_mask_storeu_ps(lo, static_cast<__mmask8>(mask_lo), _mm512_castps512_ps256(v));
    __m256 high = _mm512_extractf32x8_ps(v, 1);
    // Else GCC makes one masked vextractf32x8 to memory of both, which unlike a masked move faults
    // on addresses that the mask leaves out (exceptions type E6NF).
    keep(high);
    _mm256_mask_storeu_ps(hi, static_cast<__mmask8>(mask_hi), high);
  }
  static SPARSECNN_INLINE void store_pair(bf16* lo, uint32_t mask_lo, bf16* hi, uint32_t mask_hi,
                                          reg v) {
    const __m256i h = round_bf16(v);
    _mm_mask_storeu_epi16(lo, static_cast<__mmask8>(mask_lo), _mm256_castsi256_si128(h));
    _mm_mask_storeu_epi16(hi, static_cast<__mmask8>(mask_hi), _mm256_extracti128_si256(h, 1));
  }
  static SPARSECNN_INLINE reg even(reg a, reg b) {
    const __m512i lanes =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(a, lanes, b);
  }
  static SPARSECNN_INLINE reg odd(reg a, reg b) {
    const __m512i lanes =
        _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return _mm512_permutex2var_ps(a, lanes, b);
  }
  static SPARSECNN_INLINE reg zip_low(reg a, reg b) {
    const __m512i lanes = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return _mm512_permutex2var_ps(a, lanes, b);
  }
  static SPARSECNN_INLINE reg zip_high(reg a, reg b) {
    const __m512i lanes =
        _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return _mm512_permutex2var_ps(a, lanes, b);
  }
  static SPARSECNN_INLINE reg permute(reg a, const int32_t* index) {
    return _mm512_permutexvar_ps(_mm512_loadu_si512(index), a);
  }
  // 4x4 blocks inside the 128-bit lanes of four registers, as columns.
  static SPARSECNN_INLINE void transpose_4x4(const reg* r, reg* t) {
    const reg a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
    const reg c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
    t[0] = _mm512_shuffle_ps(a, c, 0x44);
    t[1] = _mm512_shuffle_ps(a, c, 0xee);
    t[2] = _mm512_shuffle_ps(b, d, 0x44);
    t[3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  static SPARSECNN_INLINE void transpose_pairs(reg (&r)[8]) {
    reg t[8];
    transpose_4x4(r, t);
    transpose_4x4(r + 4, t + 4);
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 4]);
      r[i] = _mm512_castpd_ps(_mm512_permutex2var_pd(a, even, b));
      r[i + 4] = _mm512_castpd_ps(_mm512_permutex2var_pd(a, odd, b));
    }
  }
  // 16x16: 4x4 blocks inside the 128-bit lanes first, then the lanes themselves.
  static SPARSECNN_INLINE void transpose(reg (&r)[16]) {
    reg t[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) transpose_4x4(r + i, t + i);
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
  static SPARSECNN_INLINE reg load_any(const float* p) { return _mm256_loadu_ps(p); }
  static SPARSECNN_INLINE void store_any(float* p, reg v) { _mm256_storeu_ps(p, v); }
  static constexpr bool kHalves = false;
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
  static SPARSECNN_INLINE __m128 load_half(const float* p, uint32_t mask) {
    return mask == 0xfu ? _mm_loadu_ps(p)
                        : _mm_maskload_ps(p, _mm256_castsi256_si128(lane_mask(mask)));
  }
  static SPARSECNN_INLINE __m128 load_half(const bf16* p, uint32_t mask) {
    alignas(16) float part[4] = {0, 0, 0, 0};
    for (int i = 0; i < 4; ++i) {
      if (mask >> i & 1u) part[i] = to_acc(p[i]);
    }
    return _mm_load_ps(part);
  }
  static SPARSECNN_INLINE void store_half(float* p, __m128 v, uint32_t mask) {
    if (mask == 0xfu) {
      _mm_storeu_ps(p, v);
    } else {
      _mm_maskstore_ps(p, _mm256_castsi256_si128(lane_mask(mask)), v);
    }
  }
  static SPARSECNN_INLINE void store_half(bf16* p, __m128 v, uint32_t mask) {
    alignas(16) float f[4];
    _mm_store_ps(f, v);
    for (int i = 0; i < 4; ++i) {
      if (mask >> i & 1u) p[i] = Convert<bf16>::from(f[i]);
    }
  }
  template <class S>
  static SPARSECNN_INLINE reg load_pair(const S* lo, uint32_t mask_lo, const S* hi,
                                        uint32_t mask_hi) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(load_half(lo, mask_lo)),
                                load_half(hi, mask_hi), 1);
  }
  template <class S>
  static SPARSECNN_INLINE void store_pair(S* lo, uint32_t mask_lo, S* hi, uint32_t mask_hi, reg v) {
    store_half(lo, _mm256_castps256_ps128(v), mask_lo);
    store_half(hi, _mm256_extractf128_ps(v, 1), mask_hi);
  }
  static SPARSECNN_INLINE reg even(reg a, reg b) {
    const __m256d s = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(s, 0xd8));
  }
  static SPARSECNN_INLINE reg odd(reg a, reg b) {
    const __m256d s = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(s, 0xd8));
  }
  static SPARSECNN_INLINE reg zip_low(reg a, reg b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x20);
  }
  static SPARSECNN_INLINE reg zip_high(reg a, reg b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), 0x31);
  }
  static SPARSECNN_INLINE reg permute(reg a, const int32_t* index) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    return _mm256_permutevar8x32_ps(a, lanes);
  }
  // 4x4 blocks inside the 128-bit lanes of four registers, as columns.
  static SPARSECNN_INLINE void transpose_4x4(const reg* r, reg* t) {
    const reg a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
    const reg c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
    t[0] = _mm256_shuffle_ps(a, c, 0x44);
    t[1] = _mm256_shuffle_ps(a, c, 0xee);
    t[2] = _mm256_shuffle_ps(b, d, 0x44);
    t[3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  static SPARSECNN_INLINE void transpose_pairs(reg (&r)[4]) {
    reg t[4];
    transpose_4x4(r, t);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) r[i] = t[i];
  }
  static SPARSECNN_INLINE void transpose(reg (&r)[8]) {
    reg t[8];
    transpose_4x4(r, t);
    transpose_4x4(r + 4, t + 4);
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
