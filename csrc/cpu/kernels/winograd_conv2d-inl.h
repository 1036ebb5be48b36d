// winograd_conv2d: y = act(A^T [ sum over c of U[k][c] . (B^T d[c] B) ] A + b + r), a 3x3
// convolution of stride 1 by F(2x2, 3x3) or F(4x4, 3x3), U dense or sparse (winograd_tiles.h).
//
// An item owns a run of up to 3 (sparse: 6) vectors of tiles and a chunk of filters. It gathers and
// transforms all channels once (V: taps x C vectors); then, for 32 filters at a time, it multiplies
// tap by tap (M: taps x 32 vectors, in L2) and transforms, finishes and stores what came out. No
// intermediate is larger than the run, and each thread reads the weight as one stream.
//
// Bound: taps * C * K * density FMAs of a vector of tiles, 4 or 2.25 times fewer than the direct
// convolution, and the transforms: about 10 cycles a tap and channel in (3 of them arithmetic, the
// rest splitting rows into phases) and 6 a tap and filter out. The weight comes from L3 at
// 4 / vectors bytes a cycle, V at 2.
//
// Measured (Zen 4, one core, roof 117 GFLOP/s, F(4), dense / 80 % sparse, times the framework's
// best): 3x3 64>64 @56 2.8 / 5.0, 128>128 @28 2.6 / 5.5, 256>256 @14 2.5 / 4.7, 256>256 @56
// 3.0 / 5.5. The dense products run at 85 % of the roof; the transforms take a quarter of the time
// at 64 channels, a tenth at 256; 49 tiles fill 64 lanes at @28. The sparse products reach 30 to
// 45 % of the roof: one or two vectors share an index, a broadcast and the FMA's own load, and at
// 256 channels a tap's part of V does not stay in L1.
//
// Tried and lost:
// - one channel (filter) at a time between image and transform: 0.87 ms instead of 0.74 for 64>64
//   @56, vectors are read before the pieces they were stored in have left the store queue.
// - 64 filters to a tap's part of V instead of 32: 256>256 @56 14 ms instead of 10, M leaves L2;
//   16: no difference.
// - prefetching the next tap's rows into L2 only, or one vector of tiles at 256 channels: equal.
// - F(4) where it is half a vector of tiles (512>512 @7: 4 tiles): 0.7 of the framework; F(2) 1.8.
#pragma once
#include "cpu/kernels/winograd_products-inl.h"
#include "cpu/kernels/winograd_tiles-inl.h"
#include "cpu/kernels/winograd_transforms-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

constexpr int kSparseVectors = 6;
constexpr int kPlanes = cpu::kWinogradPlanes;

template <class V, class S, int M, int F, int DenseVectors>
class WinogradKernel {
  using T = typename V::T;
  static constexpr int L = V::L, kTaps = winograd_taps(M);

  const WinogradConv2dParams& p_;
  const cpu::WinogradPlan& plan_;
  const ConvShape& s_;
  const int64_t channels_, filters_;  // of a group
  T* const input_;
  T* const products_;
  WinogradTiles<V, S, M, kSparseVectors> tiles_;
  int vectors_ = 0;

 public:
  WinogradKernel(const WinogradConv2dParams& p, const cpu::WinogradPlan& plan, char* scratch)
      : p_(p),
        plan_(plan),
        s_(p.shape),
        channels_(s_.channels_per_group()),
        filters_(s_.filters_per_group()),
        input_(reinterpret_cast<T*>(scratch)),
        products_(reinterpret_cast<T*>(scratch + plan.product_offset)),
        tiles_(p, plan, scratch) {}

