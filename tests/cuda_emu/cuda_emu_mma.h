// The matrix and copy instructions of cuda/mma.cuh in plain C++, over the emulator's warps. The
// layouts of the operands are those of the PTX ISA, "Matrix multiply-accumulate operation using mma
// instruction" and "... mma.sp instruction"; products are exact and added by ascending k, where
// the hardware adds in an order and with a rounding of its own.
#pragma once
#include <cstring>

#include "cuda_emu.h"

namespace sparsecnn::cuda {

namespace emulated {

inline float value(__half, uint16_t bits) { return __half2float({bits}); }
inline float value(__nv_bfloat16, uint16_t bits) { return __bfloat162float({bits}); }

// Element `i` (0 or 1) of a pair in a register.
template <typename T>
float element(uint32_t pair, int i) {
  return value(T{}, static_cast<uint16_t>(pair >> (16 * i)));
}

template <int kB>
struct Operands {
  uint32_t a[4], b[kB], metadata;
};

// What a lane brought, where it lies: copies would take most of the time.
template <int kB>
const Operands<kB>& brought(int lane) {
  return *reinterpret_cast<const Operands<kB>*>(emu::sim().current->seen->by[lane]);
}

// Element (row, k) of the 16 x 16 operand A: four quadrants of 8 x 8, the lower rows first.
template <typename T, int kB>
float a_at(int row, int k) {
  const auto& from = brought<kB>(row % 8 * 4 + k % 8 / 2);
  return element<T>(from.a[row / 8 + k / 8 * 2], k % 2);
}

// Element (k, column) of the operand B of 8 columns: eight rows a register.
template <typename T, int kB>
float b_at(int k, int column) {
  const auto& from = brought<kB>(column * 4 + k % 8 / 2);
  return element<T>(from.b[k / 8], k % 2);
}

// The multiplier reads the sign, the exponent and ten bits of the mantissa.
inline float tf32_value(uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); }

// Lane 8 m + r brings the address of row r of matrix m: 8 elements of 16 bits.
template <int kMatrices>
void ldmatrix(uint32_t (&to)[kMatrices], const void* own, bool transposed, const void* site) {
  if (reinterpret_cast<uintptr_t>(own) % 16 != 0) emu::fail("ldmatrix: unaligned row");
  emu::exchange(~0u, own, site);
  const int lane = static_cast<int>(EMU_LANE);
  for (int m = 0; m < kMatrices; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int row = transposed ? lane % 4 * 2 + i : lane / 4;
      const int column = transposed ? lane / 4 : lane % 4 * 2 + i;
      const auto* from = static_cast<const char*>(
          emu::brought_by<const void*>(static_cast<unsigned>(m * 8 + row)));
      std::memcpy(&pair[i], from + 2 * column, 2);
    }
    to[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

}  // namespace emulated

template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Operands<2> own{};
  std::memcpy(own.a, a, sizeof a);
  std::memcpy(own.b, b, sizeof b);
  emu::exchange(~0u, own, EMU_SITE);
  const int row = static_cast<int>(EMU_LANE) / 4, column = static_cast<int>(EMU_LANE) % 4 * 2;
  for (int k = 0; k < 16; ++k)
    for (int i = 0; i < 4; ++i)
      d[i] += emulated::a_at<T, 2>(row + i / 2 * 8, k) * emulated::b_at<T, 2>(k, column + i % 2);
}

// NaN keeps a bit that the multiplier reads.
inline uint32_t to_tf32(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return v != v ? bits | 0x400000u : (bits + 0x1000u) & ~0x1fffu;
}

inline void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Operands<2> own{};
  std::memcpy(own.a, a, sizeof a);
  std::memcpy(own.b, b, sizeof b);
  emu::exchange(~0u, own, EMU_SITE);
  const unsigned row = EMU_LANE / 4, column = EMU_LANE % 4 * 2;
  for (unsigned k = 0; k < 8; ++k)
    for (unsigned i = 0; i < 4; ++i) {
      const auto left = emu::brought_by<emulated::Operands<2>>(row * 4 + k % 4);
      const auto right = emu::brought_by<emulated::Operands<2>>((column + i % 2) * 4 + k % 4);
      d[i] +=
          emulated::tf32_value(left.a[i / 2 + k / 4 * 2]) * emulated::tf32_value(right.b[k / 4]);
    }
}

// Stored column k of a row stands for column 4 * (k / 2) + index of the full 32, where the index is
// two bits at 2 * (k % 8) of a half word: of lane 4 * (row % 8) + 2 * kSelector + k / 8, the upper
// one for row >= 8.
template <typename T, int kSelector = 0>
void mma_sparse_16x8x32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                        uint32_t metadata) {
  emulated::Operands<4> own{};
  std::memcpy(own.a, a, sizeof a);
  std::memcpy(own.b, b, sizeof b);
  own.metadata = metadata;
  emu::exchange(~0u, own, EMU_SITE);
  const int row = static_cast<int>(EMU_LANE) / 4, column = static_cast<int>(EMU_LANE) % 4 * 2;
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < 16; ++k) {
      const auto& from = emulated::brought<4>(row * 4 + 2 * kSelector + k / 8);
      const int index = from.metadata >> (16 * half + 2 * (k % 8)) & 3;
      const int before = k % 2 ? from.metadata >> (16 * half + 2 * (k % 8) - 2) & 3 : -1;
      if (index <= before) emu::fail("mma_sparse: indices of a pair do not ascend");
      for (int i = 0; i < 2; ++i)
        d[2 * half + i] += emulated::a_at<T, 4>(row + 8 * half, k) *
                           emulated::b_at<T, 4>(4 * (k / 2) + index, column + i);
    }
}

inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  emulated::ldmatrix(to, row, false, EMU_SITE);
}
inline void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
  emulated::ldmatrix(to, row, true, EMU_SITE);
}
inline void ldmatrix_x2(uint32_t (&to)[2], const void* row) {
  emulated::ldmatrix(to, row, false, EMU_SITE);
}
inline void ldmatrix_x2_trans(uint32_t (&to)[2], const void* row) {
  emulated::ldmatrix(to, row, true, EMU_SITE);
}

template <int kBytes, bool kCached = false>
void copy_async(void* shared, const void* global, bool inside) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emu::copy_async({shared, inside ? global : nullptr, kBytes});
}
inline void copy_async_commit() { emu::copy_async_commit(); }
template <int kLeft>
void copy_async_wait() {
  emu::copy_async_wait(kLeft);
}

}  // namespace sparsecnn::cuda
