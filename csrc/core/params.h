// One plain parameter block per op: what the glue fills and the kernels read. No ownership; every
// pointer outlives the call. Strides are never stored: a tensor is either NCHW-contiguous or
// channels-last-contiguous (kNHWC), and input, residual and output always share the layout.
#pragma once
#include <cstdint>

#include "core/activation.h"
#include "core/conv_shape.h"

namespace sparsecnn {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
enum class Layout : int32_t { kNCHW = 0, kNHWC = 1 };

// What every convolution has: y = activation(conv(x, W) + bias + residual). Accumulation is float32
// (float64 for float64 data).
struct ConvParams {
  ConvShape shape;
  DType dtype;    // of x, bias, residual, y and the weight's values
  Layout layout;  // of x, residual and y
  Activation activation;
  const void* x;         // (N, C, H, W)
  const void* bias;      // (K) or null
  const void* residual;  // like y, or null
  void* y;               // (N, K, P, Q)
};

// W in CSR over its lowered matrix (K, C/G * R * S); accumulated by ascending columns.
struct CsrConv2dParams : ConvParams {
  const void* values;      // (nnz)
  const int32_t* col_idx;  // (nnz), ascending within a row
  const int32_t* row_ptr;  // (K + 1)
};

// W in groups of filters that share their columns: group g holds the filters filters[group_rows[g]]
// to filters[group_rows[g + 1]], all of one convolution group, and the columns
// columns[group_columns[g]] to columns[group_columns[g + 1]]. Its values follow those of the groups
// before it, column by column, the filters of a column together. Summed by ascending columns.
struct PatternConv2dParams : ConvParams {
  const void* values;            // (sum of rows * columns of each group)
  const int32_t* columns;        // ascending within a group, in the lowered matrix
  const int32_t* filters;        // (K): a permutation within each convolution group
  const int32_t* group_rows;     // (filter_groups + 1)
  const int32_t* group_columns;  // (filter_groups + 1)
  int64_t filter_groups;
};

// W dense, one filter for each output channel: (K, 1, R, S), groups = C, and output channel k reads
// input channel k / (K / C). Accumulated by ascending (r, s) in NHWC, by ascending (s, r) in NCHW.
struct DepthwiseConv2dParams : ConvParams {
  const void* weight;
};

// W of a 3x3 convolution of stride 1 in the Winograd domain (core/winograd_tiles.h): filters in
// blocks of kWinogradBlock, the blocks of a convolution group after those of the one before. Dense:
// values (blocks, taps, C/G, kWinogradBlock). Sparse: CSR over the rows (block, tap, filter of the
// block) and the C/G columns. Products are accumulated by ascending channels.
struct WinogradConv2dParams : ConvParams {
  int32_t tile;            // m: outputs along an edge of a tile, 2 or 4
  const void* values;      // dense, or (nnz)
  const int32_t* col_idx;  // (nnz), channels of the group
  const int32_t* row_ptr;  // (blocks * taps * kWinogradBlock + 1); null: dense
};

// grad_values[i] = sum over n, p, q of grad_y[n, k, p, q] * x[n, c, p*stride + r*dil - pad, ...]
// for the i-th stored position (k, c, r, s): a sampled product, dense only in the activations.
struct CsrConv2dGradValuesParams {
  ConvShape shape;
  DType dtype;             // of x, grad_y and grad_values
  Layout layout;           // of x and grad_y
  const void* x;           // (N, C, H, W)
  const void* grad_y;      // (N, K, P, Q)
  const int32_t* col_idx;  // (nnz)
  const int32_t* row_ptr;  // (K + 1)
  void* grad_values;       // (nnz)
};

// A pointwise (1x1, unpadded) convolution with a dense weight.
struct PointwiseConv2dParams : ConvParams {
  const void* weight;        // (K, C)
  int64_t weight_stride[2];  // elements, in that order
  bool allow_tf32;           // CUDA may round float32 factors to TF32; the sums stay float32
};

// One stage of a chain: activation(conv(., W) + bias), W dense (groups = 1) or depthwise
// (groups = C = K).
struct ChainStage {
  ConvShape shape;  // n is that of the chain
  Activation activation;
  const void* weight;        // (K, C/G, R, S)
  int64_t weight_stride[4];  // elements, in that order
  const void* bias;          // (K) or null
};

inline constexpr int32_t kMaxChainStages = 8;

// y = activation_last(stages(x) + residual): the stages one after the other; the last one adds the
// residual before its activation.
struct ChainConv2dParams {
  int32_t stages;
  ChainStage stage[kMaxChainStages];
  int64_t n;
  DType dtype;           // of every tensor
  Layout layout;         // of x, residual and y
  const void* x;         // (N, C, H, W)
  const void* residual;  // like y, or null
  void* y;               // (N, K, P, Q) of the last stage
};

}  // namespace sparsecnn
