// Bitmask of a flat weight: bit i (least significant bit of a byte first) says that entry i is
// stored. Python-free, so that the loops run without the interpreter lock.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsecnn::codec {

// Bytes of a mask of `count` bits.
constexpr std::size_t bitmask_bytes(std::size_t count) { return count / 8 + (count % 8 != 0); }

// mask[count], any nonzero byte is a one -> bits[bitmask_bytes(count)], padding bits are zero.
void bitmask_pack(const std::uint8_t* mask, std::size_t count, std::uint8_t* bits);

// bits[bitmask_bytes(count)] -> mask[count] of 0 and 1. False, if a padding bit is set: such a mask
// was made for another count.
bool bitmask_unpack(const std::uint8_t* bits, std::size_t count, std::uint8_t* mask);

}  // namespace sparsecnn::codec
