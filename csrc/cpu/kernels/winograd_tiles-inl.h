// Tiles between an image and vectors whose lanes are tiles.
//
// NCHW: neighbouring tiles of a tile row lie m columns apart, so a row of the image is split into
// its m phases: vectors of every m-th column, which are what a pixel of the tiles is. (Gather
// instructions cost a load for each lane.) Runs of tiles in one tile row are written one after the
// other, each a whole number of vectors: what runs over is overwritten by the next run. Where a
// tile row is an m-th of a vector, as on 14x14 maps, m rows are split together.
// NHWC: a pixel of L tiles and L channels is a square, which is transposed.
#pragma once
#include "core/winograd_tiles.h"
#include "cpu/kernels/epilogue-inl.h"
#include "cpu/winograd_plan.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

template <class V, int M>
struct Phases;

template <class V>
struct Phases<V, 2> {
  using reg = typename V::reg;
  // Columns 0, 2, ..  and 1, 3, .. of 2 vectors of neighbours.
  static SPARSECNN_INLINE void split(const reg (&v)[2], reg (&phase)[2]) {
    phase[0] = V::even(v[0], v[1]);
    phase[1] = V::odd(v[0], v[1]);
  }
  static SPARSECNN_INLINE void split_two(const reg (&v)[2], reg (&phase)[2]) { split(v, phase); }
  static SPARSECNN_INLINE void join(const reg (&phase)[2], reg (&v)[2]) {
    v[0] = V::zip_low(phase[0], phase[1]);
    v[1] = V::zip_high(phase[0], phase[1]);
  }
};

template <class V>
struct Phases<V, 4> {
  using reg = typename V::reg;
  static SPARSECNN_INLINE void split(const reg (&v)[4], reg (&phase)[4]) {
    const reg even_lo = V::even(v[0], v[1]), even_hi = V::even(v[2], v[3]);
    const reg odd_lo = V::odd(v[0], v[1]), odd_hi = V::odd(v[2], v[3]);
    phase[0] = V::even(even_lo, even_hi);
    phase[1] = V::even(odd_lo, odd_hi);
    phase[2] = V::odd(even_lo, even_hi);
    phase[3] = V::odd(odd_lo, odd_hi);
  }
  // The first two phases only.
  static SPARSECNN_INLINE void split_two(const reg (&v)[4], reg (&phase)[2]) {
    phase[0] = V::even(V::even(v[0], v[1]), V::even(v[2], v[3]));
    phase[1] = V::even(V::odd(v[0], v[1]), V::odd(v[2], v[3]));
  }
  static SPARSECNN_INLINE void join(const reg (&phase)[4], reg (&v)[4]) {
    const reg low_a = V::zip_low(phase[0], phase[2]), high_a = V::zip_high(phase[0], phase[2]);
    const reg low_b = V::zip_low(phase[1], phase[3]), high_b = V::zip_high(phase[1], phase[3]);
    v[0] = V::zip_low(low_a, low_b);
    v[1] = V::zip_high(low_a, low_b);
    v[2] = V::zip_low(high_a, high_b);
    v[3] = V::zip_high(high_a, high_b);
  }
};

// The tiles of an item, and their way from x and to y.
template <class V, class S, int M, int MaxVectors>
class WinogradTiles {
  using T = typename V::T;
  using reg = typename V::reg;
  static constexpr int L = V::L, kA = M + 2;

  // NCHW: at most L neighbouring tiles of one tile row. NHWC: one tile.
  struct Run {
    int64_t row, col;           // of the first tile's first input pixel; may lie in the padding
    int64_t x, y;               // elements from x and y to the tile's first pixel of channel 0
    int64_t out_rows;           // rows of the tile that exist in the output
    int64_t out_cols;           // columns, of all the run's tiles
    int lane;                   // first
    uint32_t first[M], two[M];  // columns to load for all phases, for the last two
    uint32_t store[M];          // columns to store
  };

  const ConvShape& s_;
  const bool nhwc_;
  const S* const x_;
  const Finish<V, S> finish_;
  T* const tile_;
  const int64_t pitch_;
  int vectors_ = 0, count_ = 0;
  bool short_rows_ = false;  // of L / m tiles
  Run run_[MaxVectors * L];

 public:
  WinogradTiles(const WinogradConv2dParams& p, const cpu::WinogradPlan& plan, char* scratch)
      : s_(p.shape),
        nhwc_(p.layout == Layout::kNHWC),
        x_(static_cast<const S*>(p.x)),
        finish_{static_cast<S*>(p.y), static_cast<const S*>(p.residual), p.activation},
        tile_(reinterpret_cast<T*>(scratch + plan.tile_offset)),
        pitch_(plan.tile_pitch) {}

