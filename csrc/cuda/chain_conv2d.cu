// chain_conv2d: convolutions in a row, each dense or depthwise, without storing what lies between.
//
//   x_0 = x,  x_i = act_i(conv(x_{i-1}, W_i) + bias_i),  y = act_n(conv(x_{n-1}, W_n) + bias_n
//                                                                  + residual)
//
// Data layout: x, residual and y are NCHW or channels last; weights have any strides and are staged
// 16 bytes at a time if their filters lie innermost. Storage is float, half or bfloat16; sums and
// intermediates are float, in shared memory [pixel][channel].
//
// Fused kernel. A block owns a tile of outputs of one image and all final channels or a share of
// them (few blocks leave processors idle). It walks the steps of chain_conv2d_plan.h: what the tile
// needs of an intermediate, halo included, is made in shared memory and used from there. A last
// dense stage keeps its sums in registers while its input passes by in chunks of channels, so
// expanded channels never lie there all at once. Outputs leave through shared memory, where the
// residual waits for them. The weights of the next pass are copied while the present one computes.
// Dense stages: chain_conv2d_dense.cuh; depthwise stages and copies: chain_conv2d_tile.cuh.
//
// Direct kernel. One stage, an output per thread, for what no tile of fits into shared memory. A
// chain that does not fit runs in groups of stages, float intermediates in the caller's workspace.
//
// Bound (derived): x, residual and y once through device memory, and the stages' multiply-adds.
// Float intermediates cost a dense stage three products on tensor cores (six for half), a halo its
// share of the earlier stages (1.65 for 3x3 on tiles of 7x7). Half types with 4 units of sums a
// warp take 128 registers, so that two blocks hide each other's barriers; others have an SM for
// themselves. No GPU timings were taken: tiles are chosen by counted work, at reasoned rates.
//
// Papers: Sandler et al., "MobileNetV2", CVPR 2018; Kim et al., ICLR 2016 (Tucker-2); Lebedev et
// al., ICLR 2015 (CP); Alwani et al., "Fused-Layer CNN Accelerators", MICRO 2016 (tiles and halos).
#include "cuda/chain_conv2d_tile.cuh"
#include "cuda/entry.h"

