#include "cuda/chain_conv2d_dense.cuh"
#include "cuda/entry.h"

namespace sparsecnn::cuda {
namespace {

// Where a group of stages reads and writes: tensors of the op, or intermediates kept as float.
struct Ends {
  const void* x;
  void* y;
  const void* residual;
  bool x_is_float, y_is_float;      // whatever the op's type is
  bool x_in_vectors, y_in_vectors;  // channels last, whole and aligned vectors of channels
  TensorStrides xs, ys;
  bool channels_last;
};

__device__ __forceinline__ int pad(int channels) {
  return (channels + kGrain - 1) / kGrain * kGrain;
}

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

// Which pixel and channel of a region work item `i` of a thread is: eight pixels by four channels
// to a warp where pixels are neighbours in memory, else channels side by side.
struct Item {
  int pixel, channel;
};

__device__ __forceinline__ Item planar_item(int i, int area) {
  const int columns = (area + 7) / 8;  // of eight pixels
  const int block = i / 32, line = block / columns;
  return {(block - line * columns) * 8 + i % 8, line * 4 + i / 8 % 4};
}

template <typename T>
__device__ __forceinline__ void load_vectors(const T* x, const TensorStrides& xs, const Region& r,
                                             Origin o, int h, int w, int channels, int padded,
                                             float* to, int pitch) {
  const int vectors = padded / kVector<T>, area = r.h * r.w;
  for (int i = threadIdx.x; i < area * vectors; i += kChainThreads) {
    const int pixel = i / vectors, c = (i - pixel * vectors) * kVector<T>;
    const int row = pixel / r.w;
    const int y = o.row + row, z = o.col + (pixel - row * r.w);
    Vector<T> in{};
    if (c < channels && y >= 0 && y < h && z >= 0 && z < w)
      in = *reinterpret_cast<const Vector<T>*>(x + y * xs.h + z * xs.w + c);
    float* target = to + pixel * pitch + c;
#pragma unroll
    for (int q = 0; q < kVector<T> / 4; ++q) {
      Quad quad;
#pragma unroll
      for (int v = 0; v < 4; ++v) quad.v[v] = to_float(in.v[q * 4 + v]);
      *reinterpret_cast<Quad*>(target + q * 4) = quad;
    }
  }
}

template <typename T>
__device__ __forceinline__ void load_scalars(const T* x, const TensorStrides& xs, const Region& r,
                                             Origin o, int h, int w, int channels, int padded,
                                             float* to, int pitch, bool planar) {
  const int area = r.h * r.w, count = padded * (planar ? (area + 7) / 8 * 8 : area);
  for (int i = threadIdx.x; i < count; i += kChainThreads) {
    Item item{i / padded, i % padded};
    if (planar) item = planar_item(i, area);
    if (item.pixel >= area) continue;
    const int row = item.pixel / r.w;
    const int y = o.row + row, z = o.col + (item.pixel - row * r.w);
    const bool inside = item.channel < channels && y >= 0 && y < h && z >= 0 && z < w;
    to[item.pixel * pitch + item.channel] =
        inside ? to_float(x[y * xs.h + z * xs.w + item.channel * xs.c]) : 0.f;
  }
}

// Channels [c0, c0 + channels) of the group's input into shared memory, zeros up to `padded`.
template <typename T>
__device__ __forceinline__ void load_region(const Ends& e, const ConvShape& s, const Region& r,
                                            const Tile& tile, int c0, int channels, int padded,
                                            float* to, int pitch) {
  const Origin o = origin_of(r, tile);
  const int64_t at = tile.n * e.xs.n + c0 * e.xs.c;
  const auto load = [&](auto* x) {
    if (e.x_in_vectors)
      load_vectors(x + at, e.xs, r, o, static_cast<int>(s.h), static_cast<int>(s.w), channels,
                   padded, to, pitch);
    else
      load_scalars(x + at, e.xs, r, o, static_cast<int>(s.h), static_cast<int>(s.w), channels,
                   padded, to, pitch, !e.channels_last);
  };
  if (e.x_is_float)
    load(static_cast<const float*>(e.x));
  else
    load(static_cast<const T*>(e.x));
}

// Filters [tap][channel] and biases of a depthwise stage, `padded` channels from c0 on.
template <typename T>
__device__ __forceinline__ void stage_depthwise(const ChainStage& stage, int c0, int padded,
                                                float* to) {
  const ConvShape& s = stage.shape;
  const int filter_w = static_cast<int>(s.s), taps = static_cast<int>(s.r) * filter_w;
  for (int i = threadIdx.x; i < (taps + 1) * padded; i += kChainThreads) {
    const int tap = i / padded, c = i - tap * padded, r = tap / filter_w;
    float v = 0.f;
    if (c0 + c < s.k) {
      const int64_t* const t = stage.weight_stride;
      if (tap < taps)
        v = to_float(static_cast<const T*>(
            stage.weight)[(c0 + c) * t[0] + r * t[2] + (tap - r * filter_w) * t[3]]);
      else if (stage.bias)
        v = to_float(static_cast<const T*>(stage.bias)[c0 + c]);
    }
    to[i] = v;
  }
}

constexpr int kWide = 4;  // outputs side by side of a thread in a depthwise stage

// Sums of kWide outputs of four channels. `in`: their first input; columns from `columns` on are
// not there. kFilter and kStride 0: any.
template <int kFilter, int kStride>
__device__ __forceinline__ void window(Quad (&sum)[kWide], const float* in, int pitch, int in_w,
                                       int columns, const float* filters, int padded,
                                       const ConvShape& s) {
  const int row_pitch = static_cast<int>(s.dil_h) * in_w * pitch;
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
      for (int t = 0; t < static_cast<int>(s.s); ++t) {
        const Quad w =
            *reinterpret_cast<const Quad*>(filters + (r * static_cast<int>(s.s) + t) * padded);
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

// A depthwise stage from shared to shared memory: kWide outputs of four channels a thread.
// `finish`: with bias, activation and zeros outside the map; else the bare sums.
__device__ __forceinline__ void run_depthwise(const ChainStage& stage, const Region& from,
                                              const Region& out, Origin o, const float* in,
                                              int in_pitch, const float* filters, int padded,
                                              float* to, int pitch, bool finish) {
  const ConvShape& s = stage.shape;
  const int quads = padded / 4, strips = (out.w + kWide - 1) / kWide;
  const int kind = s.dil_w != 1 ? 0 : static_cast<int>(s.s * 4 + s.stride_w);
  for (int i = threadIdx.x; i < out.h * strips * quads; i += kChainThreads) {
    const int line = i / quads, c = (i - line * quads) * 4;
    const int row = line / strips, col = (line - row * strips) * kWide;
    const int in_col = col * static_cast<int>(s.stride_w);
    const float* x = in + (row * static_cast<int>(s.stride_h) * from.w + in_col) * in_pitch + c;
    Quad sum[kWide] = {};
    if (kind == 3 * 4 + 1)
      window<3, 1>(sum, x, in_pitch, from.w, from.w - in_col, filters + c, padded, s);
    else if (kind == 3 * 4 + 2)
      window<3, 2>(sum, x, in_pitch, from.w, from.w - in_col, filters + c, padded, s);
    else if (kind == 5 * 4 + 1)
      window<5, 1>(sum, x, in_pitch, from.w, from.w - in_col, filters + c, padded, s);
    else
      window<0, 0>(sum, x, in_pitch, from.w, from.w - in_col, filters + c, padded, s);
    const Quad bias =
        *reinterpret_cast<const Quad*>(filters + static_cast<int>(s.r * s.s) * padded + c);
    const bool row_inside = o.row + row >= 0 && o.row + row < s.p;
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
      if (col + j >= out.w) break;
      const int q = o.col + col + j;
      if (finish) {
        const bool inside = row_inside && q >= 0 && q < s.q;
#pragma unroll
        for (int v = 0; v < 4; ++v)
          sum[j].v[v] = inside ? activate(stage.activation, sum[j].v[v] + bias.v[v]) : 0.f;
      }
      *reinterpret_cast<Quad*>(to + (row * out.w + col + j) * pitch + c) = sum[j];
    }
  }
}

// Sums of a dense stage into shared memory, `to` being that of the block's first pixel and of
// channel `filter0`; channels from `channels` on have no place there.
template <typename T, int kSums>
__device__ __forceinline__ void put_dense(DenseTile<T, kSums>& tile, const ChainStage& stage,
                                          const DensePlan& d, const Region& out, Origin o, int m0,
                                          int filter0, int channels, float* to, int pitch,
                                          bool finish) {
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
      Pair out_pair{{sums[0], sums[1]}};
      if (finish) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          float& value = out_pair.v[v];
          if (bias && filter0 + channel + v < s.k) value += to_float(bias[filter0 + channel + v]);
          value = inside ? activate(stage.activation, value) : 0.f;
        }
      }
      *reinterpret_cast<Pair*>(to + pixel * pitch + channel) = out_pair;
    });
  }
}

