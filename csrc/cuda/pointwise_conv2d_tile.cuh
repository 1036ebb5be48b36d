// Tiles of pointwise_conv2d in shared memory: their shapes, copies into them, and the operands of
// the tensor cores out of them.
//
// Rows along c are 64 bytes and 16 of padding, so that eight of them cover all banks once: no
// conflicts in ldmatrix or in vectors along c. Rows along the outputs or filters are 8 elements
// longer than those: with float, four of them and eight neighbours cover all banks once.
#pragma once
#include "cuda/mma.cuh"

namespace sparsecnn::cuda::pointwise {

inline constexpr int kStages = 3;
inline constexpr int kStepBytes = 64;

// Shapes of the staged tiles, each as it lies in memory: x as [pixel][c] (channels last) or
// [c][pixel], W as [filter][c] or, filters innermost, as [c][filter].
template <typename T, bool kNhwc, bool kInnermost, int kPixels, int kFilters>
struct Tiles {
  static constexpr int kDepth = kStepBytes / static_cast<int>(sizeof(T));
  static constexpr int kRowPitch = kDepth + kVector<T>;
  static constexpr int kXPitch = kNhwc ? kRowPitch : kPixels + 8;
  static constexpr int kX = (kNhwc ? kPixels : kDepth) * kXPitch;
  static constexpr int kWPitch = kInnermost ? kFilters + 8 : kRowPitch;
  static constexpr int kStage = kX + (kInnermost ? kDepth : kFilters) * kWPitch;
  static constexpr int kOutPitch = kFilters + 1;
  static constexpr int kBytes = kStages * kStage * static_cast<int>(sizeof(T));
  static constexpr int kOutBytes = kPixels * kOutPitch * static_cast<int>(sizeof(float));
  static_assert(kOutBytes <= kBytes && kBytes <= kDefaultSmemBytes);
};

// Sixteen bytes of elements `step` apart, of which the first `count` exist; the rest become zero.
// Several at once need step 1, and a count that is a multiple of width.
template <typename T>
__device__ __forceinline__ void stage_vector(T* to, const T* from, int width, int64_t step,
                                             int64_t count) {
  constexpr int kV = kVector<T>, kSize = static_cast<int>(sizeof(T));
  if (width == kV) {
    copy_async<16>(to, from, count > 0);
  } else if (width == kV / 2) {
#pragma unroll
    for (int i = 0; i < kV; i += kV / 2) copy_async<8>(to + i, from + i, i < count);
  } else if (width * kSize == 4) {
#pragma unroll
    for (int i = 0; i < kV; i += 4 / kSize) copy_async<4>(to + i, from + i * step, i < count);
  } else {
#pragma unroll
    for (int i = 0; i < kV; ++i) to[i] = i < count ? from[i * step] : from_float<T>(0.f);
  }
}

// Elements that may be copied at once where `run` of them lie side by side and every run starts at
// a multiple of `pitch` elements from `base`.
template <typename T>
int copy_width(const void* base, int64_t run, int64_t pitch) {
  for (int width = kVector<T>; width * sizeof(T) >= 4; width /= 2) {
    const auto bytes = static_cast<uintptr_t>(width) * sizeof(T);
    if (reinterpret_cast<uintptr_t>(base) % bytes == 0 && run % width == 0 && pitch % width == 0)
      return width;
  }
  return 1;
}

// The tensor cores' product over kStep channels: 16 in half precision, 8 in TF32.
template <typename T>
inline constexpr int kStep = 32 / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == sizeof(float)) {
    mma_tf32_16x8x8(sum, a, b);
  } else {
    mma_16x8x16<T>(sum, a, b);
  }
}

// What ldmatrix brought, as the tensor cores take it: floats become TF32.
template <typename T>
__device__ __forceinline__ void round_fragment(uint32_t (&part)[4]) {
  if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (uint32_t& v : part) v = to_tf32(__uint_as_float(v));
  }
}

// Operand A, 16 rows from `row` on and kStep channels from c on, of a tile kept as [row][c] or,
// with kByChannel, as [c][row]. ldmatrix moves 16-bit pairs: of a float tile it brings rows along c
// as they are wanted, but cannot turn the others.
template <typename T, bool kByChannel>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* tile, int pitch, int row, int c,
                                       int lane) {
  if constexpr (!kByChannel) {
    ldmatrix_x4(a, tile + (row + lane % 16) * pitch + c + lane / 16 * kVector<T>);
    round_fragment<T>(a);
  } else if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int v = 0; v < 4; ++v)
      a[v] = to_tf32(tile[(c + lane % 4 + v / 2 * 4) * pitch + row + lane / 4 + v % 2 * 8]);
  } else {
    ldmatrix_x4_trans(a, tile + (c + lane % 8 + lane / 16 * 8) * pitch + row + lane / 8 % 2 * 8);
  }
}

// Two operands B, 16 columns from `column` on; likewise.
template <typename T, bool kByChannel>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const T* tile, int pitch, int column,
                                       int c, int lane) {
  if constexpr (!kByChannel) {
    const int own = column + lane % 8 + lane / 16 * 8;
    ldmatrix_x4(b, tile + own * pitch + c + lane / 8 % 2 * kVector<T>);
    round_fragment<T>(b);
  } else if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int v = 0; v < 4; ++v)
      b[v] = to_tf32(tile[(c + lane % 4 + v % 2 * 4) * pitch + column + lane / 4 + v / 2 * 8]);
  } else {
    ldmatrix_x4_trans(b, tile + (c + lane % 16) * pitch + column + lane / 16 * 8);
  }
}

}  // namespace sparsecnn::cuda::pointwise
