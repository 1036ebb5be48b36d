#include "codec/relative_index.h"

namespace sparsecnn::codec {
namespace {

// At most 9 bits are added at a time, so flushing whole bytes keeps `held` below 16.
class BitWriter {
 public:
  explicit BitWriter(std::uint8_t* out) : out_(out) {}

  void put(std::uint32_t value, int width) {
    buffer_ |= static_cast<std::uint64_t>(value) << held_;
    held_ += width;
    while (held_ >= 8) {
      *out_++ = static_cast<std::uint8_t>(buffer_);
      buffer_ >>= 8;
      held_ -= 8;
    }
  }

  void finish() {
    if (held_ > 0) *out_ = static_cast<std::uint8_t>(buffer_);
  }

 private:
  std::uint8_t* out_;
  std::uint64_t buffer_ = 0;
  int held_ = 0;
};

}  // namespace

std::int64_t find_bad_position(const std::int64_t* positions, std::size_t count,
                               std::int64_t total) {
  std::int64_t previous = -1;
  for (std::size_t i = 0; i < count; ++i) {
    if (positions[i] <= previous || positions[i] >= total) return static_cast<std::int64_t>(i);
    previous = positions[i];
  }
  return -1;
}

void gap_costs(const std::int64_t* positions, std::size_t count, GapCost cost[kMaxIndexBits]) {
  std::int64_t next = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t zeros = positions[i] - next;
    next = positions[i] + 1;
    for (int b = 1; b <= kMaxIndexBits; ++b) {
      const std::int64_t fillers = zeros >> b;
      const std::int64_t mask = (std::int64_t{1} << b) - 1;
      cost[b - 1].fillers += fillers;
      cost[b - 1].flags += fillers + ((zeros & mask) == mask);
    }
  }
}

void encode_gaps(const std::int64_t* positions, std::size_t count, int bits, std::uint8_t* stream) {
  const std::uint32_t longest = (1u << bits) - 1;
  BitWriter writer(stream);
  std::int64_t next = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t zeros = positions[i] - next;
    next = positions[i] + 1;
    for (std::int64_t f = zeros >> bits; f > 0; --f) {
      writer.put(longest | (1u << bits), bits + 1);  // flag above the gap: read after it
    }
    const std::uint32_t gap = static_cast<std::uint32_t>(zeros) & longest;
    writer.put(gap, bits + (gap == longest ? 1 : 0));
  }
  writer.finish();
}

DecodeError decode_gaps(const std::uint8_t* stream, std::size_t bytes, int bits,
                        std::int64_t symbols, std::int64_t total, std::int64_t* positions,
                        std::int64_t* count) {
  const std::uint32_t longest = (1u << bits) - 1;
  std::uint64_t buffer = 0;
  int held = 0;
  std::size_t at = 0;
  std::int64_t next = 0, found = 0;
  bool filler = false;
  for (std::int64_t s = 0; s < symbols; ++s) {
    while (held <= bits && at < bytes) {
      buffer |= static_cast<std::uint64_t>(stream[at++]) << held;
      held += 8;
    }
    if (held < bits) return DecodeError::kTruncated;
    const std::uint32_t gap = static_cast<std::uint32_t>(buffer) & longest;
    buffer >>= bits;
    held -= bits;
    filler = false;
    if (gap == longest) {
      if (held < 1) return DecodeError::kTruncated;
      filler = (buffer & 1) != 0;
      buffer >>= 1;
      held -= 1;
    }
    next += gap;  // below total + 2^8, far from overflow
    if (next >= total) return DecodeError::kOutOfRange;
    if (!filler) {
      if (positions != nullptr) positions[found] = next;
      ++found;
    }
    ++next;
  }
  if (filler) return DecodeError::kLastIsFiller;
  if (at != bytes || held >= 8 || buffer != 0) return DecodeError::kTrailingData;
  *count = found;
  return DecodeError::kNone;
}

}  // namespace sparsecnn::codec
