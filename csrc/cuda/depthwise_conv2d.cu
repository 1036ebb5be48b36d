// depthwise_conv2d: every output channel k has one dense filter over input channel k / (K / C).
//
//   y[n,k,p,q] = act(bias[k] + residual[n,k,p,q]
//                    + sum over r,s of W[k,0,r,s] * x[n, k/(K/C), p*stride+r*dil-pad, ...])
//
// Data layout: x, residual and y are NCHW or channels last, W is (K, 1, R, S). Storage is float,
// half or bfloat16; sums are float, by ascending (r, s), one fused multiply-add per tap: all three
// kernels form the same sums bit by bit.
//
// Planes kernel (NCHW; 3x3, 5x5, 7x7, stride 1 or 2). A thread owns kTall outputs below each other
// in one column of one plane, with the filter and the sums in registers; an input row is read once
// for all filter rows that touch it. Lanes run along the columns and on into the next strip and
// plane, so that maps of 7 or 14 columns fill warps as well.
//
// Channels kernel (channels last; the same filters, one filter per channel). A thread owns 16 bytes
// of channels of kWide outputs side by side; an input vector is read once for all filter columns
// that touch it. A block's filters lie in shared memory, transposed to [r][s][channel].
//
// Direct kernel: an output per thread, for everything else (other filters, dilations, several
// filters a channel, channels that are no multiple of 16 bytes, unaligned tensors).
//
// Bound (derived): device memory, input and output once. Per output the planes kernel reads
// (kTall-1+R)*S/kTall words of L1 (3.75 at 3x3, 12.3 at 7x7, stride 1), the channels kernel
// (kWide-1+S)*R/kWide vectors (4.5, 17.5), of which an SM delivers 32 words or 8 vectors a clock:
// on an H200 that is above the memory's rate but for 7x7, where in half precision the multiply-adds
// bind as well. GPU timings have not been taken: kTall, kWide and the block are reasoned.
#include "cuda/entry.h"
#include "cuda/launch.cuh"

namespace sparsecnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTall = 8;
constexpr int kWide = 4;

__device__ __forceinline__ int clamp(int64_t v, int most) {
  return v < 0 ? 0 : (v < most ? static_cast<int>(v) : most);
}

template <typename T, int kFilter, int kStride>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_conv2d_planes(const DepthwiseConv2dParams prm, int64_t strips, int64_t work) {
  constexpr int kRows = (kTall - 1) * kStride + kFilter;  // of a window
  const ConvShape& s = prm.shape;
  const T* weight = static_cast<const T*>(prm.weight);
  const int64_t filters = s.k / s.c;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < work;
       item += static_cast<int64_t>(gridDim.x) * kThreads) {
    int64_t q, strip, k;
    const int64_t n = divide(divide(divide(item, s.q, &q), strips, &strip), s.k, &k);
    const T* x = static_cast<const T*>(prm.x) + (n * s.c + k / filters) * s.h * s.w;
    const int64_t row0 = strip * kTall * kStride - s.pad_top, col0 = q * kStride - s.pad_left;
    // The rows and columns of the window that lie inside the plane, as small numbers: comparisons
    // of 64 bits for every element would take registers and half of the instructions.
    const int row_begin = clamp(-row0, kRows), row_end = clamp(s.h - row0, kRows);
    const int col_begin = clamp(-col0, kFilter), col_end = clamp(s.w - col0, kFilter);

    float w[kFilter][kFilter], sum[kTall];
#pragma unroll
    for (int r = 0; r < kFilter; ++r)
#pragma unroll
      for (int t = 0; t < kFilter; ++t) w[r][t] = to_float(weight[(k * kFilter + r) * kFilter + t]);
#pragma unroll
    for (int i = 0; i < kTall; ++i) sum[i] = 0.f;
    int64_t at = row0 * s.w + col0;
#pragma unroll
    for (int i = 0; i < kRows; ++i, at += s.w) {
      float in[kFilter];
#pragma unroll
      for (int t = 0; t < kFilter; ++t) {
        const bool inside = i >= row_begin && i < row_end && t >= col_begin && t < col_end;
        in[t] = inside ? to_float(x[at + t]) : 0.f;
      }
#pragma unroll
      for (int r = 0; r < kFilter; ++r) {
        if (i < r || (i - r) % kStride != 0 || (i - r) / kStride >= kTall) continue;
        float& to = sum[(i - r) / kStride];
#pragma unroll
        for (int t = 0; t < kFilter; ++t) to = fmaf(w[r][t], in[t], to);
      }
    }
    const int64_t p0 = strip * kTall;
#pragma unroll
    for (int i = 0; i < kTall; ++i) {
      if (p0 + i < s.p) store_output<T>(prm, sum[i], k, ((n * s.k + k) * s.p + p0 + i) * s.q + q);
    }
  }
}

