// What chain_conv2d.cu does with a tile besides its dense stages: device to shared memory and back,
// and depthwise stages from shared to shared memory. Values in shared memory are float
// [pixel of the region][channel], a whole grain of channels, zero where there is none.
#pragma once
#include "cuda/chain_conv2d_dense.cuh"

namespace sparsecnn::cuda {

// A tensor that a group of stages reads or writes: of the op, or an intermediate kept as float.
struct End {
  const void* data;
  TensorStrides strides;
  bool is_float;    // whatever the op's type is
  bool in_vectors;  // channels last, whole and aligned vectors of channels
};

struct Ends {
  End x, residual, y;
  bool channels_last;
};

struct Tile {
  int64_t n;   // image
  int p0, q0;  // first output
  int k0;      // first channel of its share
};

struct Origin {
  int row, col;
};

__device__ __forceinline__ Origin origin_of(const Region& r, const Tile& tile) {
  return {tile.p0 * r.step_h + r.first_h, tile.q0 * r.step_w + r.first_w};
}

__device__ __forceinline__ int pad(int channels) {
  return (channels + kGrain - 1) / kGrain * kGrain;
}

// `count` pixels of a region from `first` on, with `channels` channels from c0 on, in a map of
// h x w of a tensor; in shared memory at `smem`, `pitch` apart.
struct Window {
  const Region* region;
  Origin origin;
  int first, count, h, w, c0, channels;
  float* smem;
  int pitch;