namespace sparsecnn::cuda {
namespace {

struct Chain {  // what is the same for all of a tile
  const ChainStage* stages;
  const ChainPlan* plan;
  const Ends* ends;
  float* smem;
};

// The input of a step's last stage: channels [c0, c0 + channels) of [.., end), or what is final of
// them if the last stage is depthwise.
struct Chunk {
  const float* data;
  int pitch;
};

// Makes a chunk and stages the weights that reduce it to filters from k on. `first`: no chunk was
// made before it, which would have staged the weights of its expansion.
template <typename T, int kSums>
__device__ __forceinline__ Chunk make_chunk(const Chain& chain, const ChainStep& s,
                                            const Tile& tile, int c0, int channels, int end, int k,
                                            bool final, bool first) {
  const ChainPlan& plan = *chain.plan;
  float* const smem = chain.smem;
  const int padded = pad(channels);
  const ChainStage& expand = chain.stages[s.first];
  const DensePlan& d = s.expand_plan;
  Chunk chunk{smem + s.source + c0, s.source_pitch};
  __syncthreads();  // all have used the chunk before
  // Copies under way: the weights of this chunk's expansion, unless it is the first, then those of
  // its reduction, then those of the next chunk's expansion; each wait leaves one group.
  if (s.reduce)
    stage_pass<T>(chain.stages[s.last], s.reduce_plan, 0, c0, padded, k, smem);
  else
    copy_async_commit();
  float* filters = smem + s.filters;
#pragma unroll 1
  for (int i = s.first + s.expand; i <= s.last - s.reduce; ++i) {
    stage_depthwise<T>(chain.stages[i], c0, padded, filters);
    filters += static_cast<int>(chain.stages[i].shape.r * chain.stages[i].shape.s + 1) * padded;
  }
  bool next_staged = false;
  if (s.streams) {
    const ConvShape& in = expand.shape;
    const Region& r = plan.region[0];
    chunk = {smem + s.at[0], s.pitch};
    load<T>(*chain.ends, chain.ends->x, tile.n,
            {&r, origin_of(r, tile), 0, r.h * r.w, static_cast<int>(in.h), static_cast<int>(in.w),
             c0, channels, smem + s.at[0], s.pitch});
  } else if (s.expand) {
    const Region& out = plan.region[s.first + 1];
    const int inputs = pad(static_cast<int>(expand.shape.c));
    const int parts = s.first > 0 || chain.ends->x.is_float ? kAllParts : kParts<T>;
    float* to = smem + s.at[s.first + 1];
#pragma unroll 1
    for (int m0 = 0; m0 < out.h * out.w; m0 += d.warps_m * kWarpPixels)
#pragma unroll 1
      for (int n0 = 0; n0 < padded; n0 += d.slab) {
        DenseTile<T, kSums / 2> sums;
        sums.clear();
        add_dense(sums, expand, d, out, m0, chunk.data - c0, chunk.pitch, plan.region[s.first].w, 0,
                  inputs, c0 + n0, parts, !first && m0 + n0 == 0, smem);
        put_dense(sums, expand, d, out, origin_of(out, tile), m0, c0 + n0, padded - n0,
                  to + m0 * s.pitch + n0, s.pitch, false);
      }
    chunk = {to, s.pitch};
    __syncthreads();  // the chunk is there, its weights are used
    next_staged = c0 + s.chunk < end;
    if (next_staged) stage_pass<T>(expand, d, 0, 0, inputs, c0 + s.chunk, smem);
  }
  if (!next_staged) copy_async_commit();
  filters = smem + s.filters;
#pragma unroll 1
  for (int i = s.first + s.expand; i <= s.last - s.reduce; ++i) {
    const ChainStage& stage = chain.stages[i];
    const ConvShape& shape = stage.shape;
    const Region& out = plan.region[i + 1];
    Chunk made{smem + s.at[i + 1], s.pitch};
    if (i == s.last && !final) made = {smem + s.sink + c0, s.sink_pitch};
    float* to = const_cast<float*>(made.data);
    const bool add = i == s.last && final && chain.ends->residual.data;
    if (add)
      load<T>(*chain.ends, chain.ends->residual, tile.n,
              {&out, origin_of(out, tile), 0, out.h * out.w, static_cast<int>(shape.p),
               static_cast<int>(shape.q), c0, channels, to, s.pitch});
    __syncthreads();  // its input and filters are there
    run_depthwise(stage, plan.region[i], out, origin_of(out, tile), chunk.data, chunk.pitch,
                  filters, padded, to, made.pitch, add);
    filters += static_cast<int>(shape.r * shape.s + 1) * padded;
    chunk = made;
  }
  return chunk;
}

template <typename T, int kSums>
__device__ __forceinline__ void run_step(const Chain& chain, const ChainStep& s, const Tile& tile,
                                         bool final) {
  const ChainStage& last = chain.stages[s.last];
  const ConvShape& shape = last.shape;
  const Region& out = chain.plan->region[s.last + 1];
  const int area = out.h * out.w, k_begin = final ? tile.k0 : 0, all = static_cast<int>(shape.k);
  const int share = static_cast<int>(chain.plan->slab);
  const int k_end = final && all - k_begin > share ? k_begin + share : all;
  // Outputs on their way to y: pixels from m0 on, channels from c0 on.
  const auto window = [&](int m0, int count, int c0, int channels, const float* from, int pitch) {
    return Window{&out,
                  origin_of(out, tile),
                  m0,
                  count,
                  static_cast<int>(shape.p),
                  static_cast<int>(shape.q),
                  c0,
                  channels,
                  const_cast<float*>(from),
                  pitch};
  };
  if (!s.reduce) {
#pragma unroll 1
    for (int c0 = k_begin; c0 < k_end; c0 += s.chunk) {
      const int channels = k_end - c0 < s.chunk ? k_end - c0 : s.chunk;
      const Chunk made =
          make_chunk<T, kSums>(chain, s, tile, c0, channels, k_end, 0, final, c0 == k_begin);
      __syncthreads();
      if (!final) continue;
      store<T>(*chain.ends, tile.n, window(0, area, c0, channels, made.data, s.pitch));
    }
    return;
  }
  const DensePlan& d = s.reduce_plan;
  const int channels = static_cast<int>(shape.c), slab_m = d.warps_m * kWarpPixels;
  const int parts = s.last > 0 || chain.ends->x.is_float ? kAllParts : kParts<T>;
#pragma unroll 1
  for (int m0 = 0; m0 < area; m0 += slab_m)
#pragma unroll 1
    for (int k = k_begin; k < k_end; k += d.slab) {
      DenseTile<T, kSums> sums;
      sums.clear();
#pragma unroll 1
      for (int c0 = 0; c0 < channels; c0 += s.chunk) {
        const int some = channels - c0 < s.chunk ? channels - c0 : s.chunk;
        const Chunk in =
            make_chunk<T, kSums>(chain, s, tile, c0, some, channels, k, final, c0 == 0);
        add_dense(sums, last, d, out, m0, in.data, in.pitch, chain.plan->region[s.last].w, c0,
                  pad(some), k, parts, true, chain.smem);
      }
      const int left = k_end - k < d.slab ? k_end - k : d.slab;
      float* to = chain.smem + s.sink;
      if (!final) to += m0 * s.sink_pitch + k;
      const int count = area - m0 < slab_m ? area - m0 : slab_m;
      const bool add = final && chain.ends->residual.data;
      __syncthreads();  // all have used what the outputs may overwrite
      if (add) {
        load<T>(*chain.ends, chain.ends->residual, tile.n,
                window(m0, count, k, left, to, s.sink_pitch));
        __syncthreads();
      }
      put_dense(sums, last, d, out, origin_of(out, tile), m0, k, pad(left), to, s.sink_pitch, add);
      if (!final) continue;
      __syncthreads();
      store<T>(*chain.ends, tile.n, window(m0, count, k, left, to, s.sink_pitch));
    }
}

template <typename T, int kSums>
__global__ void __launch_bounds__(kChainThreads, kSums == 4 ? 2 : 1)
    chain_conv2d_fused(const ChainConv2dParams prm, const ChainPlan plan, const Ends ends) {
  DYN_SMEM(float, memory);
  // The tile lies in shared memory: it would hold registers through all stages.
  Tile& tile = *reinterpret_cast<Tile*>(memory);
  float* const smem = memory + kTileFloats;
  const Chain chain{prm.stage, &plan, &ends, smem};
#pragma unroll 1
  for (int turn = 0; blockIdx.x + static_cast<int64_t>(turn) * gridDim.x < plan.work; ++turn) {
    __syncthreads();  // all are through with the tile before
    if (threadIdx.x == 0) {
      const int64_t work = blockIdx.x + static_cast<int64_t>(turn) * gridDim.x;
      int64_t share, tile_q, tile_p;
      // Shares of the channels run fastest: blocks in flight together read the same inputs.
      tile.n = divide(divide(divide(work, plan.slabs, &share), plan.tiles_q, &tile_q), plan.tiles_p,
                      &tile_p);
      tile.p0 = static_cast<int>(tile_p) * plan.region[plan.stages].h;
      tile.q0 = static_cast<int>(tile_q) * plan.region[plan.stages].w;
      tile.k0 = static_cast<int>(share * plan.slab);
    }
    __syncthreads();
    const ChainStep& first = plan.step[0];
    if (!first.streams) {
      const ConvShape& in = chain.stages[0].shape;
      const Region& r = plan.region[0];
      load<T>(ends, ends.x, tile.n,
              {&r, origin_of(r, tile), 0, r.h * r.w, static_cast<int>(in.h), static_cast<int>(in.w),
               0, static_cast<int>(in.c), smem + first.source, first.source_pitch});
    }
#pragma unroll 1
    for (int i = 0; i < plan.steps; ++i)
      run_step<T, kSums>(chain, plan.step[i], tile, i == plan.steps - 1);
  }
}

template <typename T>
__global__ void __launch_bounds__(kChainThreads)
    chain_conv2d_direct(const ChainStage stage, const Ends e, int64_t work) {
  const ConvShape& s = stage.shape;
  void* y = const_cast<void*>(e.y.data);
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
        const int64_t at =
            n * e.x.strides.n + row * e.x.strides.h + col * e.x.strides.w + c_begin * e.x.strides.c;
        const T* tap = w + r * stage.weight_stride[2] + t * stage.weight_stride[3];
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t from = at + c * e.x.strides.c;
          const float x = e.x.is_float ? static_cast<const float*>(e.x.data)[from]
                                       : to_float(static_cast<const T*>(e.x.data)[from]);
          sum = fmaf(to_float(tap[c * stage.weight_stride[1]]), x, sum);
        }
      }
    }
    const int64_t at =
        n * e.y.strides.n + k * e.y.strides.c + p * e.y.strides.h + q * e.y.strides.w;
    if (stage.bias) sum += to_float(static_cast<const T*>(stage.bias)[k]);
    if (e.residual.data) sum += to_float(static_cast<const T*>(e.residual.data)[at]);
    sum = activate(stage.activation, sum);
    if (e.y.is_float)
      static_cast<float*>(y)[at] = sum;
    else
      static_cast<T*>(y)[at] = from_float<T>(sum);
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
  const bool nhwc = p.layout == Layout::kNHWC;
  Ends e{};
  e.channels_last = nhwc;
  e.x.data = from ? from : p.x;
  e.x.is_float = from != nullptr;
  e.x.strides = strides_of(p.layout, first.c, first.h, first.w);
  e.x.in_vectors = nhwc && first.c % (from ? 4 : vector) == 0 && aligned(e.x.data);
  e.y.data = to ? to : p.y;
  e.y.is_float = to != nullptr;
  e.y.strides = strides_of(p.layout, last.k, last.p, last.q);
  e.y.in_vectors = nhwc && !to && last.k % vector == 0 && aligned(e.y.data);
  e.residual = e.y;
  e.residual.data = to ? nullptr : p.residual;
  e.residual.in_vectors = e.y.in_vectors && aligned(p.residual);
  return e;
}

template <typename T, int kSums>
cudaError_t launch_fused(const ChainConv2dParams& p, const Group& g, const Ends& e,
                         cudaStream_t stream) {
  const auto kernel = chain_conv2d_fused<T, kSums>;
  ChainConv2dParams stages = p;
  for (int i = 0; i < g.count; ++i) stages.stage[i] = p.stage[g.begin + i];
  const cudaError_t error = allow_smem(kernel, g.plan.smem_bytes);
  if (error != cudaSuccess) return error;
  CUDA_LAUNCH(kernel, grid_size(g.plan.work), kChainThreads, static_cast<size_t>(g.plan.smem_bytes),
              stream, stages, g.plan, e);
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
    else if (kOnTensorCores<T> && g.plan.sums == 4)
      error = launch_fused<T, kOnTensorCores<T> ? 4 : 8>(p, g, e, stream);
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