// `channels` finished outputs from channel k on for pixels [m0, m0 + count) of the tile.
template <typename T>
__device__ __forceinline__ void store_tile(const ChainStage& stage, const Ends& e,
                                           const Region& out, const Tile& tile, int m0, int count,
                                           int k, int channels, const float* from, int pitch) {
  const ConvShape& s = stage.shape;
  const T* bias = static_cast<const T*>(stage.bias);
  const T* residual = static_cast<const T*>(e.residual);
  const auto value_of = [&](float v, int c, int64_t at) {
    if (bias) v += to_float(bias[k + c]);
    if (residual) v += to_float(residual[at]);
    return activate(stage.activation, v);
  };
  if (e.y_in_vectors && k % kVector<T> == 0 && channels % kVector<T> == 0) {
    const int vectors = channels / kVector<T>;
    for (int i = threadIdx.x; i < count * vectors; i += kChainThreads) {
      const int pixel = i / vectors, c = (i - pixel * vectors) * kVector<T>;
      const int row = (m0 + pixel) / out.w;
      const int p = tile.p0 + row, q = tile.q0 + (m0 + pixel - row * out.w);
      if (p >= s.p || q >= s.q) continue;
      const int64_t at = tile.n * e.ys.n + p * e.ys.h + q * e.ys.w + k + c;
      Vector<T> more{}, y;
      if (residual) more = *reinterpret_cast<const Vector<T>*>(residual + at);
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
        float value = from[pixel * pitch + c + v];
        if (bias) value += to_float(bias[k + c + v]);
        if (residual) value += to_float(more.v[v]);
        y.v[v] = from_float<T>(activate(stage.activation, value));
      }
      *reinterpret_cast<Vector<T>*>(static_cast<T*>(e.y) + at) = y;
    }
    return;
  }
  const int items = channels * (e.channels_last ? count : (count + 7) / 8 * 8);
  const int padded = e.channels_last ? items : (items / channels) * ((channels + 3) / 4 * 4);
  for (int i = threadIdx.x; i < padded; i += kChainThreads) {
    Item item{i / channels, i % channels};
    if (!e.channels_last) item = planar_item(i, count);
    if (item.pixel >= count || item.channel >= channels) continue;
    const int row = (m0 + item.pixel) / out.w;
    const int p = tile.p0 + row, q = tile.q0 + (m0 + item.pixel - row * out.w);
    if (p >= s.p || q >= s.q) continue;
    const int64_t at = tile.n * e.ys.n + (k + item.channel) * e.ys.c + p * e.ys.h + q * e.ys.w;
    const float value = value_of(from[item.pixel * pitch + item.channel], item.channel, at);
    if (e.y_is_float)
      static_cast<float*>(e.y)[at] = value;
    else
      static_cast<T*>(e.y)[at] = from_float<T>(value);
  }
}

