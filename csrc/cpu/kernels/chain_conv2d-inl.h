// chain_conv2d: y = act(W_last * ... act(W_1 * x + b_1) ... + b_last + residual), the stages run
// band by band, so that the intermediates never leave the cache.
//
// Layout. Lanes are output channels throughout. Intermediates lie in the thread's scratch as
// [row][column][channels rounded up to vectors], rings of rows with zero columns as padding; a row
// outside the image does not exist and its taps are skipped. NHWC inputs in the type of
// accumulation are read in place where no column is padded; all others pass through a ring of
// their own, NCHW ones by transposes, and NCHW outputs leave by transposes.
//
// Work. An item is a share of one image's output rows or, for a single stage with more weights
// than pixels, of its channels; see cpu/chain_plan.h. Within a band, a dense stage goes slab by
// slab of weights (2 vectors of channels) over all pixels, a depthwise one vector by vector of
// channels. Weights in another order, of another type, or at a pitch that folds them onto a few
// cache sets are packed slab by slab, for every band: 2 loads and 2 stores for 2 * pixels FMAs.
//
// Bound. The FMAs: 28 for 16 loads in a dense tile (AVX-512), one for about one load in a depthwise
// one. Bytes do not bound: 24>144>24 channels on 56x56 move 2.3 KB a pixel through L2 in 585
// cycles.
//
// Measured (Zen 4, one thread, batch 1, % of the roof of 115 GFLOP/s, all stages): 96>576>96 on
// 14x14 88-94, 160>960>160 on 7x7 88-91, 24>144>24 on 56x56 70 (24 channels fill 1.5 vectors of 2),
// 7x1>1x7 64>32>64 on 56x56 93-100, Tucker-2 256>64>64>256 on 56x56 82-99.
//
// After Sandler et al., "MobileNetV2", CVPR 2018 (section 5: bottlenecks by splits of the inner
// tensor), with rows instead of channels as the unit of what is kept.
#pragma once
#include "cpu/chain_plan.h"
#include "cpu/kernels/chain_edges-inl.h"
#include "cpu/kernels/window_tile-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

using cpu::ChainBuffer;
using cpu::ChainPlan;

template <class V, class S, int MaxM>
class Chain {
 public:
  using T = typename V::T;
  static constexpr int L = V::L;
  static constexpr int64_t kSlab = 2 * L;  // output channels of a dense tile

  Chain(const ChainConv2dParams& params, const ChainPlan& plan, char* scratch)
      : params_(params), plan_(plan), scratch_(scratch) {}

