// Geometry of a 2-d convolution, shared by glue, CPU kernels and CUDA kernels.
// Letters: N C H W in, K R S filter, P Q out, G groups.
#pragma once
#include <cstdint>

namespace sparsecnn {

struct ConvShape {
  int64_t n, c, h, w;  // input
  int64_t k, r, s;     // output channels, filter height, filter width
  int64_t p, q;        // output height, output width
  int64_t stride_h, stride_w;
  // Only top and left are needed: the bottom and right pads are implied by p and q.
  // A negative pad crops (the input gradient of a convolution with a large pad needs it).
  int64_t pad_top, pad_left;
  int64_t dil_h, dil_w;
  int64_t groups;

  constexpr int64_t channels_per_group() const { return c / groups; }
  constexpr int64_t filters_per_group() const { return k / groups; }
  // Columns of the lowered weight matrix; column index = (c * R + r) * S + s, c within the group.
  constexpr int64_t columns() const { return c / groups * r * s; }
};

// Output extent of one axis; 0 or less when the dilated filter does not fit.
constexpr int64_t conv_out_extent(int64_t in, int64_t pad_lo, int64_t pad_hi, int64_t dil,
                                  int64_t filter, int64_t stride) {
  const int64_t span = in + pad_lo + pad_hi - dil * (filter - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

}  // namespace sparsecnn