  bool nhwc() const { return nhwc_; }
  T* tile(int channel) const { return tile_ + channel * (kA * kA * pitch_); }
  int64_t pitch() const { return pitch_; }

  // The vectors [first, first + vectors) of tiles.
  void place(const cpu::WinogradPlan& plan, int64_t first, int vectors) {
    vectors_ = vectors;
    count_ = 0;
    short_rows_ = !nhwc_ && plan.tiles_x * M == L;
    const int64_t begin = first * L;
    const int64_t end = begin + vectors * L < plan.tiles ? begin + vectors * L : plan.tiles;
    for (int64_t t = begin; t < end;) {
      const int64_t tx = t % plan.tiles_x, ty = t / plan.tiles_x % plan.tiles_y;
      const int64_t image = t / plan.tiles_x / plan.tiles_y;
      int64_t tiles = 1;
      if (!nhwc_) {
        tiles = plan.tiles_x - tx < end - t ? plan.tiles_x - tx : end - t;
        tiles = tiles < L ? tiles : L;
      }
      place_run(run_[count_++], image, ty, tx, tiles, static_cast<int>(t - begin));
      t += tiles;
    }
  }

  // NCHW: one channel of x, to tile(to).
  void gather(int64_t channel, int to) const {
    const int64_t plane = s_.h * s_.w;
    if (short_rows_) {
      for (int i = 0; i < count_; i += M) {
        gather_rows(i, channel * plane, tile(to) + run_[i].lane);
      }
      return;
    }
    const int64_t rows = s_.w > 0 ? s_.h : 0;  // no pixels: x may be null, nothing adds to it
    for (int i = 0; i < count_; ++i) {
      const Run& run = run_[i];
      int64_t row = run.x + channel * plane;
      T* out = tile(to) + run.lane;
      for (int r = 0; r < kA; ++r, row += s_.w, out += kA * pitch_) {
        const bool inside = run.row + r >= 0 && run.row + r < rows;
        gather_row(run, inside ? x_ + row : nullptr, out);
      }
    }
  }

  // NHWC: L channels of x, those of `mask`, to tile(0 .. L - 1).
  void gather_transposed(int64_t channel, uint32_t mask) const {
    for (int r = 0; r < kA; ++r) {
      for (int j = 0; j < kA; ++j) {
        const int64_t pixel = (r * s_.w + j) * s_.c + channel;
        for (int v = 0; v < vectors_; ++v) {
          reg square[L];
          for (int l = 0; l < L; ++l) {
            const Run& run = run_[v * L + l];
            const int64_t row = run.row + r, col = run.col + j;
            const bool inside =
                v * L + l < count_ && row >= 0 && row < s_.h && col >= 0 && col < s_.w;
            square[l] = inside ? load_some<V>(x_ + (run.x + pixel), mask) : V::zero();
          }
          V::transpose(square);
          T* const out = tile_ + (r * kA + j) * pitch_ + v * L;
          for (int c = 0; c < L; ++c) V::store(out + c * (kA * kA * pitch_), square[c]);
        }
      }
    }
  }

  // NCHW: tile(from), m x m pixels, to filter k of y.
  void scatter(int64_t k, int from) const {
    const int64_t plane = s_.p * s_.q;
    if (short_rows_) {
      for (int i = 0; i < count_; i += M) {
        scatter_rows(i, k * plane, this->tile(from) + run_[i].lane);
      }
      return;
    }
    for (int i = 0; i < count_; ++i) {
      const Run& run = run_[i];
      const T* tile = this->tile(from) + run.lane;
      int64_t y = run.y + k * plane;
      for (int64_t r = 0; r < run.out_rows; ++r, y += s_.q, tile += M * pitch_) {
        reg phase[M], v[M];
#pragma GCC unroll 4
        for (int j = 0; j < M; ++j) phase[j] = V::load_any(tile + j * pitch_);
        Phases<V, M>::join(phase, v);
#pragma GCC unroll 4
        for (int j = 0; j < M; ++j) {
          if (run.store[j]) finish(v[j], y + j * L, run.store[j]);
        }
      }
    }
  }

