// What the teams of pattern_conv2d_mma.cu prepare on the device: the staged tile, the pieces that
// they work on, and the order of their columns.
#pragma once
#include "cuda/mma.cuh"
#include "cuda/pattern_conv2d_blocks.cuh"

namespace sparsecnn::cuda {

inline constexpr int kEight = 8;  // filters, channels: half types in 16 bytes

using Entries4 = Packed<int32_t, 4>;

// The columns of a chunk and piece: `full` octets of channels, then single columns from the next
// multiple of 16 on; `steps` products of 16 columns in all.
struct ListHeader {
  int32_t full, steps;
};

// The octets begin to end of a team that are its `piece`-th run of one filter group.
struct Piece {
  int begin, end;
};

template <int kOctets>
__device__ __forceinline__ Piece piece_of(const FilterSlot* slots, int piece) {
  Piece found{0, 0};
  int number = -1;
  for (int o = 0; o < kOctets && slots[o].rows > 0; ++o) {
    if (o == 0 || slots[o].group != slots[o - 1].group) ++number;
    if (number != piece) continue;
    if (found.end == 0) found.begin = o;
    found.end = o + 1;
  }
  return found;
}

// Copies one chunk of channels into a tile of [place][channel], zeros in the padding. `x` is the
// chunk's first channel of the image.
template <typename T, int kThreads>
__device__ __forceinline__ void stage_octets(const T* __restrict__ x, const StagedPixel* pixels,
                                             T* tile, const PatternPlan& t, int channels) {
  const auto stage = [&](int pixel, int octet) {
    const StagedPixel from = pixels[pixel];
    T* to = tile + from.place * t.pixel_pitch + octet * kEight;
    const bool inside = from.at >= 0;
    const T* first = x + (inside ? from.at + octet * kEight * t.x_c : 0);
    if (t.input_vectors) {
      copy_async<16>(to, first, inside);
      return;
    }
    const int left = inside ? channels - octet * kEight : 0;
    Vector<T> all;
#pragma unroll
    for (int v = 0; v < kEight; ++v) all.v[v] = v < left ? first[v * t.x_c] : from_float<T>(0.f);
    *reinterpret_cast<Vector<T>*>(to) = all;
  };
  const int octets = (channels + kEight - 1) / kEight;
  if (t.channels_last) {  // lanes along the channels
    int lanes = 1;
    while (lanes < octets) lanes *= 2;
    const int octet = threadIdx.x & (lanes - 1);
    if (octet >= octets) return;
    for (int i = threadIdx.x / lanes; i < t.area; i += kThreads / lanes) stage(i, octet);
    return;
  }
  for (int octet = 0; octet < octets; ++octet)
    for (int i = threadIdx.x; i < t.area; i += kThreads) stage(i, octet);
}

// Turns the inverse map into a list, by one warp, and clears the map. Item (tap, octet) of the map
// holds for each of 8 channels the number of its column in the filter group, -1 where none is kept.
// Of single columns the m-th of channel pair r goes to load m of lane r, as long as there are loads
// (a quarter of the columns); the others fill the gaps of the pairs that have fewer. `source` is in
// the order of the products' k, `offset` in bytes; of single columns lane by lane: four of lane 0,
// four of lane 1, ... of each step. Returns the number of columns.
__device__ __forceinline__ int list_columns(const PatternPlan& t, int32_t* map, int32_t* source,
                                            int32_t* offset, ListHeader* header) {
  const int lane = threadIdx.x % kWarpLanes;
  const int octets = t.chunk / kEight, items = octets * t.taps;
  const auto look = [&](int item, int32_t* entry, uint64_t* pairs) {  // whether all are kept
    Entries4 half[2] = {{-1, -1, -1, -1}, {-1, -1, -1, -1}};
    if (item < items) {
      const Entries4* from = reinterpret_cast<const Entries4*>(map + item * kEight);
      half[0] = from[0], half[1] = from[1];
    }
    int kept = 0;
    *pairs = 0;  // kept channels of each pair, 16 bits each
#pragma unroll
    for (int v = 0; v < kEight; ++v) {
      entry[v] = half[v / 4].v[v % 4];
      kept += entry[v] >= 0;
      *pairs += static_cast<uint64_t>(entry[v] >= 0) << (16 * (v / 2));
    }
    if (kept == kEight) *pairs = 0;
    return kept == kEight;
  };
  int32_t entry[kEight];
  uint64_t pairs, total = 0;
  int full = 0;
  for (int first = 0; first < items; first += kWarpLanes) {
    full += __popc(__ballot_sync(kFullWarp, look(first + lane, entry, &pairs)));
    total += pairs;
  }
  for (int d = 1; d < kWarpLanes; d *= 2) total += __shfl_xor_sync(kFullWarp, total, d);
  const auto count = [&](int pair) { return static_cast<int>(total >> (16 * pair) & 0xffff); };
  const int singles = count(0) + count(1) + count(2) + count(3);
  const int loads = (singles + 3) / 4, base = (full + 1) / 2 * 16;
  const int steps = (full + 1) / 2 + (loads + 3) / 4;

  // Everything that may stay empty: the second half of the last full step, gaps of the singles.
  for (int i = full * kEight + lane; i < steps * 16; i += kWarpLanes)
    source[i] = -1, offset[i] = i < base ? 0 : -1;
  __syncwarp();
  int full_before = 0;
  uint64_t before = 0;
  for (int first = 0; first < items; first += kWarpLanes) {
    const int item = first + lane, tap = item / octets, octet = item - tap * octets;
    const bool whole = look(item, entry, &pairs);
    const unsigned wholes = __ballot_sync(kFullWarp, whole);
    uint64_t rank = pairs;
    for (int d = 1; d < kWarpLanes; d *= 2) {
      const uint64_t other = __shfl_sync(kFullWarp, rank, lane - d);
      if (lane >= d) rank += other;
    }
    const uint64_t end = before + __shfl_sync(kFullWarp, rank, kWarpLanes - 1);
    rank += before - pairs;
    before = end;
    const int number = full_before + __popc(wholes & ((1u << lane) - 1));
    full_before += __popc(wholes);
    if (item >= items) continue;
    const int bytes = 2 * (tap_places(t, tap) * t.pixel_pitch + octet * kEight);
#pragma unroll
    for (int v = 0; v < kEight; ++v) {
      if (entry[v] < 0) continue;
      map[item * kEight + v] = -1;
      if (whole) {
        source[number * kEight + v] = entry[v];
        if (v == 0) offset[number * kEight] = bytes;
        continue;
      }
      int lane_of = v / 2, load = static_cast<int>(rank >> (16 * lane_of) & 0xffff);
      rank += uint64_t{1} << (16 * lane_of);
      if (load >= loads) {  // the how manieth of those without a load, and its gap
        int extra = load - loads;
        for (int r = 0; r < lane_of; ++r) extra += count(r) > loads ? count(r) - loads : 0;
        for (lane_of = 0; lane_of < 3; ++lane_of) {
          const int gaps = count(lane_of) < loads ? loads - count(lane_of) : 0;
          if (extra < gaps) break;
          extra -= gaps;
        }
        load = count(lane_of) + extra;
      }
      const int step = base + load / 4 * 16, j = load % 4;
      source[step + 2 * lane_of + j % 2 + j / 2 * 8] = entry[v];
      offset[step + lane_of * 4 + j] = bytes + 2 * v;
    }
  }
  if (lane == 0) *header = {full, steps};
  return full * kEight + singles;
}

}  // namespace sparsecnn::cuda
