// Relative (gap) index of Deep Compression (Han, Mao, Dally, ICLR 2016) with b-bit gaps.
//
// Rule: the gap of an entry is the number of zeros skipped before it, 0 .. 2^b - 1. A run of z
// zeros before an entry emits floor(z / 2^b) fillers, each of which eats 2^b positions, then the
// entry with gap z mod 2^b. Zeros after the last entry emit nothing.
//
// A filler is, as in the paper, an entry with gap 2^b - 1 at a position whose weight is zero. The
// paper tells it from a real entry by the zero in the value array; here values are stored for real
// entries only, so every gap of 2^b - 1 is followed by one flag bit: 1 filler, 0 entry. A flag
// costs one bit where a stored zero would cost a whole value.
//
// Stream: for each entry or filler b bits of gap (+ 1 flag), least significant bit first, bytes in
// order, the last byte padded with zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsecnn::codec {

constexpr int kMaxIndexBits = 8;
// Positions a stream may cover: bounds every allocation (at most 2 bits per position, for b = 1).
constexpr std::int64_t kMaxPositions = std::int64_t{1} << 33;

struct GapCost {
  std::int64_t fillers = 0;
  std::int64_t flags = 0;  // gaps of 2^b - 1, fillers included
};

// Index of the first position that is negative, >= total or not above its predecessor; else -1.
std::int64_t find_bad_position(const std::int64_t* positions, std::size_t count,
                               std::int64_t total);

// Cost for every width, cost[b - 1]; one pass over positions already checked.
void gap_costs(const std::int64_t* positions, std::size_t count, GapCost cost[kMaxIndexBits]);

// Bits of a stream of `count` real entries.
inline std::int64_t stream_bits(std::size_t count, int bits, const GapCost& cost) {
  return (static_cast<std::int64_t>(count) + cost.fillers) * bits + cost.flags;
}

// Positions already checked -> stream of ceil(stream_bits / 8) bytes.
void encode_gaps(const std::int64_t* positions, std::size_t count, int bits, std::uint8_t* stream);

enum class DecodeError {
  kNone,
  kTruncated,     // the stream ends before `symbols` were read
  kOutOfRange,    // an entry or filler lies at or behind `total`
  kTrailingData,  // bytes or nonzero padding behind the last symbol
  kLastIsFiller,  // zeros at the end emit nothing, so no encoder wrote this
};

// Reads `symbols` entries and fillers. positions == nullptr only checks and counts.
DecodeError decode_gaps(const std::uint8_t* stream, std::size_t bytes, int bits,
                        std::int64_t symbols, std::int64_t total, std::int64_t* positions,
                        std::int64_t* count);

}  // namespace sparsecnn::codec
