// The edges of chain_conv2d: pixels of x brought into a ring, outputs transposed to NCHW, weights
// brought into the order of the register tile. Included by chain_conv2d-inl.h, whose header
// explains the plan.
//
// All three are copies where memory runs along channels and transposes of L x L blocks where it
// does not: 64 shuffles for 256 elements with AVX-512, against K or P * Q / 16 FMAs for each of
// these elements.
#pragma once
#include "cpu/kernels/dense_tile-inl.h"

namespace sparsecnn {
namespace SPARSECNN_ISA {

// Rows of an image without padding, as a source of pixels.
template <class S>
struct ImageRows {
  const S* x;
  int64_t channels;
  int64_t channel, pixel;  // elements between channels, pixels
};

// `count` pixels from `source` to `to`, a pixel there being whole vectors at `pitch`; lanes beyond
// the channels become zero.
template <class V, class S>
SPARSECNN_INLINE void read_pixels(const ImageRows<S>& source, int64_t first, int64_t count,
                                  typename V::T* to, int64_t pitch) {
  constexpr int L = V::L;
  const S* const x = source.x + first * source.pixel;
  if (source.channel == 1) {
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t c = 0; c < source.channels; c += L) {
        const uint32_t mask = range_mask<L>(c, 0, source.channels);
        V::store(to + p * pitch + c, load_some<V>(x + p * source.pixel + c, mask));
      }
    }
    return;
  }
  for (int64_t c = 0; c < source.channels; c += L) {
    for (int64_t p = 0; p < count; p += L) {
      const S* const block = x + c * source.channel + p * source.pixel;
      const int64_t pixels = count - p < L ? count - p : L;
      typename V::reg r[L];
      if (source.pixel == 1) {
        const uint32_t mask = range_mask<L>(0, 0, pixels);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          r[i] =
              c + i < source.channels ? V::load_mask(block + i * source.channel, mask) : V::zero();
        }
      } else {
        alignas(64) typename V::T row[L] = {};
        for (int i = 0; i < L; ++i) {
          for (int64_t j = 0; j < pixels; ++j) {
            row[j] = c + i < source.channels ? to_acc(block[i * source.channel + j * source.pixel])
                                             : typename V::T(0);
          }
          r[i] = V::load(row);
        }
      }
      V::transpose(r);
      typename V::T* const out = to + p * pitch + c;
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) {
        if (j < pixels) V::store(out + j * pitch, r[j]);
      }
    }
  }
}

// Sums of `count` neighbouring pixels, `pitch` apart, to the planes of an NCHW output.
template <class V, class S>
SPARSECNN_INLINE void write_planes(const typename V::T* from, int64_t pitch, int64_t count,
                                   int64_t channels, int64_t plane, const Finish<V, S>& finish) {
  constexpr int L = V::L;
  for (int64_t c = 0; c < channels; c += L) {
    for (int64_t p = 0; p < count; p += L) {
      const int64_t pixels = count - p < L ? count - p : L;
      typename V::reg r[L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) {
        r[j] = j < pixels ? V::load(from + (p + j) * pitch + c) : V::zero();
      }
      V::transpose(r);
      const uint32_t mask = range_mask<L>(0, 0, pixels);
      alignas(64) typename V::T lines[L * L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) V::store(lines + i * L, r[i]);
      const int64_t rows = channels - c < L ? channels - c : L;
      for (int64_t i = 0; i < rows; ++i) {
        finish(V::load(lines + i * L), (c + i) * plane + p, mask);
      }
    }
  }
}

// Weights of `filters` output channels from k0 on, as rows (r, s, c) of `width` channels, zeros
// behind the last one.
template <class V, class S>
SPARSECNN_INLINE void pack_weight(const ChainStage& stage, int64_t k0, int64_t filters,
                                  int64_t width, typename V::T* to) {
  constexpr int L = V::L;
  using T = typename V::T;
  const ConvShape& s = stage.shape;
  const int64_t channels = s.groups > 1 ? 1 : s.c;
  const int64_t* const t = stage.weight_stride;
  const S* const w = static_cast<const S*>(stage.weight) + k0 * t[0];
  if (t[0] == 1) {
    for (int64_t r = 0; r < s.r; ++r) {
      for (int64_t q = 0; q < s.s; ++q) {
        for (int64_t c = 0; c < channels; ++c, to += width) {
          const S* const row = w + r * t[2] + q * t[3] + c * t[1];
          for (int64_t k = 0; k < width; k += L) {
            V::store(to + k, load_some<V>(row + k, range_mask<L>(k, 0, filters)));
          }
        }
      }
    }
    return;
  }
  // The inner loop runs over what is contiguous in a filter: its channels, or all of it.
  const int64_t taps = s.r * s.s, columns = channels * taps;
  const bool by_channel =
      t[1] == 1 && (s.s == 1 || t[3] == channels) && (s.r == 1 || t[2] == s.s * channels);
  const bool by_tap =
      (s.s == 1 || t[3] == 1) && (s.r == 1 || t[2] == s.s) && (channels == 1 || t[1] == taps);
  for (int64_t k = 0; k < width; k += L) {
    const int64_t rows = filters - k < L ? filters - k : L;
    for (int64_t f = 0; f < columns; f += L) {
      const int64_t count = columns - f < L ? columns - f : L;
      typename V::reg block[L];
      if (by_channel || by_tap) {
        const uint32_t mask = range_mask<L>(0, 0, count);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          block[i] = i < rows ? V::load_mask(w + (k + i) * t[0] + f, mask) : V::zero();
        }
      } else {
        alignas(64) T line[L] = {};
        for (int i = 0; i < L; ++i) {
          for (int64_t j = 0; j < count; ++j) {
            const int64_t c = (f + j) / taps, tap = (f + j) % taps;
            line[j] =
                i < rows
                    ? to_acc(w[(k + i) * t[0] + c * t[1] + tap / s.s * t[2] + tap % s.s * t[3]])
                    : T(0);
          }
          block[i] = V::load(line);
        }
      }
      V::transpose(block);
      alignas(64) T lines[L * L];
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) V::store(lines + j * L, block[j]);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t row = by_channel ? f + j : (f + j) % taps * channels + (f + j) / taps;
        V::store(to + row * width + k, V::load(lines + j * L));
      }
    }
  }
}

}  // namespace SPARSECNN_ISA
}  // namespace sparsecnn
