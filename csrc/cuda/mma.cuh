// The matrix and copy instructions of the tensor-core kernels, sm_80 and later: one function each,
// with a stand-in in plain C++ for the host emulator (cuda_emu_mma.h), so that nothing else in a
// kernel differs between the two. All are called by whole warps, with all lanes active.
//
// T is __half or __nv_bfloat16; with g = lane / 4 and t = lane % 4, a register of two elements
// holds
//   A (16 x 16, row major)   a[0]: row g,   k 2t, 2t+1     a[1]: row g+8, the same k
//                            a[2]: row g,   k 2t+8, 2t+9   a[3]: row g+8
//   B (16 x 8)               b[0]: k 2t, 2t+1, column g    b[1]: k 2t+8, 2t+9 (b[2], b[3]: 16, 24)
//   D (16 x 8, float)        d[0], d[1]: row g, columns 2t, 2t+1      d[2], d[3]: row g+8
// Of TF32 a register holds one element, and k goes up to 8:
//   A (16 x 8)   a[0]: row g, k t    a[1]: row g+8, k t    a[2]: row g, k t+4    a[3]: row g+8
//   B (8 x 8)    b[0]: k t, column g    b[1]: k t+4, column g
// which is what ldmatrix, not transposed, makes of rows of four floats.
// ldmatrix_x4 of row-major A: lane l gives row (l & 15), k 8 * (l / 16). ldmatrix_x4 of B kept as
// [column][k]: lane l gives column (l & 7) + 8 * (l / 16), k 8 * (l / 8 % 2), for two B of 8
// columns; of B kept as [k][column]: _trans with k (l & 15), column 8 * (l / 16).
#pragma once
#include "cuda/launch.cuh"

#ifdef CUDA_EMU
#include "cuda_emu_mma.h"
#else

namespace sparsecnn::cuda {

// D += A * B.
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&d)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                           const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds to the 10 bits of a TF32 mantissa, ties away from zero, and gives the bits. The product
// takes any float and drops the bits behind, which rounds towards zero: a bias.
__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}
// D += A * B in TF32 with float sums.
__device__ __forceinline__ void mma_tf32_16x8x8(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <typename T>
inline constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<__half> = true;

// D += A * B with A 16 x 32, of which two in four neighbouring columns are stored, as 16 x 16. The
// place of stored column k within its four is two bits at 2 * (k % 8) of a half word of `metadata`:
// of lane 4 g + 2 kSelector + k / 8, the lower one for row g, the upper one for row g+8. The other
// two lanes of four are not read, so that the words of one warp serve two products. The two places
// of a pair ascend.
template <typename T, int kSelector = 0>
__device__ __forceinline__ void mma_sparse_16x8x32(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[4], uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1);
  if constexpr (kIsHalf<T>)
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
  else
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(metadata), "n"(kSelector));
}

// Matrices of 8 x 8 elements of 16 bits from shared memory: lane 8 m + r gives the address of row r
// of matrix m (16 bytes, aligned), and receives of each matrix the elements 2t, 2t+1 of row g;
// transposed, rows 2t, 2t+1 of column g. Of two matrices the addresses of lanes 16 to 31 are not
// read, but have to be aligned.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&to)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&to)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// kBytes (4, 8 or 16, both sides aligned to them) from global to shared memory without waiting;
// zeros where not `inside`, and then `global` is not read. Copies of 16 bytes bypass L1 unless
// `kCached`, for what the same SM reads again soon. They are there for the issuing thread after a
// wait for their group, for others after a barrier behind it.
template <int kBytes, bool kCached = false>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16 && !kCached)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
}
// Closes the group of the copies issued so far; waits until at most kLeft groups are under way.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace sparsecnn::cuda

#endif
