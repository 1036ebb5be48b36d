"""CUDA C++ that surrounds the generated code of a specialized ``csr_conv2d``.

``TEMPLATE`` is completed by `sparsecnn.ops._csr_source`: names between at signs are constants, and
``@SLABS@`` and ``@CASES@`` the code of the weight. It includes nothing, so that the run-time
compiler needs no header; with ``CUDA_EMU`` defined it is compiled by the host compiler for the
tests' emulator.
"""

TEMPLATE = r"""// csr_conv2d for one weight matrix, whose values are operands of the instructions.
//
//   y[n,k,p,q] = act(bias[k] + residual[n,k,p,q]
//                    + sum over the stored (k,c,r,s) of W * x[n, c, p*stride+r*dil-pad, ...])
//
// A block owns a slab of filters of one group and a tile of pixels, one for each thread; the sums
// of a pixel for all filters of the slab are in registers. Channels are staged in shared memory a
// chunk at a time, as float, with the halo. The code of a chunk is a straight line: one load for
// each column that the slab keeps, then one multiply-add with an immediate operand for each stored
// entry, columns ascending: the sums are those of the portable kernel bit by bit.
//
// The tile is a run of output rows, which may cross images, times a run of columns; its extents,
// the pitch of a staged row and the pixel of each thread come from the host (see Args), so that one
// binary serves every image size and both memory formats. What the straight code needs at compile
// time is only the distance of two staged channels, @CAP@ floats.
//
// Work is ordered by slabs: all multiprocessors run the same code at about the same time, and the
// barriers between chunks keep a block's warps close, so that they share the instruction cache.
//
// Bound (derived): an SM issues 128 multiply-adds a clock and delivers 32 words of shared memory,
// so a column that feeds four entries or more leaves the multiply-adds as the limit. Slabs of 64
// and 128 filters take 128 and 168 registers a thread, two blocks to an SM: one computes while the
// other stages. A map with few pixels, or a batch of one, leaves most SMs without a block: the
// portable kernel is made for those. GPU timings have not been taken: slabs, tile and chunk are
// reasoned.
//
// Paper: Wang, "SparseRT: Accelerating Unstructured Sparsity on GPUs for Deep Learning Inference",
// PACT 2020.
#ifdef CUDA_EMU
#include "cuda_emu.h"
#define NOINLINE
#define GRID_CONSTANT
#define ASSUME_GLOBAL(p)
#else
#define DYN_SMEM(T, name) extern __shared__ __align__(16) T name[]
#define NOINLINE __noinline__
#define GRID_CONSTANT __grid_constant__
#define ASSUME_GLOBAL(p) __builtin_assume(__isGlobal(p))
#endif

typedef long long i64;

constexpr int kThreads = @THREADS@;
constexpr int kCap = @CAP@;         // floats from a staged channel to the next, odd
constexpr int kOut = kThreads + 1;  // floats from a filter's sums to the next, odd
constexpr unsigned short kIdle = 65535;

struct Args {
  const void* x;
  const void* bias;      // or null
  const void* residual;  // or null
  void* y;
  i64 x_n, x_c, x_h, x_w, y_n, y_k, y_p, y_q;  // strides in elements
  i64 n, h, w, p, q;
  i64 stride_h, stride_w, pad_top, pad_left;
  i64 tiles_q, tiles, work;  // tiles along a row, of a slab, and of all slabs
  int tq, tile_rows;         // a tile has tile_rows output rows and tq columns
  int slots, pitch, phase_w, staged_w;  // staged elements of a channel, of a row, of its phases
  int row_taps;              // floats from a filter row to the next
  int row_stride, gap;       // staged rows per output row, more of them from image to image
  int row_step;              // input rows per staged row
  int phases, col_step;      // column phases of a row, input columns per staged column
  int channels_last, activation;
  unsigned short pixel[kThreads];  // of each thread: row * tq + column in the tile, or kIdle
};

#if @DTYPE@ == 0
typedef float Stored;
__device__ __forceinline__ float to_float(Stored v) { return v; }
__device__ __forceinline__ Stored from_float(float v) { return v; }
#elif defined(CUDA_EMU) && @DTYPE@ == 1
typedef __nv_bfloat16 Stored;
__device__ __forceinline__ float to_float(Stored v) { return __bfloat162float(v); }
__device__ __forceinline__ Stored from_float(float v) { return __float2bfloat16_rn(v); }
#elif defined(CUDA_EMU)
typedef __half Stored;
__device__ __forceinline__ float to_float(Stored v) { return __half2float(v); }
__device__ __forceinline__ Stored from_float(float v) { return __float2half_rn(v); }
#else
typedef unsigned short Stored;
#if @DTYPE@ == 1
__device__ __forceinline__ float to_float(Stored v) {
  return __uint_as_float(static_cast<unsigned>(v) << 16);
}
__device__ __forceinline__ Stored from_float(float v) {
  Stored r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
#else
__device__ __forceinline__ float to_float(Stored v) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
  return r;
}
__device__ __forceinline__ Stored from_float(float v) {
  Stored r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
  return r;
}
#endif
#endif

// One stored entry: sum i += (float with these bits) * v. An assembler statement passes through
// the compiler's front end three times as fast as a call of fmaf.
#ifdef CUDA_EMU
inline float float_of(unsigned bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
#define F(i, bits) a##i = fmaf(float_of(0x##bits), v, a##i);
#else
#define F(i, bits) asm("fma.rn.f32 %0, %1, 0f" #bits ", %0;" : "+f"(a##i) : "f"(v));
#endif
// The load of a kept column, and the sums leaving the registers.
#define L(row, offset) v = row[offset];
#define S(i, slot) out[slot * kOut + threadIdx.x] = a##i;

// Shared memory: the offset of each staged element in x, of each thread's pixel in y, the tile.
constexpr int kTableBytes = (kCap + kThreads) * static_cast<int>(sizeof(i64));
#define SHARED_MEMORY                                  \
  DYN_SMEM(char, smem);                                \
  i64* const slot_at = reinterpret_cast<i64*>(smem);   \
  i64* const pixel_at = slot_at + kCap;                \
  float* const tile = reinterpret_cast<float*>(smem + kTableBytes); \
  (void)slot_at, (void)pixel_at, (void)tile

__device__ __forceinline__ float relu6(float v) { return v < 0.f ? 0.f : (v > 6.f ? 6.f : v); }

// Comparisons are written so that NaN passes through.
__device__ __forceinline__ float activate(int activation, float v) {
  switch (activation) {
    case 1:
      return v < 0.f ? 0.f : v;
    case 2:
      return relu6(v);
    case 3:
      return v / (1.f + expf(-v));
    case 4:
      return v * relu6(v + 3.f) / 6.f;
    default:
      return v;
  }
}

// What the end of a sum needs, out of the way of the compiler's fear that y is where Args lies.
struct End {
  const Stored* bias;
  const Stored* residual;
  Stored* y;
  int activation;
};

__device__ __forceinline__ void store(const End& end, float sum, i64 k, i64 at) {
  if (end.bias) sum += to_float(end.bias[k]);
  if (end.residual) sum += to_float(end.residual[at]);
  end.y[at] = from_float(activate(end.activation, sum));
}

// Fills both tables for a tile and returns where the thread's pixel starts in the staged tile.
// Staged rows follow each other as the output rows do; where an image ends, gap more rows are
// left, for the halo.
__device__ __forceinline__ int place(const Args& a, i64 index) {
  SHARED_MEMORY;
  const i64 row_tile = index / a.tiles_q, q0 = (index - row_tile * a.tiles_q) * a.tq;
  const i64 row0 = row_tile * a.tile_rows, n0 = row0 / a.p, p0 = row0 - n0 * a.p;
  // Output rows of the tile's first image, and of the others.
  const int first = a.p - p0 < a.tile_rows ? static_cast<int>(a.p - p0) : a.tile_rows;
  const int whole = a.p < a.tile_rows ? static_cast<int>(a.p) : a.tile_rows;
  const int first_end = first * a.row_stride + a.gap, length = whole * a.row_stride + a.gap;
  for (int slot = threadIdx.x; slot < a.slots; slot += kThreads) {
    const int row = slot / a.pitch, place_in_row = slot - row * a.pitch;
    const int image = row < first_end ? 0 : 1 + (row - first_end) / length;
    const int local = image ? (row - first_end) % length : row;
    const int phase = place_in_row / a.phase_w;
    const int column = (place_in_row - phase * a.phase_w) * a.phases + phase;
    const i64 n = n0 + image;
    const i64 h = (image ? 0 : p0) * a.stride_h - a.pad_top + static_cast<i64>(local) * a.row_step;
    const i64 w = q0 * a.stride_w - a.pad_left + static_cast<i64>(column) * a.col_step;
    const bool inside = n < a.n && h >= 0 && h < a.h && w >= 0 && w < a.w &&
                        phase < a.phases && column < a.staged_w;
    slot_at[slot] = inside ? n * a.x_n + h * a.x_h + w * a.x_w : -1;
  }
  int start = 0;
  i64 at = -1;
  const int code = a.pixel[threadIdx.x];
  if (code != kIdle) {
    const int row = code / a.tq, column = code - row * a.tq;
    const int image = row < first ? 0 : 1 + (row - first) / whole;
    const i64 n = n0 + image, p = p0 + row - image * a.p;
    if (n < a.n && q0 + column < a.q) {
      start = (row * a.row_stride + image * a.gap) * a.pitch + column;
      at = n * a.y_n + p * a.y_p + (q0 + column) * a.y_q;
    }
  }
  pixel_at[threadIdx.x] = at;
  return start;
}

// kCount channels of one staged element; all loads are under way before the first store.
template <int kCount>
__device__ __forceinline__ void copy(const Stored* from, i64 step, float* to, bool inside) {
  float v[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) v[c] = inside ? to_float(from[c * step]) : 0.f;
#pragma unroll
  for (int c = 0; c < kCount; ++c) to[c * kCap] = v[c];
}

// Stages channels first to first + kChannels; barriers before and after.
template <int kChannels>
__device__ __forceinline__ void stage(const Args& a, int first) {
  SHARED_MEMORY;
  constexpr int kWarps = kThreads / 32, kBatch = 4, kTogether = 8, kRest = kChannels % kTogether;
  const i64 step = a.x_c;
  const int slots = a.slots;
  const Stored* const x = static_cast<const Stored*>(a.x) + first * step;
  ASSUME_GLOBAL(x);
  __syncthreads();
  if (a.channels_last) {  // lanes along the channels
#pragma unroll 1
    for (int c = threadIdx.x % 32; c < kChannels; c += 32) {
#pragma unroll 1
      for (int slot = threadIdx.x / 32; slot < slots; slot += kBatch * kWarps) {
        float v[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const i64 at = slot + i * kWarps < slots ? slot_at[slot + i * kWarps] : -1;
          v[i] = at < 0 ? 0.f : to_float(x[at + c]);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
          if (slot + i * kWarps < slots) tile[c * kCap + slot + i * kWarps] = v[i];
      }
    }
  } else {  // lanes along the pixels
#pragma unroll 1
    for (int slot = threadIdx.x; slot < slots; slot += kThreads) {
      const i64 at = slot_at[slot];
      const Stored* from = x + at;
      float* to = tile + slot;
#pragma unroll 1
      for (int c = 0; c < kChannels / kTogether; ++c) {
        copy<kTogether>(from, step, to, at >= 0);
        from += kTogether * step;
        to += kTogether * kCap;
      }
      if constexpr (kRest != 0) copy<kRest>(from, step, to, at >= 0);
    }
  }
  __syncthreads();
}

// The end of kFilters sums from filter k on, which lie in shared memory.
template <int kFilters>
__device__ __forceinline__ void finish(const Args& a, i64 k) {
  SHARED_MEMORY;
  const End end{static_cast<const Stored*>(a.bias), static_cast<const Stored*>(a.residual),
                static_cast<Stored*>(a.y), a.activation};
  ASSUME_GLOBAL(end.y);
  if (a.channels_last) {  // lanes along the filters
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kFilters * kThreads; i += kThreads) {
      const int pixel = i / kFilters, f = i - pixel * kFilters;
      const i64 at = pixel_at[pixel];
      if (at >= 0) store(end, tile[f * kOut + pixel], k + f, at + k + f);
    }
    __syncthreads();
  } else {  // each thread its own pixel
    const i64 at = pixel_at[threadIdx.x], step = a.y_k;
#pragma unroll 1
    for (int f = 0; f < kFilters && at >= 0; ++f)
      store(end, tile[f * kOut + threadIdx.x], k + f, at + (k + f) * step);
  }
}

@SLABS@
#ifndef CUDA_EMU
extern "C"
#endif
__global__ void __launch_bounds__(kThreads, @BLOCKS@)
    csr_conv2d_specialized(const GRID_CONSTANT Args a) {
  for (i64 item = blockIdx.x; item < a.work; item += gridDim.x) {
    const i64 slab = item / a.tiles;
    __syncthreads();  // the item before has read its tables
    const int start = place(a, item - slab * a.tiles);
    switch (static_cast<int>(slab)) {
@CASES@    }
  }
}
"""