  void item(int64_t i) {
    const int64_t run = i % plan_.runs, chunk = i / plan_.runs % plan_.chunks;
    const int64_t group = i / plan_.runs / plan_.chunks;
    const int64_t first = plan_.vectors * run / plan_.runs;
    vectors_ = static_cast<int>(plan_.vectors * (run + 1) / plan_.runs - first);
    tiles_.place(plan_, first, vectors_);
    transform_channels(group);
    const int64_t end = plan_.blocks * (chunk + 1) / plan_.chunks;
    const int64_t step = plan_.filters / kBlock;
    for (int64_t b = plan_.blocks * chunk / plan_.chunks; b < end; b += step) {
      const int64_t blocks = end - b < step ? end - b : step;
      multiply(group * plan_.blocks + b, blocks);
      const int64_t left = filters_ - b * kBlock;
      finish(group * filters_ + b * kBlock, left < blocks * kBlock ? left : blocks * kBlock);
    }
  }

 private:
  int64_t width() const { return static_cast<int64_t>(vectors_) * L; }

  void transform_channels(int64_t group) {
    const int64_t first = group * channels_;
    const int64_t step = tiles_.nhwc() ? L : kPlanes;
    for (int64_t c = 0; c < channels_; c += step) {
      const int64_t left = channels_ - c < step ? channels_ - c : step;
      if (tiles_.nhwc()) {
        tiles_.gather_transposed(first + c, range_mask<L>(0, 0, left));
      } else {
        for (int i = 0; i < left; ++i) tiles_.gather(first + c + i, i);
      }
      for (int i = 0; i < left; ++i) {
        for (int n = 0; n < vectors_; ++n) {
          transform_input<V, M>(tiles_.tile(i) + n * L, tiles_.pitch(),
                                input_ + (c + i) * width() + n * L, plan_.input_pitch);
        }
      }
    }
  }

  // Blocks [block, block + blocks) of the weight, all taps, to products_.
  void multiply(int64_t block, int64_t blocks) const {
    const S* const values = static_cast<const S*>(p_.values);
    const int64_t out = kBlock * width();
    for (int t = 0; t < kTaps; ++t) {
      const T* const in = input_ + t * plan_.input_pitch;
      T* const products = products_ + t * plan_.product_pitch;
      if (p_.row_ptr == nullptr) {
        const DenseBlock<V, S> body = dense_block_for<V, S, F, DenseVectors>(vectors_);
        for (int64_t b = 0; b < blocks; ++b) {
          body(in, values + ((block + b) * kTaps + t) * channels_ * kBlock, channels_,
               products + b * out);
        }
      } else {
        const SparseBlock<V, S> body = sparse_block_for<V, S, kSparseVectors>(vectors_);
        for (int64_t b = 0; b < blocks; ++b) {
          body(in, values, p_.col_idx, p_.row_ptr + ((block + b) * kTaps + t) * kBlock,
               products + b * out);
        }
      }
    }
  }

  // The filters [k, k + count), whose products come first in products_.
  void finish(int64_t k, int64_t count) const {
    const int64_t step = tiles_.nhwc() ? L : kPlanes;
    for (int64_t f = 0; f < count; f += step) {
      const int64_t left = count - f < step ? count - f : step;
      for (int i = 0; i < left; ++i) {
        const T b = p_.bias ? to_acc(static_cast<const S*>(p_.bias)[k + f + i]) : T(0);
        for (int n = 0; n < vectors_; ++n) {
          transform_output<V, M>(products_ + (f + i) * width() + n * L, plan_.product_pitch, b,
                                 tiles_.tile(i) + n * L, tiles_.pitch());
        }
      }
      if (tiles_.nhwc()) {
        tiles_.scatter_transposed(k + f, range_mask<L>(0, 0, left));
      } else {
        for (int i = 0; i < left; ++i) tiles_.scatter(k + f + i, i);
      }
    }
  }
};

template <class V, class S, int F, int DenseVectors>
void winograd_items(const WinogradConv2dParams& p, const cpu::WinogradPlan& plan, int64_t begin,
                    int64_t end, char* scratch) {
  if (p.tile == 2) {
    WinogradKernel<V, S, 2, F, DenseVectors> kernel(p, plan, scratch);
    for (int64_t i = begin; i < end; ++i) kernel.item(i);
  } else {
    WinogradKernel<V, S, 4, F, DenseVectors> kernel(p, plan, scratch);
    for (int64_t i = begin; i < end; ++i) kernel.item(i);
  }
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