// The channels [c0, c0 + padded) of a step's input of its last stage, made in shared memory.
// Returns where they lie.
template <typename T, int kSums>
__device__ __forceinline__ const float* make_chunk(const ChainStage* stages, const ChainPlan& plan,
                                                   const ChainStep& s, const Ends& e,
                                                   const Tile& tile, int c0, int channels, int end,
                                                   bool final, int k, bool made_before, float* smem,
                                                   int* pitch) {
  const int padded = pad(channels);
  const float* in = smem + s.source + c0;
  *pitch = s.source_pitch;
  __syncthreads();  // all have used the chunk before
  int next = s.first;
  const DensePlan& d = s.expand_plan;
  const ChainStage& expand = stages[s.first];
  const int wide = pad(static_cast<int>(expand.shape.c));
  // Copies under way: the weights of this chunk's expansion, if there was a chunk before it, then
  // those of its reduction, then those of the next chunk's expansion; each wait leaves one group.
  if (s.reduce)
    stage_pass<T>(stages[s.last], s.reduce_plan, 0, c0, padded, k, smem);
  else
    copy_async_commit();
  float* filters = smem + s.filters;
  for (int i = s.first + s.expand; i <= s.last - s.reduce; ++i) {
    stage_depthwise<T>(stages[i], c0, padded, filters);
    filters += (static_cast<int>(stages[i].shape.r * stages[i].shape.s) + 1) * padded;
  }
  if (s.streams) {
    load_region<T>(e, stages[0].shape, plan.region[0], tile, c0, channels, padded, smem + s.at[0],
                   s.pitch);
    in = smem + s.at[0];
    *pitch = s.pitch;
  } else if (s.expand) {
    const Region& out = plan.region[s.first + 1];
    float* to = smem + s.at[s.first + 1];
    for (int m0 = 0; m0 < out.h * out.w; m0 += d.warps_m * kWarpPixels)
      for (int n0 = 0; n0 < padded; n0 += d.slab) {
        DenseTile<T, kSums / 2> sums;
        sums.clear();
        add_dense(sums, expand, d, out, m0, smem + s.source, s.source_pitch, plan.region[s.first].w,
                  0, wide, c0 + n0, s.first > 0 || e.x_is_float ? kAllParts : kParts<T>,
                  made_before && m0 + n0 == 0, smem);
        put_dense(sums, expand, d, out, origin_of(out, tile), m0, c0 + n0, padded - n0,
                  to + m0 * s.pitch + n0, s.pitch, true);
      }
    __syncthreads();  // the chunk is there, its weights are used
    if (c0 + s.chunk < end) stage_pass<T>(expand, d, 0, 0, wide, c0 + s.chunk, smem);
    in = to;
    *pitch = s.pitch;
    ++next;
  }
  if (!s.expand || c0 + s.chunk >= end) copy_async_commit();  // nothing, but a group
  filters = smem + s.filters;
  for (; next <= s.last - s.reduce; ++next) {
    const ChainStage& stage = stages[next];
    const Region& out = plan.region[next + 1];
    const bool ends = next == s.last;
    float* to = smem + s.at[next + 1];
    int to_pitch = s.pitch;
    if (ends && !final) to = smem + s.sink + c0, to_pitch = s.sink_pitch;
    __syncthreads();  // its input and filters are there
    run_depthwise(stage, plan.region[next], out, origin_of(out, tile), in, *pitch, filters, padded,
                  to, to_pitch, !(ends && final));
    filters += (static_cast<int>(stage.shape.r * stage.shape.s) + 1) * padded;
    in = to;
    *pitch = to_pitch;
  }
  return in;
}