// Threads of a block side by side along the channels; what is left over goes along the outputs.
struct ChannelsPlan {
  int lanes;
  int64_t slabs;   // of lanes * kVector channels
  int64_t strips;  // of kWide outputs: N * P * ceil(Q / kWide)
  int64_t work;    // blocks' worth
};

template <typename T, int kFilter, int kStride>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_conv2d_channels(const DepthwiseConv2dParams prm, const ChannelsPlan plan) {
  constexpr int kV = kVector<T>, kTaps = kFilter * kFilter;
  DYN_SMEM(float, weights);  // [tap][channel of the slab]
  const ConvShape& s = prm.shape;
  const int channels = plan.lanes * kV, members = kThreads / plan.lanes;
  const int lane = threadIdx.x % plan.lanes, member = threadIdx.x / plan.lanes;
  const float* own = weights + lane * kV;
  for (int64_t item = blockIdx.x; item < plan.work; item += gridDim.x) {
    // Slabs run fastest: blocks in flight together read whole pixels.
    int64_t slab, p, q_strip;
    const int64_t chunk = divide(item, plan.slabs, &slab);
    const int64_t k0 = slab * channels, k = k0 + lane * kV;
    __syncthreads();  // all have used the filters of the item before
    for (int i = threadIdx.x; i < channels * kTaps; i += kThreads) {
      const int c = i / kTaps, tap = i - c * kTaps;
      const bool inside = k0 + c < s.k;
      weights[tap * channels + c] =
          inside ? to_float(static_cast<const T*>(prm.weight)[(k0 + c) * kTaps + tap]) : 0.f;
    }
    __syncthreads();
    const int64_t strip = chunk * members + member;
    if (member >= members || strip >= plan.strips || k >= s.k) continue;
    const int64_t n = divide(divide(strip, ceil_div(s.q, kWide), &q_strip), s.p, &p);
    const int64_t q0 = q_strip * kWide, col0 = q0 * kStride - s.pad_left;
    const T* image = static_cast<const T*>(prm.x) + n * s.h * s.w * s.c + k;

    float sum[kWide][kV];
#pragma unroll
    for (int i = 0; i < kWide; ++i)
#pragma unroll
      for (int v = 0; v < kV; ++v) sum[i][v] = 0.f;
#pragma unroll 1
    for (int r = 0; r < kFilter; ++r) {
      const int64_t row = p * kStride + r - s.pad_top;
      if (row < 0 || row >= s.h) continue;
      float w[kFilter][kV];
#pragma unroll
      for (int t = 0; t < kFilter; ++t)
#pragma unroll
        for (int v = 0; v < kV; ++v) w[t][v] = own[(r * kFilter + t) * channels + v];
#pragma unroll
      for (int j = 0; j < (kWide - 1) * kStride + kFilter; ++j) {
        const int64_t col = col0 + j;
        if (col < 0 || col >= s.w) continue;
        const auto in = *reinterpret_cast<const Vector<T>*>(image + (row * s.w + col) * s.c);
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
          const int t = j - i * kStride;
          if (t < 0 || t >= kFilter) continue;
#pragma unroll
          for (int v = 0; v < kV; ++v) sum[i][v] = fmaf(w[t][v], to_float(in.v[v]), sum[i][v]);
        }
      }
    }
    Vector<T> bias{}, residual{}, out{};
    if (prm.bias) bias = *reinterpret_cast<const Vector<T>*>(static_cast<const T*>(prm.bias) + k);
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      if (q0 + i >= s.q) break;
      const int64_t at = ((n * s.p + p) * s.q + q0 + i) * s.k + k;
      if (prm.residual)
        residual = *reinterpret_cast<const Vector<T>*>(static_cast<const T*>(prm.residual) + at);
#pragma unroll
      for (int v = 0; v < kV; ++v) {
        float value = sum[i][v];
        if (prm.bias) value += to_float(bias.v[v]);
        if (prm.residual) value += to_float(residual.v[v]);
        out.v[v] = from_float<T>(activate(prm.activation, value));
      }
      *reinterpret_cast<Vector<T>*>(static_cast<T*>(prm.y) + at) = out;
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    depthwise_conv2d_direct(const DepthwiseConv2dParams prm, const TensorStrides xs,
                            const TensorStrides ys, int64_t work) {
  const ConvShape& s = prm.shape;
  const bool nhwc = prm.layout == Layout::kNHWC;
  const int64_t filters = s.k / s.c;
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; item < work;
       item += static_cast<int64_t>(gridDim.x) * kThreads) {
    int64_t k, p, q, n;  // neighbouring threads have neighbouring outputs
    if (nhwc) {
      n = divide(divide(divide(item, s.k, &k), s.q, &q), s.p, &p);
    } else {
      n = divide(divide(divide(item, s.q, &q), s.p, &p), s.k, &k);
    }
    const T* x = static_cast<const T*>(prm.x) + n * xs.n + k / filters * xs.c;
    const T* w = static_cast<const T*>(prm.weight) + k * s.r * s.s;
    float sum = 0.f;
    for (int64_t r = 0; r < s.r; ++r) {
      const int64_t row = p * s.stride_h + r * s.dil_h - s.pad_top;
      if (row < 0 || row >= s.h) continue;
      for (int64_t t = 0; t < s.s; ++t) {
        const int64_t col = q * s.stride_w + t * s.dil_w - s.pad_left;
        if (col < 0 || col >= s.w) continue;
        sum = fmaf(to_float(w[r * s.s + t]), to_float(x[row * xs.h + col * xs.w]), sum);
      }
    }
    store_output<T>(prm, sum, k, n * ys.n + k * ys.c + p * ys.h + q * ys.w);
  }
}

