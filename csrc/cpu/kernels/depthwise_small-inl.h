// depthwise_conv2d in NCHW for small planes: rows of 7 pixels would leave half of every vector
// empty and cost more to set up than to compute. L channels at a time are transposed into (pixel,
// channel) in L1, computed by the NHWC kernels, and transposed back on the way to the output: eight
// shuffles for each vector of outputs.
#pragma once
#include "cpu/kernels/depthwise_nhwc-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

template <class V, class S, int MaxTile>
class DepthwiseSmall {
  static constexpr int L = V::L;

  const DepthwiseConv2dParams& params_;
  const ConvShape& s_;
  const Finish<V, S> finish_;
  const int64_t pixels_in_, pixels_out_;
  char* const nhwc_scratch_;
  S* const in_;   // (H * W, channels of the item)
  S* const out_;  // (P * Q, channels of the item)
  cpu::DepthwisePlan plan_;

 public:
  DepthwiseSmall(const DepthwiseConv2dParams& params, const cpu::DepthwisePlan& plan, char* scratch)
      : params_(params),
        s_(params.shape),
        finish_{static_cast<S*>(params.y), static_cast<const S*>(params.residual),
                params.activation},
        pixels_in_(s_.h * s_.w),
        pixels_out_(s_.p * s_.q),
        nhwc_scratch_(scratch),
        in_(reinterpret_cast<S*>(scratch + plan.rows_offset)),
        out_(reinterpret_cast<S*>(scratch + plan.rows_2_offset)),
        plan_(plan) {
    plan_.chunks = plan_.chunk_vectors = 1;
    plan_.prefetch = false;
  }

  // An item is L channels of an image.
  void run(int64_t begin, int64_t end) {
    const int64_t blocks = (s_.k + L - 1) / L;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / blocks, k0 = item % blocks * L;
      const int64_t count = s_.k - k0 < L ? s_.k - k0 : L;
      const S* const x = static_cast<const S*>(params_.x) + (image * s_.c + k0) * pixels_in_;
      pack(x, count);

      DepthwiseConv2dParams part = params_;
      part.shape.n = 1;
      part.shape.c = part.shape.k = part.shape.groups = count;
      part.layout = Layout::kNHWC;
      part.activation = Activation::kNone;
      part.x = in_, part.y = out_, part.residual = nullptr;
      part.weight = static_cast<const S*>(params_.weight) + k0 * s_.r * s_.s;
      if (params_.bias) part.bias = static_cast<const S*>(params_.bias) + k0;
      DepthwiseNhwc<V, S, MaxTile>(part, plan_, nhwc_scratch_).run(0, s_.p);

      unpack((image * s_.k + k0) * pixels_out_, count);
    }
  }

 private:
  void pack(const S* x, int64_t count) {
    const uint32_t channels = range_mask<L>(0, 0, count);
    for (int64_t i = 0; i < pixels_in_; i += L) {
      const uint32_t mask = range_mask<L>(i, 0, pixels_in_);
      typename V::reg r[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        r[l] = l < count ? V::load_mask(x + l * pixels_in_ + i, mask) : V::zero();
      }
      V::transpose(r);
      const int64_t rows = pixels_in_ - i < L ? pixels_in_ - i : L;
      S* const to = in_ + i * count;
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        if (l < rows) V::store_mask(to + l * count, r[l], channels);
      }
    }
  }

  void unpack(int64_t y, int64_t count) {
    const uint32_t channels = range_mask<L>(0, 0, count);
    for (int64_t i = 0; i < pixels_out_; i += L) {
      const uint32_t mask = range_mask<L>(i, 0, pixels_out_);
      const int64_t rows = pixels_out_ - i < L ? pixels_out_ - i : L;
      typename V::reg r[L];
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        r[l] = l < rows ? V::load_mask(out_ + (i + l) * count, channels) : V::zero();
      }
      V::transpose(r);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        if (l < count) finish_(r[l], y + l * pixels_out_ + i, mask);
      }
    }
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