  // NHWC: tile(0 .. L - 1), to the filters k + those of `mask`.
  void scatter_transposed(int64_t k, uint32_t mask) const {
    for (int r = 0; r < M; ++r) {
      for (int j = 0; j < M; ++j) {
        for (int v = 0; v < vectors_; ++v) {
          reg square[L];
          const T* const tile = tile_ + (r * M + j) * pitch_ + v * L;
          for (int f = 0; f < L; ++f) square[f] = V::load(tile + f * (kA * kA * pitch_));
          V::transpose(square);
          for (int l = 0; l < L && v * L + l < count_; ++l) {
            const Run& run = run_[v * L + l];
            if (r >= run.out_rows || j >= run.out_cols) continue;
            finish(square[l], run.y + (r * s_.q + j) * s_.k + k, mask);
          }
        }
      }
    }
  }

 private:
  void place_run(Run& run, int64_t image, int64_t ty, int64_t tx, int64_t tiles, int lane) const {
    const int64_t p = ty * M, q = tx * M;
    run.row = p - s_.pad_top;
    run.col = q - s_.pad_left;
    const int64_t x = run.row * s_.w + run.col, y = p * s_.q + q;
    run.x = nhwc_ ? (image * s_.h * s_.w + x) * s_.c : image * s_.c * s_.h * s_.w + x;
    run.y = nhwc_ ? (image * s_.p * s_.q + y) * s_.k : image * s_.k * s_.p * s_.q + y;
    run.out_rows = s_.p - p < M ? s_.p - p : M;
    run.out_cols = s_.q - q < tiles * M ? s_.q - q : tiles * M;
    run.lane = lane;
    const int64_t last = (tiles - 1) * M + kA, right = run.col + last;
    for (int j = 0; j < M; ++j) {
      const int64_t column = run.col + j * L, end = right < s_.w ? right : s_.w;
      run.first[j] = range_mask<L>(column, 0, end);
      run.two[j] = range_mask<L>(column + M, 0, end);
      run.store[j] = range_mask<L>(j * L, 0, run.out_cols);
    }
  }

  // A row of the image for all pixels of a row of the tiles; null: zeros.
  SPARSECNN_INLINE void gather_row(const Run& run, const S* x, T* out) const {
    reg v[M], phase[M], two[2];
    if (x == nullptr) {
#pragma GCC unroll 6
      for (int j = 0; j < kA; ++j) V::store_any(out + j * pitch_, V::zero());
      return;
    }
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) v[j] = columns(x + j * L, run.first[j]);
    Phases<V, M>::split(v, phase);
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) V::store_any(out + j * pitch_, phase[j]);
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) v[j] = columns(x + M + j * L, run.two[j]);
    Phases<V, M>::split_two(v, two);
    V::store_any(out + M * pitch_, two[0]);
    V::store_any(out + (M + 1) * pitch_, two[1]);
  }

  // All rows of up to M runs of L / M tiles.
  void gather_rows(int first, int64_t channel, T* out) const {
    const int runs = count_ - first < M ? count_ - first : M;
    const int64_t rows = s_.w > 0 ? s_.h : 0;
    for (int r = 0; r < kA; ++r, out += kA * pitch_) {
      reg v[M], phase[M], more[M], two[2];
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        const Run& run = run_[first + (j < runs ? j : 0)];
        const bool inside = j < runs && run.row + r >= 0 && run.row + r < rows;
        const S* const x = inside ? x_ + (run.x + channel + r * s_.w) : nullptr;
        v[j] = inside ? columns(x, run.first[0]) : V::zero();
        more[j] = inside ? columns(x + M, run.two[0]) : V::zero();
      }
      Phases<V, M>::split(v, phase);
      Phases<V, M>::split_two(more, two);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) V::store(out + j * pitch_, phase[j]);
      V::store(out + M * pitch_, two[0]);
      V::store(out + (M + 1) * pitch_, two[1]);
    }
  }

  void scatter_rows(int first, int64_t filter, const T* tile) const {
    const int runs = count_ - first < M ? count_ - first : M;
    for (int r = 0; r < M; ++r, tile += M * pitch_) {
      reg phase[M], v[M];
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) phase[j] = V::load(tile + j * pitch_);
      Phases<V, M>::join(phase, v);
#pragma GCC unroll 4
      for (int j = 0; j < M; ++j) {
        const Run& run = run_[first + (j < runs ? j : 0)];
        if (j < runs && r < run.out_rows) {
          finish(v[j], run.y + filter + r * s_.q, run.store[0]);
        }
      }
    }
  }

  static SPARSECNN_INLINE reg columns(const S* x, uint32_t mask) {
    return mask ? load_some<V>(x, mask) : V::zero();
  }

  SPARSECNN_INLINE void finish(reg v, int64_t offset, uint32_t mask) const {
    if (finish_.residual) v = V::add(v, load_some<V>(finish_.residual + offset, mask));
    store_some<V>(finish_.y + offset, activate<V>(v, finish_.activation), mask);
  }
};

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