  void run(int64_t begin, int64_t end) {
    zero_padding();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t parts = plan_.row_parts * plan_.slab_parts;
      const int64_t rest = item % parts;
      n_ = item / parts;
      run_share(rest / plan_.slab_parts, rest % plan_.slab_parts);
    }
  }

 private:
  const ChainConv2dParams& params_;
  const ChainPlan& plan_;
  char* const scratch_;
  int64_t n_ = 0;
  // Of the current share: rows [.., ready) of each stage's input are in its ring (unless x is read
  // in place); slot 0 holds row `origin`.
  int64_t origin_[kMaxChainStages], ready_[kMaxChainStages];
  int64_t slab_begin_ = 0, slab_end_ = 0;  // of the last stage's slabs

  struct Span {
    int64_t lo, hi;
  };

  SPARSECNN_INLINE const ConvShape& shape(int32_t i) const { return plan_.shape[i]; }
  SPARSECNN_INLINE int32_t last() const { return params_.stages - 1; }

  // Columns that no row ever writes.
  SPARSECNN_INLINE void zero_padding() {
    for (int32_t i = 0; i < params_.stages; ++i) {
      const ChainBuffer& b = plan_.input[i];
      const int64_t right = b.pad_left + shape(i).w;
      if (b.pixels == shape(i).w) continue;
      T* const ring = ring_of(i);
      for (int64_t row = 0; row < b.rows; ++row) {
        T* const pixels = ring + row * b.row;
        for (int64_t j = 0; j < b.pad_left * b.pixel; ++j) pixels[j] = T(0);
        for (int64_t j = right * b.pixel; j < b.row; ++j) pixels[j] = T(0);
      }
    }
  }

  SPARSECNN_INLINE T* ring_of(int32_t i) const {
    return reinterpret_cast<T*>(scratch_ + plan_.input[i].offset);
  }
  SPARSECNN_INLINE int64_t slot(int32_t i, int64_t row) const {
    return (row - origin_[i]) % plan_.input[i].rows;
  }
  // The first image pixel of an input row of stage i.
  SPARSECNN_INLINE const T* input_row(int32_t i, int64_t row) const {
    const ChainBuffer& b = plan_.input[i];
    if (b.rows == 0) {
      return reinterpret_cast<const T*>(static_cast<const S*>(params_.x) + n_ * plan_.x_image +
                                        row * b.row);
    }
    return ring_of(i) + slot(i, row) * b.row + b.pad_left * b.pixel;
  }

  SPARSECNN_INLINE Span input_span(int32_t i, Span out) const {
    const ConvShape& s = shape(i);
    int64_t lo = out.lo * s.stride_h - s.pad_top;
    int64_t hi = (out.hi - 1) * s.stride_h + (s.r - 1) * s.dil_h + 1 - s.pad_top;
    lo = lo < 0 ? 0 : (lo > s.h ? s.h : lo);
    hi = hi < lo ? lo : (hi > s.h ? s.h : hi);
    return {lo, hi};
  }

  void run_share(int64_t row_part, int64_t slab_part) {
    const ConvShape& s = shape(last());
    const int64_t p0 = s.p * row_part / plan_.row_parts;
    const int64_t p1 = s.p * (row_part + 1) / plan_.row_parts;
    const int64_t slabs = (s.k + kSlab - 1) / kSlab;
    slab_begin_ = slabs * slab_part / plan_.slab_parts;
    slab_end_ = slabs * (slab_part + 1) / plan_.slab_parts;
    for (int32_t i = 0; i <= last(); ++i) origin_[i] = ready_[i] = -1;
    for (int64_t p = p0; p < p1; p += plan_.band) {
      run_band({p, p + plan_.band < p1 ? p + plan_.band : p1});
    }
  }

  SPARSECNN_INLINE void run_band(Span out) {
    Span missing[kMaxChainStages + 1];  // rows of each stage's input, then of the output
    missing[last() + 1] = out;
    for (int32_t i = last(); i >= 0; --i) {
      missing[i] = {0, 0};
      if (missing[i + 1].hi <= missing[i + 1].lo) continue;
      const Span need = input_span(i, missing[i + 1]);
      if (origin_[i] < 0) origin_[i] = ready_[i] = need.lo;
      if (ready_[i] < need.lo) ready_[i] = need.lo;  // a stride beyond the filter skips rows
      missing[i] = {ready_[i], need.hi};
      if (need.hi > ready_[i]) ready_[i] = need.hi;
    }
    if (plan_.input[0].rows != 0) read_input(missing[0]);
    for (int32_t i = 0; i <= last(); ++i) {
      const Span rows = missing[i + 1];
      if (rows.hi <= rows.lo) continue;
      if (i < last()) {
        run_stage<T>(i, rows, ring_target(i));
      } else if (params_.layout == Layout::kNHWC) {
        run_stage<S>(i, rows, image_target());
      } else {
        run_stage<T>(i, rows, waiting_target(rows.lo));
        write_output(rows);
      }
    }
  }

  // ---- where outputs go
  // --------------------------------------------------------------------------

  template <class O>
  struct Target {
    O* y;               // row 0 of the ring or of the image, first pixel
    const O* residual;  // likewise
    int64_t ring;       // rows of the ring; 0: not a ring
    int64_t origin;     // the row at y
    int64_t pixel, row;
    Activation activation;

    SPARSECNN_INLINE int64_t offset(int64_t p) const {
      const int64_t at = p - origin;
      return (ring == 0 ? at : at % ring) * row;
    }
    // Rows from p on that follow each other in memory.
    SPARSECNN_INLINE int64_t contiguous(int64_t p) const {
      return ring == 0 ? INT64_MAX : ring - (p - origin) % ring;
    }
  };

  SPARSECNN_INLINE Target<T> ring_target(int32_t i) const {
    const ChainBuffer& b = plan_.input[i + 1];
    return {ring_of(i + 1) + b.pad_left * b.pixel,
            nullptr,
            b.rows,
            origin_[i + 1],
            b.pixel,
            b.row,
            params_.stage[i].activation};
  }
  SPARSECNN_INLINE Target<S> image_target() const {
    const ConvShape& s = shape(last());
    const int64_t image = n_ * plan_.y_image;
    const S* const residual = static_cast<const S*>(params_.residual);
    return {static_cast<S*>(params_.y) + image,
            residual ? residual + image : nullptr,
            0,
            0,
            s.k,
            s.k * s.q,
            params_.stage[last()].activation};
  }
  // Sums that wait for their transposition; residual and activation come after it.
  SPARSECNN_INLINE Target<T> waiting_target(int64_t p) const {
    return {reinterpret_cast<T*>(scratch_ + plan_.out_offset),
            nullptr,
            0,
            p,
            plan_.out_pixel,
            plan_.out_pixel * shape(last()).q,
            Activation::kNone};
  }

  void write_output(Span rows) const {
    const ConvShape& s = shape(last());
    const int64_t plane = s.p * s.q;
    const int64_t at = n_ * plan_.y_image + rows.lo * s.q;
    const S* const residual = static_cast<const S*>(params_.residual);
    const Finish<V, S> finish{static_cast<S*>(params_.y) + at, residual ? residual + at : nullptr,
                              params_.stage[last()].activation};
    const int64_t first = last() == 0 ? slab_begin_ * kSlab : 0;
    const int64_t end = last() == 0 && slab_end_ * kSlab < s.k ? slab_end_ * kSlab : s.k;
    write_planes<V, S>(
        reinterpret_cast<const T*>(scratch_ + plan_.out_offset) + first, plan_.out_pixel,
        (rows.hi - rows.lo) * s.q, end - first, plane,
        Finish<V, S>{finish.y + first * plane, residual ? finish.residual + first * plane : nullptr,
                     finish.activation});
  }

  void read_input(Span rows) {
    const ConvShape& s = shape(0);
    const ChainBuffer& b = plan_.input[0];
    const S* const x = static_cast<const S*>(params_.x) + n_ * plan_.x_image;
    const bool one_run = b.pixels == s.w && plan_.x_row == s.w * plan_.x_pixel;
    for (int64_t row = rows.lo; row < rows.hi;) {
      int64_t count = 1;
      if (one_run) {  // rows follow each other here and there, up to the end of the ring
        count = b.rows - slot(0, row);
        count = count < rows.hi - row ? count : rows.hi - row;
      }
      const ImageRows<S> source{x + row * plan_.x_row, s.c, plan_.x_channel, plan_.x_pixel};
      T* const to = ring_of(0) + slot(0, row) * b.row + b.pad_left * b.pixel;
      read_pixels<V, S>(source, 0, count * s.w, to, b.pixel);
      row += count;
    }
  }

  // ---- stages
  // ------------------------------------------------------------------------------------

  template <class O>
  SPARSECNN_INLINE void run_stage(int32_t i, Span rows, const Target<O>& target) {
    if (shape(i).groups > 1) {
      depthwise_rows<O>(i, rows, target);
    } else {
      dense_rows<O>(i, rows, target);
    }
  }

  // The filter's rows for each output row: pixel 0 at tap 0, or null where the image has no such
  // row. Found once for all channels: rings cost divisions.
  SPARSECNN_INLINE const char** find_tap_rows(int32_t i, Span rows) const {
    const ConvShape& s = shape(i);
    const char** const table = reinterpret_cast<const char**>(scratch_ + plan_.table_offset);
    const char** to = table;
    for (int64_t p = rows.lo; p < rows.hi; ++p) {
      for (int64_t r = 0; r < s.r; ++r) {
        const int64_t h = p * s.stride_h - s.pad_top + r * s.dil_h;
        *to++ = h < 0 || h >= s.h ? nullptr
                                  : reinterpret_cast<const char*>(
                                        input_row(i, h) - s.pad_left * plan_.input[i].pixel);
      }
    }
    return table;
  }

  template <class O>
  SPARSECNN_INLINE OutputRows<O> output_rows(int32_t i, const Target<O>& target, int64_t p,
                                             int64_t k) const {
    const int64_t at = target.offset(p) + k;
    return {target.y + at, target.residual ? target.residual + at : nullptr,
            shape(i).q,    target.pixel,
            target.row,    target.activation};
  }

  template <class O>
  void dense_rows(int32_t i, Span rows, const Target<O>& target) {
    const ChainStage& stage = params_.stage[i];
    const ConvShape& s = shape(i);
    const ChainBuffer& b = plan_.input[i];
    const bool direct = plan_.direct[i];
    T* const packed = reinterpret_cast<T*>(scratch_ + plan_.slab_offset);
    // Rows of a pointwise stage that follow each other are one run of pixels.
    const bool merge = s.r == 1 && s.s == 1 && s.stride_h == 1 && s.stride_w == 1 &&
                       s.pad_top == 0 && s.pad_left == 0 && b.row == s.w * b.pixel && s.q == s.w;
    const char** const taps = find_tap_rows(i, rows);
    alignas(64) T bias[kSlab];
    const int64_t slabs = (s.k + kSlab - 1) / kSlab;
    const int64_t first = i == last() ? slab_begin_ : 0, end = i == last() ? slab_end_ : slabs;
    for (int64_t slab = first; slab < end; ++slab) {
      const int64_t k = slab * kSlab, filters = s.k - k < kSlab ? s.k - k : kSlab;
      const bool two = filters > L;
      load_bias(stage, k, filters, bias);
      if (!direct) pack_weight<V, S>(stage, k, filters, two ? kSlab : L, packed);
      DenseRun<V, O> run;
      run.taps = {taps,
                  s.r,
                  s.s,
                  s.c,
                  static_cast<ptrdiff_t>(s.dil_w * b.pixel * sizeof(T)),
                  static_cast<ptrdiff_t>(s.stride_w * b.pixel * sizeof(T)),
                  direct ? s.k : (two ? kSlab : L)};
      run.weight = direct ? static_cast<const T*>(stage.weight) + k : packed;
      run.bias = bias;
      // Lanes of a ring that belong to no channel are written too: what is there is read again.
      run.last_mask =
          kSame<O, T> && target.ring != 0 ? kAllLanes<L> : range_mask<L>(two ? L : 0, 0, filters);
      for (int64_t p = rows.lo; p < rows.hi;) {
        int64_t count = 1;
        if (merge) {
          count = rows.hi - p;
          const int64_t out = target.contiguous(p);
          count = out < count ? out : count;
          if (b.rows != 0) {
            const int64_t in = b.rows - slot(i, p);
            count = in < count ? in : count;
          }
        }
        run.taps.rows = taps + (p - rows.lo) * s.r;
        run.out = output_rows<O>(i, target, p, k);
        dense_run<V, O, MaxM>(run, count * s.q, dense_tiles<V, O, MaxM>(filters));
        p += count;
      }
    }
  }

  template <class O>
  void depthwise_rows(int32_t i, Span rows, const Target<O>& target) {
    const ChainStage& stage = params_.stage[i];
    const ConvShape& s = shape(i);
    const ChainBuffer& b = plan_.input[i];
    T* const packed = reinterpret_cast<T*>(scratch_ + plan_.slab_offset);
    const char** const taps = find_tap_rows(i, rows);
    alignas(64) T bias[kSlab];
    for (int64_t k = 0; k < s.k; k += L) {
      const int64_t filters = s.k - k < L ? s.k - k : L;
      load_bias(stage, k, filters, bias);
      pack_weight<V, S>(stage, k, filters, L, packed);
      WindowRun<V, O> run;
      run.taps = {taps,
                  s.r,
                  s.s,
                  1,
                  static_cast<ptrdiff_t>(s.dil_w * b.pixel * sizeof(T)),
                  static_cast<ptrdiff_t>(s.stride_w * b.pixel * sizeof(T)),
                  0};
      run.channel = k * sizeof(T);
      run.weight = packed;
      run.bias = bias;
      run.mask = kSame<O, T> && target.ring != 0 ? kAllLanes<L> : range_mask<L>(0, 0, filters);
      for (int64_t p = rows.lo; p < rows.hi; ++p) {
        run.taps.rows = taps + (p - rows.lo) * s.r;
        run.out = output_rows<O>(i, target, p, k);
        window_run<V, O, MaxM>(run, s.q);
      }
    }
  }

  SPARSECNN_INLINE void load_bias(const ChainStage& stage, int64_t k, int64_t filters,
                                  T* bias) const {
    for (int64_t j = 0; j < kSlab; j += L) {
      V::store(bias + j, stage.bias ? load_some<V>(static_cast<const S*>(stage.bias) + k + j,
                                                   range_mask<L>(j, 0, filters))
                                    : V::zero());
    }
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