template <typename T, int kSums>
__device__ __forceinline__ void run_step(const ChainStage* stages, const ChainPlan& plan,
                                         const ChainStep& s, const Ends& e, const Tile& tile,
                                         bool final, float* smem) {
  const ChainStage& last = stages[s.last];
  const Region& out = plan.region[s.last + 1];
  const int area = out.h * out.w;
  const int k_begin = final ? tile.k0 : 0;
  const int all = static_cast<int>(last.shape.k);
  const int k_end =
      final && all - k_begin > plan.slab ? k_begin + static_cast<int>(plan.slab) : all;
  int pitch;
  if (!s.reduce) {
    for (int c0 = k_begin; c0 < k_end; c0 += s.chunk) {
      const int channels = k_end - c0 < s.chunk ? k_end - c0 : s.chunk;
      const float* made = make_chunk<T, kSums>(stages, plan, s, e, tile, c0, channels, k_end, final,
                                               0, c0 > k_begin, smem, &pitch);
      __syncthreads();
      if (final) store_tile<T>(last, e, out, tile, 0, area, c0, channels, made, pitch);
    }
    return;
  }
  const DensePlan& d = s.reduce_plan;
  const int channels = static_cast<int>(last.shape.c), slab_m = d.warps_m * kWarpPixels;
  const int parts = s.last > 0 || e.x_is_float ? kAllParts : kParts<T>;
  for (int m0 = 0; m0 < area; m0 += slab_m)
    for (int k = k_begin; k < k_end; k += d.slab) {
      DenseTile<T, kSums> sums;
      sums.clear();
      for (int c0 = 0; c0 < channels; c0 += s.chunk) {
        const int some = channels - c0 < s.chunk ? channels - c0 : s.chunk;
        const float* in = make_chunk<T, kSums>(stages, plan, s, e, tile, c0, some, channels, final,
                                               k, c0 > 0, smem, &pitch);
        add_dense(sums, last, d, out, m0, in, pitch, plan.region[s.last].w, c0, pad(some), k, parts,
                  true, smem);
      }
      const int left = k_end - k < d.slab ? k_end - k : d.slab;
      __syncthreads();  // all have used what the outputs may overwrite
      if (final) {
        const int count = area - m0 < slab_m ? area - m0 : slab_m;
        put_dense(sums, last, d, out, origin_of(out, tile), m0, k, d.slab, smem + s.sink,
                  s.sink_pitch, false);
        __syncthreads();
        store_tile<T>(last, e, out, tile, m0, count, k, left, smem + s.sink, s.sink_pitch);
      } else {
        put_dense(sums, last, d, out, origin_of(out, tile), m0, k, pad(left),
                  smem + s.sink + m0 * s.sink_pitch + k, s.sink_pitch, true);
      }
    }
}