  // Element of the tensor, less its image's and c0's; -1 outside the map.
  __device__ __forceinline__ int64_t at(const TensorStrides& s, int pixel) const {
    const int row = (first + pixel) / region->w;
    const int y = origin.row + row, x = origin.col + (first + pixel - row * region->w);
    return y >= 0 && y < h && x >= 0 && x < w ? y * s.h + x * s.w : -1;
  }
};

// Pixel and channel of work item i: eight pixels by four channels to a warp where pixels are
// neighbours in memory (few lanes on one bank, whole sectors), else channels side by side.
struct Item {
  int pixel, channel;
};
__device__ __forceinline__ Item item_of(int i, int count, int channels, bool channels_last) {
  if (channels_last) return {i / channels, i % channels};
  const int columns = (count + 7) / 8;
  const int block = i / 32, line = block / columns;
  return {(block - line * columns) * 8 + i % 8, line * 4 + i / 8 % 4};
}
__device__ __forceinline__ int items_of(int count, int channels, bool channels_last) {
  return channels_last ? count * channels : (count + 7) / 8 * 8 * ((channels + 3) / 4 * 4);
}

// To shared memory, zeros outside the map and up to a whole grain of channels.
template <typename T>
__device__ __forceinline__ void load_as(const T* from, const End& end, const Window& v,
                                        bool channels_last) {
  const int padded = pad(v.channels);
  if (end.in_vectors) {
    constexpr int kV = kVector<T>;
    const int vectors = padded / kV;
#pragma unroll 1
    for (int i = threadIdx.x; i < v.count * vectors; i += kChainThreads) {
      const int pixel = i / vectors, c = (i - pixel * vectors) * kV;
      const int64_t at = v.at(end.strides, pixel);
      Vector<T> in{};
      if (at >= 0 && c < v.channels) in = *reinterpret_cast<const Vector<T>*>(from + at + c);
#pragma unroll
      for (int q = 0; q < kV / 4; ++q) {
        Quad quad;
#pragma unroll
        for (int e = 0; e < 4; ++e) quad.v[e] = to_float(in.v[q * 4 + e]);
        *reinterpret_cast<Quad*>(v.smem + pixel * v.pitch + c + q * 4) = quad;
      }
    }
    return;
  }
  const int items = items_of(v.count, padded, channels_last);
#pragma unroll 1
  for (int i = threadIdx.x; i < items; i += kChainThreads) {
    const Item item = item_of(i, v.count, padded, channels_last);
    if (item.pixel >= v.count) continue;
    const int64_t at = v.at(end.strides, item.pixel);
    const bool inside = at >= 0 && item.channel < v.channels;
    v.smem[item.pixel * v.pitch + item.channel] =
        inside ? to_float(from[at + item.channel * end.strides.c]) : 0.f;
  }
}

template <typename T>
__device__ __forceinline__ void load(const Ends& ends, const End& end, int64_t n, const Window& v) {
  const int64_t at = n * end.strides.n + v.c0 * end.strides.c;
  if (end.is_float)
    load_as(static_cast<const float*>(end.data) + at, end, v, ends.channels_last);
  else
    load_as(static_cast<const T*>(end.data) + at, end, v, ends.channels_last);
}

// Finished outputs from shared memory to y.
template <typename T>
__device__ __forceinline__ void store(const Ends& ends, int64_t n, const Window& v) {
  const End& end = ends.y;
  void* data = const_cast<void*>(end.data);
  const int64_t base = n * end.strides.n + v.c0 * end.strides.c;
  if (end.in_vectors) {
    constexpr int kV = kVector<T>;
    const int vectors = v.channels / kV;
#pragma unroll 1
    for (int i = threadIdx.x; i < v.count * vectors; i += kChainThreads) {
      const int pixel = i / vectors, c = (i - pixel * vectors) * kV;
      const int64_t at = v.at(end.strides, pixel);
      if (at < 0) continue;
      Vector<T> out;
#pragma unroll
      for (int q = 0; q < kV / 4; ++q) {
        const Quad quad = *reinterpret_cast<const Quad*>(v.smem + pixel * v.pitch + c + q * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) out.v[q * 4 + e] = from_float<T>(quad.v[e]);
      }
      *reinterpret_cast<Vector<T>*>(static_cast<T*>(data) + base + at + c) = out;
    }
    return;
  }
  const int items = items_of(v.count, v.channels, ends.channels_last);
#pragma unroll 1
  for (int i = threadIdx.x; i < items; i += kChainThreads) {
    const Item item = item_of(i, v.count, v.channels, ends.channels_last);
    if (item.pixel >= v.count || item.channel >= v.channels) continue;
    const int64_t at = v.at(end.strides, item.pixel);
    if (at < 0) continue;
    const float value = v.smem[item.pixel * v.pitch + item.channel];
    const int64_t to = base + at + item.channel * end.strides.c;
    if (end.is_float)
      static_cast<float*>(data)[to] = value;
    else
      static_cast<T*>(data)[to] = from_float<T>(value);
  }
}

// Filters [tap][channel] and biases of a depthwise stage, `padded` channels from c0 on.
template <typename T>
__device__ __forceinline__ void stage_depthwise(const ChainStage& stage, int c0, int padded,
                                                float* to) {
  const ConvShape& s = stage.shape;
  const int64_t* const stride = stage.weight_stride;
  const T* weight = static_cast<const T*>(stage.weight);
  const T* bias = static_cast<const T*>(stage.bias);
  const int filter_w = static_cast<int>(s.s), taps = static_cast<int>(s.r) * filter_w;
#pragma unroll 1
  for (int i = threadIdx.x; i < (taps + 1) * padded; i += kChainThreads) {
    const int tap = i / padded, c = c0 + i - tap * padded, r = tap / filter_w;
    float v = 0.f;
    if (c < s.k) {
      if (tap < taps)
        v = to_float(weight[c * stride[0] + r * stride[2] + (tap - r * filter_w) * stride[3]]);
      else if (bias)
        v = to_float(bias[c]);
    }
    to[i] = v;
  }
}

constexpr int kWide = 4;  // outputs side by side of a thread in a depthwise stage

// Sums of kWide outputs of four channels. `in`: their first input; columns from `columns` on are
// not there. kFilter and kStride 0: any.
template <int kFilter, int kStride>
__device__ __forceinline__ void slide(Quad (&sum)[kWide], const float* in, int pitch, int in_w,
                                      int columns, const float* filters, int padded,
                                      const ConvShape& s) {
  const int row_pitch = static_cast<int>(s.dil_h) * in_w * pitch;
#pragma unroll 1
  for (int r = 0; r < static_cast<int>(s.r); ++r, in += row_pitch) {
    if constexpr (kFilter > 0) {
      Quad w[kFilter];
#pragma unroll
      for (int t = 0; t < kFilter; ++t)
        w[t] = *reinterpret_cast<const Quad*>(filters + (r * kFilter + t) * padded);
#pragma unroll
      for (int j = 0; j < (kWide - 1) * kStride + kFilter; ++j) {
        const Quad x = *reinterpret_cast<const Quad*>(in + (j < columns ? j : 0) * pitch);
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
          const int t = j - i * kStride;
          if (t < 0 || t >= kFilter) continue;
#pragma unroll
          for (int v = 0; v < 4; ++v) sum[i].v[v] = fmaf(w[t].v[v], x.v[v], sum[i].v[v]);
        }
      }
    } else {
      const int filter_w = static_cast<int>(s.s);
#pragma unroll 1
      for (int t = 0; t < filter_w; ++t) {
        const Quad w = *reinterpret_cast<const Quad*>(filters + (r * filter_w + t) * padded);
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
          const int j = i * static_cast<int>(s.stride_w) + t * static_cast<int>(s.dil_w);
          const Quad x = *reinterpret_cast<const Quad*>(in + (j < columns ? j : 0) * pitch);
#pragma unroll
          for (int v = 0; v < 4; ++v) sum[i].v[v] = fmaf(w.v[v], x.v[v], sum[i].v[v]);
        }
      }
    }
  }
}