template <typename T, int kFilter, int kStride>
cudaError_t launch_planes(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  const int64_t strips = ceil_div(s.p, kTall), work = s.n * s.k * strips * s.q;
  CUDA_LAUNCH((depthwise_conv2d_planes<T, kFilter, kStride>), grid_size(ceil_div(work, kThreads)),
              kThreads, 0, stream, params, strips, work);
  return cudaGetLastError();
}

template <typename T, int kFilter, int kStride>
cudaError_t launch_channels(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  constexpr int64_t kLaneBytes = int64_t{kFilter} * kFilter * kVector<T> * sizeof(float);
  constexpr int64_t kMost = kDefaultSmemBytes / kLaneBytes;
  const int64_t vectors = s.k / kVector<T>, most = kMost < kWarpLanes ? kMost : kWarpLanes;
  ChannelsPlan plan{};
  plan.slabs = ceil_div(vectors, most);
  plan.lanes = static_cast<int>(ceil_div(vectors, plan.slabs));
  plan.strips = s.n * s.p * ceil_div(s.q, kWide);
  plan.work = plan.slabs * ceil_div(plan.strips, kThreads / plan.lanes);
  CUDA_LAUNCH((depthwise_conv2d_channels<T, kFilter, kStride>), grid_size(plan.work), kThreads,
              static_cast<size_t>(plan.lanes * kLaneBytes), stream, params, plan);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_direct(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  const int64_t work = s.n * s.k * s.p * s.q;
  CUDA_LAUNCH((depthwise_conv2d_direct<T>), grid_size(ceil_div(work, kThreads)), kThreads, 0,
              stream, params, strides_of(params.layout, s.c, s.h, s.w),
              strides_of(params.layout, s.k, s.p, s.q), work);
  return cudaGetLastError();
}

template <typename T, int kFilter, int kStride>
cudaError_t launch_fixed(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  if (params.layout == Layout::kNCHW) return launch_planes<T, kFilter, kStride>(params, stream);
  const bool whole = s.k == s.c && s.k % kVector<T> == 0 && aligned(params.x) &&
                     aligned(params.y) && aligned(params.bias) && aligned(params.residual);
  return whole ? launch_channels<T, kFilter, kStride>(params, stream)
               : launch_direct<T>(params, stream);
}

template <typename T, int kFilter>
cudaError_t launch_filter(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  return params.shape.stride_h == 1 ? launch_fixed<T, kFilter, 1>(params, stream)
                                    : launch_fixed<T, kFilter, 2>(params, stream);
}

template <typename T>
cudaError_t launch(const DepthwiseConv2dParams& params, cudaStream_t stream) {
  const ConvShape& s = params.shape;
  const bool square = s.r == s.s && s.stride_h == s.stride_w && s.stride_h <= 2;
  const int64_t filter = square && s.dil_h == 1 && s.dil_w == 1 ? s.r : 0;
  if (filter == 3) return launch_filter<T, 3>(params, stream);
  if (filter == 5) return launch_filter<T, 5>(params, stream);
  if (filter == 7) return launch_filter<T, 7>(params, stream);
  return launch_direct<T>(params, stream);
}

}  // namespace

int32_t depthwise_conv2d(const DepthwiseConv2dParams& params, void* stream) {
  const ConvShape& s = params.shape;
  if (s.n * s.k * s.p * s.q == 0) return cudaSuccess;
  if (s.c < 1 || s.groups != s.c || s.k % s.c != 0) return cudaErrorInvalidValue;
  const auto on = static_cast<cudaStream_t>(stream);
  return with_storage(params.dtype, [&](auto storage) {
    return launch<typename decltype(storage)::type>(params, on);
  });
}

}  // namespace sparsecnn::cuda