template <typename T, int kSums>
__global__ void __launch_bounds__(kChainThreads, kSums == 4 ? 2 : 1)
    chain_conv2d_fused(const ChainConv2dParams prm, int begin, const ChainPlan plan,
                       const Ends ends) {
  DYN_SMEM(float, smem);
  const ChainStage* stages = prm.stage + begin;
  for (int64_t work = blockIdx.x; work < plan.work; work += gridDim.x) {
    int64_t share, tile_q, tile_p;
    Tile tile;
    // Shares of the channels run fastest: blocks in flight together read the same inputs.
    tile.n = divide(divide(divide(work, plan.slabs, &share), plan.tiles_q, &tile_q), plan.tiles_p,
                    &tile_p);
    tile.p0 = static_cast<int>(tile_p) * plan.region[plan.stages].h;
    tile.q0 = static_cast<int>(tile_q) * plan.region[plan.stages].w;
    tile.k0 = static_cast<int>(share * plan.slab);
    const ChainStep& first = plan.step[0];
    if (!first.streams) {
      const int channels = static_cast<int>(stages[0].shape.c);
      __syncthreads();  // all are through with the tile before
      load_region<T>(ends, stages[0].shape, plan.region[0], tile, 0, channels, pad(channels),
                     smem + first.source, first.source_pitch);
    }
    for (int i = 0; i < plan.steps; ++i)
      run_step<T, kSums>(stages, plan, plan.step[i], ends, tile, i == plan.steps - 1, smem);
  }
}

