// Geometry of the 2:4 convolution: what it takes, how its packed weight lies in memory, and which
// tile a launch uses. Plain host code, shared by the launchers.
//
// The packed weight is cut into blocks of 64 filters, each block into steps. A step is one tap
// (r, s) of 64 neighbouring channels; steps go chunk of channels by chunk, the taps of a chunk one
// after the other. One step of a block is 4608 bytes, in the order in which a warp wants them:
//   1. values: of 4 tiles of 16 filters, of 2 slices of 32 channels, lane by lane the four
//      registers of operand A (mma.cuh), 16 stored columns for 32 channels: 4 x 2 x 32 x 16 bytes;
//   2. places: lane by lane one word of metadata for each of the 4 tiles. Lanes with t = 0 and 1
//      hold those of the first slice, t = 2 and 3 of the second: 32 x 4 x 4 bytes.
#pragma once
#include "cuda/launch.cuh"

namespace sparsecnn::cuda::two_four {

using Words = Packed<uint32_t, 4>;  // of the packed weight

inline constexpr int kSlice = 32;  // channels of one mma.sp
inline constexpr int kChunk = 64;  // channels of a step: 128 bytes of a pixel
inline constexpr int kBlockFilters = 64;
inline constexpr int kValueBytes = 4096;
inline constexpr int kBlockBytes = kValueBytes + 512;  // of one block and step
// One filter, dense, of as many chunks as fit is packed at a time.
inline constexpr int kRowElements = static_cast<int>(kDefaultSmemBytes / 2) - 64;
inline constexpr int64_t kMostExtent = int64_t{1} << 30;  // of the coordinates kept in 32 bits

enum class TileKind : int32_t { kWide, kMiddle, kSmall };

struct Plan {
  int64_t pixels;         // N * P * Q
  int64_t filter_blocks;  // of kBlockFilters, the last one filled up with zeros
  int32_t taps, chunks, steps;
  int32_t first_half_step;  // from here on a step has one slice; `steps` if all have two
  int32_t pass_chunks;      // that the packing kernel takes at a time
  TileKind tile;
  int32_t parts;  // that the steps of a tile are split into; more than one leave partial sums
};

// Geometry alone, no tile yet.
inline Plan plan_steps(const ConvShape& s) {
  Plan plan{};
  plan.pixels = s.n * s.p * s.q;
  plan.filter_blocks = ceil_div(s.k, kBlockFilters);
  plan.taps = static_cast<int32_t>(s.r * s.s);
  plan.chunks = static_cast<int32_t>(ceil_div(s.c, kChunk));
  plan.steps = plan.chunks * plan.taps;
  plan.first_half_step = s.c % kChunk ? plan.steps - plan.taps : plan.steps;
  const int32_t fitting = kRowElements / kChunk / plan.taps;
  plan.pass_chunks = fitting < plan.chunks ? fitting : plan.chunks;
  return plan;
}

inline int64_t packed_bytes(const Plan& plan) {
  return plan.filter_blocks * plan.steps * kBlockBytes;
}

// Whether the kernel takes the problem; what it refuses is left to the general one. Fewer than 32
// filters would leave most of a tile empty.
inline bool applies(const PatternConv2dParams& prm) {
  const ConvShape& s = prm.shape;
  const bool half_floats = prm.dtype == DType::kFloat16 || prm.dtype == DType::kBFloat16;
  // Maps of one pixel are the same in both layouts.
  const bool nhwc = prm.layout == Layout::kNHWC || (s.h * s.w == 1 && s.p * s.q == 1);
  if (!half_floats || !nhwc || s.groups != 1) return false;
  if (s.c < kSlice || s.c % kSlice || s.k < 32 || s.k % 8) return false;
  if (!aligned(prm.x) || !aligned(prm.y) || !aligned(prm.residual)) return false;
  if (s.r > kRowElements || s.s > kRowElements || s.r * s.s > kRowElements / kChunk) return false;
  if (s.columns() >= kMostExtent || s.h >= kMostExtent || s.w >= kMostExtent) return false;
  // The packed weight is addressed by 32 bits.
  if (packed_bytes(plan_steps(s)) > UINT32_MAX) return false;
  const int64_t span_h = (s.r - 1) * s.dil_h, span_w = (s.s - 1) * s.dil_w;
  if (span_h >= kMostExtent || span_w >= kMostExtent) return false;
  // Pads that are not given are implied: the last pixel's window ends where the padded input does.
  return s.pad_top > -kMostExtent && s.pad_top < kMostExtent && s.pad_left > -kMostExtent &&
         s.pad_left < kMostExtent && (s.p - 1) * s.stride_h - s.pad_top < kMostExtent &&
         (s.q - 1) * s.stride_w - s.pad_left < kMostExtent;
}

// Fills `packed`, of packed_bytes; its content before does not matter.
cudaError_t pack(const PatternConv2dParams& prm, const Plan& plan, unsigned char* packed,
                 cudaStream_t stream);

// Ends a convolution whose plan has several parts; they lie one after the other in `partial`.
cudaError_t sum_parts(const PatternConv2dParams& prm, const Plan& plan, const float* partial,
                      cudaStream_t stream);

// What a block computes: kWarpRows x kWarpColumns warps of kM x kN products of 16 filters and 8
// pixels each.
template <int kRows_, int kColumns_, int kM_, int kN_, int kBlocksPerSm_>
struct Tile {
  static constexpr int kWarpRows = kRows_, kWarpColumns = kColumns_, kM = kM_, kN = kN_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = kWarpRows * kWarpColumns * kWarpLanes;
  static constexpr int kFilters = kWarpRows * kM * 16, kPixels = kWarpColumns * kN * 8;
  static constexpr int kFilterBlocks = kFilters / kBlockFilters;
  static constexpr int kStages = 3;
  static constexpr int kStageBytes = kFilterBlocks * kBlockBytes + kPixels * kChunk * 2;
  static constexpr int kPixelBytes = 16;  // of the table of pixels behind the stages
  static constexpr int kSmemBytes = kStages * kStageBytes + kPixels * kPixelBytes;
  // Bytes through shared memory of one slice: each warp reads its operands, each is written once.
  static constexpr int kWork =
      kWarpRows * kWarpColumns * (kM * 16 * 36 + kN * 8 * 64) + kFilters * 36 + kPixels * 64;
};
struct Wide : Tile<4, 2, 4, 8, 1> {};    // 256 filters x 128 pixels
struct Middle : Tile<2, 2, 4, 8, 2> {};  // 128 x 128
struct Small : Tile<2, 2, 2, 4, 4> {};   // 64 x 64

// Time in units of bytes through the shared memory of one SM, the resource that bounds all tiles.
inline constexpr double kSumTime = 300e3;  // one more launch, some 1.3 us at 128 bytes a cycle
inline constexpr double kL2Time = 5;       // of a byte from or to L2, at some 25 bytes a cycle
inline constexpr int32_t kLeastSteps = 4;  // of a part: fewer do not fill the stages

// Takes a tile into the plan if with it the busiest SM is done earlier than `least`: as it is, or
// with the steps split so far that every SM has a part.
template <class Tile>
inline void consider(TileKind kind, const ConvShape& s, const DeviceLimits& limits, Plan* plan,
                     double* least) {
  if (Tile::kSmemBytes > limits.smem_optin_bytes) return;
  const int64_t tiles = ceil_div(s.k, Tile::kFilters) * ceil_div(plan->pixels, Tile::kPixels);
  const auto consider_parts = [&](int64_t parts) {
    const double rounds = static_cast<double>(ceil_div(tiles * parts, limits.sm_count));
    double time = rounds * static_cast<double>(ceil_div(plan->steps, parts)) *
                  (kChunk / kSlice * Tile::kWork);
    if (parts > 1)  // every part is written and read
      time += kSumTime + kL2Time * 8 * static_cast<double>(parts * plan->pixels) *
                             static_cast<double>(s.k) / limits.sm_count;
    if (time >= *least) return;
    *least = time;
    plan->tile = kind;
    plan->parts = static_cast<int32_t>(parts);
  };
  consider_parts(1);
  const int64_t for_all = limits.sm_count / (tiles > 0 ? tiles : 1);
  const int64_t most = plan->steps / kLeastSteps;
  const int64_t parts = for_all < most ? for_all : most;
  if (parts > 1) consider_parts(parts);
}

inline cudaError_t make_plan(const ConvShape& s, Plan* plan) {
  *plan = plan_steps(s);
  DeviceLimits limits;
  const cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  double least = 1e300;  // on a tie the larger tile
  consider<Wide>(TileKind::kWide, s, limits, plan, &least);
  consider<Middle>(TileKind::kMiddle, s, limits, plan, &least);
  consider<Small>(TileKind::kSmall, s, limits, plan, &least);
  return plan->parts > 0 ? cudaSuccess : cudaErrorInvalidValue;
}

// The packed weight, then the partial sums.
inline int64_t workspace_bytes(const ConvShape& s, const Plan& plan) {
  const int64_t partial = plan.parts > 1 ? 4 * plan.parts * plan.pixels * s.k : 0;
  return packed_bytes(plan) + partial;
}

}  // namespace sparsecnn::cuda::two_four