// A depthwise stage with bias and activation, zeros outside its map: kWide outputs of four channels
// a thread. `add`: to the sums, what lies in `to`.
__device__ __forceinline__ void run_depthwise(const ChainStage& stage, const Region& from,
                                              const Region& out, Origin o, const float* in,
                                              int in_pitch, const float* filters, int padded,
                                              float* to, int pitch, bool add) {
  const ConvShape& s = stage.shape;
  const int quads = padded / 4, strips = (out.w + kWide - 1) / kWide;
  const int kind = s.dil_w == 1 ? static_cast<int>(s.s * 4 + s.stride_w) : 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < out.h * strips * quads; i += kChainThreads) {
    const int line = i / quads, c = (i - line * quads) * 4;
    const int row = line / strips, col = (line - row * strips) * kWide;
    const int in_col = col * static_cast<int>(s.stride_w), columns = from.w - in_col;
    const float* x = in + (row * static_cast<int>(s.stride_h) * from.w + in_col) * in_pitch + c;
    Quad sum[kWide] = {};
    if (kind == 3 * 4 + 1)
      slide<3, 1>(sum, x, in_pitch, from.w, columns, filters + c, padded, s);
    else if (kind == 3 * 4 + 2)
      slide<3, 2>(sum, x, in_pitch, from.w, columns, filters + c, padded, s);
    else if (kind == 5 * 4 + 1)
      slide<5, 1>(sum, x, in_pitch, from.w, columns, filters + c, padded, s);
    else
      slide<0, 0>(sum, x, in_pitch, from.w, columns, filters + c, padded, s);
    const Quad bias =
        *reinterpret_cast<const Quad*>(filters + static_cast<int>(s.r * s.s) * padded + c);
    const bool row_inside = o.row + row >= 0 && o.row + row < s.p;
    float* target = to + (row * out.w + col) * pitch + c;
#pragma unroll
    for (int j = 0; j < kWide; ++j, target += pitch) {
      if (col + j >= out.w) break;
      const int q = o.col + col + j;
      const bool inside = row_inside && q >= 0 && q < s.q;
      Quad more{};
      if (add) more = *reinterpret_cast<const Quad*>(target);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float value = sum[j].v[v] + bias.v[v] + more.v[v];
        sum[j].v[v] = inside ? activate(stage.activation, value) : 0.f;
      }
      *reinterpret_cast<Quad*>(target) = sum[j];
    }
  }
}

// The sums of a dense stage with bias and activation, zeros outside its map. `to` is the place of
// the block's first pixel and filter; filters from `channels` on have no place there. `add`: to the
// sums, what lies in `to`.
template <typename T, int kSums>
__device__ __forceinline__ void put_dense(DenseTile<T, kSums>& tile, const ChainStage& stage,
                                          const DensePlan& d, const Region& out, Origin o, int m0,
                                          int filter0, int channels, float* to, int pitch,
                                          bool add) {
  const ConvShape& s = stage.shape;
  const Share own = share_of(d);
  const int area = out.h * out.w;
  const T* bias = static_cast<const T*>(stage.bias);
#pragma unroll
  for (int i = 0; i < DenseTile<T, kSums>::kPixels; ++i) {
    const int pixel = own.first + tile.pixel(i), row = (m0 + pixel) / out.w;
    if (m0 + pixel >= area) continue;
    const int p = o.row + row, q = o.col + (m0 + pixel - row * out.w);
    const bool inside = p >= 0 && p < s.p && q >= 0 && q < s.q;
    tile.each(d, own, i, [&](int channel, const float* sums) {
      if (channel >= channels) return;
      float* target = to + pixel * pitch + channel;
      Pair result{};
      if (add) result = *reinterpret_cast<const Pair*>(target);
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        float value = sums[v];
        if (bias && filter0 + channel + v < s.k) value += to_float(bias[filter0 + channel + v]);
        value += result.v[v];
        result.v[v] = inside ? activate(stage.activation, value) : 0.f;
      }
      *reinterpret_cast<Pair*>(target) = result;
    });
  }
}

}  // namespace sparsecnn::cuda