// One stage, an output per thread: what no tile of fits into shared memory.
template <typename T>
__global__ void __launch_bounds__(kChainThreads)
    chain_conv2d_direct(const ChainStage stage, const Ends e, int64_t work) {
  const ConvShape& s = stage.shape;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kChainThreads + threadIdx.x; item < work;
       item += static_cast<int64_t>(gridDim.x) * kChainThreads) {
    int64_t k, p, q, n;  // neighbouring threads have neighbouring outputs
    if (e.channels_last) {
      n = divide(divide(divide(item, s.k, &k), s.q, &q), s.p, &p);
    } else {
      n = divide(divide(divide(item, s.q, &q), s.p, &p), s.k, &k);
    }
    const int64_t c_begin = s.groups > 1 ? k : 0, channels = s.groups > 1 ? 1 : s.c;
    const T* w = static_cast<const T*>(stage.weight) + k * stage.weight_stride[0];
    float sum = 0.f;
    for (int64_t r = 0; r < s.r; ++r) {
      const int64_t row = p * s.stride_h + r * s.dil_h - s.pad_top;
      if (row < 0 || row >= s.h) continue;
      for (int64_t t = 0; t < s.s; ++t) {
        const int64_t col = q * s.stride_w + t * s.dil_w - s.pad_left;
        if (col < 0 || col >= s.w) continue;
        const int64_t at = n * e.xs.n + row * e.xs.h + col * e.xs.w + c_begin * e.xs.c;
        const T* tap = w + r * stage.weight_stride[2] + t * stage.weight_stride[3];
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t from = at + c * e.xs.c;
          const float x = e.x_is_float ? static_cast<const float*>(e.x)[from]
                                       : to_float(static_cast<const T*>(e.x)[from]);
          sum = fmaf(to_float(tap[c * stage.weight_stride[1]]), x, sum);
        }
      }
    }
    const int64_t at = n * e.ys.n + k * e.ys.c + p * e.ys.h + q * e.ys.w;
    if (stage.bias) sum += to_float(static_cast<const T*>(stage.bias)[k]);
    if (e.residual) sum += to_float(static_cast<const T*>(e.residual)[at]);
    sum = activate(stage.activation, sum);
    if (e.y_is_float)
      static_cast<float*>(e.y)[at] = sum;
    else
      static_cast<T*>(e.y)[at] = from_float<T>(sum);
  }
}

// Stages that run as one launch.
struct Group {
  int begin, count;
  bool fused;
  ChainPlan plan;
};

Ends ends_of(const ChainConv2dParams& p, const Group& g, const float* from, float* to,
             int64_t vector) {
  const ConvShape& first = p.stage[g.begin].shape;
  const ConvShape& last = p.stage[g.begin + g.count - 1].shape;
  Ends e{};
  e.channels_last = p.layout == Layout::kNHWC;
  e.x_is_float = from != nullptr;
  e.y_is_float = to != nullptr;
  e.x = from ? from : p.x;
  e.y = to ? to : p.y;
  e.residual = to ? nullptr : p.residual;
  e.x_in_vectors = e.channels_last && first.c % (from ? 4 : vector) == 0 && aligned(e.x);
  e.y_in_vectors =
      e.channels_last && !to && last.k % vector == 0 && aligned(e.y) && aligned(e.residual);
  e.xs = strides_of(p.layout, first.c, first.h, first.w);
  e.ys = strides_of(p.layout, last.k, last.p, last.q);
  return e;
}

template <typename T, int kSums>
cudaError_t launch_fused(const ChainConv2dParams& p, const Group& g, const Ends& e,
                         cudaStream_t stream) {
  const auto kernel = chain_conv2d_fused<T, kSums>;
  if (g.plan.smem_bytes > kDefaultSmemBytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(g.plan.smem_bytes));
    if (error != cudaSuccess) return error;
  }
  CUDA_LAUNCH(kernel, grid_size(g.plan.work), kChainThreads, static_cast<size_t>(g.plan.smem_bytes),
              stream, p, g.begin, g.plan, e);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_direct(const ChainStage& stage, const Ends& e, cudaStream_t stream) {
  const ConvShape& s = stage.shape;
  const int64_t work = s.n * s.k * s.p * s.q;
  CUDA_LAUNCH((chain_conv2d_direct<T>), grid_size(ceil_div(work, kChainThreads)), kChainThreads, 0,
              stream, stage, e, work);
  return cudaGetLastError();
}

// As many stages to a launch as shared memory takes. Returns the number of groups.
int make_groups(const ChainConv2dParams& p, const ChainMachine& machine, Group* groups) {
  int found = 0;
  for (int begin = 0; begin < p.stages;) {
    Group& g = groups[found++];
    g.begin = begin;
    g.fused = false;
    for (g.count = p.stages - begin; g.count > 0 && !g.fused; --g.count) {
      g.fused = chain::plan_group(p, begin, g.count, machine, &g.plan);
      if (g.fused) break;
    }
    if (!g.fused) g.count = 1;
    begin += g.count;
  }
  return found;
}

template <typename T>
cudaError_t launch(const ChainConv2dParams& p, WorkspaceSource workspace, void* context,
                   cudaStream_t stream) {
  DeviceLimits limits;
  cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  const ChainMachine machine{limits.sm_count, limits.smem_optin_bytes, kOnTensorCores<T>, kParts<T>,
                             kOnTensorCores<T> ? kParts<T> : 1};
  Group groups[kMaxChainStages];
  const int count = make_groups(p, machine, groups);
  // What lies between two launches, in turn in the first and the second part of the workspace.
  int64_t size[2] = {0, 0};
  for (int i = 0; i + 1 < count; ++i) {
    const ConvShape& s = p.stage[groups[i + 1].begin].shape;
    size[i % 2] = chain::most(size[i % 2], chain::round_up(p.n * s.c * s.h * s.w, 4));
  }
  float* base = nullptr;
  if (count > 1) {
    base = static_cast<float*>(workspace(context, (size[0] + size[1]) * 4));
  }
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    const Group& g = groups[i];
    const float* from = i > 0 ? base + (i % 2 ? 0 : size[0]) : nullptr;
    float* to = i + 1 < count ? base + (i % 2 ? size[0] : 0) : nullptr;
    const Ends e = ends_of(p, g, from, to, kVector<T>);
    if (!g.fused)
      error = launch_direct<T>(p.stage[g.begin], e, stream);
    else if (g.plan.sums == 4)
      error = launch_fused<T, 4>(p, g, e, stream);
    else
      error = launch_fused<T, 8>(p, g, e, stream);
  }
  return error;
}

}  // namespace

int32_t chain_conv2d(const ChainConv2dParams& params, WorkspaceSource workspace, void* context,
                     void* stream) {
  if (params.stages < 1 || params.stages > kMaxChainStages) return cudaErrorInvalidValue;
  const ConvShape& last = params.stage[params.stages - 1].shape;
  if (params.n * last.k * last.p * last.q == 0) return cudaSuccess;
  for (int i = 0; i < params.stages; ++i) {
    const ConvShape& s = params.stage[i].shape;
    if (s.groups != 1 && (s.groups != s.c || s.groups != s.k)) return cudaErrorInvalidValue;
  }
  const auto on = static_cast<cudaStream_t>(stream);
  return with_storage(params.dtype, [&](auto storage) {
    return launch<typename decltype(storage)::type>(params, workspace, context, on);
  });
}

}  // namespace sparsecnn::cuda
